"""The reference attention alone: `mra_export.model` as a package also needs transformers, which a GPU machine may not have."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import mra_export


def _load() -> ModuleType:
    path = Path(mra_export.__file__).parent / "model" / "attention.py"
    spec = importlib.util.spec_from_file_location("mra_reference_attention", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_reference = _load()
Selection = _reference.Selection
mra_attention = _reference.mra_attention
