"""ctypes binding of libmra_attention, the compiled kernels. Imports no framework: tensors are addresses.

Work runs on the OpenMP pool that the process already has (torch's, where torch is loaded): a second pool on the same cores would
fight with it. Without one, threads are started at each call.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mra_export import libraries
from mra_export.contract import APPROX_MODES, BLOCK_SIZE, CONTRACT_VERSION, Attributes, check_shapes
from mra_export.errors import ContractError, PluginLoadError

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
"""Name of the tensor type T -> MraDtype."""

FLOAT32_MODES = {"fma": 0, "tf32x3": 1}
"""How the CUDA kernels multiply float32 tensors -> MraFloat32Mode. The CPU kernel takes "fma" for either."""

ALIGNMENT = 64
_NOT_BUILT = 14
"""MRA_ERROR_NOT_BUILT."""
_KEPT_WORKSPACE_BYTES = 1 << 28
"""A thread keeps its workspace for the next call up to this size: fresh pages cost more than the kernel's own time."""


class Params(ctypes.Structure):
    """MraAttentionParams of mra_attention.h."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("dtype", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("num_heads", ctypes.c_int32),
        ("head_size", ctypes.c_int32),
        ("num_blocks", ctypes.c_int64),
        ("approx_mode", ctypes.c_int32),
        ("initial_prior_first_n_blocks", ctypes.c_int32),
        ("initial_prior_diagonal_n_blocks", ctypes.c_int32),
        ("padding_invariant", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("float32_mode", ctypes.c_int32),
    )


class Threads(ctypes.Structure):
    """MraThreads of mra_attention.h."""

    _fields_ = (("pool", ctypes.c_void_p), ("num_threads", ctypes.c_int32), ("parallel_for", ctypes.c_void_p))


class OpenMPPool(ctypes.Structure):
    """MraOpenMPPool of mra_threads.h."""

    _fields_ = (("gomp_parallel", ctypes.c_void_p), ("num_threads", ctypes.c_uint))


@cache
def library() -> Any:
    """The loaded library. Raises PluginLoadError if it is missing, does not load or is of another contract version."""
    path = libraries.require("kernels")
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise PluginLoadError(f"{path} does not load: {error}; rebuild it with {libraries.GET['kernels']}") from error
    version = loaded.mra_attention_contract_version()
    if version != CONTRACT_VERSION:
        raise PluginLoadError(
            f"{path} has contract version {version}, this package {CONTRACT_VERSION}: rebuild it with {libraries.GET['kernels']}"
        )
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    loaded.mra_status_string.restype = ctypes.c_char_p
    loaded.mra_attention_cpu_target.restype = ctypes.c_char_p
    loaded.mra_attention_cpu_workspace_size.argtypes = (ctypes.POINTER(Params), ctypes.c_int32, ctypes.POINTER(size))
    loaded.mra_attention_cpu.argtypes = (ctypes.POINTER(Params), *[pointer] * 6, size, pointer)
    loaded.mra_attention_cpu_selection.argtypes = (ctypes.POINTER(Params), *[pointer] * 6, size, pointer)
    loaded.mra_attention_cuda_workspace_size.argtypes = (ctypes.POINTER(Params), ctypes.POINTER(size))
    loaded.mra_attention_cuda.argtypes = (ctypes.POINTER(Params), *[pointer] * 6, size, pointer)
    loaded.mra_attention_cuda_selection.argtypes = (ctypes.POINTER(Params), *[pointer] * 6, size, pointer)
    return loaded


def available() -> bool:
    """Whether the compiled library is there. One that is there but does not load is an error when it is used, not a silent no."""
    return libraries.find("kernels") is not None


@cache
def has_cuda(path: Path) -> bool:
    """Whether the library of this path, libmra_attention or libmra_ort, was built with the CUDA kernels. Needs no GPU.

    Raises PluginLoadError where it does not load.
    """
    try:
        workspace_size = ctypes.CDLL(str(path)).mra_attention_cuda_workspace_size
    except (OSError, AttributeError) as error:
        raise PluginLoadError(f"{path} does not load: {error}; rebuild it with {libraries.GET['kernels']}") from error
    params = make_params(Attributes(num_heads=1, num_blocks=1, scale=1.0), "float32", 1, 1, 8)
    return bool(workspace_size(ctypes.byref(params), ctypes.byref(ctypes.c_size_t())) != _NOT_BUILT)


def cpu_target() -> str:
    """The instruction set the kernel runs on here: "avx512", "avx2", "neon" or "baseline"."""
    name = library().mra_attention_cpu_target()
    if name is None:
        wanted = os.environ.get("MRA_ATTENTION_CPU_TARGET")
        raise PluginLoadError(f"MRA_ATTENTION_CPU_TARGET is {wanted!r}, which this machine or library does not have: unset it")
    return str(name.decode())


def attention_cpu(
    attributes: Attributes,
    dtype: str,
    batch: int,
    length: int,
    head_size: int,
    query: int,
    key: int,
    value: int,
    mask: int,
    context: int,
    num_threads: int,
) -> None:
    """Run the kernel on contiguous memory, given as addresses.

    dtype: "float32", "float16" or "bfloat16", the type of query, key, value and context: (batch, length, num_heads * head_size).
    mask: (batch, length) int32, 0 = padding. context is written. num_threads >= 1.
    Raises ContractError with the library's own text for anything outside the contract, PluginLoadError without a usable library.
    """
    params = make_params(attributes, dtype, batch, length, head_size)
    workspace = _workspace_for(params, num_threads)
    threads = _ThreadsFor(num_threads)
    _check(
        library().mra_attention_cpu(params, query, key, value, mask, context, workspace.address, workspace.size, threads.address),
        params,
    )


def make_params(
    attributes: Attributes, dtype: str, batch: int, length: int, head_size: int, *, float32_mode: str = "fma"
) -> Params:
    """The C parameter struct for these attributes and shapes.

    float32_mode: "fma" or "tf32x3", for CUDA and dtype "float32" only. Raises ContractError for an unknown dtype or mode and for
    what C's integers cannot hold.
    """
    if dtype not in DTYPES:
        raise ContractError(f"dtype is {dtype!r}: use one of {', '.join(DTYPES)}")
    if float32_mode not in FLOAT32_MODES:
        raise ContractError(f"float32_mode is {float32_mode!r}: use one of {', '.join(FLOAT32_MODES)}")
    largest = 2**31 - 1
    first, diagonal = attributes.initial_prior_first_n_blocks, attributes.initial_prior_diagonal_n_blocks
    for name, number in (("num_heads", attributes.num_heads), ("head_size", head_size)):
        if number > largest:
            raise ContractError(f"{name} is {number}: it must be below 2^31")
    return Params(
        struct_size=ctypes.sizeof(Params),
        dtype=DTYPES[dtype],
        batch=batch,
        length=length,
        num_heads=attributes.num_heads,
        head_size=head_size,
        num_blocks=min(attributes.num_blocks, 2**63 - 1),  # beyond the number of blocks, a larger number means the same
        approx_mode=APPROX_MODES.index(attributes.approx_mode),
        initial_prior_first_n_blocks=min(first, largest),
        initial_prior_diagonal_n_blocks=min(diagonal, largest),
        padding_invariant=int(attributes.padding_invariant),
        scale=attributes.scale,
        float32_mode=FLOAT32_MODES[float32_mode],
    )


def attention(
    query: np.ndarray[Any, Any],
    key: np.ndarray[Any, Any],
    value: np.ndarray[Any, Any],
    mask: np.ndarray[Any, Any],
    attributes: Attributes,
    *,
    num_threads: int = 1,
) -> np.ndarray[Any, Any]:
    """MRA attention of numpy arrays.

    query, key, value: (B, N, H * D) float32, float16 or ml_dtypes.bfloat16, all of one type; mask: (B, N) integer or bool,
    nonzero = real token. Returns the context, (B, N, H * D) of the same type. Raises ContractError, PluginLoadError.
    """
    head_size = _check_arrays({"query": query, "key": key, "value": value}, mask, attributes)
    q, k, v = (np.ascontiguousarray(array) for array in (query, key, value))
    m = np.ascontiguousarray(mask != 0, dtype=np.int32)
    context = np.empty_like(q)
    batch, length, _ = q.shape
    attention_cpu(
        attributes,
        str(q.dtype),
        batch,
        length,
        head_size,
        q.ctypes.data,
        k.ctypes.data,
        v.ctypes.data,
        m.ctypes.data,
        context.ctypes.data,
        num_threads,
    )
    return context


def selection(
    query: np.ndarray[Any, Any],
    key: np.ndarray[Any, Any],
    mask: np.ndarray[Any, Any],
    attributes: Attributes,
    *,
    num_threads: int = 1,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What the kernel selects for these inputs (shapes as in `attention`), nb = ceil(N / 32).

    Returns chosen (B, H, nb, nb) bool, excluded (B, H, nb, nb) bool (the chosen blocks and those tied with the last one) and score
    (B, H, nb, nb) float32, block logit minus row maximum. Raises ContractError, PluginLoadError.
    """
    head_size = _check_arrays({"query": query, "key": key}, mask, attributes)
    q, k = (np.ascontiguousarray(array) for array in (query, key))
    m = np.ascontiguousarray(mask != 0, dtype=np.int32)
    batch, length, _ = q.shape
    blocks = -(-length // BLOCK_SIZE)
    states = np.empty((batch, attributes.num_heads, blocks, blocks), np.uint8)
    score = np.empty(states.shape, np.float32)
    params = make_params(attributes, str(q.dtype), batch, length, head_size)
    selection_cpu(params, q.ctypes.data, k.ctypes.data, m.ctypes.data, states.ctypes.data, score.ctypes.data, num_threads)
    return states == 2, states > 0, score


def selection_cpu(params: Params, query: int, key: int, mask: int, blocks: int, score: int | None, num_threads: int) -> None:
    """What `attention_cpu` selects, on memory given as addresses.

    blocks, (B, H, nb, nb) uint8, 2 = chosen, 1 = excluded but not chosen, and score, (B, H, nb, nb) float32 or None, are written.
    Raises ContractError, PluginLoadError.
    """
    workspace = _workspace_for(params, num_threads)
    threads = _ThreadsFor(num_threads)
    addresses = (query, key, mask, blocks, score, workspace.address)
    _check(library().mra_attention_cpu_selection(params, *addresses, workspace.size, threads.address), params)


def cuda_workspace_size(params: Params) -> int:
    """Bytes of device memory that `attention_cuda` and `selection_cuda` need. Raises ContractError, PluginLoadError."""
    needed = ctypes.c_size_t()
    _check(library().mra_attention_cuda_workspace_size(params, needed), params)
    return needed.value


def attention_cuda(
    params: Params, query: int, key: int, value: int, mask: int, context: int, workspace: int, workspace_bytes: int, stream: int
) -> None:
    """Queue the kernel on a cudaStream_t, of the current device; all addresses are its memory, laid out as for `attention_cpu`.

    Returns at once. Raises ContractError, also where a launch is refused, and PluginLoadError.
    """
    addresses = (query, key, value, mask, context, workspace)
    _check(library().mra_attention_cuda(params, *addresses, workspace_bytes, stream), params)


def selection_cuda(
    params: Params, query: int, key: int, mask: int, blocks: int, workspace: int, workspace_bytes: int, stream: int
) -> None:
    """As `selection_cpu`, without the score, queued as `attention_cuda` is."""
    addresses = (query, key, mask, blocks, None, workspace)
    _check(library().mra_attention_cuda_selection(params, *addresses, workspace_bytes, stream), params)


def _check_arrays(tensors: dict[str, np.ndarray[Any, Any]], mask: np.ndarray[Any, Any], attributes: Attributes) -> int:
    query = tensors["query"]
    key = tensors["key"]
    value = tensors.get("value", key)
    head_size = check_shapes(query.shape, key.shape, value.shape, mask.shape, attributes.num_heads)
    for name, array in tensors.items():
        if str(array.dtype) not in DTYPES:
            raise ContractError(f"{name} is of type {array.dtype}: use one of {', '.join(DTYPES)}")
        if array.dtype != query.dtype:
            raise ContractError(f"{name} is of type {array.dtype}, query {query.dtype}: pass tensors of one type")
    return head_size


def _check(status: int, params: Params) -> None:
    if status:
        text = library().mra_status_string(status).decode()
        shown = ", ".join(f"{name}={getattr(params, name)}" for name, _ in Params._fields_[1:])
        raise ContractError(f"{text} ({shown})")


class _Kept(threading.local):
    """This thread's workspace, kept between calls."""

    memory: np.ndarray[Any, Any] | None = None


_kept = _Kept()


@dataclass(frozen=True)
class _Workspace:
    memory: np.ndarray[Any, Any]

    @property
    def address(self) -> int:
        address = self.memory.ctypes.data
        return int(address + -address % ALIGNMENT)

    @property
    def size(self) -> int:
        return int(self.memory.size - ALIGNMENT)


def _workspace_for(params: Params, num_threads: int) -> _Workspace:
    """Memory for one call of this thread: what it kept, or new."""
    needed = ctypes.c_size_t()
    _check(library().mra_attention_cpu_workspace_size(params, num_threads, needed), params)
    size = needed.value + ALIGNMENT
    memory = _kept.memory
    if memory is None or memory.size < size:
        memory = np.empty(size, np.uint8)
        if size <= _KEPT_WORKSPACE_BYTES:
            _kept.memory = memory
    return _Workspace(memory)


class _ThreadsFor:
    """A Threads struct and what it points to, for as long as a call needs them."""

    def __init__(self, num_threads: int) -> None:
        openmp = _openmp("torch" in sys.modules)
        run = library().mra_parallel_for_std if openmp is None else library().mra_parallel_for_openmp
        self.pool = ctypes.c_int32(num_threads) if openmp is None else OpenMPPool(openmp, num_threads)
        self.struct = Threads(ctypes.addressof(self.pool), num_threads, ctypes.cast(run, ctypes.c_void_p))

    @property
    def address(self) -> int:
        return ctypes.addressof(self.struct)


@cache
def _openmp(torch_is_loaded: bool) -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that this process has loaded, torch's before others; None without one.

    torch_is_loaded: only there to look again once torch, and its runtime with it, has been imported.
    """
    try:
        with open("/proc/self/maps") as maps:
            loaded = {line.split(maxsplit=5)[5].rstrip() for line in maps if line.count("/")}
    except OSError:
        return None  # not Linux
    runtimes = [path for path in loaded if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))]
    for path in sorted(runtimes, key=lambda path: ("torch" not in path, path)):
        try:
            runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue  # unlinked since it was loaded, or without that entry point
    return None
