"""What this installation has: versions, compiled libraries, processor, GPU, and what is missing with the command that gets it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mra_export import gpu, kernel, libraries
from mra_export.errors import BackendError, PluginLoadError
from mra_export.report import versions

LIBRARIES = {
    "kernels": "the operator for PyTorch on a CPU (the plain reference runs without it, slower)",
    "ort_ops": "the operator for ONNX Runtime; exporting bundles",
    "trt_plugin": "the operator for TensorRT engines",
    "trt_register": "serving TensorRT engines with Triton's own tensorrt backend",
    "session": "C and C++ programs that run bundles",
}
"""Name for libraries.find -> what needs it."""

_ON_GPU = {"kernels": "the operator for PyTorch", "ort_ops": "the onnxruntime backend"}
_PACKAGES = {
    "torch": "reading checkpoints, exporting, the torch backend, verify",
    "onnx": "exporting, inspect, verify",
    "onnxruntime": "the onnxruntime backend, verify",
    "transformers": "reading checkpoints",
}
_OPTIONAL_PACKAGES = {
    "tensorrt": ("TensorRT engines for the GPU of this machine", "pip install tensorrt"),
    "tensorrt_rtx": ("TensorRT-RTX engines, which need no GPU to build", "pip install tensorrt-rtx-cu13 tensorrt-rtx-cu13-libs"),
    "matplotlib": ("mra-export bench --plot", "pip install matplotlib"),
    "fastapi": ("mra-export serve", "pip install 'mra-export[serve]'"),
}
_CPU_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "neon",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
INT8_FEATURES = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")
"""Instructions that sum products of 8-bit integers in 32 bits, the fastest first."""


def examine() -> dict[str, Any]:
    """JSON-ready: versions, libraries (name -> absolute path or null), embedding (for a C or C++ build: cmake_prefix and
    onnxruntime_library, each a path or null), cpu, gpu, left_out (part of the build -> why it went without), missing (name,
    needed_for, command, optional), and problems, what is there but does not work."""
    found = {name: libraries.find(name) for name in LIBRARIES}
    return {
        "versions": versions(),
        "libraries": {name: None if path is None else str(Path(path).absolute()) for name, path in found.items()},
        "embedding": {"cmake_prefix": _place(libraries.cmake_prefix), "onnxruntime_library": _place(libraries.onnxruntime_library)},
        "cpu": cpu(),
        "gpu": gpus(),
        "left_out": libraries.left_out(),
        "missing": _missing(found),
        "problems": _problems(found),
    }


def _place(find: Callable[[], Path]) -> str | None:
    try:
        return str(find())
    except PluginLoadError:
        return None


def _problems(found: dict[str, Path | None]) -> list[str]:
    problems = []
    try:
        if found["kernels"] is not None:
            kernel.library()
    except PluginLoadError as error:
        problems.append(str(error))
    try:
        if found["ort_ops"] is not None and find_spec("onnxruntime") is not None:
            from mra_export.backends.onnx_runtime import cuda_available, probe_library

            probe_library(found["ort_ops"], "fp32", "cpu")
            if cuda_available() and gpu.devices():
                from mra_export.backends.onnx_runtime_cuda import check_library, start_provider

                start_provider()
                check_library(found["ort_ops"], "fp32")
    except (BackendError, PluginLoadError) as error:
        problems.append(str(error))
    return problems


def _missing(found: dict[str, Path | None]) -> list[dict[str, Any]]:
    missing: list[dict[str, Any]] = []
    for name, path in found.items():
        if path is None:
            optional = name in ("trt_plugin", "trt_register", "session")
            missing.append({"name": name, "needed_for": LIBRARIES[name], "command": libraries.GET[name], "optional": optional})
    for name, purpose in _PACKAGES.items():
        if find_spec(name) is None:
            missing.append({"name": name, "needed_for": purpose, "command": f"pip install {name}", "optional": False})
    for name in ("kernels", "ort_ops"):
        if found[name] is not None and not _has_cuda(found[name]):
            command = "pip install . in the repository with an nvcc on PATH, or CUDACXX set"
            missing.append(
                {"name": f"{name} with CUDA", "needed_for": f"{_ON_GPU[name]} on a GPU", "command": command, "optional": True}
            )
    if find_spec("onnxruntime") is not None:
        from mra_export.backends.onnx_runtime import cuda_available

        if not cuda_available():
            missing.append(
                {
                    "name": "CUDAExecutionProvider",
                    "needed_for": f"{_ON_GPU['ort_ops']} on a GPU",
                    "command": "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'",
                    "optional": True,
                }
            )
    for name, (purpose, command) in _OPTIONAL_PACKAGES.items():
        if find_spec(name) is None:
            missing.append({"name": name, "needed_for": purpose, "command": command, "optional": True})
    return missing


def _has_cuda(library: Path | None) -> bool:
    try:
        return library is not None and kernel.has_cuda(library)
    except PluginLoadError:
        return True  # among the problems already


def cpu() -> dict[str, Any]:
    """model, machine, cpus, features (those that the kernels know), int8 (in words: what multiplies 8-bit integers)."""
    model, flags = platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = value
    present = set(flags.split())
    return {
        "model": model,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "features": [name for name in _CPU_FEATURES if name in present],
        "int8": next(
            (f"exact, by {name}" for name in INT8_FEATURES if name in present),
            "no instructions for them: an int8 bundle is hardly faster than fp32 here, and large sums may saturate",
        ),
    }


def gpus() -> list[dict[str, str]]:
    """NVIDIA GPUs with driver version and compute capability, as nvidia-smi tells them; empty without one."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    fields = ("name", "driver_version", "compute_cap")
    done = subprocess.run(
        [command, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    if done.returncode:
        return []
    return [
        dict(zip(fields, (part.strip() for part in line.split(",")), strict=False)) for line in done.stdout.splitlines() if line
    ]
