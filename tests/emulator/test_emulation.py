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


def run(name: str, shared_bytes: int = 4 * THREADS, blocks: int = 1) -> tuple[int, np.ndarray, str]:
    """Launches one of self_test.cc's kernels on in = 0, 1, 2, ...; returns the error, out, and the report."""
    lib = emulated.library()
    source, out = np.arange(THREADS, dtype=np.int32), np.full(THREADS, -7, np.int32)
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
