"""mra-export doctor: what is there, what is missing, what does not work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mra_export import doctor, libraries
from mra_export.cli import main
from mra_export.errors import BackendError


def examine() -> dict:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_it_names_versions_libraries_and_processor() -> None:
    facts = examine()
    assert {"python", "torch", "onnx", "onnxruntime", "transformers"} <= set(facts["versions"])
    assert set(facts["libraries"]) == set(libraries.FILES)
    for name, path in facts["libraries"].items():
        found = libraries.find(name)
        assert path == (None if found is None else str(found))
        assert path is None or (Path(path).is_absolute() and Path(path).is_file())
    assert Path(facts["embedding"]["cmake_prefix"], "lib/cmake/MraExport/MraExportConfig.cmake").is_file()
    assert facts["cpu"]["cpus"] >= 1
    assert facts["problems"] == []


def test_a_library_that_is_missing_comes_with_the_command_that_gets_it(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(libraries.DIRECTORY_VARIABLE, str(tmp_path))
    facts = examine()
    assert facts["libraries"] == dict.fromkeys(libraries.FILES)
    missing = {entry["name"]: entry for entry in facts["missing"]}
    for name in libraries.FILES:
        assert "pip install" in missing[name]["command"]
        assert missing[name]["optional"] is (name in ("trt_plugin", "trt_register", "session"))
    plain = CliRunner().invoke(main, ["doctor"])
    assert plain.exit_code == 0
    assert "not built" in plain.stdout
    assert "pip install" in plain.stdout


def test_a_package_that_is_missing_comes_with_the_command_that_gets_it(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    missing = {entry["name"]: entry["command"] for entry in doctor.examine()["missing"]}
    assert missing["onnxruntime"] == "pip install onnxruntime"
    assert "tensorrt" in missing


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_a_gpu_needs_is_optional(monkeypatch, on_gpu) -> None:
    pytest.importorskip("onnxruntime")
    from mra_export import gpu, kernel
    from mra_export.backends import onnx_runtime, onnx_runtime_cuda

    def not_started() -> None:
        raise BackendError("onnxruntime cannot use its CUDAExecutionProvider: libcublas")

    monkeypatch.setattr(kernel, "has_cuda", lambda path: on_gpu)
    monkeypatch.setattr(onnx_runtime, "cuda_available", lambda: on_gpu)
    monkeypatch.setattr(gpu, "devices", lambda: (gpu.Gpu("imagined", "9.0"),))
    monkeypatch.setattr(onnx_runtime_cuda, "start_provider", not_started)
    facts = doctor.examine()
    optional = {entry["name"]: entry for entry in facts["missing"] if entry["optional"]}
    wanted = {"CUDAExecutionProvider"} | {f"{name} with CUDA" for name in ("kernels", "ort_ops") if libraries.find(name)}
    assert wanted & set(optional) == (set() if on_gpu else wanted)
    if libraries.find("ort_ops"):
        assert any("libcublas" in problem for problem in facts["problems"]) is on_gpu


def test_libraries_that_do_not_work_are_problems(monkeypatch, tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    from mra_export import kernel

    for file in ("libmra_attention.so", "libmra_ort.so"):
        (tmp_path / file).write_bytes(b"not a library")
    monkeypatch.setenv(libraries.DIRECTORY_VARIABLE, str(tmp_path))
    kernel.library.cache_clear()
    try:
        problems = examine()["problems"]
    finally:
        kernel.library.cache_clear()
    assert len(problems) == 2
    assert "libmra_attention.so does not load" in problems[0]
    assert "libmra_ort.so does not load" in problems[1]
