"""The plugin compiled for the host: its own source, the CUDA kernels on the emulator, and a driver that plays TensorRT."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "mra_export" / "plugins"
HERE = Path(__file__).resolve().parent
SOURCES = [
    PLUGINS / "mra_attention_plugin.cu",
    PLUGINS / "cuda" / "mra_attention_cuda.cu",
    PLUGINS / "common" / "mra_attention_params.cc",
    ROOT / "tests" / "emulator" / "cuda_emulation.cc",
    ROOT / "tests" / "emulator" / "cuda_emulation_ptx.cc",
    HERE / "plugin_driver.cc",
]


@pytest.fixture(scope="session")
def tensorrt_headers() -> Path:
    """The folder with TensorRT's headers, found as the build finds them."""
    spec = importlib.util.spec_from_file_location("fetch_headers", PLUGINS / "tensorrt" / "fetch_headers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Path | None = module.find()
    if found is None:
        pytest.skip("no TensorRT headers: run python mra_export/plugins/tensorrt/fetch_headers.py")
    return found


@pytest.fixture(scope="session")
def driver_library(tensorrt_headers: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: install g++")
    target = tmp_path_factory.mktemp("plugin") / "libplugin_driver.so"
    flags = [
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-ffp-contract=off",
        "-DMRA_CUDA_EMULATION",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-Werror",
    ]
    includes = [f"-I{PLUGINS / 'include'}", f"-I{PLUGINS / 'common'}", f"-I{ROOT / 'tests' / 'emulator'}", f"-I{HERE / 'host'}"]
    system = ["-isystem", str(tensorrt_headers)]
    objects = []
    for source in SOURCES:
        objects.append(str(target.with_name(source.name + ".o")))
        compiled = [compiler, *flags, *includes, *system, "-c", "-x", "c++", str(source), "-o", objects[-1]]
        subprocess.run(compiled, check=True)
    # Its own stand-ins for CUDA are meant, also where torch has loaded the real one.
    subprocess.run([compiler, "-shared", "-Wl,-Bsymbolic", *objects, "-ldl", "-lpthread", "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))
