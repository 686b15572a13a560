"""The programs that the tests run: this environment's own before the machine's, so that an activated one makes no difference."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def put_on_path() -> None:
    """cmake, ninja, pkgconf and mra-export of this environment come first on PATH, and its nvcc where the machine has none.

    For this process and what it starts: tests, CMake and the commands of the documentation then all find the same ones.
    """
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path = [str(Path(sys.executable).parent), *path]
    os.environ["PATH"] = os.pathsep.join(dict.fromkeys(path))
    found = nvcc()
    if found is not None and shutil.which("nvcc") is None:
        os.environ["PATH"] += os.pathsep + str(found.parent)


def nvcc() -> Path | None:
    """That of CUDACXX, on PATH, in CUDA's usual place, or of this environment's packages (nvidia-cuda-nvcc)."""
    named = (os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc")
    ours = Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc")
    return next((path for path in (*map(Path, filter(None, named)), *ours) if path.is_file()), None)
