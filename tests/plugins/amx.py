"""A build of the kernel library whose AMX tiles are emulated (tests/cpp/amx_emulation.h), for machines that have none."""

from __future__ import annotations

import fcntl
import subprocess
from pathlib import Path

from aarch64 import ROOT

BUILD = ROOT / "build" / "amx-emulated"


def build() -> Path:
    """The folder of libmra_attention.so, up to date."""
    configure = ["cmake", "-G", "Ninja", "-S", "mra_export/plugins", "-B", str(BUILD)]
    configure += ["-DMRA_AMX_EMULATED=ON", "-DMRA_BUILD_CUDA=OFF"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # test processes share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(BUILD), "--target", "mra_attention"]):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return BUILD
