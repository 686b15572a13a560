"""The programs that the tests run: this environment's own before the machine's, so that an activated one makes no difference."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

MAKE = Path(__file__).resolve().parent.parent / "mra_export" / "plugins" / "make"


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
    """The one that the build takes, or None."""
    sys.path.insert(0, str(MAKE))
    try:
        import find_nvcc
    finally:
        sys.path.remove(str(MAKE))
    return find_nvcc.find()
