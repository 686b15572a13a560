"""The kernel for 64-bit ARM: cross-compiled here, run under qemu-user."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "aarch64"
EMULATOR = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
TOOLS = {
    "aarch64-linux-gnu-g++": "apt install g++-aarch64-linux-gnu",
    "qemu-aarch64": "apt install qemu-user",
}


def missing() -> str:
    """What this machine lacks for it, and how to get it; empty where nothing."""
    if os.uname().machine == "aarch64":
        return "this machine is aarch64 itself: its own build is tested"
    lacking = [f"{tool} ({how})" for tool, how in TOOLS.items() if not shutil.which(tool)]
    return f"not on PATH: {', '.join(lacking)}" if lacking else ""


def build() -> Path:
    """The folder of the libraries and test programs, up to date. Skips the test where the tools are missing."""
    if reason := missing():
        pytest.skip(reason)
    configure = [
        *("cmake", "-G", "Ninja", "-S", "mra_export/plugins", "-B", str(BUILD)),
        *("--toolchain", "cmake/aarch64-linux-gnu.cmake", "-DMRA_BUILD_TESTS=ON", "-DMRA_WARNINGS_AS_ERRORS=ON"),
        "-DMRA_BUILD_SESSION=OFF",
    ]
    with alone():
        for command in (configure, ["cmake", "--build", str(BUILD)]):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return BUILD


@contextmanager
def alone() -> Iterator[None]:
    """No other test process builds meanwhile: they share the folder."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
