"""mra-export bench: the arithmetic of its report, and what it refuses before it times anything. No test judges a time."""

from __future__ import annotations

import csv
import json
import shutil
import threading
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mra_export import bench as bench_module
from mra_export import bench_plot
from mra_export.bench import BACKENDS, Measurement, bench
from mra_export.bundle import GOLDEN, Bundle, file_entry
from mra_export.cli import _BENCH_BACKENDS, main
from mra_export.errors import BackendError, ContractError, MissingPackageError, ParityError
from mra_export.runtime import MraRuntime

QUICK = {"seconds": 0.02, "warmup": 0.0}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def sound(row: Measurement) -> None:
    """What holds whatever the machine does."""
    assert row.calls >= 1
    assert 0 < row.min_ms <= row.p50_ms
    assert row.min_ms <= row.mean_ms
    known = [value for value in (row.p50_ms, row.p90_ms, row.p95_ms, row.p99_ms) if value is not None]
    assert known == sorted(known)
    assert [value is not None for value in (row.p90_ms, row.p95_ms, row.p99_ms)] == [row.calls >= n for n in (10, 20, 100)]


def test_each_runtime_at_each_shape(bundles) -> None:
    told: list[str] = []
    report = bench(
        Bundle.load(bundles("fp32")),
        backends=["torch", "onnxruntime", "onnxruntime-function"],
        lengths=[33, 8],
        batches=[1, 2],
        threads=1,
        progress=told.append,
        **QUICK,
    )
    shapes = [(length, batch) for length in (33, 8) for batch in (1, 2)]
    names = ("torch", "onnxruntime", "onnxruntime-function")
    assert [(row.length, row.batch, row.backend) for row in report.measurements] == [(*s, name) for s in shapes for name in names]
    for row in report.measurements:
        sound(row)
        assert row.device == "cpu"
        assert row.tokens_per_second == pytest.approx(row.length * row.sequences_per_second)
    assert any("timing torch, onnxruntime" in text for text in told)


def test_defaults_are_what_auto_takes_at_two_lengths(bundles) -> None:
    report = bench(Bundle.load(bundles("fp32")), **QUICK)
    assert [(row.backend, row.length, row.batch) for row in report.measurements] == [
        ("onnxruntime", 128, 1),
        ("onnxruntime", 256, 1),
    ]
    half = bench(Bundle.load(bundles("bf16")), backends=["auto", "torch"], lengths=[8], **QUICK)
    assert [row.backend for row in half.measurements] == ["torch"], "named twice, timed once"


def test_callers_share_one_runtime_and_are_counted_together(bundles, monkeypatch) -> None:
    seen: set[int] = set()
    run = MraRuntime.run

    def counted(self, **arrays):
        seen.add(threading.get_ident())
        return run(self, **arrays)

    monkeypatch.setattr(MraRuntime, "run", counted)
    report = bench(Bundle.load(bundles("fp32")), lengths=[8], concurrency=3, seconds=0.1, warmup=0.0)
    (row,) = report.measurements
    sound(row)
    assert row.calls >= 3
    assert len(seen - {threading.get_ident()}) == 3


def test_a_callers_error_is_raised(bundles, monkeypatch) -> None:
    run = MraRuntime.run

    def fails(self, **arrays):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("as asked")
        return run(self, **arrays)

    monkeypatch.setattr(MraRuntime, "run", fails)
    with pytest.raises(RuntimeError, match="as asked"):
        bench(Bundle.load(bundles("fp32")), lengths=[8], concurrency=2, **QUICK)


def test_percentiles_and_rates_of_known_times(bundles) -> None:
    class Subject:
        name = "torch"
        runtime = type("Runtime", (), {"device": "cpu"})

    mask = np.array([[1] * 8, [1] * 4 + [0] * 4])
    count = bench_module._Count(Subject(), [n / 1000 for n in range(1, 101)], wall=2.0)  # type: ignore[arg-type]
    row = count.result(8, 2, {"attention_mask": mask})
    assert (row.calls, row.min_ms, row.mean_ms, row.p50_ms) == (100, *map(pytest.approx, (1.0, 50.5, 50.5)))
    assert (row.p90_ms, row.p95_ms, row.p99_ms) == tuple(map(pytest.approx, (90.1, 95.05, 99.01)))
    assert (row.sequences_per_second, row.tokens_per_second) == (100.0, 600.0)
    few = bench_module._Count(Subject(), [0.001] * 19, wall=1.0).result(8, 2, {"attention_mask": mask})  # type: ignore[arg-type]
    assert (few.p90_ms, few.p95_ms, few.p99_ms) == (pytest.approx(1.0), None, None)


@pytest.mark.parametrize("kind", ["fp32", "choices", "answers"])
def test_inputs_are_random_tokens_with_the_mask_asked_for(bundles, kind) -> None:
    bundle = Bundle.load(bundles(kind))
    options = bench_module.Options((100,), (16,), mask="ragged", seed=3)
    inputs = bench_module._inputs(bundle, 100, 16, options)
    rows = inputs["attention_mask"].reshape(-1, 100).sum(1)
    assert rows[0] == 100
    assert 25 <= rows.min() < 100
    assert len(set(rows)) > 3
    assert (np.diff(inputs["attention_mask"], axis=-1) <= 0).all(), "padded at the end"
    assert len(np.unique(inputs["input_ids"])) > 100
    assert set(inputs) == {tensor.name for tensor in bundle.manifest.inputs}
    full = bench_module._inputs(bundle, 100, 16, bench_module.Options((100,), (16,), seed=3))
    assert full["attention_mask"].all()
    assert (full["input_ids"] == inputs["input_ids"]).all()


def test_choices_are_sequences(bundles) -> None:
    (row,) = bench(Bundle.load(bundles("choices")), lengths=[16], batches=[2], **QUICK).measurements
    assert row.tokens_per_second == pytest.approx(16 * row.sequences_per_second)


def test_torch_threads_are_put_back(bundles, monkeypatch) -> None:
    import torch

    before = torch.get_num_threads()
    seen = []
    run = MraRuntime.run
    monkeypatch.setattr(MraRuntime, "run", lambda self, **arrays: (seen.append(torch.get_num_threads()), run(self, **arrays))[1])
    bench(Bundle.load(bundles("fp32")), backends=["torch"], lengths=[8], threads=before + 1, **QUICK)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [300]}, "length 300, the model's max_position_embeddings is 256"),
        ({"lengths": [0]}, "length is 0"),
        ({"batches": [-1]}, "batch is -1"),
        ({"backends": []}, "backends is empty"),
        ({"threads": 0}, "threads is 0"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"seconds": 0.0}, "seconds is 0.0: it must be above 0"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"warmup": -1.0}, "warmup is -1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"mask": "holes"}, "mask is 'holes': use one of full, ragged"),
        ({"cuda_graphs": True}, "for backend 'tensorrt' and for 'onnxruntime' on device 'cuda'"),
        ({"backends": ["tensorrt"], "threads": 2}, "threads is 2: backend 'tensorrt' runs on a GPU"),
    ],
)
def test_options_outside_the_model_are_refused_before_anything_is_loaded(bundles, options, message, monkeypatch) -> None:
    monkeypatch.setattr(MraRuntime, "load", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ContractError, match=message):
        bench(Bundle.load(bundles("fp32")), **options)


def test_unknown_and_absent_backends_are_refused(bundles) -> None:
    with pytest.raises(BackendError, match="backend is 'jax'"):
        bench(Bundle.load(bundles("fp32")), backends=["jax"])
    with pytest.raises(BackendError, match="no bfloat16 MatMul"):
        bench(Bundle.load(bundles("bf16")), backends=["torch", "onnxruntime"], lengths=[8], **QUICK)
    with pytest.raises(BackendError, match="'tensorrt' runs on device 'cuda' only"):
        bench(Bundle.load(bundles("fp32")), backends=["tensorrt"], device="cpu")


def test_shapes_an_engine_does_not_take_are_refused_before_timing(bundles, monkeypatch) -> None:
    monkeypatch.setattr(MraRuntime, "refuses", lambda self, shape: f"no {shape}" if shape[0] > 2 else None)
    monkeypatch.setattr(MraRuntime, "run", lambda *a, **k: pytest.fail("ran"))
    with pytest.raises(ContractError, match=r"onnxruntime: no \(3, 8\)"):
        bench(Bundle.load(bundles("fp32")), lengths=[8], batches=[1, 3])


def test_a_function_body_beyond_memory_is_refused(bundles, monkeypatch) -> None:
    monkeypatch.setattr(bench_module, "_memory_bytes", lambda: 1 << 20)
    with pytest.raises(ContractError, match="the function body forms N x N"):
        bench(Bundle.load(bundles("fp32")), backends=["onnxruntime-function"], lengths=[256], batches=[4])


def test_a_runtime_that_differs_is_not_timed(bundles, tmp_path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundles("fp32"), folder)
    with np.load(folder / GOLDEN) as archive:
        arrays = {name: array + 1 if name.startswith("outputs/") else array for name, array in archive.items()}
    np.savez(folder / GOLDEN, **arrays)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][GOLDEN] = file_entry(folder / GOLDEN).model_dump()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ParityError, match="differs from PyTorch"):
        bench(Bundle.load(folder), lengths=[8], **QUICK)
    result = call(folder, "--length", 8)
    assert result.exit_code == 3
    assert "timing" not in result.stderr


# The command


def test_the_command_writes_what_it_is_asked_for(bundles, tmp_path) -> None:
    files = {kind: tmp_path / f"bench.{kind}" for kind in ("json", "csv", "svg")}
    written = ["--json", files["json"], "--csv", files["csv"], "--plot", files["svg"]]
    result = call(bundles("fp32"), "--length", 8, "--length", 40, "--seconds", 0.02, "--warmup", 0, *written)
    assert result.exit_code == 0, result.output
    for word in ("runtime", "p50", "p99", "tokens/s", "onnxruntime", "default threads", "raise --seconds"):
        assert word in result.stdout
    report = json.loads(files["json"].read_text())
    assert [row["length"] for row in report["measurements"]] == [8, 40]
    assert report["options"]["seconds"] == 0.02
    assert report["machine"]["model"]
    assert "onnxruntime" in report["versions"]
    rows = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert [float(row["p50_ms"]) for row in rows] == [row["p50_ms"] for row in report["measurements"]]
    assert rows[0]["p99_ms"] == ("" if report["measurements"][0]["p99_ms"] is None else rows[0]["p99_ms"])
    assert ElementTree.parse(files["svg"]).getroot().tag.endswith("svg")


def test_a_png_is_a_png(bundles) -> None:
    pytest.importorskip("matplotlib")
    report = bench(Bundle.load(bundles("fp32")), lengths=[8], batches=[1, 2], **QUICK)
    assert bench_plot.draw(report, ".png").startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_is_refused_before_any_work(bundles, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench_plot, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install matplotlib"):
        bench_plot.check_plot(Path("bench.svg"))
    result = call(bundles("fp32"), "--plot", tmp_path / "bench.svg")
    assert result.exit_code == 4
    assert "pip install matplotlib" in result.stderr
    assert "checking" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--length", "300"], 2, "max_position_embeddings is 256"),
        (["--length", "0"], 2, "0"),
        (["--seconds", "0"], 2, "seconds"),
        (["--backend", "jax"], 2, "jax"),
        (["--plot", "bench.pdf"], 2, "name it .png or .svg"),
        (["--json", "nowhere/bench.json"], 2, "does not exist"),
        (["--device", "cpu", "--backend", "tensorrt"], 4, "cuda"),
    ],
)
def test_wrong_usage(bundles, arguments, code, message) -> None:
    result = call(bundles("fp32"), *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_folder_without_a_bundle_is_4(tmp_path) -> None:
    assert call(tmp_path).exit_code == 4


def test_the_command_knows_the_librarys_backends() -> None:
    assert _BENCH_BACKENDS == BACKENDS
