"""The CUDA kernels compiled for the host (cuda_emulation.h), behind the C API's own functions and numpy arrays.

The library is built by the C++ compiler (CXX, else g++) into build/emulator/ the first time, and again when a source changes.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mra_export.contract import BLOCK_SIZE, Attributes
from mra_export.kernel import Params, make_params

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "mra_export" / "plugins"
HERE = Path(__file__).resolve().parent
SOURCES = (
    PLUGINS / "cuda" / "mra_attention_cuda.cu",
    PLUGINS / "common" / "mra_attention_params.cc",
    HERE / "cuda_emulation.cc",
    HERE / "cuda_emulation_ptx.cc",
    HERE / "self_test.cc",
)
# -ffp-contract=off: selection is bit-exact, every fused multiply-add is written out. unroll is nvcc's pragma. -Bsymbolic: its own
# stand-ins for CUDA are meant, also where torch has loaded the real one.
FLAGS = (
    *("-std=c++17", "-O2", "-g", "-fPIC", "-shared", "-Wl,-Bsymbolic", "-ffp-contract=off", "-fno-math-errno"),
    *("-Wall", "-Wextra", "-Wshadow", "-Werror", "-Wno-unknown-pragmas", "-DMRA_CUDA_EMULATION"),
)
ALIGNMENT = 64
FAULT_EXIT = 97
"""Exit status of a process whose emulated kernel went out of bounds."""


def build(sources: tuple[Path, ...] = SOURCES, include: tuple[Path, ...] = (PLUGINS / "include", PLUGINS / "cuda", HERE)) -> Path:
    """The compiled library for these sources, from the cache if it is there."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler {compiler!r}: install g++ or set CXX")
    folders = {*include, *(source.parent for source in sources)}
    read = sorted(path for folder in folders for path in folder.glob("*") if path.is_file())
    digest = hashlib.sha256(" ".join((compiler, *FLAGS)).encode())
    for path in read:
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"libmra_emulated-{digest.hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test workers build it once
        if not library.exists():
            part = library.with_suffix(".part")
            command = [compiler, *FLAGS, *(f"-I{path}" for path in include), "-x", "c++", *map(str, sources), "-o", str(part)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
            part.rename(library)
    return library


@cache
def library() -> Any:
    """The loaded library."""
    loaded = ctypes.CDLL(str(build()))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    params = ctypes.POINTER(Params)
    loaded.mra_status_string.restype = ctypes.c_char_p
    loaded.mra_attention_cuda_workspace_size.argtypes = (params, ctypes.POINTER(size))
    loaded.mra_attention_cuda.argtypes = (params, *[pointer] * 6, size, pointer)
    loaded.mra_attention_cuda_selection.argtypes = (params, *[pointer] * 6, size, pointer)
    loaded.mra_emulation_seed.argtypes = (ctypes.c_uint64,)
    loaded.mra_emulation_error.restype = ctypes.c_char_p
    loaded.mra_emulation_launches.argtypes = (ctypes.POINTER(ctypes.c_int64), ctypes.c_int)
    loaded.mra_emulation_allocate.argtypes = (ctypes.c_char_p, size, ctypes.c_int)
    loaded.mra_emulation_allocate.restype = pointer
    loaded.mra_emulation_self_test.argtypes = (ctypes.c_char_p, pointer, pointer, ctypes.c_int64, size)
    loaded.mra_emulation_workspace_sections.argtypes = (params, ctypes.POINTER(ctypes.c_uint64))
    for name in ("half_to_float", "bfloat_to_float"):
        getattr(loaded, f"mra_emulation_{name}").argtypes = (ctypes.c_uint16,)
        getattr(loaded, f"mra_emulation_{name}").restype = ctypes.c_uint32
    for name in ("float_to_half", "float_to_bfloat"):
        getattr(loaded, f"mra_emulation_{name}").argtypes = (ctypes.c_uint32,)
        getattr(loaded, f"mra_emulation_{name}").restype = ctypes.c_uint16
    return loaded


class StatusError(Exception):
    """A status other than MRA_OK. `status` is its number, the text also holds what the emulation saw."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"{library().mra_status_string(status).decode()} {library().mra_emulation_error().decode()}".rstrip())


def params_for(query: np.ndarray, attributes: Attributes, float32_mode: str = "fma") -> Params:
    """query: (B, N, H * D)."""
    batch, length, hidden = query.shape
    head_size = hidden // attributes.num_heads
    return make_params(attributes, str(query.dtype), batch, length, head_size, float32_mode=float32_mode)


def workspace_size(params: Params) -> int:
    size = ctypes.c_size_t()
    status = library().mra_attention_cuda_workspace_size(params, size)
    if status:
        raise StatusError(status)
    return size.value


def aligned_bytes(size: int, fill: int) -> np.ndarray:
    """`size` bytes of value `fill` at a multiple of ALIGNMENT."""
    memory = np.full(size + ALIGNMENT, fill, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def moved(array: np.ndarray, by: int) -> np.ndarray:
    """A copy that begins `by` bytes after a multiple of ALIGNMENT."""
    memory = aligned_bytes(array.nbytes + by, 0)[by:]
    copy = memory.view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    mask: np.ndarray,
    attributes: Attributes,
    *,
    seed: int = 1,
    fill: int = 0xFF,
    float32_mode: str = "fma",
) -> np.ndarray:
    """The emulated mra_attention_cuda. query, key, value: (B, N, H * D) float32, float16 or ml_dtypes.bfloat16; mask: (B, N) int32.

    seed: order of threads and CTAs, 0 = ascending. fill: what the workspace and the context hold before, 0xFF = NaN.
    """
    lib, params = library(), params_for(query, attributes, float32_mode)
    workspace = aligned_bytes(workspace_size(params), fill)
    context = np.full(query.size * query.itemsize, fill, np.uint8).view(query.dtype).reshape(query.shape)
    lib.mra_emulation_seed(seed)
    arrays = (query, key, value, mask, context, workspace)
    assert all(array.flags.c_contiguous for array in arrays)
    assert mask.dtype == np.int32
    status = lib.mra_attention_cuda(params, *(array.ctypes.data for array in arrays), workspace.size, None)
    if status:
        raise StatusError(status)
    return context


def selection(
    query: np.ndarray, key: np.ndarray, mask: np.ndarray, attributes: Attributes, *, seed: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The emulated mra_attention_cuda_selection: chosen, excluded (B, H, nb, nb) bool and score (B, H, nb, nb) float32."""
    lib, params = library(), params_for(query, attributes)
    batch, length, _ = query.shape
    nb = -(-length // BLOCK_SIZE)
    states = np.full((batch, attributes.num_heads, nb, nb), 0xFF, np.uint8)
    score = np.full(states.shape, np.nan, np.float32)
    workspace = aligned_bytes(workspace_size(params), 0xFF)
    lib.mra_emulation_seed(seed)
    arrays = (query, key, mask, states, score, workspace)
    status = lib.mra_attention_cuda_selection(params, *(array.ctypes.data for array in arrays), workspace.size, None)
    if status:
        raise StatusError(status)
    assert set(np.unique(states)) <= {0, 1, 2}
    return states == 2, states > 0, score


def launches() -> list[tuple[int, int, int]]:
    """CTAs, threads and bytes of shared memory of each launch since the last call of this function."""
    numbers = (ctypes.c_int64 * 3000)()
    count = library().mra_emulation_launches(numbers, 1000)
    return [tuple(numbers[3 * n : 3 * n + 3]) for n in range(min(count, 1000))]
