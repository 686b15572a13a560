"""Prints the nvcc to build with; exits with 1 where there is none.

    .venv/bin/python mra_export/plugins/make/find_nvcc.py

CUDACXX, whatever it names; else the first that is new enough: on PATH, of the toolkit's usual folder, among this Python's packages.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

OLDEST = (12, 8)
"""As in ../cuda/CMakeLists.txt."""
TOOLKIT = Path("/usr/local/cuda")


def find() -> Path | None:
    if given := os.environ.get("CUDACXX"):
        return Path(given)
    packaged = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "nvcc")
    candidates = (shutil.which("nvcc"), TOOLKIT / "bin" / "nvcc", packaged)
    return next((Path(nvcc) for nvcc in candidates if nvcc and release(Path(nvcc)) >= OLDEST), None)


def release(nvcc: Path) -> tuple[int, int]:
    """(13, 0) for CUDA 13.0; (0, 0) for what is no nvcc that runs."""
    try:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    except OSError:
        return 0, 0
    found = re.search(r"release (\d+)\.(\d+)", told)
    return (int(found[1]), int(found[2])) if found else (0, 0)


if __name__ == "__main__":
    nvcc = find()
    if nvcc is None:
        sys.exit(1)
    sys.stdout.write(f"{nvcc}\n")
