"""The CPU kernel on each instruction set: against the dense formula, bit for bit against the selection contract, hostile inputs."""

from __future__ import annotations

import ctypes
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import Target
from kernel_cases import DTYPES, case, cast, check_against_formula, hostile_cases
from oracles import OpCase, dense_attention, op_cases

from mra_export import kernel
from mra_export.contract import Attributes
from mra_export.errors import ContractError

pytestmark = pytest.mark.usefixtures("target")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("made", hostile_cases(), ids=str)
def test_hostile_cases(made: OpCase, dtype: str) -> None:
    check_against_formula(made, dtype)


def test_property(target: Target) -> None:
    @settings(max_examples=30 if target.emulated else 60)
    @given(op_cases(), st.sampled_from(sorted(DTYPES)), st.integers(1, 3))
    def check(made: OpCase, dtype: str, num_threads: int) -> None:
        check_against_formula(made, dtype, num_threads)

    check()


@settings(max_examples=30)
@given(op_cases())
def test_selection_is_the_formulas_where_nothing_is_a_near_tie(made: OpCase) -> None:
    chosen, _, _ = kernel.selection(made.query, made.key, made.mask, made.attributes)
    expected = dense_attention(*made.arrays, made.attributes)
    nb = chosen.shape[-1]
    blocks = np.zeros((len(made.mask), nb * 32), bool)
    blocks[:, : made.mask.shape[1]] = made.mask != 0
    live = blocks.reshape(len(made.mask), nb, 32).any(2)
    pairs = (live[:, :, None] & live[:, None, :])[:, None]
    for b, h in zip(*np.nonzero(expected.margin > 1e-3), strict=True):
        np.testing.assert_array_equal(chosen[b, h] & pairs[b, 0], expected.chosen[b, h] & pairs[b, 0])


def test_full_budget_is_exact_attention() -> None:
    made = case(2, 100, 2, 32, 16)
    q, k, v = (x.astype(np.float64).reshape(2, 100, 2, 32).transpose(0, 2, 1, 3) for x in made.arrays[:3])
    logits = made.attributes.scale * q @ k.transpose(0, 1, 3, 2)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True)) @ v
    actual = kernel.attention(*made.arrays, made.attributes)
    np.testing.assert_allclose(actual, expected.transpose(0, 2, 1, 3).reshape(2, 100, 64), atol=5e-6)


@pytest.mark.parametrize("offset", [-300.0, 80.0])
def test_logits_of_any_size(offset: float) -> None:
    """eps is relative to the largest weight: logits far below 0 must not fade out, logits far above must not overflow."""
    made = case(1, 70, 1, 16, 3)
    query = made.query.copy()
    key = made.key.copy()
    query[:, :, 0] = 16.0
    key[:, :, 0] = offset / (16.0 * made.attributes.scale)
    shifted = OpCase(made.attributes, query, key, made.value, made.mask)
    check_against_formula(shifted, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_same_for_any_threads_in_any_order(dtype: str, target: Target) -> None:
    import torch  # noqa: F401  its OpenMP pool is one of the three

    for made in hostile_cases():
        made = cast(made, dtype)
        expected = kernel.attention(*made.arrays, made.attributes, num_threads=1)
        for num_threads in (3,) if target.emulated else (2, 3, 8, 61):
            actual = kernel.attention(*made.arrays, made.attributes, num_threads=num_threads)
            assert actual.tobytes() == expected.tobytes(), f"{made}: {num_threads} threads of the OpenMP pool"
            for name, run in (("std", _std_threads(num_threads)), ("shuffled", _shuffled(num_threads))):
                status, actual = _run_raw(made, dtype, run)
                assert status == 0
                assert actual.tobytes() == expected.tobytes(), f"{made}: {num_threads} threads, {name}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_only_what_it_owns(dtype: str) -> None:
    """Sentinels around context and workspace stay; inputs stay; the workspace may hold anything before."""
    for number, made in enumerate(hostile_cases()):
        made = cast(made, dtype)
        before = [x.tobytes() for x in made.arrays]
        expected = kernel.attention(*made.arrays, made.attributes)
        status, actual = _run_raw(
            made, dtype, _std_threads(2), poison=(0xFF, 0x00, 0x7F)[number % 3]
        )  # _run_raw checks the sentinels
        assert status == 0
        assert actual.tobytes() == expected.tobytes()
        assert [x.tobytes() for x in made.arrays] == before


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_poison_at_masked_tokens_has_no_effect(poison: float) -> None:
    for made in hostile_cases():
        masked = made.mask[:, :, None] == 0
        clean = OpCase(made.attributes, *(np.where(masked, np.float32(0), x) for x in made.arrays[:3]), made.mask)
        dirty = OpCase(made.attributes, *(np.where(masked, np.float32(poison), x) for x in made.arrays[:3]), made.mask)
        expected = kernel.attention(*clean.arrays, made.attributes)
        actual = kernel.attention(*dirty.arrays, made.attributes)
        assert actual.tobytes() == expected.tobytes()
        assert not actual[np.broadcast_to(masked, actual.shape)].any(), "a masked token's context must be 0"


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_poison_in_a_real_token_stays_in_its_row_and_head(poison: float, which: int) -> None:
    for dtype in DTYPES:
        made = cast(case(3, 150, 4, 16, 9), dtype)
        expected = kernel.attention(*made.arrays, made.attributes)
        arrays = [x.copy() for x in made.arrays]
        arrays[which][1, 77, 2 * 16 + 3] = poison  # batch row 1, head 2
        for num_threads in (1, 2):
            actual = kernel.attention(*arrays, made.attributes, num_threads=num_threads)
            chosen, excluded, _ = kernel.selection(arrays[0], arrays[1], made.mask, made.attributes)
            assert (chosen.sum((2, 3)) == 9).all()
            assert (excluded >= chosen).all()
            actual, untouched = actual.reshape(3, 150, 4, 16), expected.reshape(3, 150, 4, 16)
            for b in range(3):
                for h in range(4):
                    if (b, h) != (1, 2):
                        assert actual[b, :, h].tobytes() == untouched[b, :, h].tobytes()
            row = actual[1, 77, 2] if which == 0 else actual[1, :, 2]  # a key or value is seen by every token
            hidden = np.isfinite(row[..., 3].astype(np.float32))
            if np.isnan(poison) or which == 2:
                assert not hidden.any(), "poison must not be hidden"


def test_everything_nan() -> None:
    x = np.full((2, 100, 16), np.nan, np.float32)
    mask = np.ones((2, 100), np.int32)
    attributes = Attributes(2, 5, 0.35)
    chosen, excluded, _ = kernel.selection(x, x, mask, attributes, num_threads=2)
    assert chosen.reshape(2, 2, -1)[:, :, :5].all(), "NaN scores tie: the lower flat index wins"
    assert chosen.sum() == 2 * 2 * 5
    assert excluded.all()
    assert np.isnan(kernel.attention(x, x, x, mask, attributes)[:, :64]).all(), "block rows 0 and 1 have a chosen pair"


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_ties_go_to_the_lower_flat_index(mode: str) -> None:
    made = case(1, 128, 1, 8, 6)
    constant = np.ones((1, 128, 8), np.float32)
    attributes = Attributes(1, 6, 0.25, mode)
    chosen, excluded, score = kernel.selection(constant, constant, made.mask, attributes)
    assert np.flatnonzero(chosen).tolist() == [0, 1, 2, 3, 4, 5]
    assert excluded.all()  # all tied with the last chosen one, so dropped
    assert not score.any()
    context = kernel.attention(constant, constant, made.value, made.mask, attributes)
    assert not context[0, 64:].any(), "rows 2 and 3 have no weight at all"
    np.testing.assert_allclose(context[0, :32], np.broadcast_to(made.value[0].mean(0), (32, 8)), atol=1e-5)
    np.testing.assert_allclose(context[0, 32:64], np.broadcast_to(made.value[0, :64].mean(0), (32, 8)), atol=1e-5)


def test_minus_zero_ties_with_zero() -> None:
    query = np.ones((1, 64, 8), np.float32)
    key = np.zeros((1, 64, 8), np.float32)
    query[:, :32] = -1  # logits -0 in the first block row, +0 in the second
    chosen, _, _ = kernel.selection(query, key, np.ones((1, 64)), Attributes(1, 1, 0.25))
    assert np.flatnonzero(chosen).tolist() == [0]


def test_all_rows_masked() -> None:
    made = case(2, 70, 2, 16, 3)
    mask = np.zeros_like(made.mask)
    for dtype in DTYPES:
        arrays = cast(made, dtype).arrays[:3]
        assert not kernel.attention(*arrays, mask, made.attributes, num_threads=2).astype(np.float32).any()


@pytest.mark.parametrize("value", [1, -1, 7, 2**31 - 1, -(2**31), 256])
def test_any_nonzero_mask_value_is_a_real_token(value: int) -> None:
    made = case(1, 70, 1, 16, 3, "holes")
    expected = kernel.attention(*made.arrays, made.attributes)
    status, actual = _run_raw(OpCase(made.attributes, *made.arrays[:3], made.mask * np.int32(value)), "float32", None)
    assert status == 0
    assert actual.tobytes() == expected.tobytes()


def test_padding_invariant() -> None:
    """Alone or padded among others, a sequence gets the same result."""
    attributes = Attributes(2, 8, 0.25, padding_invariant=True, initial_prior_diagonal_n_blocks=1, initial_prior_first_n_blocks=1)
    made = case(3, 230, 2, 16, 8)
    mask = made.mask.copy()
    lengths = (230, 100, 33)
    for b, length in enumerate(lengths):
        mask[b, length:] = 0
    together = kernel.attention(*made.arrays[:3], mask, attributes, num_threads=2)
    for b, length in enumerate(lengths):
        one = slice(b, b + 1)
        alone = kernel.attention(*(x[one, :length] for x in made.arrays[:3]), mask[one, :length], attributes)
        np.testing.assert_allclose(together[one, :length], alone, atol=2e-6)


@pytest.mark.parametrize("first", [0, 3])
def test_long_sequence(first: int) -> None:
    """N = 16384: 512 x 512 blocks a head; some query blocks against the formula in float64."""
    made = case(1, 16384, 2, 8, 1500, "holes", initial_prior_first_n_blocks=first, initial_prior_diagonal_n_blocks=first)
    context = kernel.attention(*made.arrays, made.attributes, num_threads=2)
    chosen, excluded, _ = kernel.selection(made.query, made.key, made.mask, made.attributes, num_threads=2)
    assert (chosen.sum((2, 3)) == 1500).all()
    real = made.mask[0] != 0
    q, k, v = (np.where(real[:, None], x[0].astype(np.float64), 0) for x in made.arrays[:3])
    count = real.reshape(512, 32).sum(1)
    expected_rows, actual_rows = [], []
    for h in range(2):
        qh, kh, vh = (x[:, h * 8 : h * 8 + 8] for x in (q, k, v))
        qm, km = (x.reshape(512, 32, 8).sum(1) / (count + 1e-6)[:, None] for x in (qh, kh))
        for i in (0, 2, 200, 511):
            tokens = slice(i * 32, i * 32 + 32)
            low = np.where(excluded[0, h, i], -np.inf, made.attributes.scale * km @ qm[i])
            logit = np.where(chosen[0, h, i].repeat(32), made.attributes.scale * qh[tokens] @ kh.T, low.repeat(32))
            logit[:, ~real] = -np.inf
            weight = np.exp(logit - logit.max(1, keepdims=True))
            expected = weight @ vh / (weight.sum(1, keepdims=True) + 1e-6)
            expected_rows.append(expected[real[tokens]])
            actual_rows.append(context[0, tokens, h * 8 : h * 8 + 8][real[tokens]])
    np.testing.assert_allclose(np.concatenate(actual_rows), np.concatenate(expected_rows), atol=2e-5)


def test_many_heads_in_several_bundles() -> None:
    """More heads than are packed at a time: every head must still get its own selection and rows."""
    made = case(4, 640, 8, 256, 4, "right padding")  # 1.3 MB each, packed
    together = kernel.attention(*made.arrays, made.attributes, num_threads=2)
    for b in (0, 3):
        one = slice(b, b + 1)
        alone = kernel.attention(*(x[one] for x in made.arrays), made.attributes)
        assert together[one].tobytes() == alone.tobytes()


def test_many_python_threads(target: Target) -> None:
    cases = hostile_cases()
    rounds = 1 if target.emulated else 3
    expected = [kernel.attention(*made.arrays, made.attributes).tobytes() for made in cases]
    wrong: list[str] = []

    def work(start: int) -> None:
        for n in range(rounds * len(cases)):
            made = cases[(start + n) % len(cases)]
            actual = kernel.attention(*made.arrays, made.attributes, num_threads=2).tobytes()
            if actual != expected[(start + n) % len(cases)]:
                wrong.append(str(made))

    workers = [threading.Thread(target=work, args=(start,)) for start in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# Every MraStatus: a change of valid parameters that must be refused with it.
REFUSED = {
    "STRUCT_SIZE": (2, {"struct_size": 8}),
    "DTYPE": (3, {"dtype": 3}),
    "DTYPE negative": (3, {"dtype": -1}),
    "BATCH": (4, {"batch": 0}),
    "BATCH negative": (4, {"batch": -5}),
    "LENGTH": (5, {"length": 0}),
    "NUM_HEADS": (6, {"num_heads": 0}),
    "HEAD_SIZE small": (7, {"head_size": 7}),
    "HEAD_SIZE large": (7, {"head_size": 257}),
    "NUM_BLOCKS": (8, {"num_blocks": 0}),
    "APPROX_MODE": (9, {"approx_mode": 2}),
    "PRIOR first": (10, {"initial_prior_first_n_blocks": -1}),
    "PRIOR diagonal": (10, {"initial_prior_diagonal_n_blocks": -1}),
    "SCALE zero": (11, {"scale": 0.0}),
    "SCALE negative": (11, {"scale": -1.0}),
    "SCALE NaN": (11, {"scale": float("nan")}),
    "SCALE infinite": (11, {"scale": float("inf")}),
    "FLAG": (15, {"padding_invariant": 2}),
    "FLAG float32_mode": (15, {"float32_mode": 2}),
    "FLAG float32_mode negative": (15, {"float32_mode": -1}),
    "TOO_LARGE length": (16, {"length": 2**31}),
    "TOO_LARGE batch": (16, {"batch": 2**62}),
    "TOO_LARGE product": (16, {"batch": 2**30, "length": 2**30}),
    "TOO_LARGE hidden": (16, {"num_heads": 2**31 - 1, "length": 2**20}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_parameters(name: str) -> None:
    status, change = REFUSED[name]
    made = case(1, 40, 2, 8, 2)
    params = kernel.make_params(made.attributes, "float32", 1, 40, 8)
    for field, value in change.items():
        setattr(params, field, value)
    library = kernel.library()
    size = ctypes.c_size_t(123)
    assert library.mra_attention_cpu_workspace_size(params, 1, size) == status
    assert size.value == 0
    # Refused before anything is read or written: these are no addresses.
    assert library.mra_attention_cpu(params, 64, 64, 64, 64, 64, 64, 2**40, None) == status
    assert library.mra_attention_cpu_selection(params, 64, 64, 64, 64, 64, 64, 2**40, None) == status
    with pytest.raises(ContractError, match=r"must be|use |rebuild|pass|lower"):
        kernel._check(status, params)


def test_refused_calls() -> None:
    made = case(1, 40, 2, 8, 2)
    library = kernel.library()
    params = kernel.make_params(made.attributes, "float32", 1, 40, 8)
    size = ctypes.c_size_t()
    assert library.mra_attention_cpu_workspace_size(params, 2, size) == 0
    assert library.mra_attention_cpu_workspace_size(None, 2, size) == 1
    assert library.mra_attention_cpu_workspace_size(params, 2, None) == 1
    assert library.mra_attention_cpu_workspace_size(params, 0, size) == 18
    assert library.mra_attention_cpu_workspace_size(params, -1, size) == 18
    assert library.mra_attention_cpu_workspace_size(params, 2, size) == 0

    call = [params, 64, 64, 64, 64, 64, 64, size.value, None]
    for place in range(7):
        missing = [*call]
        missing[place] = None
        assert library.mra_attention_cpu(*missing) == 1, f"argument {place}"
    for place in range(7):
        if place != 5:  # score may be NULL
            missing = [*call]
            missing[place] = None
            assert library.mra_attention_cpu_selection(*missing) == 1, f"argument {place}"
    assert library.mra_attention_cpu(params, 64, 64, 64, 64, 64, 32, size.value, None) == 12, "workspace not aligned"
    needed = ctypes.c_size_t()
    assert library.mra_attention_cpu_workspace_size(params, 1, needed) == 0
    assert library.mra_attention_cpu(params, 64, 64, 64, 64, 64, 64, needed.value - 1, None) == 12, "workspace too small"
    no_loop = kernel.Threads(None, 2, None)
    assert library.mra_attention_cpu(params, 64, 64, 64, 64, 64, 64, size.value, ctypes.addressof(no_loop)) == 18
    no_threads = _std_threads(2)
    no_threads.num_threads = 0
    assert library.mra_attention_cpu(params, 64, 64, 64, 64, 64, 64, size.value, ctypes.addressof(no_threads)) == 18


def test_status_texts() -> None:
    texts = [kernel.library().mra_status_string(status).decode() for status in range(19)]
    assert texts[0] == "ok"
    assert len(set(texts)) == 19
    for text in texts[1:]:
        assert ":" in text, "what is wrong, then the fix"
    assert "unknown status" in kernel.library().mra_status_string(999).decode()


def test_memory_is_linear_in_length_apart_from_the_block_matrix() -> None:
    def workspace(length: int) -> int:
        size = ctypes.c_size_t()
        params = kernel.make_params(Attributes(12, 4 * length // 32, 0.125), "float32", 8, length, 64)
        assert kernel.library().mra_attention_cpu_workspace_size(params, 2, size) == 0
        return size.value

    assert workspace(16384) < 100e6  # N x N would be a gigabyte for each head
    assert workspace(4096) < 50e6


def test_every_conversion_of_half_and_bfloat16(target: Target) -> None:
    """All 65536 values of both types, there and back: a single real token with a full budget gets its own value, up to eps.

    AMX tiles take subnormal bfloat16 for 0.
    """
    for dtype, bits in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        values = np.arange(65536, dtype=np.uint16).view(bits)
        values = values[np.isfinite(values.astype(np.float32))]
        values = np.concatenate([values, np.zeros(-len(values) % 64, bits)]).reshape(-1, 1, 64)
        zeros = np.zeros_like(values)
        out = kernel.attention(zeros, zeros, values, np.ones((len(values), 1)), Attributes(1, 1, 0.125))
        inverse = np.float32(1) / (np.float32(1) + np.float32(1e-6))
        wide = values.astype(np.float32)
        if (target.name, dtype) == ("amx_bf16", "bfloat16"):
            wide[np.abs(wide) < np.finfo(np.float32).tiny] = 0
        expected = (wide * inverse + np.float32(0)).astype(bits)  # a sum from +0 never gives -0
        np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16), err_msg=dtype)


# Running the C function on memory that the test owns byte by byte.

SENTINEL = 0xA5
MARGIN = 4096
TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
PARALLEL_FOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, TASK, ctypes.c_void_p)


def _std_threads(num_threads: int) -> kernel.Threads:
    pool = ctypes.c_int32(num_threads)
    run = ctypes.cast(kernel.library().mra_parallel_for_std, ctypes.c_void_p)
    threads = kernel.Threads(ctypes.addressof(pool), num_threads, run)
    threads.keep = pool
    return threads


def _shuffled(num_threads: int) -> kernel.Threads:
    """One thread that takes the tasks in a random order."""

    def loop(_pool: int, count: int, task: object, arg: int) -> None:
        for index in np.random.default_rng(count).permutation(count):
            task(arg, int(index))

    callback = PARALLEL_FOR(loop)
    threads = kernel.Threads(None, num_threads, ctypes.cast(callback, ctypes.c_void_p))
    threads.keep = callback
    return threads


def _guarded(size: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Memory of `size` bytes, 64-byte aligned, with sentinels before and after: the whole, and the part inside."""
    whole = np.full(size + 2 * MARGIN + 64, SENTINEL, np.uint8)
    start = MARGIN + -(whole.ctypes.data + MARGIN) % 64
    inside = whole[start : start + size]
    inside[:] = fill
    return whole, inside


def _run_raw(made: OpCase, dtype: str, threads: kernel.Threads | None, poison: int = 0xFF) -> tuple[int, np.ndarray]:
    batch, length, hidden = made.query.shape
    params = kernel.make_params(made.attributes, dtype, batch, length, hidden // made.attributes.num_heads)
    size = ctypes.c_size_t()
    num_threads = threads.num_threads if threads else 1
    assert kernel.library().mra_attention_cpu_workspace_size(params, num_threads, size) == 0
    buffers = [_guarded(made.query.nbytes, poison), _guarded(size.value, poison)]
    arrays = [np.ascontiguousarray(x) for x in made.arrays]
    status = kernel.library().mra_attention_cpu(
        params,
        *(x.ctypes.data for x in arrays),
        *(inside.ctypes.data for _, inside in buffers),
        size.value,
        ctypes.addressof(threads) if threads else None,
    )
    for whole, inside in buffers:
        start = inside.ctypes.data - whole.ctypes.data
        assert (whole[:start] == SENTINEL).all()
        assert (whole[start + inside.size :] == SENTINEL).all()
    return status, buffers[0][1].view(DTYPES[dtype]).reshape(made.query.shape)
