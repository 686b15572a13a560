"""The C++ library runs ONNX Runtime's library: without it its tests skip and say so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mra_export import libraries
from mra_export.errors import PluginLoadError


@pytest.fixture(autouse=True)
def _needs(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        monkeypatch.setenv("MRA_ONNXRUNTIME_LIBRARY", str(libraries.onnxruntime_library()))
    except PluginLoadError as error:
        pytest.skip(str(error))


@pytest.fixture
def copied(bundles: Callable[[str], Path], tmp_path: Path) -> Path:
    """The fp32 bundle, to break."""
    shutil.copytree(bundles("fp32"), tmp_path / "bundle")
    return tmp_path / "bundle"
