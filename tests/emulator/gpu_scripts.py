"""The check scripts that GPU machines run (tests/gpu), loaded and run on the emulated kernels."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import emulated
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "gpu"


def loaded(name: str) -> Iterator[ModuleType]:
    """The script as a module, its folder importable meanwhile. For a fixture to `yield from`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module(name)


def run(script: ModuleType, *arguments: str) -> tuple[int, str]:
    """Exit status and what it wrote."""
    emulated.library().mra_emulation_seed(5)
    lines: list[str] = []
    return script.main(["--device", "cpu", "--library", str(emulated.build()), *arguments], lines.append), "".join(lines)
