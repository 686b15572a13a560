"""The mra-export command: what it prints, writes and returns, and that an error leaves nothing behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from exported import checkpoint
from processes import started

from mra_export import __version__
from mra_export.bundle import MODEL, Bundle, file_entry
from mra_export.cli import main

COMMANDS = ("export", "verify", "bench", "run", "triton", "inspect", "doctor", "init")


def call(*arguments: object, **options) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **options)


def spawn(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from mra_export.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(result: Result, code: int, message: str) -> None:
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in result.output


@pytest.fixture
def copied(bundles, tmp_path) -> Path:
    shutil.copytree(bundles("fp32"), tmp_path / "bundle")
    return tmp_path / "bundle"


# The command itself


def test_help_is_quick_and_complete() -> None:
    started = time.perf_counter()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = spawn("--help")
        times.append(time.perf_counter() - started)
    assert done.returncode == 0
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout
    code = "import sys, mra_export.cli; print('\\n'.join(sys.modules))"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "onnx", "onnxruntime", "transformers", "numpy", "rich", "pydantic"} & set(imported)
    assert min(times) < 1.0, "0.1 s on a machine with nothing else to do"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_examples(name) -> None:
    result = call(name, "--help")
    assert result.exit_code == 0
    assert f"mra-export {name} " in result.output
    assert "Example" in result.output


def test_version() -> None:
    assert call("--version").output.strip() == f"mra-export, version {__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["dance"],
        ["verify"],
        ["verify", "bundle", "--backend", "jax"],
        ["verify", "bundle", "--seeds", "0"],
        ["export", "model"],
        ["export", "model", "out", "--dtype", "int4"],
        ["export", "model", "out", "--task", "poetry"],
        ["init", "huge", "out"],
        ["init", "tiny", "out", "--seed", "-1"],
        ["run", "bundle"],
        ["run", "bundle", "--text", "a", "--npz", __file__],
        ["run", "bundle", "--question", "a"],
        ["run", "bundle", "--choice", "a", "--choice", "b"],
        ["run", "bundle", "--text", "a", "--out", "outputs.npz"],
        ["run", "bundle", "--npz", "nowhere.npz"],
        ["doctor", "-v", "-q"],
    ],
)
def test_wrong_usage_is_2(arguments) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


@pytest.mark.parametrize("option", ["--json", "--junit"])
@pytest.mark.parametrize(("path", "message"), [("nowhere/f", "does not exist"), (".", "is a folder")])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(bundles, option, path, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("verify", bundles("fp32"), option, path)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "loading" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unexpected_error_is_1_and_debug_shows_where(monkeypatch) -> None:
    import mra_export.doctor

    monkeypatch.setattr(mra_export.doctor, "examine", lambda: 1 / 0)
    result = call("doctor")
    assert result.exit_code == 1
    assert "error: ZeroDivisionError: division by zero" in result.stderr
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr
    result = call("doctor", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_interrupt_is_130(monkeypatch) -> None:
    import mra_export.doctor

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mra_export.doctor, "examine", interrupt)
    result = call("doctor")
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted"


# init, export


def test_init_writes_a_checkpoint_that_the_seed_decides(tmp_path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = call("init", "tiny", tmp_path / name, "--seed", seed)
        assert result.exit_code == 0, result.output
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    refused(call("init", "tiny", tmp_path / "a"), 4, "already exists")


def test_export_checks_publishes_and_records_what_it_found(tmp_path) -> None:
    source = checkpoint(tmp_path / "checkpoint")
    result = call("export", source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "distance from PyTorch" in result.stdout
    for name in ("torch", "onnxruntime", "onnxruntime-function", "onnx-reference"):
        assert f"│ {name} " in result.stdout
    assert "ready for mra-export run" in result.stdout
    rows = Bundle.load(tmp_path / "out").manifest.parity
    assert {row["check"] for row in rows} == {"golden", "outputs", "selection", "operator", "canary"}
    assert {row["status"] for row in rows} == {"pass", "skip"}
    refused(call("export", source, tmp_path / "out"), 4, "pass --force to overwrite it")
    again = call("export", source, tmp_path / "out", "--force", "--no-verify", "-q")
    assert again.exit_code == 0
    assert again.stderr == ""
    assert Bundle.load(tmp_path / "out").manifest.parity is None
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "out"}


def test_an_export_whose_runtimes_differ_is_not_published(tmp_path, monkeypatch) -> None:
    from mra_export import subjects

    original = subjects._OnnxRuntime.run
    monkeypatch.setattr(subjects._OnnxRuntime, "run", lambda self, inputs: {n: v + 1 for n, v in original(self, inputs).items()})
    result = call("export", checkpoint(tmp_path / "checkpoint"), tmp_path / "out")
    refused(result, 3, "onnxruntime differs from PyTorch in outputs")
    assert "fail" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--opset", "12"], 2, "opset is 12"),
        (["--task", "question-answering"], 2, "question-answering"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing(tmp_path, options, code, message) -> None:
    refused(call("export", checkpoint(tmp_path / "checkpoint"), tmp_path / "out", *options), code, message)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_what_is_no_checkpoint_is_refused(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    refused(call("export", tmp_path / "empty", tmp_path / "out"), 2, "config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("ignored", "sent", "code", "said"),
    [
        ([], [signal.SIGINT], 130, "interrupted"),
        ([], [signal.SIGTERM], 143, "terminated"),
        # A job in the background: a Ctrl-C for another is not its own.
        ([signal.SIGINT], [signal.SIGINT, signal.SIGTERM], 143, "terminated"),
    ],
)
def test_an_export_that_is_stopped_leaves_nothing(ignored, sent, code, said, tmp_path) -> None:
    source = checkpoint(tmp_path / "checkpoint")
    command = [sys.executable, "-c", "from mra_export.cli import main; main()", "export", source, tmp_path / "out"]
    with started(command, ignored, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=tmp_path) as process:
        for line in process.stderr:
            if "export fill-mask" in line:
                break
        for number in sent:
            process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(60) == code
    assert said in rest
    assert "Traceback" not in rest
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


# verify


def test_verify_writes_json_and_junit(bundles, tmp_path) -> None:
    result = call(
        "verify", bundles("fp32"), "--quick", "--backend", "torch", "--backend", "onnxruntime",
        "--json", tmp_path / "p.json", "--junit", tmp_path / "p.xml",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "p.json").read_text())
    assert written["passed"] is True
    assert {row["backend"] for row in written["rows"]} == {"torch", "onnxruntime"}
    assert ElementTree.parse(tmp_path / "p.xml").getroot().tag == "testsuites"
    assert {path.name for path in tmp_path.iterdir()} == {"p.json", "p.xml"}


def test_verify_of_a_graph_that_ignores_attention_is_3_and_still_writes_the_report(copied, tmp_path) -> None:
    graph = onnx.load(copied / MODEL)
    for node in graph.graph.node:
        if node.op_type == "MraAttention":
            value = node.input[2]
            del node.input[:], node.attribute[:]
            node.input.append(value)
            node.op_type, node.domain = "Identity", ""
    onnx.save(graph, copied / MODEL)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"][MODEL] = file_entry(copied / MODEL).model_dump()
    (copied / "manifest.json").write_text(json.dumps(manifest))
    result = call("verify", copied, "--quick", "--backend", "onnxruntime", "--json", tmp_path / "p.json")
    refused(result, 3, "comparisons failed")
    assert "ignores attention" in result.stdout
    assert json.loads((tmp_path / "p.json").read_text())["passed"] is False


def test_verify_of_a_damaged_bundle_is_4_by_name(copied, tmp_path) -> None:
    content = (copied / MODEL).read_bytes()
    (copied / MODEL).write_bytes(content[:-7])
    refused(call("verify", copied, "--json", tmp_path / "p.json"), 4, "model.onnx is truncated")
    (copied / MODEL).write_bytes(content[:-1] + b"\0")
    refused(call("verify", copied, "--json", tmp_path / "p.json"), 4, "model.onnx is altered")
    refused(call("verify", tmp_path / "nothing"), 4, "is not a folder")
    assert not (tmp_path / "p.json").exists()


def test_verify_of_bfloat16_in_onnx_runtime_is_4_with_what_can_run_it(bundles) -> None:
    refused(call("verify", bundles("bf16"), "--backend", "onnxruntime"), 4, "backend 'torch'")


# run


def test_run_fills_masks(bundles) -> None:
    result = call("run", bundles("fp32"), "--text", "for i in <mask>", "--text", "a <mask> <mask>", "--json")
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout)
    assert [len(answer["masks"]) for answer in answers] == [1, 2]
    assert all(len(best) == 5 for answer in answers for best in answer["masks"])
    scores = [candidate["score"] for candidate in answers[0]["masks"][0]]
    assert scores == sorted(scores, reverse=True)
    assert 0 < sum(scores) <= 1
    shown = call("run", bundles("fp32"), "--text", "for i in <mask>")
    assert shown.exit_code == 0
    assert "for i in <mask>\n" in shown.stdout
    assert repr(answers[0]["masks"][0][0]["token"]) in shown.stdout
    assert "onnxruntime on cpu" in shown.stderr


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_run_answers_by_task(bundles, backend) -> None:
    def answers(kind, *arguments):
        result = call("run", bundles(kind), *arguments, "--backend", backend, "--json", "-q")
        assert result.exit_code == 0, result.output
        plain = call("run", bundles(kind), *arguments, "--backend", backend, "-q")
        assert plain.exit_code == 0
        assert plain.stdout.strip()
        assert plain.stderr == ""
        return json.loads(result.stdout)

    labels = answers("classes", "--text", "hello", "--text", "a longer text")
    assert [{entry["label"] for entry in answer["labels"]} for answer in labels] == [{"good", "bad", "ugly"}] * 2
    assert sum(entry["score"] for entry in labels[0]["labels"]) == pytest.approx(1)

    context = "Ada wrote the first program in 1843."
    answer = answers("answers", "--question", "Who?", "--context", context)
    assert answer["answer"] == context[answer["start"] : answer["end"]]
    assert answer["answer"]

    choice = answers("choices", "--text", "It rains, so", "--choice", "he is wet.", "--choice", "he is dry.")
    assert {entry["label"] for entry in choice["choices"]} == {"he is wet.", "he is dry."}

    tokens = answers("tokens", "--text", "Ada")[0]["tokens"]
    assert [token["token"] for token in tokens] == ["A", "d", "a"]
    assert {token["label"] for token in tokens} <= {"LABEL_0", "LABEL_1"}

    features = answers("features", "--text", "Ada")[0]["features"]
    assert np.shape(features) == (5, 64)


def test_run_on_arrays(bundles, tmp_path) -> None:
    ids = np.random.default_rng(0).integers(0, 261, (2, 40)).astype(np.int32)
    np.savez(tmp_path / "in.npz", input_ids=ids)
    result = call("run", bundles("fp16"), "--npz", tmp_path / "in.npz", "--out", tmp_path / "out.npz", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"logits": {"shape": [2, 40, 261], "dtype": "float16"}}
    with np.load(tmp_path / "out.npz") as outputs:
        assert outputs["logits"].shape == (2, 40, 261)
    assert {path.name for path in tmp_path.iterdir()} == {"in.npz", "out.npz"}


@pytest.mark.parametrize(
    ("kind", "arguments", "code", "message"),
    [
        ("fp32", ["--text", "no mask here"], 2, "has no <mask>: write it where a word is missing"),
        ("fp32", ["--text", "x" * 300 + "<mask>"], 2, "has 303 tokens, the model takes 256"),
        ("fp32", ["--question", "a", "--context", "b"], 2, "are for question-answering, this bundle's task is fill-mask"),
        ("fp32", ["--text", "a", "--choice", "b"], 2, "--choice is for multiple-choice"),
        ("answers", ["--text", "a"], 2, "pass --question and --context"),
        ("answers", ["--question", "a", "--context", ""], 2, "the context is empty"),
        ("choices", ["--text", "a", "--choice", "b"], 2, "pass two choices or more"),
        ("bf16", ["--text", "<mask>", "--backend", "onnxruntime"], 4, "no bfloat16 MatMul"),
        ("fp32", ["--npz", __file__], 2, "is not an npz file of arrays"),
    ],
)
def test_what_cannot_be_run_is_refused(bundles, kind, arguments, code, message) -> None:
    refused(call("run", bundles(kind), *arguments), code, message)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input_ids": np.zeros((1, 300), int)}, "max_position_embeddings is 256"),
        ({"input_ids": np.zeros((2, 8), int), "attention_mask": np.ones((2, 9), int)}, "attention_mask has shape (2, 9)"),
        ({"ids": np.zeros((1, 3), int)}, "ids is not an input of this model"),
    ],
)
def test_arrays_the_model_cannot_take_are_refused_and_leave_no_output(bundles, tmp_path, arrays, message) -> None:
    np.savez(tmp_path / "in.npz", **arrays)
    refused(call("run", bundles("fp32"), "--npz", tmp_path / "in.npz", "--out", tmp_path / "out.npz"), 2, message)
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]


def test_arrays_of_objects_are_refused_unread(bundles, tmp_path) -> None:
    np.savez(tmp_path / "in.npz", input_ids=np.array([[{"a": 1}]], dtype=object))
    refused(call("run", bundles("fp32"), "--npz", tmp_path / "in.npz"), 2, "is not an npz file of arrays")
    np.save(tmp_path / "one.npy", np.zeros((1, 3), int))
    refused(call("run", bundles("fp32"), "--npz", tmp_path / "one.npy"), 2, "no archive of named arrays")


def test_a_bundle_without_a_tokenizer_says_what_else_to_pass(copied) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
        del manifest["files"][name]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    refused(call("run", copied, "--text", "<mask>"), 4, "pass token ids with --npz")


# inspect


def test_inspect_shows_model_graph_ops_and_files(bundles) -> None:
    result = call("inspect", bundles("features"), "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["model"]["architecture"] == "MraModel"
    assert facts["graph"]["attention_nodes"] == facts["graph"]["ops"]["mra.MraAttention"] == 2
    assert facts["graph"]["functions"].keys() == {"mra.MraAttention"}
    assert facts["attributes"]["initial_prior_diagonal_n_blocks"] == 3
    assert facts["files"]["model.onnx"]["size"] == (bundles("features") / MODEL).stat().st_size
    assert facts["engines"] == []
    plain = call("inspect", bundles("features"))
    assert plain.exit_code == 0
    for text in ("MraModel", "mra.MraAttention", "model.onnx", "last_hidden_state float32 (batch, sequence, 64)"):
        assert text in plain.stdout


def test_results_go_to_stdout_and_nothing_else(bundles) -> None:
    done = spawn("run", bundles("fp16"), "--text", "a <mask>", "--json")
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    assert "\x1b" not in done.stdout + done.stderr, "no colours where there is no terminal"


def test_a_reader_that_goes_away_is_no_traceback(bundles) -> None:
    inspect = [sys.executable, "-c", "from mra_export.cli import main; main()", "inspect", str(bundles("fp32")), "--json"]
    command = f"{shlex.join(inspect)} | head -c 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert done.stdout == "{"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_bundle_for_servers_holds_no_second_copy_of_the_weights(tmp_path) -> None:
    """It was checked against PyTorch before the weights went, runs, and says what it cannot do."""
    bundle = tmp_path / "bundle"
    made = call("export", checkpoint(tmp_path / "checkpoint"), bundle, "--no-weights")
    assert made.exit_code == 0, made.output
    loaded = Bundle.load(bundle)
    assert {row["status"] for row in loaded.manifest.parity} <= {"pass", "skip"}
    assert "torch" in {row["backend"] for row in loaded.manifest.parity}
    assert not (bundle / "model.safetensors").exists()
    assert "model.safetensors" not in loaded.manifest.files
    answer = call("run", bundle, "--text", "A<mask>")
    assert answer.exit_code == 0, answer.output
    refused(call("verify", bundle, "--quick"), 4, "export it again without --no-weights")
    refused(call("run", bundle, "--backend", "torch", "--text", "A<mask>"), 4, "holds no model.safetensors")
