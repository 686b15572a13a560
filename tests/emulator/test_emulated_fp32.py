"""The attention kernels with float32 products, by fused multiply-add and by three tf32 products, on the emulator."""

from __future__ import annotations

import ctypes

import emulated
import ml_dtypes
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_emulated_kernels import as_dtype, check_values

from mra_export import kernel
from mra_export.contract import Attributes
from mra_export.errors import ContractError

MODES = sorted(kernel.FLOAT32_MODES)
ALIGNED, ODD = (8, 16, 32, 40, 64, 96, 128, 200, 256), (9, 31, 33, 63, 65, 127, 129, 255)
"""Head sizes whose rows can be copied 16 bytes at a time, and others."""


@settings(max_examples=30)
@given(case=oracles.op_cases(), mode=st.sampled_from(MODES), seed=st.integers(0, 2**32))
def test_any_call(case, mode, seed):
    check_values(case.arrays, case.attributes, seed, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("approx_mode", ["full", "sparse"])
@pytest.mark.parametrize("head_size", [*ALIGNED, *ODD])
def test_head_sizes(head_size, approx_mode, mode):
    attributes = Attributes(2, 7, 0.125, approx_mode)
    case = oracles.make_case(attributes, 2, 100, head_size, "holes", spread=0.4, seed=head_size)
    check_values(case.arrays, attributes, 3, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head_size", [32, 64, 128, 256])
@pytest.mark.parametrize("which", range(3))
def test_tensors_at_any_address(which, head_size, mode):
    """One tensor that begins 4 bytes off, as a view may: the bits are those of aligned tensors."""
    attributes = Attributes(1, 7, 0.125)
    arrays = list(oracles.make_case(attributes, 1, 130, head_size, "holes", seed=2).arrays)
    want = emulated.attention(*[emulated.moved(array, 0) for array in arrays], attributes, float32_mode=mode)
    arrays[which] = emulated.moved(arrays[which], 4)
    got = emulated.attention(*arrays, attributes, float32_mode=mode)
    if head_size == 32:  # the kernel for single elements is 64 wide and sums in another order
        np.testing.assert_allclose(got, want, atol=1e-5)
        check_values(tuple(arrays), attributes, float32_mode=mode)
    else:
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("head_size", "approx_mode"), [(64, "full"), (24, "sparse"), (128, "full"), (17, "full"), (144, "full")])
def test_order_of_execution_does_not_matter(head_size, approx_mode, mode):
    """The same bits in every order of threads and CTAs, from any workspace content; rows split in chunks included."""
    attributes = Attributes(1, 110, 0.1, approx_mode, 1, 1)
    case = oracles.make_case(attributes, 1, 34 * 32, head_size, "holes", spread=0.4, seed=9)
    want = emulated.attention(*case.arrays, attributes, seed=0, float32_mode=mode)
    assert np.isfinite(want).all()
    for seed, fill in ((1, 0xFF), (2, 0x00)):
        assert emulated.attention(*case.arrays, attributes, seed=seed, fill=fill, float32_mode=mode).tobytes() == want.tobytes()


@pytest.mark.parametrize(("dtype", "mode"), [("float32", "fma"), ("float32", "tf32x3"), ("float16", "fma"), ("bfloat16", "fma")])
@pytest.mark.parametrize("head_size", [20, 32, 61, 64, 100, 130])
def test_split_rows_of_every_width(head_size, dtype, mode):
    """Every kernel's partial results have room in the workspace: rows of 40 blocks, in two chunks."""
    attributes = Attributes(1, 200, 0.2, "full", 2, 1)
    arrays = as_dtype(oracles.make_case(attributes, 1, 40 * 32 - 9, head_size, "holes", spread=0.3, seed=5), dtype)
    chosen, _, _ = emulated.selection(arrays[0], arrays[1], arrays[3], attributes)
    assert chosen.sum(-1).max() > 32
    check_values(arrays, attributes, 1, mode)


def test_more_chosen_blocks_than_a_warp_looks_up_at_once():
    """Whole rows of 68 blocks, dead ones between them, in two teams: none is visited twice or left out."""
    attributes = Attributes(1, 68 * 68, 0.2)
    case = oracles.make_case(attributes, 1, 68 * 32, 8, spread=0.4, seed=3)
    case.mask[:, 5 * 32 : 7 * 32] = 0
    case.mask[:, 9 * 32 : 60 * 32 : 2] = 0
    check_values(case.arrays, attributes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_stays_in_its_row_and_head(bad, where, mode):
    attributes = Attributes(2, 4, 0.25, "full", 0, 1)
    case = oracles.make_case(attributes, 2, 130, 16, seed=4)
    clean = emulated.attention(*case.arrays, attributes, float32_mode=mode)
    getattr(case, where)[1, 40, 16 + 3] = bad  # batch row 1, head 1
    context = emulated.attention(*case.arrays, attributes, float32_mode=mode)
    np.testing.assert_array_equal(context[0], clean[0])
    np.testing.assert_array_equal(context[1, :, :16], clean[1, :, :16])
    assert not np.array_equal(context[1, :, 16:], clean[1, :, 16:])


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_any_nan_stays_nan_in_two_tf32_parts(bits):
    attributes = Attributes(1, 100, 0.25)
    case = oracles.make_case(attributes, 1, 64, 16, seed=4)
    case.value.view(np.uint32)[0, 40, 3] = bits
    context = emulated.attention(*case.arrays, attributes, float32_mode="tf32x3")
    assert np.isnan(context[0, :, 3]).all()


@pytest.mark.parametrize("mode", MODES)
def test_masked_tokens_are_not_read(mode):
    """make_case puts NaN there; any other bits give the same result."""
    attributes = Attributes(1, 7, 0.2)
    case = oracles.make_case(attributes, 2, 130, 64, "holes", seed=7)
    want = emulated.attention(*case.arrays, attributes, float32_mode=mode)
    for array in (case.query, case.key, case.value):
        array[case.mask == 0] = 3e4
    assert emulated.attention(*case.arrays, attributes, float32_mode=mode).tobytes() == want.tobytes()


@pytest.mark.parametrize("mode", MODES)
def test_logits_far_below_and_above_zero(mode):
    """Exponents are taken relative to each token's own largest logit, of exact blocks and of the low-resolution part."""
    attributes = Attributes(1, 5, 1.0)
    for shift in (-60.0, 60.0):
        case = oracles.make_case(attributes, 1, 128, 16, spread=0.3, seed=4)
        case.query[..., 0], case.key[..., 0] = 8.0, shift / 8.0
        check_values(case.arrays, attributes, 1, mode)


def test_modes_differ_for_float32_only():
    attributes = Attributes(1, 7, 0.125)
    for dtype, head_size, differ in ((np.float32, 64, True), (np.float32, 160, False), (ml_dtypes.bfloat16, 64, False)):
        case = oracles.make_case(attributes, 1, 100, head_size, seed=2)
        arrays = (*(x.astype(dtype) for x in (case.query, case.key, case.value)), case.mask)
        fma, tf32 = (emulated.attention(*arrays, attributes, float32_mode=mode).tobytes() for mode in MODES)
        assert (fma != tf32) == differ


def test_the_cpu_kernel_ignores_the_mode():
    if not kernel.available():
        pytest.skip("libmra_attention is not built")
    attributes = Attributes(1, 7, 0.125)
    case = oracles.make_case(attributes, 1, 100, 64, seed=2)
    contexts = []
    for mode in MODES:
        params = kernel.make_params(attributes, "float32", 1, 100, 64, float32_mode=mode)
        size = ctypes.c_size_t()
        assert kernel.library().mra_attention_cpu_workspace_size(params, 1, size) == 0
        workspace, context = emulated.aligned_bytes(size.value, 0), np.zeros_like(case.query)
        addresses = [array.ctypes.data for array in (*case.arrays, context, workspace)]
        assert kernel.library().mra_attention_cpu(params, *addresses, size.value, None) == 0
        contexts.append(context)
    np.testing.assert_array_equal(contexts[0], contexts[1])


def test_unknown_mode_is_an_error():
    with pytest.raises(ContractError, match="float32_mode is 'tf32': use one of fma, tf32x3"):
        kernel.make_params(Attributes(1, 7, 0.125), "float32", 1, 100, 64, float32_mode="tf32")
