"""TensorRT and TensorRT-RTX have nearly one Python API: where they differ, and how each is found and loaded, is here."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import platform
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mra_export.contract import PLUGIN_NAME, PLUGIN_NAMESPACE, PLUGIN_VERSION
from mra_export.errors import EngineError, PluginLoadError


@dataclass(frozen=True)
class Flavour:
    """One of the two.

    refuses: options of engine.EngineOptions that it cannot take -> why.
    """

    name: str
    module: str
    install: str
    builds_without_gpu: bool
    refuses: dict[str, str] = field(default_factory=dict)


_RTX_ALIAS, _RTX_LIBRARY = "libtensorrt_rtx.so", "libtensorrt_rtx.so.1"
_BUILT_ON_GPU = "TensorRT-RTX measures nothing while it builds; it compiles for the GPU it finds at run time"

FLAVOURS = {
    "tensorrt": Flavour(
        name="tensorrt",
        module="tensorrt",
        install="pip install tensorrt",
        builds_without_gpu=False,
        refuses={"compute_capabilities": "TensorRT builds for the GPU of this machine: use --hardware-compatibility for others"},
    ),
    "tensorrt-rtx": Flavour(
        name="tensorrt-rtx",
        module="tensorrt_rtx",
        install="pip install tensorrt-rtx-cu13",
        builds_without_gpu=True,
        refuses={
            "version_compatible": "TensorRT-RTX has no lean runtime: build with the version that will run the engine",
            "hardware_compatibility": "a TensorRT-RTX engine runs on several GPUs anyway: choose them with --compute-capability",
            "timing_cache": _BUILT_ON_GPU,
        },
    ),
}
"""Name of a backend, as the manifest and the command line have it -> what is special about it."""

Logged = Callable[[str, str], None]
"""Told (level, text) of TensorRT's own messages; level "error", "warning" or "info"."""

# Said of every graph with a function, and of every graph with int64 inputs: nothing is wrong and nobody can act on it.
_NOISE = ("already exists, the output tensors of this new instance will not be queryable", "has Int64 binding")


def installed(name: str) -> bool:
    """Whether a backend's Python package is there; nothing is loaded."""
    return find_spec(FLAVOURS[name].module) is not None


def load(name: str) -> Any:
    """Import a backend's module, `tensorrt` or `tensorrt_rtx`. Raises EngineError saying how to install it."""
    flavour = FLAVOURS[name]
    if not installed(name):
        raise EngineError(f"{name} is not installed: {flavour.install}")
    try:
        module = importlib.import_module(flavour.module)
        if name == "tensorrt-rtx":
            _alias_rtx_library()
    except (ImportError, OSError) as error:
        raise EngineError(f"{name} is installed but does not load ({error}): {flavour.install} --force-reinstall") from error
    return module


def version(name: str) -> str:
    """The installed version, all four parts, such as "1.7.1.116". Raises EngineError."""
    return str(load(name).__version__)


def make_logger(trt: Any, told: Logged) -> Any:
    """A logger object for TensorRT. Keep it alive as long as what was made with it."""
    severity = trt.ILogger.Severity
    levels = {severity.INTERNAL_ERROR: "error", severity.ERROR: "error", severity.WARNING: "warning"}

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, text: str) -> None:
            if not any(noise in text for noise in _NOISE):
                told(levels.get(level, "info"), text)

    return Logger()


def register_plugin(trt: Any, library: Path, errors: Callable[[], str]) -> None:
    """Load a plugin library by its path and make sure that it brings our creator.

    errors: gives what TensorRT logged since. Raises PluginLoadError naming library and creator.
    """
    registry = trt.get_plugin_registry()
    wanted = (PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE)
    name = f"{PLUGIN_NAME} version {PLUGIN_VERSION!r}, namespace {PLUGIN_NAMESPACE!r}"
    if wanted in _creators(registry):
        return  # loaded before: a second load would be refused
    if not library.is_file():
        raise PluginLoadError(f"{library} is missing: it holds the plugin {name}")
    if not registry.load_library(str(library.resolve())):
        raise PluginLoadError(f"{library} does not load as a TensorRT plugin library: {errors() or 'TensorRT gives no reason'}")
    if wanted not in _creators(registry):
        others = ", ".join(f"version {c[1]!r}, namespace {c[2]!r}" for c in _creators(registry) if c[0] == PLUGIN_NAME)
        raise PluginLoadError(
            f"{library} brings no plugin {name}; it brings {others or 'none of that name'}: build it with this mra-export"
        )


def _creators(registry: Any) -> list[tuple[str, str, str]]:
    """Not get_creator: that logs an error where there is none."""
    return [(creator.name, creator.plugin_version, creator.plugin_namespace) for creator in registry.all_creators]


@functools.cache
def _alias_rtx_library() -> None:
    """Let TensorRT-RTX find itself.

    Its ONNX parser opens "libtensorrt_rtx.so" when it makes a plugin and ends the process where that fails; its package ships
    "libtensorrt_rtx.so.1" only. The loader takes a library that is already there under the asked-for name, so a library that has
    this name, no code, and depends on the real one is all it needs. It is made in memory, and no search path has to be set.
    """
    descriptor = os.memfd_create(_RTX_ALIAS)
    try:
        os.write(descriptor, _alias_elf(_RTX_ALIAS, _RTX_LIBRARY))
        ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _alias_elf(name: str, needed: str) -> bytes:
    """A 64-bit little-endian ELF shared library without code: DT_SONAME `name`, DT_NEEDED `needed`."""
    machine = {"x86_64": 62, "aarch64": 183}.get(platform.machine())
    if machine is None:
        raise EngineError(f"TensorRT-RTX has no build for {platform.machine()}")
    strings = b"\0" + name.encode() + b"\0" + needed.encode() + b"\0"
    dynamic_at = 64 + 3 * 56
    symbols_at = dynamic_at + 7 * 16
    strings_at = symbols_at + 24
    entries = (
        (14, 1),  # DT_SONAME
        (1, 2 + len(name)),  # DT_NEEDED
        (5, strings_at),  # DT_STRTAB
        (6, symbols_at),  # DT_SYMTAB
        (10, len(strings)),  # DT_STRSZ
        (11, 24),  # DT_SYMENT
        (0, 0),
    )
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    header = struct.pack("<4s5B7xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 0, 3, machine, 1, 0, 64, 0, 0, 64, 56, 3, 64, 0, 0)

    def segment(kind: int, at: int, size: int, align: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, 6, at, at, at, size, size, align)  # 6: readable, writable, not executable

    size = strings_at + len(strings)
    load, dynamic_segment, stack = segment(1, 0, size, 4096), segment(2, dynamic_at, len(dynamic), 8), segment(0x6474E551, 0, 0, 16)
    return header + load + dynamic_segment + stack + dynamic + bytes(24) + strings
