"""The attention kernel of float16 and bfloat16 heads of up to 128 dimensions, on emulated tensor cores and asynchronous copies."""

from __future__ import annotations

import emulated
import ml_dtypes
import numpy as np
import oracles
import pytest
from test_emulated_kernels import as_dtype, check_selection, check_values

from mra_export.contract import Attributes

DTYPES = ("float16", "bfloat16")
ALIGNED, ODD = (8, 16, 32, 40, 64, 96, 128), (9, 12, 31, 63, 100, 127)
"""Head sizes whose rows can be copied 16 bytes at a time, and others."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("head_size", [*ALIGNED, *ODD])
def test_head_sizes(head_size, mode, dtype):
    attributes = Attributes(2, 6, 0.125, mode)
    arrays = as_dtype(oracles.make_case(attributes, 2, 100, head_size, "holes", spread=0.4, seed=head_size), dtype)
    check_values(arrays, attributes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(3))
def test_tensors_at_any_address(which, dtype):
    """One tensor that begins 2 bytes off, as a view may: the bits are those of aligned tensors."""
    attributes = Attributes(1, 7, 0.125)
    arrays = list(as_dtype(oracles.make_case(attributes, 1, 130, 64, "holes", seed=2), dtype))
    want = emulated.attention(*[emulated.moved(array, 0) for array in arrays], attributes)
    arrays[which] = emulated.moved(arrays[which], 2)
    got = emulated.attention(*arrays, attributes)
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_size", "mode"), [(64, "full"), (24, "sparse"), (128, "full"), (20, "full")])
def test_order_of_execution_does_not_matter(head_size, mode, dtype):
    """The same bits in every order of threads and CTAs, from any workspace content; rows split in chunks included."""
    attributes = Attributes(1, 110, 0.2, mode, 2, 1)
    case = oracles.make_case(attributes, 1, 36 * 32, head_size, "holes", spread=0.4, seed=9)
    arrays = as_dtype(case, dtype)
    want = emulated.attention(*arrays, attributes, seed=0)
    assert np.isfinite(want[case.mask != 0].astype(np.float32)).all()
    for seed, fill in ((1, 0xFF), (2, 0x00), (3, 0x7F)):
        assert emulated.attention(*arrays, attributes, seed=seed, fill=fill).tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_rows(dtype):
    """Rows of 70 blocks among rows of a few: three chunks, of which the last is shorter."""
    attributes = Attributes(1, 280, 0.2, "full", 2, 1)
    arrays = as_dtype(oracles.make_case(attributes, 1, 70 * 32, 32, "holes", spread=0.4, seed=5), dtype)
    chosen, _, _ = check_selection(arrays, attributes)
    assert chosen[0, 0].sum(1).max() > 2 * 32
    check_values(arrays, attributes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_chosen_blocks_than_a_warp_looks_up_at_once(dtype):
    """Whole rows of 40 live blocks and one of dead ones between them: none is visited twice or left out."""
    attributes = Attributes(1, 41 * 41, 0.2)
    case = oracles.make_case(attributes, 1, 41 * 32, 16, spread=0.4, seed=3)
    case.mask[:, 5 * 32 : 6 * 32] = 0
    check_values(as_dtype(case, dtype), attributes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_stays_in_its_row_and_head(bad, where, dtype):
    attributes = Attributes(2, 4, 0.25, "full", 0, 1)
    case = oracles.make_case(attributes, 2, 130, 16, seed=4)
    clean = emulated.attention(*as_dtype(case, dtype), attributes).astype(np.float32)
    getattr(case, where)[1, 40, 16 + 3] = bad  # batch row 1, head 1
    context = emulated.attention(*as_dtype(case, dtype), attributes).astype(np.float32)
    np.testing.assert_array_equal(context[0], clean[0])
    np.testing.assert_array_equal(context[1, :, :16], clean[1, :, :16])
    assert not np.array_equal(context[1, :, 16:], clean[1, :, 16:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_tokens_are_not_read(dtype):
    """make_case puts NaN there; any other bits give the same result."""
    attributes = Attributes(1, 7, 0.2)
    case = oracles.make_case(attributes, 2, 130, 64, "holes", seed=7)
    want = emulated.attention(*as_dtype(case, dtype), attributes)
    for array in (case.query, case.key, case.value):
        array[case.mask == 0] = 3e4
    assert emulated.attention(*as_dtype(case, dtype), attributes).tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_far_below_and_above_zero(dtype):
    """Exponents are taken relative to each token's own largest logit, of exact blocks and of the low-resolution part."""
    attributes = Attributes(1, 5, 1.0)
    for shift in (-60.0, 60.0):
        case = oracles.make_case(attributes, 1, 128, 16, spread=0.3, seed=4)
        case.query[..., 0], case.key[..., 0] = 8.0, shift / 8.0
        check_values(as_dtype(case, dtype), attributes)


def test_largest_float16_values_do_not_overflow():
    attributes = Attributes(1, 4, 0.25)
    case = oracles.make_case(attributes, 1, 64, 32, spread=0.2, seed=4)
    case.value[:] = 65504.0
    context = emulated.attention(*as_dtype(case, "float16"), attributes)
    np.testing.assert_allclose(context.astype(np.float32), 65504.0, rtol=2e-3)


def test_small_types_round_once():
    """Values that T holds exactly and equal weights: the result is T's nearest value to their mean."""
    attributes = Attributes(1, 4, 0.25)
    query = np.zeros((1, 64, 16), ml_dtypes.bfloat16)
    value = np.arange(64).reshape(1, 64, 1).repeat(16, 2).astype(ml_dtypes.bfloat16)
    context = emulated.attention(query, query, value, np.ones((1, 64), np.int32), attributes)
    np.testing.assert_array_equal(context, np.full((1, 64, 16), 31.5, ml_dtypes.bfloat16))
