"""Where the compiled libraries are: always found by absolute path, never by the loader's search path."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import mra_export
from mra_export.errors import PluginLoadError

DIRECTORY_VARIABLE = "MRA_EXPORT_LIBRARY_DIR"
"""Environment variable: a folder to take the libraries from instead of the installed package's lib/."""

FILES = {
    "kernels": "libmra_attention.so",
    "ort_ops": "libmra_ort.so",
    "trt_plugin": "libmra_trt.so",
    "trt_register": "libmra_trt_register.so",
    "session": "libmra_session.so",
}
"""Name of a library -> its file."""

_GET_CPU = "`pip install .` in the repository (`pip install -e .` to work on it) with a C++17 compiler (GCC 11, Clang 14 or newer)"
GET = {
    "kernels": _GET_CPU,
    "ort_ops": _GET_CPU,
    "trt_plugin": "`pip install .` in the repository with an nvcc on PATH (or CUDACXX set) and TensorRT's headers (TENSORRT_ROOT)",
    "trt_register": _GET_CPU,
    "session": _GET_CPU,
}
"""Name of a library -> the command that gets it."""


def _file(name: str) -> str:
    if name not in FILES:
        raise ValueError(f"library {name!r} is unknown: use one of {', '.join(FILES)}")
    return FILES[name]


def _folders() -> list[Path]:
    override = os.environ.get(DIRECTORY_VARIABLE)
    if override:
        return [Path(override)]
    return [Path(entry) / "lib" for entry in mra_export.__path__]  # an editable install has two entries: source and site-packages


def find(name: str) -> Path | None:
    """The absolute path of a library (a key of FILES, such as "kernels"), or None where it was not built."""
    file = _file(name)
    for folder in _folders():
        path = folder / file
        if path.is_file():
            return path.resolve()
    return None


def left_out() -> dict[str, str]:
    """Part -> why the build went without it: a key of FILES, "cuda" (its kernels) or "session_tensorrt" (TensorRT for C++)."""
    files = (folder / "left_out.txt" for folder in _folders())
    lines = next((file.read_text(encoding="utf-8").splitlines() for file in files if file.is_file()), [])
    return dict(line.split(": ", 1) for line in lines)


def require(name: str) -> Path:
    """As `find`, but raises PluginLoadError naming what is missing, where it was looked for and the command that gets it."""
    path = find(name)
    if path is None:
        places = ", ".join(str(folder) for folder in _folders())
        reason = left_out().get(name)
        why = f" (the build went without: {reason})" if reason else ""
        raise PluginLoadError(
            f"{_file(name)} is not in {places}{why}: build it with {GET[name]}, or point {DIRECTORY_VARIABLE} at its folder"
        )
    return path


def cmake_prefix() -> Path:
    """For CMAKE_PREFIX_PATH of find_package(MraExport): the folder that holds include/ and lib/ of this installation.

    Raises PluginLoadError where there is none.
    """
    config = Path("cmake", "MraExport", "MraExportConfig.cmake")
    folders = [Path(entry) / "lib" for entry in mra_export.__path__]
    for folder in folders:
        if (folder / config).is_file():
            return folder.parent.resolve()
    places = ", ".join(str(folder) for folder in folders)
    raise PluginLoadError(f"{config} is not in {places}: install mra_export with {_GET_CPU}")


def onnxruntime_library() -> Path:
    """libonnxruntime.so of the installed Python package, for C and C++ programs: MRA_ONNXRUNTIME_LIBRARY. Nothing is loaded.

    Raises PluginLoadError where the package is missing or brings none.
    """
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise PluginLoadError("onnxruntime is not installed: pip install onnxruntime")
    folder = Path(spec.origin).parent / "capi"
    for path in sorted(folder.glob("libonnxruntime.so*")):
        return path.resolve()
    raise PluginLoadError(f"{folder} holds no libonnxruntime.so: install a newer onnxruntime, or ONNX Runtime's own C library")
