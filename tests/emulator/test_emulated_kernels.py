"""The CUDA kernels, emulated on the host, against docs/operator.md: values, selection bit for bit, order of execution, launches."""

from __future__ import annotations

import math

import contract_selection
import emulated
import ml_dtypes
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mra_export import kernel
from mra_export.contract import Attributes

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
HALF_ULP = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float32": 0.0, "float16": 2.0**-24, "bfloat16": 0.0}


def as_dtype(case: oracles.OpCase, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return (*(x.astype(DTYPES[dtype]) for x in (case.query, case.key, case.value)), case.mask)


def check_values(arrays: tuple[np.ndarray, ...], attributes: Attributes, seed: int = 1) -> None:
    """The context is the float64 formula's for the blocks that the kernel chose.

    Tolerance: a float32 logit of D terms is off by a few ulps of the largest one possible, weights by as much relative to
    themselves, and the result rounds once to T. Everything between is float32, whatever T is.
    """
    query, key, value, mask = arrays
    context = emulated.attention(*arrays, attributes, seed=seed).astype(np.float64)
    chosen, excluded, _ = emulated.selection(query, key, mask, attributes, seed=seed)
    exact = tuple(x.astype(np.float64) for x in (query, key, value))
    want = oracles.dense_attention(*exact, mask, attributes, chosen, excluded).context
    real = mask != 0
    if not real.any():
        assert (context == 0).all()
        return
    heads = attributes.num_heads
    norms = [np.linalg.norm(x[real].reshape(real.sum(), heads, -1), axis=-1).max() for x in exact[:2]]
    largest_logit = attributes.scale * norms[0] * norms[1]
    value_scale = np.abs(exact[2][real]).max()
    dtype = str(query.dtype)
    tolerance = value_scale * 4 * 2.0**-24 * (8 + largest_logit) + HALF_ULP[dtype] * np.abs(want) * 1.001 + SMALLEST[dtype]
    assert np.isfinite(context).all()
    assert (np.abs(context - want) <= tolerance).all(), (np.abs(context - want) / tolerance).max()


def check_selection(arrays: tuple[np.ndarray, ...], attributes: Attributes, seed: int = 1) -> contract_selection.Blocks:
    """Chosen, excluded and score equal the literal contract's and the CPU kernel's, bit for bit."""
    query, key, _, mask = arrays
    got = emulated.selection(query, key, mask, attributes, seed=seed)
    references = [contract_selection.select(query, key, mask, attributes)]
    if kernel.available():
        references.append(kernel.selection(query, key, mask, attributes))
    for want in references:
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
        np.testing.assert_array_equal(got[2], want[2])  # -0 equals +0 here, NaN equals NaN
    return got


@settings(max_examples=60)
@given(case=oracles.op_cases(), dtype=st.sampled_from(sorted(DTYPES)), seed=st.integers(0, 2**32))
def test_any_call(case, dtype, seed):
    arrays = as_dtype(case, dtype)
    check_selection(arrays, case.attributes, seed)
    check_values(arrays, case.attributes, seed)


def test_cpu_kernel_is_compared_with():
    if not kernel.available():
        pytest.skip("libmra_attention is not built: selection was compared with the literal contract only")
    assert kernel.cpu_target()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("length", [1, 33, 100, 512])
def test_lengths(length, mode, dtype):
    nb = math.ceil(length / 32)
    attributes = Attributes(2, max(1, nb * nb // 5), 0.125, mode, initial_prior_diagonal_n_blocks=1)
    arrays = as_dtype(oracles.make_case(attributes, 1, length, 40, "holes", spread=0.5, seed=length), dtype)
    check_selection(arrays, attributes)
    check_values(arrays, attributes)


@pytest.mark.parametrize("head_size", [8, 9, 31, 33, 64, 65, 127, 128, 129, 255, 256])
def test_head_sizes(head_size):
    attributes = Attributes(2, 5, 0.125)
    arrays = as_dtype(oracles.make_case(attributes, 2, 100, head_size, "holes", spread=0.3, seed=head_size), "float32")
    check_selection(arrays, attributes)
    check_values(arrays, attributes)


@pytest.mark.parametrize(("mode", "first", "diagonal"), [("full", 0, 0), ("full", 3, 1), ("sparse", 2, 5)])
def test_more_than_128_blocks(mode, first, diagonal):
    """The path with a launch of its own for the logits; with priors, rows of 130 blocks are split into chunks and merged."""
    attributes = Attributes(1, 640, 0.35, mode, first, diagonal)
    length = 130 * 32 - 5
    case = oracles.make_case(attributes, 1, length, 8, "holes", spread=0.4, seed=3)
    case.mask[:, 1000:1100] = 0  # dead blocks
    arrays = as_dtype(case, "float32")
    chosen, _, _ = check_selection(arrays, attributes)
    emulated.launches()
    context = emulated.attention(*arrays, attributes, seed=1)
    assert len(emulated.launches()) == 4
    np.testing.assert_array_equal(context, emulated.attention(*arrays, attributes, seed=2))
    if first:
        assert chosen[0, 0].sum(1).max() > 2 * 32  # three chunks or more
    check_values(arrays, attributes)


def test_longest():
    """N = 16384, too long for the dense formula: compared with the CPU kernel."""
    if not kernel.available():
        pytest.skip("libmra_attention is not built")
    attributes = Attributes(1, 1100, 0.35, "full", 1, 1)
    case = oracles.make_case(attributes, 1, 16384, 8, "holes", spread=0.2, seed=6)
    check_selection(case.arrays, attributes)
    context = emulated.attention(*case.arrays, attributes)
    np.testing.assert_allclose(context, kernel.attention(*case.arrays, attributes), atol=2e-5)


@pytest.mark.parametrize("padding_invariant", [False, True])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_split_rows(dtype, padding_invariant):
    """Rows of 40 blocks among rows of a few: two chunks each, the second one shorter."""
    attributes = Attributes(1, 150, 0.3, "full", 2, 1, padding_invariant)
    arrays = as_dtype(oracles.make_case(attributes, 2, 40 * 32, 16, "right padding", spread=0.5, seed=5), dtype)
    check_selection(arrays, attributes)
    check_values(arrays, attributes)


def test_full_budget_is_exact_attention():
    attributes = Attributes(2, 10**12, 0.2)
    case = oracles.make_case(attributes, 1, 150, 24, "holes", seed=1)
    context = emulated.attention(*case.arrays, attributes)
    real = case.mask[0] != 0
    for head in range(2):
        columns = slice(24 * head, 24 * head + 24)
        q, k, v = (x[0, real, columns].astype(np.float64) for x in (case.query, case.key, case.value))
        weight = np.exp(0.2 * q @ k.T - (0.2 * q @ k.T).max(1, keepdims=True))
        np.testing.assert_allclose(context[0, real, columns], weight @ v / (weight.sum(1, keepdims=True) + 1e-6), atol=2e-5)


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_order_of_execution_does_not_matter(mode):
    """The same bits in every order of threads and CTAs, from any workspace content; split rows included."""
    attributes = Attributes(2, 100, 0.3, mode, 2, 1)
    case = oracles.make_case(attributes, 1, 36 * 32, 8, "holes", spread=0.5, seed=9)
    want = emulated.attention(*case.arrays, attributes, seed=0)
    for seed, fill in ((1, 0xFF), (2, 0x00), (3, 0x7F), (4, 0x01)):
        got = emulated.attention(*case.arrays, attributes, seed=seed, fill=fill)
        assert got.tobytes() == want.tobytes()


def test_all_masked():
    attributes = Attributes(2, 3, 0.125)
    case = oracles.make_case(attributes, 2, 70, 8, "one row all masked", seed=2)
    dead = int(np.flatnonzero(case.mask.sum(1) == 0)[0])
    context = emulated.attention(*case.arrays, attributes)
    assert (context[dead] == 0).all()
    assert (context[1 - dead] != 0).all()
    check_selection(case.arrays, attributes)
    check_values(case.arrays, attributes)


def test_mask_values_other_than_one_count_as_one():
    attributes = Attributes(1, 3, 0.125)
    case = oracles.make_case(attributes, 1, 70, 8, "holes", seed=2)
    odd = case.mask * np.array([1, -1, 2, 2**31 - 1, -(2**31), 256, 65536], np.int64)[np.arange(70) % 7]
    got = emulated.attention(case.query, case.key, case.value, odd.astype(np.int32), attributes)
    np.testing.assert_array_equal(got, emulated.attention(*case.arrays, attributes))


@pytest.mark.parametrize("budget", [1, 7, 36, 37, 100, 143, 144])
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_ties_go_to_the_lower_index(budget, mode):
    """Blocks that repeat exactly: whole groups of pairs have equal scores."""
    attributes = Attributes(1, budget, 0.25, mode)
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=(3, 1, 3 * 32, 8)).astype(np.float32)
    query, key, value = np.tile(pattern, (1, 1, 4, 1))
    mask = np.ones((1, 12 * 32), np.int32)
    chosen, excluded, _ = check_selection((query, key, value, mask), attributes)
    assert chosen.sum() == budget
    if budget not in (36, 144):
        assert excluded.sum() > budget
    check_values((query, key, value, mask), attributes)


def test_zeros_and_signed_zeros_tie():
    attributes = Attributes(1, 5, 0.25)
    query, key = np.zeros((2, 1, 128, 8), np.float32)
    query[:, :64] = 1e-30
    key[:, 32:64] = -1e-30  # products underflow to -0; the other pairs' logits, and the row maxima, are +0
    query[:, 96:] = -0.0
    mask = np.ones((1, 128), np.int32)
    chosen, excluded, _ = check_selection((query, key, query, mask), attributes)
    np.testing.assert_array_equal(np.flatnonzero(chosen), np.arange(5))
    assert excluded.all()


def test_denormal_scores_are_told_apart():
    attributes = Attributes(1, 3, 1.0)
    query, key = np.zeros((2, 1, 96, 8), np.float32)
    query[..., 0] = 1.0
    for block, size in enumerate((1, 3, 2)):
        key[:, 32 * block : 32 * block + 32, 0] = size * 2e-45
    mask = np.ones((1, 96), np.int32)
    chosen, _, _ = check_selection((query, key, query, mask), attributes)
    np.testing.assert_array_equal(chosen[0, 0, :, 1], [True, True, True])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_nan_stays_in_its_row_and_head(bad, where, mode):
    attributes = Attributes(2, 4, 0.25, mode, 0, 1)
    case = oracles.make_case(attributes, 2, 130, 8, seed=4)
    clean = emulated.attention(*case.arrays, attributes)
    getattr(case, where)[1, 40, 8 + 3] = bad  # batch row 1, head 1
    check_selection(case.arrays, attributes)
    context = emulated.attention(*case.arrays, attributes)
    np.testing.assert_array_equal(context[0], clean[0])
    np.testing.assert_array_equal(context[1, :, :8], clean[1, :, :8])
    assert not np.array_equal(context[1, :, 8:], clean[1, :, 8:])


def test_everything_nan_ends():
    attributes = Attributes(1, 7, 0.25)
    query = np.full((1, 200, 8), np.nan, np.float32)
    mask = np.ones((1, 200), np.int32)
    chosen, _, _ = check_selection((query, query, query, mask), attributes)
    np.testing.assert_array_equal(np.flatnonzero(chosen), np.arange(7))
    assert np.isnan(emulated.attention(query, query, query, mask, attributes)[:, :32]).all()  # block row 0, which has all 7


def test_infinite_sum_of_an_excluded_block_has_no_effect():
    """Block sums overflow float32 where the weighted sum does not: an excluded block's sum must not meet a weight of 0."""
    attributes = Attributes(1, 4, 1.0)
    case = oracles.make_case(attributes, 1, 64, 8, spread=5.0, seed=4)
    case.value[:] = 3e37
    context = emulated.attention(*case.arrays, attributes)
    np.testing.assert_allclose(context, 3e37, rtol=1e-5)


def test_huge_logits():
    attributes = Attributes(1, 5, 1.0)
    case = oracles.make_case(attributes, 1, 100, 8, spread=30.0, seed=4)
    check_selection(case.arrays, attributes)
    assert np.isfinite(emulated.attention(*case.arrays, attributes)).all()


@pytest.mark.parametrize(("length", "budget", "count"), [(1, 1, 3), (512, 64, 3), (1100, 80, 3), (4096, 300, 3), (4097, 300, 4)])
def test_launches_depend_on_shapes_only(length, budget, count):
    """Data decides nothing that a CUDA graph would have frozen."""
    attributes = Attributes(1, budget, 0.35, "sparse", 1, 1)
    seen = []
    for spread, masking in ((0.1, "none"), (1.0, "right padding")):
        case = oracles.make_case(attributes, 1, length, 8, masking, spread)
        emulated.launches()
        emulated.attention(*case.arrays, attributes)
        seen.append(emulated.launches())
    assert seen[0] == seen[1]
    assert len(seen[0]) == count


@pytest.mark.parametrize("length", [40, 4100])
def test_refused_launch_is_an_error(length):
    attributes = Attributes(1, 5, 0.35)
    case = oracles.make_case(attributes, 1, length, 8)
    for step in range(3 if length == 40 else 4):
        emulated.library().mra_emulation_fail_after(step)
        with pytest.raises(emulated.StatusError, match="CUDA launch failed") as error:
            emulated.attention(*case.arrays, attributes)
        assert error.value.status == 13
    emulated.library().mra_emulation_fail_after(-1)
    emulated.attention(*case.arrays, attributes)


def test_more_heads_than_a_grid_axis_holds():
    """B * H = 70000: CTAs lie along the one axis that allows 2^31 - 1. The last launches are refused to save time."""
    attributes = Attributes(1, 1, 0.35)
    case = oracles.make_case(attributes, 70000, 1, 8)
    emulated.launches()
    emulated.library().mra_emulation_fail_after(1)
    with pytest.raises(emulated.StatusError, match="the test asked for it"):
        emulated.attention(*case.arrays, attributes)
    assert [launch[:2] for launch in emulated.launches()] == [(70000, 128), (70000, 512)]


def good_params(**changes: int | float) -> kernel.Params:
    params = kernel.make_params(Attributes(2, 4, 0.25), "float32", 1, 40, 8)
    for name, value in changes.items():
        setattr(params, name, value)
    return params


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"struct_size": 4}, "struct_size"),
        ({"dtype": 7}, "dtype"),
        ({"batch": 0}, "batch"),
        ({"length": 0}, "length"),
        ({"num_heads": 0}, "num_heads"),
        ({"head_size": 7}, "head_size"),
        ({"head_size": 257}, "head_size"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"approx_mode": 2}, "approx_mode"),
        ({"initial_prior_first_n_blocks": -1}, "initial_prior_first_n_blocks"),
        ({"initial_prior_diagonal_n_blocks": -1}, "initial_prior_diagonal_n_blocks"),
        ({"scale": math.nan}, "scale"),
        ({"padding_invariant": 2}, "padding_invariant"),
        ({"float32_mode": 2}, "float32_mode MRA_FLOAT32_FMA or MRA_FLOAT32_TF32X3"),
        ({"length": 131073}, "lower batch or length"),  # nb = 4097
        ({"batch": 2**31, "length": 1}, "lower batch or length"),  # more CTAs than a grid holds
        ({"batch": 2**62}, "lower batch or length"),
    ],
)
def test_parameters_outside_the_contract(changes, message):
    with pytest.raises(emulated.StatusError, match=message):
        emulated.workspace_size(good_params(**changes))


def test_memory_outside_the_contract():
    lib, params = emulated.library(), good_params()
    memory = emulated.aligned_bytes(1 << 20, 0)
    size = emulated.workspace_size(params)
    address = memory.ctypes.data
    null, short_of = "a required pointer is NULL", "workspace is too small or not 64-byte aligned"
    good = [address] * 6
    calls = [([*good[:n], None, *good[n + 1 :]], size, null) for n in range(6)]
    calls += [(good, size - 1, short_of), ([*good[:5], address + 32], size, short_of)]
    for pointers, bytes_given, message in calls:
        status = lib.mra_attention_cuda(params, *pointers, bytes_given, None)
        assert message in lib.mra_status_string(status).decode()
    for n in (0, 1, 2, 3, 5):  # the score, 4, may be NULL
        status = lib.mra_attention_cuda_selection(params, *good[:n], None, *good[n + 1 :], size, None)
        assert null in lib.mra_status_string(status).decode()
    assert lib.mra_attention_cuda_workspace_size(params, None) != 0
    assert lib.mra_attention_cuda_workspace_size(None, None) != 0


def test_workspace_size_grows_with_shapes_only():
    case = good_params()
    size = emulated.workspace_size(case)
    assert size == emulated.workspace_size(good_params(scale=0.5, dtype=1))
    assert emulated.workspace_size(good_params(length=100)) > size
    # Nothing N x N, however large the budget: below 40 float copies of the inputs and the nb x nb logits.
    for length, budget in ((4096, 1024), (4096, 128 * 128), (16384, 2048), (16384, 512 * 512)):
        params = good_params(length=length, num_blocks=budget, head_size=64)
        heads, nb = 2, length // 32
        assert emulated.workspace_size(params) < heads * (4 * nb * nb * 3 + 2 * 4 * length * 64 * 1.3) + 10**5
