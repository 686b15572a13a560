"""What the benchmarks share: times, a limit to them, calls that take turns, the machine, what a large matrix product reaches."""

from __future__ import annotations

import os
import platform
import signal
import statistics
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mra_export import kernel

REST = 0.03
"""Seconds to wait before another library's turn: the threads of the one that ran spin that long for more work (OpenMP's and ONNX
Runtime's do, some milliseconds), on the cores that the next one needs."""
_LEAST_CALLS = 3


@dataclass(frozen=True)
class Timing:
    """Times of one call, in `unit`: "ms" or "us". calls: how many were timed, each alone or as the mean of a run."""

    median: float
    lower_quartile: float
    upper_quartile: float
    fastest: float
    calls: int
    unit: str

    @classmethod
    def of(cls, times: Sequence[float], unit: str) -> Timing:
        """times: at least two, in that unit."""
        lower, median, upper = statistics.quantiles(times, n=4)
        return cls(median, lower, upper, min(times), len(times), unit)


def take_turns(calls: Sequence[Callable[[], object]], seconds: float, *, rest: float = 0.0, turn: float = 0.0) -> list[Timing]:
    """Milliseconds of each call, in turn until `seconds` are over for all of them together; at least three calls of each.

    rest: seconds of quiet before each turn, for calls whose thread pools differ (REST). turn: seconds that one turn lasts, at least
    one call, so that the rest is paid once for many short calls. The first call after a rest is not counted where it is short.
    """
    for call in calls:
        call()  # warm: pages, caches, thread pool
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while min(map(len, times)) < _LEAST_CALLS or time.perf_counter() < end:
        for call, kept in zip(calls, times, strict=True):
            if rest:
                time.sleep(rest)
                if not kept or min(kept) < turn * 1e3:
                    call()
            until = time.perf_counter() + turn
            while True:
                start = time.perf_counter()
                call()
                now = time.perf_counter()
                kept.append((now - start) * 1e3)
                if now >= until:
                    break
    return [Timing.of(kept, "ms") for kept in times]


MATMUL_GFLOP = 2 * 1536**3 / 1e9


def large_matmul() -> Callable[[], object]:
    """A float32 product of two 1536 x 1536 matrices (MATMUL_GFLOP), on torch's threads: what the machine can reach at all."""
    a = torch.randn(1536, 1536)
    return lambda: a @ a


def matmul_gflops(seconds: float) -> float:
    """What a large float32 matrix product reaches here, on torch's threads."""
    return MATMUL_GFLOP / take_turns([large_matmul()], seconds)[0].median * 1e3


def machine() -> dict[str, object]:
    """Processor, load, instruction set of the kernel, versions and commit: what a figure means nothing without."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = {}
    for package in ("mra-export", "torch", "onnxruntime", "numpy"):
        try:
            versions[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "instruction_set": kernel.cpu_target(),
        "python": platform.python_version(),
        **versions,
        "commit": commit or "unknown",
    }


class TimeIsUp(BaseException):
    """Not an Exception: the compiler catches those."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeIsUp where the block takes longer. In the main thread only."""

    def stop(signum: int, frame: object) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def why_not_compiled() -> str:
    """What torch.compile lacks here; empty where nothing. What calls a kernel is built against Python's headers, also on a GPU."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.is_file() else f"torch.compile needs {header}: install it (Debian, Ubuntu: apt install python3-dev)"
