"""A build of the kernel library whose AMX tiles are emulated (tests/cpp/amx_emulation.h), for machines that have none."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from pathlib import Path

import instruction_sets
import pytest
from aarch64 import ENVIRONMENT, ROOT

BUILD = ROOT / "build" / "amx-emulated"


def build() -> Path:
    """The folder of libmra_attention.so, up to date. Skips the test where the vector half of that kernel could not run."""
    if "avx512_bf16" not in instruction_sets.targets():
        pytest.skip("this machine has no amx_bf16, and no avx512_bf16, which its emulation needs")
    if not all(shutil.which(tool, path=ENVIRONMENT["PATH"]) for tool in ("cmake", "ninja")):
        pytest.skip("needs cmake and ninja on PATH")
    configure = [
        "cmake",
        "-G",
        "Ninja",
        "-S",
        "mra_export/plugins",
        "-B",
        str(BUILD),
        "-DMRA_AMX_EMULATED=ON",
        "-DMRA_BUILD_CUDA=OFF",
    ]
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # test processes share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(BUILD), "--target", "mra_attention"]):
            done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return BUILD
