"""The reference attention against the dense formula, exact attention, and hostile inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import OpCase, dense_attention, make_case, op_cases

from mra_export.contract import BLOCK_SIZE, Attributes
from mra_export.errors import ContractError
from mra_export.model.attention import Selection, mra_attention, mra_attention_backward

# Rounding of the result to T, of the softmax weights, and of logits of a size near 100 before exp.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tensors(case: OpCase, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = (torch.from_numpy(x).to(dtype) for x in (case.query, case.key, case.value))
    return query, key, value, torch.from_numpy(case.mask)


def live_pairs(case: OpCase) -> np.ndarray:
    """(B, 1, nb, nb) bool."""
    padding = -case.mask.shape[1] % BLOCK_SIZE
    block = np.pad(case.mask, ((0, 0), (0, padding))).reshape(len(case.mask), -1, BLOCK_SIZE).any(-1)
    return (block[:, :, None] & block[:, None, :])[:, None]


@given(op_cases())
def test_float64_equals_the_dense_formula_selection_included(case: OpCase) -> None:
    context, selection = mra_attention(*tensors(case, torch.float64), case.attributes, return_selection=True)
    dense = dense_attention(*case.arrays, case.attributes)
    assume(dense.margin.min() > 1e-9)
    live = live_pairs(case)
    np.testing.assert_array_equal(selection.chosen.numpy() & live, dense.chosen & live)
    np.testing.assert_array_equal(selection.excluded.numpy() & live, dense.excluded & live)
    assert selection.chosen.sum((-1, -2)).unique().tolist() == [min(case.attributes.num_blocks, live.shape[-1] ** 2)]
    np.testing.assert_allclose(context.numpy(), dense.context, atol=1e-9, rtol=1e-9)


@given(op_cases(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_arithmetic_of_each_dtype_with_the_selection_forced_equal(case: OpCase, dtype: torch.dtype) -> None:
    query, key, value, mask = tensors(case, dtype)
    context, selection = mra_attention(query, key, value, mask, case.attributes, return_selection=True)
    assert context.dtype == dtype
    rounded = [x.double().numpy() for x in (query, key, value)]
    dense = dense_attention(*rounded, case.mask, case.attributes, selection.chosen.numpy(), selection.excluded.numpy())
    np.testing.assert_allclose(context.double().numpy(), dense.context, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@given(op_cases())
def test_float32_selects_as_float64_does_unless_it_is_a_near_tie(case: OpCase) -> None:
    dense = dense_attention(*case.arrays, case.attributes)
    decided = (dense.margin > 1e-3)[..., None, None] & live_pairs(case)
    _, selection = mra_attention(*tensors(case, torch.float32), case.attributes, return_selection=True)
    np.testing.assert_array_equal(selection.chosen.numpy() & decided, dense.chosen & decided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 33, 100])
def test_full_budget_is_exact_attention(length: int, dtype: torch.dtype) -> None:
    attributes = Attributes(num_heads=3, num_blocks=16, scale=0.25)
    case = make_case(attributes, batch=2, length=length, head_size=16, masking="holes")
    query, key, value, mask = tensors(case, dtype)
    mask[:, 0] = 1  # exact attention over no key is NaN
    query, key, value = (x.nan_to_num(0.5) for x in (query, key, value))

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (3, 16)).transpose(1, 2)

    real = mask.bool()[:, None, None, :]
    exact = torch.nn.functional.scaled_dot_product_attention(heads(query), heads(key), heads(value), attn_mask=real, scale=0.25)
    exact = exact.transpose(1, 2).flatten(-2) * mask[..., None]
    torch.testing.assert_close(mra_attention(query, key, value, mask, attributes), exact, atol=1e-5, rtol=1e-5)


@given(op_cases(max_length=130), st.integers(0, 100))
def test_padding_invariant_gives_a_sequence_the_same_result_alone_in_a_batch_and_padded(case: OpCase, more: int) -> None:
    attributes = Attributes(**{**case.attributes.as_dict(), "padding_invariant": True})
    query, key, value, mask = tensors(case, torch.float64)
    together = mra_attention(query, key, value, mask, attributes)

    def pad(x: torch.Tensor, value: float) -> torch.Tensor:
        return torch.cat([x, x.new_full((x.shape[0], more, *x.shape[2:]), value)], 1)

    padded = mra_attention(pad(query, 7.0), pad(key, 7.0), pad(value, 7.0), pad(mask, 0), attributes)
    torch.testing.assert_close(padded[:, : mask.shape[1]], together, atol=1e-9, rtol=1e-9)
    for b in range(len(mask)):
        end = max(1, int(mask[b].nonzero().max()) + 1) if mask[b].any() else 1
        alone = mra_attention(
            query[b : b + 1, :end], key[b : b + 1, :end], value[b : b + 1, :end], mask[b : b + 1, :end], attributes
        )
        torch.testing.assert_close(alone[0], together[b, :end], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_gradients_with_the_selection_fixed(mode: str) -> None:
    attributes = Attributes(2, 3, 0.3, mode, initial_prior_diagonal_n_blocks=1)
    case = make_case(attributes, batch=2, length=37, head_size=8, masking="holes")
    query, key, value, mask = tensors(case, torch.float64)
    leaves = [x.nan_to_num(0.0).requires_grad_() for x in (query, key, value)]
    _, selection = mra_attention(*leaves, mask, attributes, return_selection=True)

    def fixed(*inputs: torch.Tensor) -> torch.Tensor:
        return mra_attention(*inputs, mask, attributes, selection=selection)

    assert torch.autograd.gradcheck(fixed, leaves, fast_mode=True)


@given(op_cases())
def test_the_written_out_gradient_is_that_of_autograd_and_zero_where_masked(case: OpCase) -> None:
    query, key, value, mask = tensors(case, torch.float64)  # NaN where masked
    leaves = [x.requires_grad_() for x in (query, key, value)]
    context = mra_attention(query, key, value, mask, case.attributes)
    grad = torch.randn(context.shape, dtype=context.dtype, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(context, leaves, grad)
    actual = mra_attention_backward(grad, query.detach(), key.detach(), value.detach(), mask, case.attributes)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
        assert (theirs[mask == 0] == 0).all()
        assert (ours[mask == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_masked_tokens_hold_changes_no_bit(dtype: torch.dtype) -> None:
    case = make_case(Attributes(2, 4, 0.25), batch=3, length=90, head_size=16, masking="right padding")
    query, key, value, mask = tensors(case, dtype)
    expected = mra_attention(*(x.nan_to_num(0.0) for x in (query, key, value)), mask, case.attributes)
    assert torch.equal(mra_attention(query, key, value, mask, case.attributes), expected)
    infinite = [x.masked_fill(mask[..., None] == 0, math.inf) for x in (query, key, value)]
    assert torch.equal(mra_attention(*infinite, mask, case.attributes), expected)
    assert (expected[mask == 0] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_bad_value_at_a_real_token_stays_in_its_row_and_head(which: int, bad: float) -> None:
    attributes = Attributes(2, 3, 0.25, initial_prior_first_n_blocks=1)
    inputs = list(tensors(make_case(attributes, batch=2, length=70, head_size=8), torch.float32))
    expected = mra_attention(*inputs, attributes)
    inputs[which][1, 40, 3] = bad  # batch row 1, head 0
    context, selection = mra_attention(*inputs, attributes, return_selection=True)
    assert torch.equal(context[0], expected[0])
    assert torch.equal(context[1, :, 8:], expected[1, :, 8:])
    assert not torch.equal(context[1, :, :8], expected[1, :, :8])
    assert (selection.chosen.sum((-1, -2)) == 3).all()


def test_ties_go_to_the_lower_flat_index_and_all_tied_pairs_are_excluded() -> None:
    attributes = Attributes(num_heads=1, num_blocks=6, scale=1.0)
    zeros = torch.zeros(1, 4 * BLOCK_SIZE, 8)
    value = torch.arange(4.0).repeat_interleave(BLOCK_SIZE)[None, :, None].expand(1, -1, 8)
    context, selection = mra_attention(zeros, zeros, value, torch.ones(1, 128), attributes, return_selection=True)
    assert selection.chosen.flatten().nonzero().flatten().tolist() == list(range(6))
    assert selection.excluded.all()
    assert selection.margin.item() == 0
    # Block row 0 averages blocks 0 to 3, row 1 blocks 0 and 1; the others were tied out of every weight.
    torch.testing.assert_close(context[0, ::BLOCK_SIZE, 0], torch.tensor([1.5, 0.5, 0.0, 0.0]), atol=1e-5, rtol=0)


def test_priors_outrank_any_logit_and_dead_pairs_come_last() -> None:
    attributes = Attributes(1, 5, 1.0, initial_prior_first_n_blocks=1, initial_prior_diagonal_n_blocks=3)
    query = torch.randn(1, 4 * BLOCK_SIZE, 8) * 30
    mask = torch.ones(1, 4 * BLOCK_SIZE)
    mask[:, 3 * BLOCK_SIZE :] = 0
    _, selection = mra_attention(query, -query, query, mask, attributes, return_selection=True)
    assert selection.score_class[0, 0].tolist() == [[3, 2, 1, -1], [2, 1, 1, -2], [1, 1, 1, -1], [-1, -2, -1, -1]]
    assert selection.chosen[0, 0, 0, :2].all()
    assert selection.chosen[0, 0, 1, 0]
    assert not selection.chosen[0, 0, 3].any()
    assert not selection.chosen[0, 0, :, 3].any()


def test_a_forced_selection_is_used_and_returned() -> None:
    attributes = Attributes(1, 4, 0.3)
    case = make_case(attributes, batch=1, length=128, head_size=8)
    chosen = np.eye(4, dtype=bool)[None, None]
    flags = torch.from_numpy(chosen)
    forced = Selection(flags, flags, torch.zeros(1, 1, 4, 4, dtype=torch.int64), torch.zeros(1, 1, 4, 4), torch.zeros(1, 1))
    context, used = mra_attention(*tensors(case, torch.float64), attributes, selection=forced, return_selection=True)
    assert used is forced
    dense = dense_attention(*case.arrays, attributes, chosen, chosen)
    np.testing.assert_allclose(context.numpy(), dense.context, atol=1e-9)
    assert not np.array_equal(dense.chosen, dense_attention(*case.arrays, attributes).chosen)


def test_huge_logits_stay_finite_and_exact() -> None:
    """Every logit is far below 0 or far above: a sum that is not relative to the token's own largest weight would be 0 or inf."""
    attributes = Attributes(1, 16, 1.0)
    query = torch.full((1, 128, 8), 30.0)
    value = torch.randn(1, 128, 8)
    for key in (query, -query):
        context = mra_attention(query, key, value, torch.ones(1, 128), attributes)
        torch.testing.assert_close(context, value.mean(1, keepdim=True).expand_as(context), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 40)}, r"query has shape \(2, 40\)"),
        ({"key": torch.zeros(2, 41, 16)}, r"key has shape \(2, 41, 16\), query \(2, 40, 16\)"),
        ({"mask": torch.ones(2, 41)}, r"mask has shape \(2, 41\)"),
        ({"value": torch.zeros(2, 40, 16, dtype=torch.float64)}, "value is torch.float64, query torch.float32"),
        (
            {name: torch.zeros(2, 40, 16, dtype=torch.int64) for name in ("query", "key", "value")},
            "query is torch.int64: use one of",
        ),
        ({name: torch.zeros(0, 40, 16) for name in ("query", "key", "value")} | {"mask": torch.ones(0, 40)}, "1 or more"),
        ({name: torch.zeros(2, 40, 15) for name in ("query", "key", "value")}, "multiple of num_heads"),
        ({name: torch.zeros(2, 40, 14) for name in ("query", "key", "value")}, "head size is 7"),
        ({"mask": torch.ones(2, 40, device="meta")}, "mask is on meta, query on cpu"),
    ],
)
def test_inputs_outside_the_contract_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    inputs = {name: torch.zeros(2, 40, 16) for name in ("query", "key", "value")} | {"mask": torch.ones(2, 40)} | change
    with pytest.raises(ContractError, match=message):
        mra_attention(**inputs, attributes=Attributes(2, 4, 0.25))
