"""Finding the compiled libraries."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import programs
import pytest

import mra_export
from mra_export import kernel, libraries
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


@pytest.mark.parametrize("name", ["kernels", "ort_ops", "trt_register", "session"])
def test_what_needs_only_a_compiler_is_always_built(name: str) -> None:
    assert libraries.require(name).is_file()


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


def test_what_can_be_built_here_is_built() -> None:
    """A part that was left out would only make its tests skip."""
    assert [name for name in libraries.FILES if name != "trt_plugin" and libraries.find(name) is None] == []
    nvcc = programs.nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: nothing of CUDA was built")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = map(int, re.findall(r"release (\d+)\.(\d+)", said)[0])
    if (major, minor) < (12, 8):
        pytest.skip(f"{nvcc} is of CUDA {major}.{minor}: the build needs 12.8")
    assert libraries.find("trt_plugin") is not None, libraries.GET["trt_plugin"]
    assert all(kernel.has_cuda(libraries.require(name)) for name in ("kernels", "ort_ops"))


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="'ort' is unknown: use one of kernels, ort_ops, trt_plugin, trt_register, session"):
        libraries.find("ort")


def test_what_a_c_build_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (libraries.cmake_prefix() / "include" / "mra_attention.h").is_file()
    assert mra_export.cmake_prefix() == libraries.cmake_prefix()
    monkeypatch.setattr(mra_export, "__path__", [str(tmp_path)])
    with pytest.raises(PluginLoadError, match=r"MraExportConfig.cmake is not in .*: install mra_export with"):
        libraries.cmake_prefix()


def test_the_onnxruntime_of_python_is_found_without_loading_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert libraries.onnxruntime_library().name.startswith("libonnxruntime.so")
    spec = importlib.util.spec_from_loader("onnxruntime", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(PluginLoadError, match=r"capi holds no libonnxruntime.so: install a newer onnxruntime"):
        libraries.onnxruntime_library()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PluginLoadError, match="onnxruntime is not installed: pip install onnxruntime"):
        libraries.onnxruntime_library()


def test_third_party_sources_come_with_licence_and_origin() -> None:
    folder = Path(__file__).resolve().parents[2] / "mra_export" / "plugins" / "third_party"
    table = (folder / "README.md").read_text()
    parts = [path.name for path in folder.iterdir() if path.is_dir()]
    assert {"highway", "json", "onnxruntime"} <= set(parts)
    for name in parts:
        assert (folder / name / "LICENSE").read_text().strip(), name
        assert f"| `{name}` |" in table
