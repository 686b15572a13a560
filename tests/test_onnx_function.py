"""The function body of standard ops, in ONNX Runtime without our library and in onnx's evaluator, against the float64 formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from mra_export.contract import Attributes
from mra_export.errors import ContractError
from mra_export.onnx_function import NODE_ATTRIBUTES, element_type, function_proto

BLOCK = 32


def dense_float64(query, key, value, mask, attributes: Attributes):
    """docs/operator.md written down pair by pair in float64 -> (context (B, N, H * D), score gap at the selection's edge)."""
    B, N, hidden = query.shape
    H = attributes.num_heads
    D = hidden // H
    nb = -(-N // BLOCK)
    L = nb * BLOCK
    real = np.zeros((B, L), bool)
    real[:, :N] = mask != 0
    q, k, v = (np.zeros((B, L, H, D)) for _ in range(3))
    for target, source in ((q, query), (k, key), (v, value)):
        target[:, :N] = np.where((mask != 0)[:, :, None], source.astype(np.float64), 0).reshape(B, N, H, D)
    context = np.zeros((B, L, H, D))
    gap = np.inf
    first, diagonal = attributes.initial_prior_first_n_blocks, attributes.initial_prior_diagonal_n_blocks
    for b in range(B):
        count = real[b].reshape(nb, BLOCK).sum(1)
        for h in range(H):
            means_q = q[b, :, h].reshape(nb, BLOCK, D).sum(1) / (count + 1e-6)[:, None]
            means_k = k[b, :, h].reshape(nb, BLOCK, D).sum(1) / (count + 1e-6)[:, None]
            block_logit = attributes.scale * means_q @ means_k.T
            live = np.outer(count, count) > 0
            order = []
            for i in range(nb):
                considered = block_logit[i][live[i]] if attributes.padding_invariant else block_logit[i]
                row_max = considered.max() if considered.size else 0.0
                for j in range(nb):
                    preferred = (i < first) + (j < first) + bool(diagonal and abs(i - j) <= diagonal // 2)
                    order.append((preferred - 2 * (not live[i, j]), block_logit[i, j] - row_max, -(i * nb + j)))
            ranked = sorted(order, reverse=True)
            chosen = {-entry[2] for entry in ranked[: attributes.num_blocks]}
            last = ranked[len(chosen) - 1][:2]
            excluded = {-entry[2] for entry in order if entry[:2] >= last}
            gap = min([gap, *(abs(e[1] - last[1]) for e in order if e[0] == last[0] and e[1] != last[1])])
            for a in np.flatnonzero(real[b]):
                logits = np.full(L, -np.inf)
                for j in range(nb):
                    pair = a // BLOCK * nb + j
                    tokens = slice(j * BLOCK, (j + 1) * BLOCK)
                    if pair in chosen:
                        logits[tokens] = attributes.scale * k[b, tokens, h] @ q[b, a, h]
                    elif pair not in excluded and attributes.approx_mode == "full":
                        logits[tokens] = block_logit[a // BLOCK, j]
                logits[~real[b]] = -np.inf
                if np.isfinite(logits).any():
                    weight = np.exp(logits - logits.max())
                    context[b, a, h] = weight @ v[b, :, h] / (weight.sum() + 1e-6)
    return context[:, :N].reshape(B, N, hidden), gap


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


@st.composite
def cases(draw):
    heads = draw(st.integers(1, 3))
    size = draw(st.sampled_from([8, 16, 40]))
    attributes = Attributes(
        num_heads=heads,
        num_blocks=draw(st.integers(1, 20)),
        scale=draw(st.sampled_from([1e-5, 0.17677669529663687, 0.5])),
        approx_mode=draw(st.sampled_from(["full", "sparse"])),
        initial_prior_first_n_blocks=draw(st.integers(0, 3)),
        initial_prior_diagonal_n_blocks=draw(st.integers(0, 4)),
        padding_invariant=draw(st.booleans()),
    )
    length = draw(st.one_of(st.sampled_from([1, 31, 32, 33, 64]), st.integers(1, 170)))
    feeds = inputs(
        draw(st.integers(0, 2**31)),
        draw(st.integers(1, 2)),
        length,
        heads * size,
        spread=draw(st.sampled_from([0.3, 1.0])),
        masked=draw(st.sampled_from([0.0, 0.3, 0.95])),
    )
    tail = draw(st.integers(0, length))
    feeds["mask"][0, length - tail :] = 0
    return attributes, feeds


@pytest.mark.parametrize("run", [run_ort, run_reference])
def test_equals_the_formula(run):
    @settings(
        max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
    )
    @given(cases(), st.sampled_from([18, 20, 23]))
    def check(case, opset):
        attributes, feeds = case
        expected, gap = dense_float64(**feeds, attributes=attributes)
        assume(gap > 1e-4 * attributes.scale)  # nearer, float32 may rightly choose otherwise
        np.testing.assert_allclose(run(one_node_model(attributes, opset=opset), poison(feeds)), expected, rtol=0, atol=2e-5)

    check()


BASE = Attributes(2, 5, 0.25, "full", 1, 1)


@pytest.mark.parametrize("opset", range(18, 24))
@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("invariant", [False, True])
def test_every_opset(opset, mode, invariant):
    attributes = replace(BASE, approx_mode=mode, padding_invariant=invariant)
    feeds = inputs(3, 2, 100, 32)
    expected, _ = dense_float64(**feeds, attributes=attributes)
    model = one_node_model(attributes, opset=opset)
    for run in (run_ort, run_reference):
        np.testing.assert_allclose(run(model, feeds), expected, rtol=0, atol=1e-5)


def test_lengths_and_batches_change_within_one_session():
    session = onnxruntime.InferenceSession(one_node_model(BASE).SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (3, 33), (1, 256), (2, 31), (1, 1)):
        feeds = inputs(batch + length, batch, length, 32)
        np.testing.assert_allclose(session.run(None, feeds)[0], dense_float64(**feeds, attributes=BASE)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "numpy_type", "atol"), [("fp16", np.float16, 2e-3)])
@pytest.mark.parametrize("run", [run_ort, run_reference])
def test_half_precision_rounds_the_result_only(dtype, numpy_type, atol, run):
    feeds = {name: array if name == "mask" else array.astype(numpy_type) for name, array in inputs(5, 2, 77, 32).items()}
    context = run(one_node_model(BASE, dtype), feeds)
    assert context.dtype == numpy_type
    expected, _ = dense_float64(**feeds, attributes=BASE)
    np.testing.assert_allclose(context.astype(np.float64), expected, rtol=0, atol=atol)


def test_bfloat16_runs_in_the_reference_evaluator():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    feeds = {name: array if name == "mask" else array.astype(ml_dtypes.bfloat16) for name, array in inputs(5, 1, 40, 32).items()}
    context = run_reference(one_node_model(BASE, "bf16"), feeds)
    assert context.dtype == ml_dtypes.bfloat16
    expected, _ = dense_float64(**feeds, attributes=BASE)
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
    expected, _ = dense_float64(**feeds, attributes=attributes)
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
