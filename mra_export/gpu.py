"""NVIDIA GPUs as the driver tells them, through libcuda: no torch, no CUDA toolkit, and no crash where there is neither."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
"""CUdevice_attribute of the compute capability."""


@dataclass(frozen=True)
class Gpu:
    """compute_capability: such as "9.0"."""

    name: str
    compute_capability: str


@functools.cache
def devices() -> tuple[Gpu, ...]:
    """The GPUs this process may use, in CUDA's order; empty without a driver or a GPU."""
    driver = _driver()
    if driver is None or driver.cuInit(0):
        return ()
    count = _number(driver.cuDeviceGetCount)
    return tuple(_device(driver, index) for index in range(count))


@functools.cache
def driver_version() -> str | None:
    """The newest CUDA version that the installed driver runs, such as "13.0"; None without a driver."""
    driver = _driver()
    if driver is None:
        return None
    version = _number(driver.cuDriverGetVersion)
    return f"{version // 1000}.{version % 1000 // 10}" if version else None


def why_none() -> str:
    """Why `devices` is empty, for a message."""
    driver = _driver()
    if driver is None:
        return "this machine has no NVIDIA driver (libcuda.so.1)"
    status = driver.cuInit(0)
    return f"the NVIDIA driver does not start (cuInit gives error {status})" if status else "the NVIDIA driver finds no GPU"


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _device(driver: ctypes.CDLL, index: int) -> Gpu:
    handle = _number(driver.cuDeviceGet, ctypes.c_int(index))
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, ctypes.c_int(len(name)), ctypes.c_int(handle))
    major, minor = (
        _number(driver.cuDeviceGetAttribute, ctypes.c_int(which), ctypes.c_int(handle))
        for which in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR)
    )
    return Gpu(name.value.decode(errors="replace"), f"{major}.{minor}")


def _number(function: ctypes._CFuncPtr, *arguments: ctypes.c_int) -> int:  # type: ignore[name-defined]
    """Call a driver function whose first parameter is an int to fill in; 0 where it fails."""
    value = ctypes.c_int(0)
    return 0 if function(ctypes.byref(value), *arguments) else value.value
