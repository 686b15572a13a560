"""What a script of this folder needs, said in one line where it is missing. Standard library only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

SKIPPED = 77
"""Exit status of a script that had nothing to run on; its last line says why."""


def missing(modules: Mapping[str, str]) -> str | None:
    """modules: name -> pip's name for it. None where all are there, else what is missing and how to get it. Imports nothing."""
    gone = [(module, package) for module, package in modules.items() if not _there(module)]
    if not gone:
        return None
    names = ", ".join(module for module, _ in gone)
    return f"{sys.executable} has no {names}: pip install {' '.join(package for _, package in gone)}"


def skip(reason: str, write: Callable[[str], Any] = sys.stdout.write) -> int:
    write(f"SKIP all: {reason}\n")
    return SKIPPED


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
