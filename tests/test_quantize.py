"""int8: what the graph becomes, what it keeps, what is refused, and that the answers stay as good."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from exported import checkpoint

pytest.importorskip("onnxruntime.quantization")

import onnxruntime as ort

from mra_export import accuracy, corpus
from mra_export.bundle import MODEL, OP_LIBRARY, Bundle
from mra_export.cli import main
from mra_export.errors import BackendError, ContractError, EngineError
from mra_export.export import export_bundle
from mra_export.runtime import MraRuntime
from mra_export.text import Tokenizer
from mra_export.verify import verify

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "docs"  # any text will do for random weights


def call(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def static(bundles) -> Path:
    return bundles("int8")


@pytest.fixture(scope="module")
def dynamic(bundles) -> Path:
    return bundles("int8-dynamic")


def optimized(bundle: Path, target: Path) -> dict[str, int]:
    """Nodes by type in the graph that ONNX Runtime really runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(target)
    options.register_custom_ops_library(str(bundle / OP_LIBRARY))
    ort.InferenceSession(str(bundle / MODEL), options, providers=["CPUExecutionProvider"])
    ops = [node.op_type for node in onnx.load(target, load_external_data=False).graph.node]
    return {name: ops.count(name) for name in ops}


# The graph


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic"])
def test_every_product_is_an_integer_one_and_all_else_is_kept(bundles, kind, tmp_path) -> None:
    path, plain = bundles(kind), bundles("fp32")
    graph, float_graph = onnx.load(path / MODEL), onnx.load(plain / MODEL)
    onnx.checker.check_model(str(path / MODEL), full_check=True)
    assert [f.SerializeToString() for f in graph.functions] == [f.SerializeToString() for f in float_graph.functions]
    kept = {"MraAttention", "LayerNormalization", "Gelu"}
    names = [[node.name for node in g.graph.node if node.op_type in kept] for g in (graph, float_graph)]
    assert names[0] == names[1]
    assert [v.SerializeToString() for v in (*graph.graph.input, *graph.graph.output)] == [
        v.SerializeToString() for v in (*float_graph.graph.input, *float_graph.graph.output)
    ]
    assert not graph.metadata_props
    assert graph.producer_name == "mra-export"
    quantization = Bundle.load(path).manifest.quantization
    assert quantization is not None
    products = [node.name for node in float_graph.graph.node if node.op_type in ("MatMul", "Gemm")]
    assert sorted(quantization.quantized) == sorted(products)
    ops = optimized(path, tmp_path / "optimized.onnx")
    assert ops.get("MatMulIntegerToFloat", 0) + ops.get("DynamicQuantizeMatMul", 0) == len(products)
    assert "MatMul" not in ops
    assert ops["SkipLayerNormalization"] == 4
    weights = [tensor for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2]
    assert len(weights) == len(products)
    assert min(onnx.numpy_helper.to_array(tensor).min() for tensor in weights) <= -126  # the full range
    assert max(onnx.numpy_helper.to_array(tensor).max() for tensor in weights) == 127


def test_residuals_are_not_rounded(static) -> None:
    """The quantizer itself hands every reader of a tensor its rounded values."""
    graph = onnx.load(static / MODEL).graph
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        for name in node.input:
            maker = makers.get(name)
            assert maker is None or maker.op_type != "DequantizeLinear" or node.op_type == "MatMul", node.name


def test_the_weights_file_and_golden_outputs_are_the_float_models(bundles, static) -> None:
    plain = bundles("fp32")
    for name in ("model.safetensors", "golden.npz"):
        assert Bundle.load(static).manifest.files[name] == Bundle.load(plain).manifest.files[name], name
    assert [tensor.dtype for tensor in Bundle.load(static).manifest.outputs] == ["float32"]
    assert [tensor.dtype for tensor in Bundle.load(static).manifest.inputs] == ["int64", "int64"]


def test_heads_of_a_few_classes_stay_in_float(tmp_path) -> None:
    source = checkpoint(tmp_path / "checkpoint", "text-classification")
    path = export_bundle(source, tmp_path / "bundle", dtype="int8", calibration=TEXT)
    quantization = Bundle.load(path).manifest.quantization
    assert quantization is not None
    assert quantization.kept == ["/classifier/out_proj/Gemm"]
    MraRuntime.load(path, "onnxruntime").validate()


def test_weights_above_two_gigabytes_go_through_their_own_file(tmp_path, monkeypatch) -> None:
    source = checkpoint(tmp_path / "checkpoint")
    small = export_bundle(source, tmp_path / "small", dtype="int8", calibration=TEXT)
    monkeypatch.setattr("mra_export.onnx_model._SINGLE_FILE_LIMIT", 10_000)
    large = export_bundle(source, tmp_path / "large", dtype="int8", calibration=TEXT)
    assert "model.onnx.data" in Bundle.load(large).manifest.files
    ids = np.arange(5, 45)[None]
    answers = [MraRuntime.load(path, "onnxruntime").run(input_ids=ids)["logits"] for path in (small, large)]
    assert np.array_equal(*answers)


def test_nothing_is_said_and_nothing_is_left(tmp_path) -> None:
    source = checkpoint(tmp_path / "checkpoint")
    (tmp_path / "scratch").mkdir()
    options = f"dtype='int8', calibration={str(TEXT)!r}"
    code = f"from mra_export.export import export_bundle; export_bundle({str(source)!r}, 'out', {options})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    left = [path.name for path in (tmp_path / "scratch").iterdir()]
    assert not [name for name in left if not name.startswith(".")]  # onnxruntime's own .ses is none of ours
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out", "scratch"]


def test_an_interrupted_quantisation_leaves_nothing(tmp_path, monkeypatch) -> None:
    source = checkpoint(tmp_path / "checkpoint")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mra_export.quantize.quantize_static", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(source, tmp_path / "out", dtype="int8", calibration=TEXT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "scratch"]
    assert not list((tmp_path / "scratch").iterdir())


def test_a_product_that_the_quantizer_left_out_is_not_passed_over(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mra_export.quantize.quantize_dynamic", lambda source, target, **options: shutil.copyfile(source, target))
    with pytest.raises(ContractError, match="made 0 of 14 matrix products"):
        export_bundle(checkpoint(tmp_path / "checkpoint"), tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


# Running it


def test_static_scales_give_a_text_the_same_in_any_batch_and_dynamic_ones_do_not(static, dynamic) -> None:
    random = np.random.default_rng(0)
    one, other = random.integers(5, 261, (1, 64)), random.integers(5, 261, (1, 64))
    for path, same in ((static, True), (dynamic, False)):
        runtime = MraRuntime.load(path, "onnxruntime")
        alone = runtime.run(input_ids=one)["logits"][0]
        together = runtime.run(input_ids=np.concatenate([one, other]))["logits"][0]
        assert alone.dtype == np.float32
        assert np.array_equal(alone, together) == same


def test_padding_invariant_needs_fixed_scales(tmp_path) -> None:
    source = checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ContractError, match="needs calibration text"):
        export_bundle(source, tmp_path / "out", dtype="int8", padding_invariant=True)
    path = export_bundle(source, tmp_path / "out", dtype="int8", padding_invariant=True, calibration=TEXT)
    rows = verify(Bundle.load(path), ["onnxruntime"], quick=True).rows
    (padding,) = (row for row in rows if row.check == "padding")
    assert padding.status == "pass"
    assert padding.needed is not None
    assert padding.needed < 0.05


def test_every_runtime_of_an_int8_bundle_passes_verify(static) -> None:
    report = verify(Bundle.load(static), quick=True)
    assert report.passed, report.failed_rows
    judged = {(row.backend, row.dtype) for row in report.rows if row.status == "pass"}
    assert {("torch", "fp32"), ("onnxruntime", "int8"), ("onnxruntime-function", "int8"), ("onnx-reference", "int8")} <= judged


def test_verify_sees_a_wrong_scale(static, tmp_path) -> None:
    from mra_export.bundle import file_entry, write_manifest

    shutil.copytree(static, tmp_path / "bundle")
    model = onnx.load(tmp_path / "bundle" / MODEL)
    scale = next(t for t in model.graph.initializer if "output/dense" in t.name.replace(".", "/") and t.name.endswith("scale"))
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1.5), scale.name))
    onnx.save(model, tmp_path / "bundle" / MODEL)
    manifest = Bundle.load(static).manifest
    manifest.files[MODEL] = file_entry(tmp_path / "bundle" / MODEL)
    write_manifest(tmp_path / "bundle", manifest)
    report = verify(Bundle.load(tmp_path / "bundle"), ["onnxruntime"], quick=True)
    assert {row.check for row in report.failed_rows} & {"outputs", "golden"}


def test_torch_runs_the_float_model(bundles, static) -> None:
    ids = np.arange(5, 45)[None]
    answers = [MraRuntime.load(path, "torch").run(input_ids=ids)["logits"] for path in (bundles("fp32"), static)]
    assert np.array_equal(*answers)
    assert MraRuntime.load(static, "torch").precision == "fp32"
    assert MraRuntime.load(static).precision == "int8"


def test_gpus_are_refused(static, tmp_path, monkeypatch) -> None:
    from mra_export.engine import build_engine

    with pytest.raises(EngineError, match="no engine is built from an int8 graph"):
        build_engine(static)
    with pytest.raises(BackendError, match="int8 bundle's graph is for CPUs"):
        MraRuntime.load(static, "onnxruntime", "cuda")
    result = call("export", checkpoint(tmp_path / "checkpoint"), tmp_path / "out", "--dtype", "int8", "--engine", "auto")
    assert result.exit_code == 4
    assert "no engine is built from an int8 graph" in result.stderr
    assert not (tmp_path / "out").exists()


# Text


def test_calibration_text_is_for_int8_and_must_be_text(tmp_path) -> None:
    source = checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ContractError, match="is for dtype int8, dtype is fp16"):
        export_bundle(source, tmp_path / "out", dtype="fp16", calibration=TEXT)
    (tmp_path / "noise").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ContractError, match="cannot be read as UTF-8 text"):
        export_bundle(source, tmp_path / "out", dtype="int8", calibration=tmp_path / "noise")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ContractError, match="holds no text"):
        export_bundle(source, tmp_path / "out", dtype="int8", calibration=tmp_path / "empty")
    with pytest.raises(ContractError, match="does not exist"):
        export_bundle(source, tmp_path / "out", dtype="int8", calibration=tmp_path / "nowhere")
    (source / "tokenizer.json").unlink()
    with pytest.raises(ContractError, match="has no tokenizer to read calibration text"):
        export_bundle(source, tmp_path / "out", dtype="int8", calibration=TEXT)
    assert not (tmp_path / "out").exists()


def test_folders_give_their_visible_text_in_order(tmp_path) -> None:
    for name, content in {"b.txt": b"second", "a/x.py": b"first", ".hidden/c": b"no", "d.bin": b"\xff", "e": b"nul\0"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert corpus.read_texts(tmp_path) == ["first", "second"]
    assert corpus.read_texts(tmp_path / "b.txt") == ["second"]


def test_rows_are_framed_and_masks_hide_text_only(static) -> None:
    tokenizer = Tokenizer(static)
    before, after = tokenizer.frame
    rows = corpus.rows(tokenizer, ["some text " * 50, "more of it " * 50], 64, 5)
    assert rows.shape == (5, 64)
    assert (rows[:, : len(before)] == before).all()
    assert (rows[:, 64 - len(after) :] == after).all()
    masked = corpus.mask(tokenizer, rows, seed=0)
    assert 0.05 < masked.hidden.mean() < 0.3
    assert not np.isin(masked.tokens[masked.hidden], tokenizer.special_ids).any()
    assert (masked.ids == np.where(masked.hidden, tokenizer.mask_id, rows)).all()
    assert corpus.rows(tokenizer, ["ab"], 64, 5).shape == (1, 2 + len(after) + len(before) + len(after))


def test_held_out_text_must_be_apart_and_the_task_fill_mask(static, bundles, tmp_path) -> None:
    with pytest.raises(ContractError, match="overlap"):
        accuracy.HeldOut(Bundle.load(static), TEXT / "parity.md")
    with pytest.raises(ContractError, match="task is text-classification"):
        accuracy.HeldOut(Bundle.load(bundles("classes")), TEXT)
    source = checkpoint(tmp_path / "checkpoint")
    result = call("export", source, tmp_path / "out", "--dtype", "int8", "--calibration", TEXT, "--evaluate", TEXT / "parity.md")
    assert result.exit_code == 2
    assert "overlap" in result.stderr
    result = call("export", source, tmp_path / "out", "--evaluate", TEXT, "--no-verify")
    assert result.exit_code == 2
    assert "--no-verify" in result.stderr


def test_a_loss_of_half_a_point_fails_and_too_little_text_is_no_comparison() -> None:
    expected = np.arange(20_000) % 2 == 0
    worse = expected.copy()
    worse[:200] = False  # 100 of 20000 lost: half a point
    assert accuracy.judge("onnxruntime", "int8", "text", worse, expected).status == "pass"
    worse[:202] = False
    row = accuracy.judge("onnxruntime", "int8", "text", worse, expected)
    assert row.status == "fail"
    assert row.detail["difference"] == pytest.approx(-0.505)
    assert row.detail["standard_error"] == pytest.approx(100 * np.sqrt(0.00505 * (1 - 0.00505) / 20_000))
    few = accuracy.judge("onnxruntime", "int8", "text", worse[:500], expected[:500])
    assert few.status == "skip"
    assert "too little text" in few.reason
    assert accuracy.judge("onnxruntime", "int8", "text", expected, expected).needed == 0


@pytest.mark.slow
def test_the_shipped_checkpoint_names_as_many_held_out_tokens_as_in_float(tmp_path) -> None:
    """examples/train_tiny.py's split: calibrated on text that the model was trained on, measured on text that it was not."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import train_tiny
    finally:
        sys.path.pop(0)
    documents = train_tiny.documents()
    for name, found in (
        ("calibration", [d for d in documents if not d.held_out][::60]),
        ("held-out", [d for d in documents if d.held_out]),
    ):
        (tmp_path / name).mkdir()
        for number, document in enumerate(found):
            (tmp_path / name / f"{number:03}.txt").write_text(document.text, encoding="utf-8")
    source = ROOT / "examples" / "mra-tiny-python"
    path = export_bundle(source, tmp_path / "bundle", dtype="int8", calibration=tmp_path / "calibration")
    bundle = Bundle.load(path)
    held_out = accuracy.HeldOut(bundle, tmp_path / "held-out")
    held_out._masked = corpus.Masked(*(part[::3] for part in vars(held_out._masked).values()))  # a third, for time
    expected, named = (
        held_out.named(lambda inputs, b=backend: runtime(b, bundle).run(**inputs)) for backend in ("torch", "onnxruntime")
    )
    row = accuracy.judge("onnxruntime", "int8", "held-out", named, expected)
    assert row.status == "pass", row.reason
    assert row.detail["tokens"] > 2500
    assert 30 < row.detail["reference_accuracy"] < 50


_runtimes: dict[str, MraRuntime] = {}


def runtime(backend: str, bundle: Bundle) -> MraRuntime:
    return _runtimes.setdefault(backend, MraRuntime.load(bundle, backend))


# The command


def test_inspect_and_the_manifest_say_how_it_was_made(static, dynamic) -> None:
    shown = call("inspect", static).stdout
    assert "static, 14 matrix products" in shown
    assert "calibrated with 96 pieces" in shown
    facts = json.loads(call("inspect", dynamic, "--json").stdout)
    assert facts["dtype"] == "int8"
    assert facts["quantization"]["method"] == "dynamic"
    assert facts["quantization"]["calibration"] is None


def test_accuracy_is_a_row_of_the_parity_report(static, tmp_path) -> None:
    result = call(
        "verify", static, "--quick", "--backend", "onnxruntime", "--evaluate", ROOT / "README.md", "--json", tmp_path / "p.json"
    )
    assert result.exit_code == 0, result.output
    (row,) = (row for row in json.loads((tmp_path / "p.json").read_text())["rows"] if row["check"] == "accuracy")
    assert row["tokens"] > 100
    assert {"accuracy", "reference_accuracy", "difference", "standard_error"} <= set(row)
