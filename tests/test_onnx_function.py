"""The function body of standard ops, in ONNX Runtime without our library and in onnx's evaluator, against the float64 formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from oracles import dense_attention, op_cases

from mra_export.contract import Attributes
from mra_export.errors import ContractError
from mra_export.onnx_function import NODE_ATTRIBUTES, element_type, function_proto

BLOCK = 32


def dense(feeds, attributes: Attributes):
    """The float64 formula's context (B, N, H * D)."""
    return dense_attention(feeds["query"], feeds["key"], feeds["value"], feeds["mask"], attributes).context


def one_node_model(attributes: Attributes, dtype: str = "fp32", opset: int = 20) -> onnx.ModelProto:
    element = element_type(dtype)
    values = dict(
        attributes.as_dict(), padding_invariant=int(attributes.padding_invariant), plugin_version="1", plugin_namespace=""
    )
    node = helper.make_node("MraAttention", ["query", "key", "value", "mask"], ["context"], domain="mra", **values)
    tensors = [helper.make_tensor_value_info(name, element, ["batch", "length", "hidden"]) for name in ("query", "key", "value")]
    tensors.append(helper.make_tensor_value_info("mask", TensorProto.INT32, ["batch", "length"]))
    graph = helper.make_graph(
        [node], "one", tensors, [helper.make_tensor_value_info("context", element, ["batch", "length", "hidden"])]
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("mra", 1)],
        functions=[function_proto(attributes, dtype, opset)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def run_ort(model: onnx.ModelProto, feeds):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def run_reference(model: onnx.ModelProto, feeds):
    return onnx.reference.ReferenceEvaluator(model).run(None, feeds)[0]


def inputs(seed: int, batch: int, length: int, hidden: int, *, spread: float = 1.0, masked: float = 0.3):
    rng = np.random.default_rng(seed)
    # A slow drift gives blocks different means, so that the selection has something to select.
    drift = np.repeat(rng.normal(size=(batch, -(-length // BLOCK), hidden)), BLOCK, axis=1)[:, :length]
    feeds = {
        name: ((rng.normal(size=(batch, length, hidden)) + drift) * spread).astype(np.float32) for name in ("query", "key", "value")
    }
    feeds["mask"] = (rng.random((batch, length)) >= masked).astype(np.int32)
    return feeds


def poison(feeds):
    """NaN and infinity at masked tokens: no runtime may let them through."""
    bad = {name: array.copy() for name, array in feeds.items()}
    masked = feeds["mask"] == 0
    for name, filler in (("query", np.nan), ("key", np.inf), ("value", np.nan)):
        bad[name][masked] = filler
    return bad


@pytest.mark.parametrize("run", [run_ort, run_reference])
def test_equals_the_formula(run):
    @settings(max_examples=25, derandomize=True)
    @given(op_cases(max_length=170, head_sizes=(8, 16, 40)), st.sampled_from([18, 20, 23]))
    def check(case, opset):
        # op_cases puts NaN at masked tokens.
        expected = dense_attention(*case.arrays, case.attributes)
        clear = (expected.margin == 0) | (expected.margin > 1e-5)  # nearer, but not tied, float32 may rightly choose otherwise
        assume(clear.all())
        feeds = dict(zip(("query", "key", "value", "mask"), case.arrays, strict=True))
        context = run(one_node_model(case.attributes, opset=opset), feeds)
        np.testing.assert_allclose(context, expected.context, rtol=0, atol=3e-5)

    check()


BASE = Attributes(2, 5, 0.25, "full", 1, 1)


@pytest.mark.parametrize("opset", range(18, 24))
@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("invariant", [False, True])
def test_every_opset(opset, mode, invariant):
    attributes = replace(BASE, approx_mode=mode, padding_invariant=invariant)
    feeds = inputs(3, 2, 100, 32)
    expected = dense(feeds, attributes)
    model = one_node_model(attributes, opset=opset)
    for run in (run_ort, run_reference):
        np.testing.assert_allclose(run(model, feeds), expected, rtol=0, atol=1e-5)


def test_lengths_and_batches_change_within_one_session():
    session = onnxruntime.InferenceSession(one_node_model(BASE).SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (3, 33), (1, 256), (2, 31), (1, 1)):
        feeds = inputs(batch + length, batch, length, 32)
        np.testing.assert_allclose(session.run(None, feeds)[0], dense(feeds, BASE), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "numpy_type", "atol"), [("fp16", np.float16, 2e-3)])
@pytest.mark.parametrize("run", [run_ort, run_reference])
def test_half_precision_rounds_the_result_only(dtype, numpy_type, atol, run):
    feeds = {name: array if name == "mask" else array.astype(numpy_type) for name, array in inputs(5, 2, 77, 32).items()}
    context = run(one_node_model(BASE, dtype), feeds)
    assert context.dtype == numpy_type
    expected = dense(feeds, BASE)
    np.testing.assert_allclose(context.astype(np.float64), expected, rtol=0, atol=atol)


def test_bfloat16_runs_in_the_reference_evaluator():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    feeds = {name: array if name == "mask" else array.astype(ml_dtypes.bfloat16) for name, array in inputs(5, 1, 40, 32).items()}
    context = run_reference(one_node_model(BASE, "bf16"), feeds)
    assert context.dtype == ml_dtypes.bfloat16
    expected = dense(feeds, BASE)
    np.testing.assert_allclose(context.astype(np.float64), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("run", [run_ort, run_reference])
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_ties_go_to_the_lower_index_and_exclude_every_tied_pair(run, mode):
    # Each block of tokens is alike, so all block logits are equal: every pair ties, whatever the budget.
    rng = np.random.default_rng(0)
    block = rng.integers(-2, 3, size=(1, BLOCK, 16)).astype(np.float32)
    feeds = {name: np.tile(block, (1, 4, 1)) for name in ("query", "key")}
    feeds["value"] = rng.normal(size=(1, 128, 16)).astype(np.float32)
    feeds["mask"] = np.ones((1, 128), np.int32)
    attributes = Attributes(1, 6, 0.25, mode)
    expected = dense(feeds, attributes)
    context = run(one_node_model(attributes), feeds)
    np.testing.assert_allclose(context, expected, rtol=0, atol=1e-5)
    # Six pairs are chosen in flat order: block row 0 and half of row 1. The rest ties with the last one and is dropped.
    assert np.abs(context[0, 32:64]).max() > 0
    assert not context[0, 64:].any()


@pytest.mark.parametrize("run", [run_ort, run_reference])
def test_a_budget_for_every_block_is_exact_attention_at_any_logit_level(run):
    feeds = inputs(9, 1, 90, 16, masked=0.0)
    feeds["key"] -= 60 * feeds["query"].mean() + 40  # pushes logits far from 0: eps must not swallow them
    attributes = Attributes(1, 9, 0.25)
    logits = 0.25 * feeds["query"][0].astype(np.float64) @ feeds["key"][0].astype(np.float64).T
    weights = np.exp(logits - logits.max(1, keepdims=True))
    expected = weights @ feeds["value"][0] / weights.sum(1, keepdims=True)
    assert logits.max() > 50 or logits.min() < -50
    np.testing.assert_allclose(run(one_node_model(attributes), feeds)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("run", [run_ort, run_reference])
def test_masked_rows_and_queries_are_zero(run):
    feeds = inputs(4, 2, 70, 32)
    feeds["mask"][0] = 0
    context = run(one_node_model(BASE), poison(feeds))
    assert not context[0].any()
    assert not context[1][feeds["mask"][1] == 0].any()
    assert np.isfinite(context).all()


@pytest.mark.parametrize("run", [run_ort, run_reference])
def test_nan_at_a_real_token_stays_in_its_batch_row_and_head(run):
    feeds = inputs(4, 2, 70, 32, masked=0.0)
    clean = run(one_node_model(BASE), feeds)
    feeds["query"][1, 3, 20] = np.nan  # row 1, head 1
    context = run(one_node_model(BASE), feeds)
    np.testing.assert_array_equal(context[0], clean[0])
    np.testing.assert_array_equal(context[1, :, :16], clean[1, :, :16])


def test_padding_invariance():
    attributes = replace(BASE, padding_invariant=True)
    model = one_node_model(attributes)
    alone = inputs(6, 1, 75, 32, masked=0.0)
    expected = run_ort(model, alone)
    padded = {name: np.pad(array, [(0, 1), (0, 150), (0, 0)][: array.ndim]) for name, array in alone.items()}
    padded["mask"][1] = 1
    np.testing.assert_allclose(run_ort(model, padded)[:1, :75], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("run", [run_ort, run_reference])
def test_a_preferred_dead_pair_can_take_the_budget(run):
    # Left padding: pair (0, 0) is dead but preferred three times, so it ranks with the live diagonal, and at score 0 as they do.
    attributes = Attributes(2, 1, 0.25, "full", 1, 1, True)
    feeds = inputs(2, 1, 128, 32, masked=0.0)
    feeds["key"] = feeds["query"] * 2  # makes the diagonal each row's maximum
    feeds["mask"][:, :BLOCK] = 0
    np.testing.assert_allclose(run(one_node_model(attributes), feeds), dense(feeds, attributes), rtol=0, atol=1e-5)


def test_any_mask_value_but_zero_is_real():
    feeds = inputs(8, 1, 50, 32)
    expected = run_ort(one_node_model(BASE), feeds)
    feeds["mask"] *= np.array([-7, 2] * 25, np.int32)
    np.testing.assert_array_equal(run_ort(one_node_model(BASE), feeds), expected)


def test_the_body_is_standard_ops_and_declares_the_node_attributes():
    function = function_proto(BASE, "fp16", 18)
    assert {node.domain for node in function.node} == {""}
    assert list(function.attribute) == list(NODE_ATTRIBUTES)
    assert [(entry.domain, entry.version) for entry in function.opset_import] == [("", 18)]
    assert "num_blocks=5" in function.doc_string


@pytest.mark.parametrize("opset", [17, 24, 0])
def test_other_opsets_are_refused(opset):
    with pytest.raises(ContractError, match=f"opset is {opset}: use 18 to 23"):
        function_proto(BASE, "fp32", opset)


def test_other_dtypes_are_refused():
    with pytest.raises(ContractError, match="dtype is 'int8': use one of fp32, fp16, bf16"):
        function_proto(BASE, "int8", 20)
