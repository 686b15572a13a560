"""Everything before the attention launch, emulated: pool, selection above and below 128 blocks, and the low-resolution sections."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import contract_selection
import emulated
import ml_dtypes
import numpy as np
import oracles
import pytest
from test_emulated_kernels import DTYPES, as_dtype, check_selection, check_values

from mra_export.contract import BLOCK_SIZE, Attributes

SECTIONS = (
    *("real", "query_mean", "key_mean", "value_sum", "logit", "row_key", "row_start", "column"),
    *("excluded", "work", "arrivals", "partial", "low_vector", "low_total", "low_largest"),
)


@dataclass(frozen=True)
class Workspace:
    """What one emulated call leaves: float32 arrays and the excluded pairs."""

    value_sum: np.ndarray  # (BH, nb, D)
    low_vector: np.ndarray  # (BH, nb, D)
    low_total: np.ndarray  # (BH, nb)
    low_largest: np.ndarray  # (BH, nb)
    excluded: np.ndarray  # (BH, nb, nb) bool


def run(arrays: tuple[np.ndarray, ...], attributes: Attributes, seed: int = 1) -> Workspace:
    """mra_attention_cuda in a workspace that is looked at afterwards."""
    lib, params = emulated.library(), emulated.params_for(arrays[0], attributes)
    memory = emulated.aligned_bytes(emulated.workspace_size(params), 0xFF)
    context = np.empty_like(arrays[0])
    lib.mra_emulation_seed(seed)
    assert lib.mra_attention_cuda(params, *(x.ctypes.data for x in (*arrays, context, memory)), memory.size, None) == 0
    numbers = (ctypes.c_uint64 * 64)()
    assert lib.mra_emulation_workspace_sections(params, numbers) == len(SECTIONS)
    batch, length, hidden = arrays[0].shape
    heads, nb = batch * attributes.num_heads, -(-length // BLOCK_SIZE)
    words = -(-nb // 32)

    def section(name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        n = SECTIONS.index(name)
        return memory[numbers[2 * n] :][: numbers[2 * n + 1]].view(dtype).reshape(shape).copy()

    bits = np.unpackbits(section("excluded", "<u4", (heads, nb, words)).view(np.uint8), axis=-1, bitorder="little")
    pooled = (heads, nb, hidden // attributes.num_heads)
    return Workspace(
        section("value_sum", "<f4", pooled),
        section("low_vector", "<f4", pooled),
        section("low_total", "<f4", (heads, nb)),
        section("low_largest", "<f4", (heads, nb)),
        bits[:, :, :nb] != 0,
    )


def check_low(arrays: tuple[np.ndarray, ...], attributes: Attributes) -> Workspace:
    """The low-resolution sections are the float64 sums over what was not excluded.

    Tolerance: logits are the contract's, bit for bit, so weights are off by some ulps of their exponents, which reach 80; tf32
    rounds each weight and each block sum by 2^-11 at most, and tensor cores truncate their sums.
    """
    query, key, value, mask = arrays
    got = run(arrays, attributes)
    batch, length, hidden = query.shape
    heads, nb = attributes.num_heads, -(-length // BLOCK_SIZE)
    real = np.zeros((batch, nb * BLOCK_SIZE), bool)
    real[:, :length] = mask != 0
    count = real.reshape(batch, nb, BLOCK_SIZE).sum(-1)
    tokens = np.zeros((batch, nb * BLOCK_SIZE, hidden))
    tokens[:, :length] = np.where(mask[:, :, None] != 0, value.astype(np.float64), 0)
    block_sum = tokens.reshape(batch, nb, BLOCK_SIZE, heads, -1).sum(2)
    relative = 2e-5 if str(query.dtype) == "float32" else 2.0**-10 * 1.05
    for b in range(batch):
        means = [contract_selection._block_means(x[b], real[b], heads) for x in (query, key)]
        for h in range(heads):
            n = b * heads + h
            logit = contract_selection._logits(means[0][h], means[1][h], attributes.scale).astype(np.float64)
            logit = np.where(got.excluded[n] | (count[b] == 0)[None, :], -np.inf, logit)
            largest = logit.max(1)
            np.testing.assert_array_equal(got.low_largest[n], largest.astype(np.float32))
            weight = np.exp(logit - np.where(np.isfinite(largest), largest, 0)[:, None])
            want, size = weight @ block_sum[b, :, h], weight @ np.abs(block_sum[b, :, h])
            assert (np.abs(got.low_vector[n] - want) <= relative * size).all(), np.nanmax(np.abs(got.low_vector[n] - want) / size)
            np.testing.assert_allclose(got.low_total[n], weight @ count[b], rtol=relative)
    return got


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("length", "head_size", "budget"),
    [(20, 8, 1), (100, 9, 3), (500, 64, 20), (1000, 72, 40), (1500, 33, 30), (2048, 130, 10), (2100, 8, 99), (4096, 16, 99)],
)
def test_low_resolution(length, head_size, budget, dtype):
    attributes = Attributes(2 if length < 1000 else 1, budget, 0.3, "full", 1, 1)
    case = oracles.make_case(attributes, 1, length, head_size, "holes", spread=0.5, seed=length)
    case.mask[:, length // 2 : length // 2 + 70] = 0  # a dead block or two
    check_low(as_dtype(case, dtype), attributes)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("head_size", [8, 65, 256])
def test_low_resolution_of_more_than_128_blocks(head_size, dtype):
    attributes = Attributes(1, 50, 0.3 * (8 / head_size) ** 0.5, "full")
    case = oracles.make_case(attributes, 1, 129 * 32 + 9, head_size, "holes", spread=0.5, seed=3)
    case.mask[:, 1000:1100] = 0
    check_low(as_dtype(case, dtype), attributes)


@pytest.mark.parametrize("length", [96, 130 * 32])
def test_low_resolution_of_nothing(length):
    """Where the last tie takes all, or with the whole budget, nothing is left to low resolution."""
    budgets = (1, 9) if length == 96 else (1,)
    for budget in budgets:
        attributes = Attributes(1, budget, 0.3)
        case = oracles.make_case(attributes, 1, length, 8, seed=3)
        if budget == 1:
            case.query[:] = 0
        got = check_low(as_dtype(case, "bfloat16"), attributes)
        assert got.excluded.all()
        assert (got.low_total == 0).all()
        assert (got.low_vector == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [200, 1100, 2500, 130 * 32])
def test_sums_that_are_not_finite_reach_the_rows_that_weigh_them_only(length, dtype):
    """One block's sum overflows in dimension 5, another's is NaN in dimension 0 (infinities of both signs)."""
    nb = -(-length // 32)
    attributes = Attributes(1, 2 * nb, 0.02)  # no weight is so small that it is 0
    case = oracles.make_case(attributes, 1, length, 12, spread=0.5, seed=3)
    arrays = as_dtype(case, dtype)
    clean = run(arrays, attributes)
    times = clean.excluded[0].sum(0)
    infinite, nan = np.flatnonzero((times > 0) & (times < nb))[[0, -1]]
    value = arrays[2]
    value[:, 32 * infinite : 32 * infinite + 32, 5] = 3e38
    value[0, 32 * nan, 0], value[0, 32 * nan + 1, 0] = np.inf, -np.inf
    got = run(arrays, attributes)
    assert np.isposinf(got.value_sum[0, infinite, 5])
    assert np.isnan(got.value_sum[0, nan, 0])
    for block, dim, is_bad in ((infinite, 5, np.isposinf), (nan, 0, np.isnan)):
        weighed = ~clean.excluded[0, :, block]
        assert is_bad(got.low_vector[0, weighed, dim]).all()
        np.testing.assert_array_equal(got.low_vector[0, ~weighed, dim], clean.low_vector[0, ~weighed, dim])
    others = [d for d in range(12) if d not in (0, 5)]
    np.testing.assert_array_equal(got.low_vector[..., others], clean.low_vector[..., others])


def test_a_sum_that_only_tf32_makes_infinite_counts_as_it_is():
    attributes = Attributes(1, 1, 0.3)
    case = oracles.make_case(attributes, 1, 96, 8, spread=0.5, seed=3)
    arrays = as_dtype(case, "bfloat16")
    arrays[2][:] = 0
    arrays[2][0, [64, 65], 1] = ml_dtypes.bfloat16(3.38e38), ml_dtypes.bfloat16(2e36)  # together above the largest tf32
    got = run(arrays, attributes)
    assert np.isfinite(got.low_vector).all()
    assert got.low_vector.max() > 1e36


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_stays_in_its_row_and_head_above_128_blocks(bad, dtype):
    attributes = Attributes(2, 200, 0.25)
    case = oracles.make_case(attributes, 2, 129 * 32, 8, seed=4)
    arrays = as_dtype(case, dtype)
    clean = emulated.attention(*arrays, attributes)
    for tensor in arrays[:3]:
        tensor[1, 40, 8 + 3] = bad  # batch row 1, head 1
    check_selection(arrays, attributes)
    context = emulated.attention(*arrays, attributes)
    np.testing.assert_array_equal(context[0], clean[0])
    np.testing.assert_array_equal(context[1, :, :8], clean[1, :, :8])
    assert not np.array_equal(context[1, :, 8:], clean[1, :, 8:])


@pytest.mark.parametrize("budget", [1, 100, 5000, 8193, 9000, 16899, 16900])
@pytest.mark.parametrize("pattern", ["all equal", "repeating", "rising", "random"])
def test_candidates_that_overflow(budget, pattern):
    """130 x 130 pairs: more than fit on chip, so some are dropped on the way; above 8192 chosen ones logits are read repeatedly.

    Rising: each row has better pairs than the one before, so that nothing can be dropped early.
    """
    nb, rng = 130, np.random.default_rng(0)
    attributes = Attributes(1, budget, 0.25, "sparse", padding_invariant=True)
    query, key = rng.normal(size=(2, 1, nb * 32, 8)).astype(np.float32)
    if pattern == "all equal":
        query[:], key[:] = 1, -2
    elif pattern == "repeating":
        query, key = (np.tile(x[:, : 13 * 32], (1, 10, 1)) for x in (query, key))
    elif pattern == "rising":
        query[0] = np.linspace(3, 0.01, nb).repeat(32)[:, None]
        key[0] = np.linspace(-1, -0.5, nb).repeat(32)[:, None]
    mask = np.ones((1, nb * 32), np.int32)
    chosen, excluded, _ = check_selection((query, key, key, mask), attributes, seed=budget)
    assert chosen.sum() == budget
    if pattern == "all equal":
        assert excluded.all()


@pytest.mark.parametrize("padding_invariant", [False, True])
@pytest.mark.parametrize(("length", "budget"), [(40 * 32, 500), (100 * 32 - 3, 2000), (140 * 32, 2100)])
def test_budget_that_reaches_dead_pairs(length, budget, padding_invariant):
    """More pairs to choose than live ones: the last one's class is one of dead pairs."""
    attributes = Attributes(1, budget, 0.25, "full", 2, 3, padding_invariant)
    case = oracles.make_case(attributes, 1, length, 8, spread=0.5, seed=8)
    case.mask[:, 20 * 32 :] = 0
    case.mask[:, 64:96] = 0
    chosen, _, _ = check_selection(case.arrays, attributes)
    assert chosen[0, 0, 20:].any()
    check_values(case.arrays, attributes)


@pytest.mark.parametrize(("first", "diagonal"), [(0, 1), (3, 0), (33, 9), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("length", [30 * 32, 70 * 32 + 1, 130 * 32])
def test_priors(length, first, diagonal):
    nb = -(-length // 32)
    attributes = Attributes(1, nb * 5, 0.25, "sparse", first, diagonal)
    case = oracles.make_case(attributes, 1, length, 8, "holes", spread=0.5, seed=8)
    case.mask[:, 500:600] = 0
    check_selection(case.arrays, attributes, seed=first)


def test_rows_of_more_than_32_words():
    """1056 blocks: row words no longer fit a warp, neither while lists are written nor where the last tie takes part of a row."""
    attributes = Attributes(1, 3000, 0.25, "sparse", 1)
    query, key = np.zeros((2, 1, 1056 * 32, 8), np.float32)
    query[..., 0] = np.random.default_rng(1).normal(size=1056).repeat(32)
    mask = np.ones((1, 1056 * 32), np.int32)
    key[..., 0] = 1  # every score is 0
    chosen, _, _ = check_selection((query, key, key, mask), attributes)
    np.testing.assert_array_equal(chosen[0, 0, 0], True)  # twice preferred, or once
    assert chosen.sum() == 3000


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(("heads", "head_size"), [(2, 16), (3, 40)])
def test_unaligned_tensors_give_the_same_bits(heads, head_size, dtype):
    """16-byte loads where every head's rows allow them, else loads of elements: the same sums."""
    attributes = Attributes(heads, 9, 0.25)
    arrays = as_dtype(oracles.make_case(attributes, 2, 130, head_size, "holes", seed=5), dtype)
    want = [emulated.selection(arrays[0], arrays[1], arrays[3], attributes), run(arrays, attributes)]

    def shifted(x: np.ndarray, elements: int) -> np.ndarray:
        memory = np.empty(x.nbytes + 64, np.uint8)
        start = -memory.ctypes.data % 16 + elements * x.itemsize
        view = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
        view[:] = x
        return view

    for shifts in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 3, 1)):
        moved = (*(shifted(x, n) for x, n in zip(arrays[:3], shifts, strict=True)), arrays[3])
        for a, b in zip(emulated.selection(moved[0], moved[1], moved[3], attributes), want[0], strict=True):
            np.testing.assert_array_equal(a, b)
        got = run(moved, attributes)
        for name in Workspace.__annotations__:
            assert getattr(got, name).tobytes() == getattr(want[1], name).tobytes(), name


@pytest.mark.parametrize("length", [36 * 32, 130 * 32])
def test_order_of_execution_does_not_matter(length):
    attributes = Attributes(1, 700, 0.3, "full", 1)
    case = oracles.make_case(attributes, 1, length, 8, "holes", spread=0.5, seed=9)
    arrays = as_dtype(case, "float16")
    want = run(arrays, attributes, seed=0)
    for seed in range(1, 4):
        got = run(arrays, attributes, seed=seed)
        for name in Workspace.__annotations__:
            assert getattr(got, name).tobytes() == getattr(want, name).tobytes(), name
