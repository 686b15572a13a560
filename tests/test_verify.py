"""Verify finds what is wrong: a graph without attention, altered weights, another selection, NaN. And passes what is right."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from exported import checkpoint

from mra_export import cases, subjects
from mra_export.backends.onnx_runtime import cuda_available
from mra_export.bundle import MODEL, OP_LIBRARY, WEIGHTS, Bundle, file_entry
from mra_export.contract import TOLERANCES
from mra_export.errors import BackendError, ContractError
from mra_export.parity import FAIL, PASS, SKIP
from mra_export.probe import Layer, possible_choices
from mra_export.report import Report
from mra_export.selection import Choice
from mra_export.verify import verify

CHECKS = {"golden", "outputs", "selection", "operator", "canary"}


def loaded(folder: Path) -> Bundle:
    return Bundle.load(folder)


def altered(bundles, tmp_path, change) -> Bundle:
    """A copy of the fp32 bundle with another graph, whose manifest vouches for it."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundles("fp32"), folder)
    graph = onnx.load(folder / MODEL)
    change(graph)
    onnx.save(graph, folder / MODEL)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][MODEL] = file_entry(folder / MODEL).model_dump()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return loaded(folder)


def statuses(report: Report, check: str) -> set[str]:
    return {row.status for row in report.rows if row.check == check}


@pytest.mark.parametrize("kind", ["fp32", "fp16", "answers", "choices"])
def test_every_runtime_of_a_good_bundle_agrees(bundles, kind) -> None:
    bundle = loaded(bundles(kind))
    report = verify(bundle, quick=True)
    assert report.passed, [row for row in report.rows if row.status == FAIL]
    assert "tensorrt" not in {row.backend for row in report.rows}, "the bundle has no engine"
    on_gpu = {row.status for row in report.rows if row.backend == "onnxruntime-cuda"}
    assert on_gpu == set() or cuda_available(), "this onnxruntime has no CUDA provider"
    for name in set(subjects.NAMES) - {"tensorrt", "onnxruntime-cuda"}:
        rows = [row for row in report.rows if row.backend == name]
        assert rows
        if name == "torch-reference" and bundle.manifest.dtype == "fp32":
            assert [(row.status, row.reason) for row in rows] == [(SKIP, "this is the reference itself")]
            continue
        expected = CHECKS - ({"golden"} if name == "onnx-reference" else set())
        expected |= {"padding"} if bundle.manifest.padding_invariant else set()
        assert {row.check for row in rows if row.status == PASS} == expected, name


def test_bfloat16_passes_in_torch_and_says_why_not_elsewhere(bundles) -> None:
    report = verify(loaded(bundles("bf16")), quick=True)
    assert report.passed
    by_backend = {name: {row.status for row in report.rows if row.backend == name} for name in subjects.NAMES}
    assert by_backend["torch"] == by_backend["torch-reference"] == {PASS}
    assert by_backend["onnxruntime"] == by_backend["onnxruntime-function"] == by_backend["onnx-reference"] == {SKIP}
    assert any("ONNX Runtime's CPU provider has no bfloat16 MatMul" in row.reason for row in report.rows)
    with pytest.raises(BackendError, match="no bfloat16 MatMul"):
        verify(loaded(bundles("bf16")), ["onnxruntime"], quick=True)


@pytest.mark.skipif(cuda_available(), reason="this onnxruntime has the CUDA provider")
def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(bundles) -> None:
    with pytest.raises(BackendError, match="has no CUDAExecutionProvider"):
        verify(loaded(bundles("fp32")), ["onnxruntime-cuda"], quick=True)


def test_the_whole_sweep_has_the_lengths_batches_masks_and_text(bundles) -> None:
    bundle = loaded(bundles("fp32"))
    found = cases.sweep(bundle, seeds=2, quick=False)
    assert {case.tokens for case in found} == {(b, n) for b in (1, 2, 3) for n in (1, 31, 32, 33, 100, 170, 256)}
    assert len(found) == 42
    assert len({case.name for case in found}) == 42
    ragged = next(case for case in found if case.tokens == (3, 100))
    mask = ragged.inputs["attention_mask"]
    assert mask[0].all()
    assert (mask[1, 0], mask[1, -1]) == (1, 0)
    assert (mask[2, 0], mask[2, -1]) == (0, 1)
    texts = cases.text_cases(bundle)
    assert [case.tokens[0] for case in texts] == [2, 1]
    assert texts[1].tokens[1] == 170
    report = verify(bundle, ["onnxruntime"], seeds=2)
    assert report.passed
    assert len([row for row in report.rows if row.check == "outputs"]) == 44


def test_a_graph_that_ignores_attention_fails_by_the_canary(bundles, tmp_path) -> None:
    def without_attention(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == "MraAttention":
                value = node.input[2]
                del node.input[:], node.attribute[:]
                node.input.append(value)
                node.op_type, node.domain = "Identity", ""

    report = verify(altered(bundles, tmp_path, without_attention), ["onnxruntime", "onnxruntime-function"], quick=True)
    assert not report.passed
    for name in ("onnxruntime", "onnxruntime-function"):
        canary = [row for row in report.rows if (row.backend, row.check) == (name, "canary")]
        assert [row.status for row in canary] == [FAIL]
        assert "ignores attention" in canary[0].reason
    assert {row.status for row in report.rows if row.check == "outputs" and not row.case.startswith("1x1 ")} == {FAIL}
    assert "0 MraAttention nodes ran, the model has 2 layers" in next(row for row in report.rows if row.check == "selection").reason


def test_a_changed_weight_fails_by_the_outputs(bundles, tmp_path) -> None:
    def change(model: onnx.ModelProto) -> None:
        weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and tensor.dims[0] == tensor.dims[1])
        array = onnx.numpy_helper.to_array(weight).copy()
        array[3, 3] += 1.0
        weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))

    report = verify(altered(bundles, tmp_path, change), ["onnxruntime"], quick=True)
    assert FAIL in statuses(report, "outputs")
    assert FAIL in statuses(report, "golden")
    assert statuses(report, "operator") == {PASS}, "the operator itself is right"


def test_nan_fails(bundles, tmp_path) -> None:
    def change(model: onnx.ModelProto) -> None:
        bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [261])
        array = onnx.numpy_helper.to_array(bias).copy()
        array[17] = np.nan
        bias.CopyFrom(onnx.numpy_helper.from_array(array, bias.name))

    report = verify(altered(bundles, tmp_path, change), ["onnxruntime"], quick=True)
    assert statuses(report, "outputs") == statuses(report, "golden") == {FAIL}
    assert all("NaN" in row.reason for row in report.rows if row.check == "outputs")
    json.loads(report.json(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def test_another_selection_fails_although_the_arithmetic_is_right(bundles, monkeypatch) -> None:
    """A runtime that chooses other blocks than the scores say: the reference follows it, so only the selection row can tell."""
    bundle = loaded(bundles("fp32"))
    shifted = replace(bundle.manifest.operator_attributes(), scale=bundle.manifest.attributes["scale"])

    def choose_the_worst(query, key, mask, attributes):
        scores = subjects_block_scores(query, key, mask, shifted)
        worst = replace(scores, score=-scores.score)
        return select(worst, attributes.num_blocks)

    from mra_export import probe
    from mra_export.selection import block_scores as subjects_block_scores
    from mra_export.selection import select

    monkeypatch.setattr(probe, "kernel_choice", choose_the_worst)
    report = verify(bundle, ["onnxruntime"], quick=True)
    assert FAIL in statuses(report, "selection")
    failed = next(row for row in report.rows if row.check == "selection" and row.status == FAIL)
    assert failed.detail["largest_margin"] > TOLERANCES["fp32"].near_tie
    assert failed.detail["overlap"] < 1
    assert {"layer", "overlap", "differing", "margins"} == set(failed.detail["layers"][0])


def test_a_near_tie_is_followed_and_reported(bundles, monkeypatch) -> None:
    bundle = loaded(bundles("fp32"))
    original = subjects._OnnxRuntime.observe

    def swap_the_last_two(self, inputs):
        outputs, layers = original(self, inputs)
        (first,) = layers[0].choices
        if first.chosen.shape[-1] ** 2 <= bundle.manifest.attributes["num_blocks"]:
            return outputs, layers
        chosen = first.chosen.copy()
        index = int(np.argmin(chosen[0, 0].reshape(-1)))
        chosen[0, 0].reshape(-1)[index] = True
        layers[0] = replace(layers[0], choices=(Choice(chosen, first.excluded | chosen),))
        return outputs, layers

    monkeypatch.setattr(subjects._OnnxRuntime, "observe", swap_the_last_two)
    report = verify(bundle, ["onnxruntime"], quick=True)
    touched = [row for row in report.rows if row.check == "selection" and row.detail["differing"]]
    assert touched
    assert all(row.status == FAIL and "differ, the widest by" in row.reason for row in touched), "not a near-tie in this model"
    followed = [row for row in report.rows if row.check == "outputs" and "taken as this runtime chose them" in row.reason]
    assert {row.case for row in followed} == {row.case for row in touched}


def test_what_cannot_be_seen_is_tried_both_ways(bundles) -> None:
    """ONNX Runtime's CPU provider may keep 16-bit tensors as float32, so it may have chosen by rounded or by unrounded values."""
    blank = np.zeros((1, 1, 2, 2), dtype=bool)
    one, other = Choice(blank, blank), Choice(~blank, ~blank)
    tensor = np.zeros((1, 40, 32), np.float32)
    mask = np.ones((1, 40), bool)
    layers = [Layer(tensor, tensor, None, mask, choices) for choices in ((one, other), (one,), (one, one))]
    assert [[choice is other for choice in way] for way in possible_choices(layers)] == [
        [False, False, False],
        [True, False, False],
    ]
    assert len(possible_choices(layers[1:])) == 1
    assert possible_choices([]) == [[]]

    subject = subjects.open_subject("onnxruntime", loaded(bundles("fp16")))
    _, seen = subject.observe(cases.random_case(subject.bundle, 1, 100, 0).inputs)
    assert len(seen) == 2
    assert all(layer.query.dtype == np.float32 and len(layer.choices) == 2 for layer in seen)


def test_a_wrong_operator_fails_by_the_operator_row(bundles, monkeypatch) -> None:
    original = subjects._OnnxRuntime.operator
    monkeypatch.setattr(subjects._OnnxRuntime, "operator", lambda *arguments: original(*arguments) * np.float32(1.001))
    report = verify(loaded(bundles("fp32")), ["onnxruntime"], quick=True)
    assert statuses(report, "operator") == {FAIL}
    assert statuses(report, "outputs") == {PASS}


def test_a_text_that_depends_on_its_batch_fails_by_the_padding_row(bundles, monkeypatch) -> None:
    original = subjects._OnnxRuntime.run

    def leak(self, inputs):
        outputs = original(self, inputs)
        rows = inputs["input_ids"].shape[0]
        return {name: value + 0.1 * (rows - 1) for name, value in outputs.items()}

    monkeypatch.setattr(subjects._OnnxRuntime, "run", leak)
    assert statuses(verify(loaded(bundles("answers")), ["onnxruntime"], quick=True), "padding") == {FAIL}


def test_what_is_too_large_for_the_function_body_is_left_out_with_its_reason(bundles, monkeypatch) -> None:
    monkeypatch.setattr(subjects, "_FUNCTION_BODY_LIMIT", 6 * 2 * 100 * 100 * 4 * 3)
    report = verify(loaded(bundles("fp32")), ["onnxruntime-function"], quick=True)
    assert report.passed
    left_out = [row for row in report.rows if row.status == SKIP]
    assert [row.case for row in left_out] == ["1x256 full seed 0"]
    assert "forms N x N" in left_out[0].reason
    assert any("100" in row.case and row.status == PASS for row in report.rows)


def test_a_bundle_without_its_op_library_skips_that_runtime_unless_it_was_named(bundles, tmp_path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundles("fp32"), folder)
    (folder / OP_LIBRARY).unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][OP_LIBRARY]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    report = verify(loaded(folder), quick=True)
    rows = [row for row in report.rows if row.backend == "onnxruntime"]
    assert [row.status for row in rows] == [SKIP]
    assert "holds no op library" in rows[0].reason
    assert report.passed
    with pytest.raises(BackendError, match="holds no op library"):
        verify(loaded(folder), ["onnxruntime"], quick=True)


def test_without_weights_there_is_no_reference(bundles, tmp_path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundles("fp32"), folder)
    (folder / WEIGHTS).unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][WEIGHTS]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BackendError, match=r"holds no model.safetensors"):
        verify(loaded(folder), quick=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seeds": 0}, ContractError, "seeds is 0"),
        ({"backends": ["tpu"]}, BackendError, "backend is 'tpu': use one of torch, torch-reference"),
    ],
)
def test_options_that_make_no_sense_are_refused(bundles, options, error, message) -> None:
    with pytest.raises(error, match=message):
        verify(loaded(bundles("fp32")), **options)


def test_the_report_as_json_junit_and_table(bundles, tmp_path) -> None:
    from rich.console import Console

    def change(model: onnx.ModelProto) -> None:
        bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [261])
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(1), bias.name))

    report = verify(altered(bundles, tmp_path, change), ["torch", "onnxruntime", "onnx-reference"], quick=True)
    written = json.loads(report.json())
    assert written["passed"] is False
    assert len(written["rows"]) == len(report.rows)
    row = next(row for row in written["rows"] if (row["backend"], row["check"]) == ("torch", "outputs"))
    assert row["status"] == PASS
    assert {"max_abs", "p999_abs", "max_rel", "p999_rel", "cosine", "argmax_agreement", "smallest_tolerance", "nan", "inf"} <= set(
        row
    )
    assert {"torch", "onnx", "onnxruntime", "transformers"} <= set(written["versions"])

    suites = ElementTree.fromstring(report.junit())
    assert {suite.get("name") for suite in suites} == {"torch", "onnxruntime", "onnx-reference"}
    for suite in suites:
        rows = [row for row in report.rows if row.backend == suite.get("name")]
        assert int(suite.get("tests")) == len(rows) == len(suite)
        assert int(suite.get("failures")) == sum(row.status == FAIL for row in rows) == len(suite.findall("testcase/failure"))
        assert int(suite.get("skipped")) == sum(row.status == SKIP for row in rows) == len(suite.findall("testcase/skipped"))

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    text = console.export_text()
    assert "onnxruntime" in text
    assert "fail: " in text
    assert "needs a tolerance of" in text


def test_the_tolerances_are_about_twice_what_pytorch_itself_needs(tmp_path) -> None:
    """contract.TOLERANCES says how its numbers came about; this is the measurement, on weights that make attention sharp."""
    from mra_export.export import export_bundle

    source = checkpoint(tmp_path / "checkpoint", initializer_range=0.1, hidden_size=256, num_attention_heads=4, num_hidden_layers=4)
    for dtype in ("fp16", "bf16"):
        report = verify(loaded(export_bundle(source, tmp_path / dtype, dtype=dtype)), ["torch-reference"], quick=True)
        assert report.passed
        own = {
            check: max(row.difference.smallest_tolerance for row in report.rows if row.check == check)
            for check in ("outputs", "operator")
        }
        for check, allowed in (("outputs", TOLERANCES[dtype].model), ("operator", TOLERANCES[dtype].operator)):
            assert 2 * own[check] <= allowed <= 6 * own[check], (dtype, check, own[check], allowed)
