"""Finding the compiled libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

import mra_export
from mra_export import libraries
from mra_export.errors import PluginLoadError


def test_found_by_absolute_path_under_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(libraries.DIRECTORY_VARIABLE, raising=False)
    source, installed = tmp_path / "source", tmp_path / "site-packages"
    (installed / "lib").mkdir(parents=True)
    monkeypatch.setattr(mra_export, "__path__", [str(source), str(installed)])
    assert libraries.find("kernels") is None
    (installed / "lib" / "libmra_attention.so").touch()
    assert libraries.find("kernels") == (installed / "lib" / "libmra_attention.so").resolve()
    assert libraries.require("kernels").is_absolute()


@pytest.mark.parametrize(("name", "file"), libraries.FILES.items())
def test_missing_library_names_file_place_and_command(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(libraries.DIRECTORY_VARIABLE, str(tmp_path))
    assert libraries.find(name) is None
    with pytest.raises(PluginLoadError) as caught:
        libraries.require(name)
    message = str(caught.value)
    assert file in message
    assert str(tmp_path) in message
    assert "pip install" in message
    assert libraries.DIRECTORY_VARIABLE in message


def test_directory_variable_wins_over_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libmra_ort.so").touch()
    monkeypatch.setenv(libraries.DIRECTORY_VARIABLE, str(tmp_path))
    assert libraries.require("ort_ops") == (tmp_path / "libmra_ort.so").resolve()


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="'ort' is unknown: use one of kernels, ort_ops, trt_plugin"):
        libraries.find("ort")
