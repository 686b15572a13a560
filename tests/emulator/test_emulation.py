"""The emulation itself: it computes what CUDA would, and it catches what CUDA would let pass."""

from __future__ import annotations

import subprocess
import sys

import emulated
import ml_dtypes
import numpy as np
import pytest

THREADS = 64
LAUNCH_FAILURE = 719


@pytest.fixture(autouse=True)
def ascending_order():
    emulated.library().mra_emulation_seed(0)


def run(
    name: str, shared_bytes: int = 4 * THREADS, blocks: int = 1, source: np.ndarray | None = None, words: int = 1
) -> tuple[int, np.ndarray, str]:
    """Launches one of self_test.cc's kernels on source (int32; else 0, 1, ...): the error, out (`words` per thread), report."""
    lib = emulated.library()
    if source is None:
        source = np.arange(8 * THREADS, dtype=np.int32)
    out = np.full(THREADS * words, -7, np.int32)
    error = lib.mra_emulation_self_test(name.encode(), out.ctypes.data, source.ctypes.data, blocks, shared_bytes)
    return error, out, lib.mra_emulation_error().decode()


@pytest.mark.parametrize("seed", range(5))
def test_barrier_orders_shared_memory(seed):
    emulated.library().mra_emulation_seed(seed)
    error, out, _ = run("Reverse")
    assert error == 0
    np.testing.assert_array_equal(out, np.arange(THREADS)[::-1])


def test_missing_barrier_shows_as_poison_or_stale_data():
    for seed in range(5):
        emulated.library().mra_emulation_seed(seed)
        error, out, _ = run("ReverseWithoutBarrier")
        assert error == 0
        assert (out != np.arange(THREADS)[::-1]).any()
        assert (out == -1).any()  # 0xffffffff, a NaN


def test_ctas_run_into_each_other():
    """What one CTA leaves to another without a barrier before it says so arrives too late in some order."""
    sums = {"SumOfBoth": set(), "SumOfBothWithoutBarrier": set()}
    for name, found in sums.items():
        for seed in range(100):
            emulated.library().mra_emulation_seed(seed)
            error, out, _ = run(name, blocks=2)
            assert error == 0
            found.add(int(out[2]))
    assert sums["SumOfBoth"] == {201}
    assert len(sums["SumOfBothWithoutBarrier"]) > 1


def test_shared_memory_starts_as_nan():
    _, out, _ = run("ReadUninitialisedShared")
    assert np.isnan(out.view(np.float32)).all()


@pytest.mark.parametrize("seed", range(5))
def test_warp_functions(seed):
    emulated.library().mra_emulation_seed(seed)
    error, out, _ = run("WarpFunctions")
    assert error == 0
    for warp in range(THREADS // 32):
        x = np.arange(32) + 32 * warp
        lane = np.arange(32)
        up = np.where(lane >= 3, x[lane - 3], x)
        down = np.where(lane + 5 < 32, x[np.minimum(lane + 5, 31)], x)
        peers = np.array([np.flatnonzero(x % 5 == x[n] % 5)[0] for n in lane])
        want = x[7] + 10 * x[lane ^ 4] + 100 * up + 1000 * down + 10000 * (x % 3 == 0).sum() + 100000 * peers
        np.testing.assert_array_equal(out[32 * warp : 32 * warp + 32], want)


@pytest.mark.parametrize("seed", range(5))
def test_reductions(seed):
    emulated.library().mra_emulation_seed(seed)
    error, out, _ = run("Reductions")
    assert error == 0
    x = np.arange(THREADS) % 32 - 16
    # The unsigned maximum is that of the negative numbers: -1.
    want = [np.full(THREADS, x[:32].sum()), np.full(THREADS, -1), np.full(THREADS, THREADS - 1), np.full(THREADS, x.sum())]
    want.append(np.array([0 if n < 0 else 32 - int(n).bit_length() for n in x]))
    for n in range(THREADS):
        assert out[n] == want[n % 5][n]


@pytest.mark.parametrize(
    ("kernel", "report"),
    [
        ("BarrierInBranch", "wait in __syncthreads"),
        ("BarrierAfterExit", "1 threads (first 5) have exited"),
        ("ShuffleInBranch", "wait in a warp function"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_divergence_is_reported(kernel, report, seed):
    emulated.library().mra_emulation_seed(seed)
    error, _, text = run(kernel)
    assert error == LAUNCH_FAILURE
    assert "is stuck" in text
    assert report in text
    assert "self_test.cc:" in text
    assert run("Reverse")[0] == 0  # the next launch is not disturbed


def test_write_into_shared_memory_padding_is_reported():
    error, _, text = run("WritePastShared", 4 * THREADS + 1)  # the kernel writes 4 bytes past 4 * THREADS; 16 are mapped
    assert error == LAUNCH_FAILURE
    assert "past its 257 bytes of shared memory" in text


def test_impossible_launches_are_refused():
    for shared, blocks in ((99 * 1024 + 1, 1), (256, 2**31), (256, 0)):
        error, _, text = run("Reverse", shared, blocks)
        assert error != 0
        assert "launch refused" in text


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("ReadPastShared", "shared memory"),
        ("WritePastShared", "past the end of shared memory"),
        ("ReadPastInput", "0 bytes past the end of input (256 bytes), thread 63 of CTA 0"),
    ],
)
def test_access_out_of_bounds_ends_the_process_with_a_report(kernel, message):
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import emulated
lib = emulated.library()
lib.mra_emulation_catch_faults()
out = lib.mra_emulation_allocate(b"output", 256, 1)
source = lib.mra_emulation_allocate(b"input", 256, 1)
lib.mra_emulation_self_test({kernel.encode()!r}, out, source, 1, 256)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == emulated.FAULT_EXIT, result.stderr
    assert "access out of bounds" in result.stderr
    assert message in result.stderr


@pytest.mark.parametrize(("name", "dtype"), [("half", np.float16), ("bfloat", ml_dtypes.bfloat16)])
def test_16_bit_floats_convert_as_numpy_does(name, dtype):
    lib = emulated.library()
    to_float, from_float = getattr(lib, f"mra_emulation_{name}_to_float"), getattr(lib, f"mra_emulation_float_to_{name}")
    every = np.arange(2**16, dtype=np.uint16)
    widened = np.array([to_float(int(x)) for x in every], np.uint32).view(np.float32)
    np.testing.assert_array_equal(widened, every.view(dtype).astype(np.float32))

    rng = np.random.default_rng(0)
    near = rng.choice(widened[np.isfinite(widened)], 5000).view(np.uint32)
    halfway = near + (1 << (12 if name == "half" else 15))  # ties, and their neighbours
    inputs = np.concatenate([rng.integers(0, 2**32, 5000, dtype=np.uint32), near, halfway, halfway + 1, halfway - 1]).astype(
        np.uint32
    )
    numbers = inputs.view(np.float32)
    numbers, inputs = numbers[~np.isnan(numbers)], inputs[~np.isnan(numbers)]
    with np.errstate(over="ignore"):
        want = numbers.astype(dtype).view(np.uint16)
    got = np.array([from_float(int(x)) for x in inputs], np.uint16)
    np.testing.assert_array_equal(got, want)
    assert from_float(0x7FC00000) == 0x7FFF  # CUDA's NaN


LANE = np.arange(32)


def indices_16(multiplicand: str, lane: int, i: int) -> tuple[int, int]:
    """Row and column of element i of a lane's fragment: PTX ISA, "Matrix Fragments for mma.m16n8k16", .f16 and .bf16."""
    group, thread = lane >> 2, lane % 4
    if multiplicand == "A":
        row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
        return row, thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8
    if multiplicand == "B":
        return thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8, group
    return group if i < 2 else group + 8, thread * 2 + (i & 1)


def indices_8(multiplicand: str, lane: int, i: int) -> tuple[int, int]:
    """The same of mma.m16n8k8: PTX ISA, "Matrix Fragments for mma.m16n8k8", .tf32."""
    group, thread = lane >> 2, lane % 4
    if multiplicand == "A":
        return group if i in (0, 2) else group + 8, thread if i < 2 else thread + 4
    if multiplicand == "B":
        return thread if i == 0 else thread + 4, group
    return group if i < 2 else group + 8, thread * 2 + (i & 1)


TILES = {
    "MultiplyHalf": (np.float16, 16, indices_16),
    "MultiplyBfloat16": (ml_dtypes.bfloat16, 16, indices_16),
    "MultiplyTf32": (np.float32, 8, indices_8),
}


def multiply(kernel: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The kernel's a @ b + c for two warps. a: (2, 16, depth), b: (2, depth, 8), c: (2, 16, 8)."""
    dtype, _, indices = TILES[kernel]
    per_word = 4 // np.dtype(dtype).itemsize
    source = np.zeros((2, 32, 10), np.int32)
    for warp in range(2):
        for lane in LANE:
            a_elements = np.array([a[warp][indices("A", lane, i)] for i in range(4 * per_word)], dtype)
            b_elements = np.array([b[warp][indices("B", lane, i)] for i in range(2 * per_word)], dtype)
            c_elements = np.array([c[warp][indices("C", lane, i)] for i in range(4)], np.float32)
            source[warp, lane] = np.concatenate([x.view(np.int32) for x in (a_elements, b_elements, c_elements)])
    error, out, report = run(kernel, source=source, words=4)
    assert error == 0, report
    result = np.full(c.shape, np.nan, np.float32)
    for warp in range(2):
        for lane in LANE:
            for i in range(4):
                result[warp][indices("C", lane, i)] = out.view(np.float32).reshape(2, 32, 4)[warp, lane, i]
    return result


@pytest.mark.parametrize("kernel", TILES)
@pytest.mark.parametrize("seed", range(3))
def test_matrix_product_reads_and_writes_the_documented_fragments(kernel, seed):
    emulated.library().mra_emulation_seed(seed)
    _, depth, _ = TILES[kernel]
    rng = np.random.default_rng(seed)
    a, b, c = (rng.integers(-8, 9, (2, *shape)).astype(np.float32) for shape in ((16, depth), (depth, 8), (16, 8)))
    np.testing.assert_array_equal(multiply(kernel, a, b, c), a @ b + c)  # small integers: exact, and no two rows or columns alike


@pytest.mark.parametrize("kernel", TILES)
def test_matrix_product_keeps_the_inputs_precision_and_float32_sums(kernel):
    dtype, depth, _ = TILES[kernel]
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((2, *shape)).astype(dtype).astype(np.float32) for shape in ((16, depth), (depth, 8)))
    c = rng.standard_normal((2, 16, 8)).astype(np.float32)
    got = multiply(kernel, a, b, c)
    if kernel == "MultiplyTf32":
        rounded = multiply(kernel, *((x.view(np.uint32) & 0xFFFFE000).view(np.float32) for x in (a, b)), c)
        np.testing.assert_array_equal(got, rounded)  # the low 13 bits are ignored
        a, b = ((x.view(np.uint32) & 0xFFFFE000).view(np.float32) for x in (a, b))
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    np.testing.assert_allclose(got, exact, rtol=0, atol=2.0**-21 * np.abs(exact).max())
    assert (got != (a @ b + c)).any()  # no one's order
    np.testing.assert_array_equal(got, multiply(kernel, a, b, c))


def test_matrix_product_truncates_its_sum():
    a, b, c = np.zeros((2, 16, 16), np.float32), np.zeros((2, 16, 8), np.float32), np.ones((2, 16, 8), np.float32)
    a[:, :, 0], b[:, 0, :] = 1.5 * 2.0**-12, 2.0**-11
    np.testing.assert_array_equal(multiply("MultiplyHalf", a, b, c), 1 + 2.0**-23)  # to nearest even it would be 1 + 2^-22


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_ldmatrix_distributes_rows_as_documented(transposed, seed):
    emulated.library().mra_emulation_seed(seed)
    rng = np.random.default_rng(seed)
    rows = rng.permutation(THREADS)  # which 16 bytes of shared memory a thread points at
    source = np.zeros((THREADS, 5), np.int32)
    stored = rng.permutation(2**16)[: THREADS * 8].astype(np.uint16).reshape(THREADS, 8)
    source[:, :4] = stored.view(np.int32)
    source[:, 4] = 16 * rows
    error, out, report = run("LoadMatrix" + "Transposed" * transposed, 16 * THREADS, source=source, words=4)
    assert error == 0, report
    got = out.view(np.uint16).reshape(2, 32, 4, 2)
    for warp in range(2):
        for matrix in range(4):
            elements = stored[rows[32 * warp + 8 * matrix :][:8]]  # lanes 8 n to 8 n + 7 point at matrix n's rows
            if transposed:
                elements = elements.T
            for lane in LANE:
                want = elements[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
                np.testing.assert_array_equal(got[warp, lane, matrix], want)


@pytest.mark.parametrize(
    ("byte", "report"),
    [(24, "byte 24: not a multiple of 16"), (1024, "byte 1024: outside its 1024 bytes"), (-16, "byte -16: outside its 1024 bytes")],
)
def test_ldmatrix_refuses_a_wrong_address(byte, report):
    source = np.zeros((THREADS, 5), np.int32)
    source[37, 4] = byte
    error, _, text = run("LoadMatrix", 16 * THREADS, source=source, words=4)
    assert error == LAUNCH_FAILURE
    assert report in text
    assert "thread 37 of CTA 0 ldmatrix of shared memory" in text
    assert "self_test.cc:" in text
    assert run("Reverse")[0] == 0


@pytest.mark.parametrize(
    ("kernel", "reports"),
    [
        ("MultiplyInBranch", ("32 threads (first 0) wait in a warp", "32 threads (first 16) wait in a warp")),
        (
            "LoadMatrixWithoutALane",
            ("31 threads (first 0) wait in a warp", "33 threads (first 3) have exited"),
        ),  # a whole warp left
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_tile_instruction_without_all_lanes_is_reported(kernel, reports, seed):
    emulated.library().mra_emulation_seed(seed)
    error, _, text = run(kernel)
    assert error == LAUNCH_FAILURE
    assert all(report in text for report in reports), text
    assert "function at self_test.cc:" in text


@pytest.mark.parametrize("seed", range(5))
def test_asynchronous_copy(seed):
    emulated.library().mra_emulation_seed(seed)
    error, out, report = run("CopyAsync", 16 * THREADS, words=4)
    assert error == 0, report
    np.testing.assert_array_equal(out.reshape(THREADS, 4), np.arange(4 * THREADS).reshape(THREADS, 4)[::-1])


@pytest.mark.parametrize("seed", range(5))
def test_asynchronous_copy_arrives_at_the_wait_for_its_group(seed):
    emulated.library().mra_emulation_seed(seed)
    error, out, report = run("CopyAsyncInTwoGroups", 32 * THREADS, words=6)
    assert error == 0, report
    before, after_one, after_all = out.reshape(THREADS, 3, 2).transpose(1, 0, 2)
    assert np.isnan(before.view(np.float32)).all()
    first = 8 * np.arange(THREADS)
    np.testing.assert_array_equal(after_one[:, 0], first)
    assert np.isnan(after_one[:, 1].view(np.float32)).all()
    np.testing.assert_array_equal(after_all, np.stack((first, first + 4), 1))


@pytest.mark.parametrize("kernel", ["CopyAsyncWithoutCommit", "CopyAsyncWithoutWait"])
def test_asynchronous_copy_that_is_not_waited_for_is_reported(kernel):
    error, out, text = run(kernel, 16 * THREADS)
    assert error == LAUNCH_FAILURE
    assert "thread 0 of CTA 0 returned with 1 cp.async that it has not waited for" in text
    assert np.isnan(out[:1].view(np.float32)).all()
    assert run("Reverse")[0] == 0


def test_asynchronous_copy_reads_its_source_at_any_time_until_the_wait():
    found = set()
    for seed in range(5):
        emulated.library().mra_emulation_seed(seed)
        error, out, _ = run("CopyAsyncFromChangingSource", 16 * THREADS)
        assert error == 0
        changed = out == -5
        np.testing.assert_array_equal(out[~changed], 4 * np.arange(THREADS)[~changed])
        found |= set(changed)
    assert found == {True, False}


def copy_from_to(*numbers: int) -> tuple[int, np.ndarray, str]:
    """One copy from a byte of `in` to a byte of shared memory, if the third number is not 0."""
    source = np.arange(8 * THREADS + 4, dtype=np.int32)
    source = source[-source.ctypes.data % 16 // 4 :]
    source[:3] = numbers
    return run("CopyAsyncFromTo", 1024, source=source)


@pytest.mark.parametrize(
    ("numbers", "report"),
    [
        ((16, 8, 1), "cp.async of shared memory at byte 8: not a multiple of 16"),
        ((16, 1024, 1), "cp.async of shared memory at byte 1024: outside its 1024 bytes"),
        ((20, 16, 1), "cp.async from a global address that is not a multiple of 16"),
    ],
)
def test_asynchronous_copy_refuses_a_wrong_address(numbers, report):
    error, _, text = copy_from_to(*numbers)
    assert error == LAUNCH_FAILURE
    assert report in text
    assert "self_test.cc:" in text


def test_asynchronous_copy_of_nothing_is_zeros():
    assert list(copy_from_to(64, 16, 0)[1][:4]) == [0] * 4
    assert (copy_from_to(64, 16, 1)[1][:4] != 0).all()


@pytest.mark.parametrize("valid", [0, 1])
def test_asynchronous_copy_of_nothing_does_not_touch_its_source(valid):
    code = f"""
import ctypes, sys; sys.path[:0] = {sys.path!r}
import emulated
lib = emulated.library()
lib.mra_emulation_catch_faults()
out = lib.mra_emulation_allocate(b"output", 256, 1)
source = lib.mra_emulation_allocate(b"input", 256, 1)
ctypes.memmove(source, (ctypes.c_int32 * 3)(256, 0, {valid}), 12)
assert lib.mra_emulation_self_test(b"CopyAsyncFromTo", out, source, 1, 256) == 0
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == (emulated.FAULT_EXIT if valid else 0), result.stderr
    assert ("0 bytes past the end of input (256 bytes), thread 0 of CTA 0" in result.stderr) == bool(valid)


def convert(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Exp2, RoundToTf32 (uint32), PackPair of half and of bfloat16 (uint32) for THREADS floats."""
    error, out, report = run("Convert", source=x.view(np.int32), words=4)
    assert error == 0, report
    exp2, *words = out.view(np.uint32).reshape(THREADS, 4).T
    return np.ascontiguousarray(exp2).view(np.float32), *words


def test_conversions():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(THREADS) * 2.0 ** rng.integers(-9, 6, THREADS)).astype(np.float32)
    x[:6] = 0.0, -0.0, -np.inf, -140.0, -127.0, 1 + 2.0**-11  # the last one is halfway between two tf32
    exp2, tf32, half, bfloat = convert(x)
    want = np.exp2(x.astype(np.float64))
    want[want < 2.0**-126] = 0
    np.testing.assert_allclose(exp2, want, rtol=2.0**-22, atol=0)
    assert (exp2 != want.astype(np.float32)).any()
    assert list(exp2[:5]) == [1, 1, 0, 0, 0]
    rounded = (tf32[3:] & 0xFFFFE000).view(np.float32)
    assert (np.abs(rounded - x[3:]) <= 2.0**-11 * 2.0 ** np.floor(np.log2(np.abs(x[3:])))).all()
    assert rounded[2] == 1 + 2.0**-10
    assert (tf32 & 0x1FFF).any()  # left unspecified
    with np.errstate(over="ignore"):
        for words, dtype in ((half, np.float16), (bfloat, ml_dtypes.bfloat16)):
            pairs = np.stack((x, -x), 1).astype(dtype).view(np.uint32)[:, 0]
            np.testing.assert_array_equal(words, pairs)
