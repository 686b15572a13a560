"""The wheels that `make wheel` left in dist/."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

import mra_export

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
MACHINES = ("x86_64", "aarch64")


def path(machine: str) -> Path:
    """Skips the test where there is none of these sources."""
    wheel = DIST / f"mra_export-{mra_export.__version__}-py3-none-manylinux_2_28_{machine}.whl"
    if not wheel.is_file():
        pytest.skip(f"no {wheel.name} in dist/: make wheel")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            source = ROOT / name
            if name.endswith((".py", ".h", ".hpp")) and source.is_file() and source.read_bytes() != archive.read(name):
                pytest.skip(f"{wheel.name} was made before {name} changed: make wheel")
    return wheel


def unpacked(machine: str, folder: Path) -> Path:
    """The package's folder of libraries, unpacked into folder."""
    with zipfile.ZipFile(path(machine)) as archive:
        archive.extractall(folder)
    return folder / "mra_export" / "lib"
