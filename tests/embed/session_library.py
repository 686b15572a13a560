"""libmra_session through ctypes: what any language that binds C sees."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from mra_export import libraries
from mra_export.errors import (
    BackendError,
    BundleError,
    ContractError,
    EngineError,
    MraExportError,
    ParityError,
    PluginLoadError,
)

KINDS: dict[int, type[MraExportError]] = {
    1: ContractError,
    2: BundleError,
    3: PluginLoadError,
    4: BackendError,
    5: EngineError,
    6: ParityError,
    7: MraExportError,
}
"""MraErrorKind -> the class of mra_export/errors.py."""
ELEMENTS = (np.float32, np.float16, np.uint16)
"""MraElementType -> numpy's, bfloat16 as its bits."""

Int64Pointer = ctypes.POINTER(ctypes.c_int64)


class Options(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("verify_hashes", ctypes.c_int32),
        ("use_op_library", ctypes.c_int32),
        ("intra_op_threads", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("allow_embedded_plugin", ctypes.c_int32),
        ("backend", ctypes.c_char_p),
        ("device", ctypes.c_char_p),
        ("engine", ctypes.c_char_p),
        ("onnxruntime_library", ctypes.c_char_p),
        ("tensorrt_library", ctypes.c_char_p),
    )


class Input(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("shape", Int64Pointer), ("rank", ctypes.c_size_t))


class GoldenRow(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("output", ctypes.c_char_p),
        ("status", ctypes.c_char_p),
        ("reason", ctypes.c_char_p),
        ("max_abs", ctypes.c_double),
        ("needed", ctypes.c_double),
        ("tolerance", ctypes.c_double),
    )


@functools.cache
def library(path: Path | None = None) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path or libraries.require("session")))
    pointer, text, number, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_size_t
    for name, result, arguments in (
        ("error_kind", ctypes.c_int, [pointer]),
        ("error_message", text, [pointer]),
        ("error_free", None, [pointer]),
        ("session_options_init", None, [ctypes.POINTER(Options)]),
        ("session_open", pointer, [text, ctypes.POINTER(Options), ctypes.POINTER(pointer)]),
        ("session_close", None, [pointer]),
        *((f"session_{name}", text, [pointer]) for name in ("backend", "device", "task", "manifest")),
        *((f"session_{name}", number, [pointer]) for name in ("vocab_size", "max_length")),
        ("session_run", pointer, [pointer, ctypes.POINTER(Input), size, ctypes.POINTER(pointer)]),
        ("session_validate", pointer, [pointer]),
        ("session_compare_golden", pointer, [pointer, ctypes.POINTER(pointer)]),
        ("golden_count", size, [pointer]),
        ("golden_row", ctypes.POINTER(GoldenRow), [pointer, size]),
        ("golden_free", None, [pointer]),
        ("outputs_count", size, [pointer]),
        ("outputs_name", text, [pointer, size]),
        ("outputs_type", ctypes.c_int, [pointer, size]),
        ("outputs_rank", size, [pointer, size]),
        ("outputs_shape", Int64Pointer, [pointer, size]),
        ("outputs_elements", size, [pointer, size]),
        ("outputs_data", pointer, [pointer, size]),
        ("outputs_copy_float32", None, [pointer, size, pointer]),
        ("outputs_free", None, [pointer]),
    ):
        function = getattr(loaded, f"mra_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded


def check(error: int | None) -> None:
    """Raises the error as the class of its kind."""
    if error:
        kind, message = library().mra_error_kind(error), library().mra_error_message(error).decode()
        library().mra_error_free(error)
        raise KINDS[kind](message)


class Session:
    """options: fields of MraSessionOptions."""

    def __init__(self, bundle: Path | str, **options: Any) -> None:
        self._handle = ctypes.c_void_p()
        chosen = Options()
        library().mra_session_options_init(chosen)
        for name, value in options.items():
            setattr(chosen, name, str(value).encode() if isinstance(value, str | Path) else value)
        check(library().mra_session_open(os.fsencode(bundle), chosen, self._handle))

    def run(self, **arrays: Any) -> dict[str, Any]:
        """int64 arrays in; arrays of the graph's type and, by name + "/float32", widened ones out."""
        keep = {name: None if array is None else np.asarray(array, np.int64, order="C") for name, array in arrays.items()}
        inputs = (Input * max(len(keep), 1))()
        for number, (name, array) in enumerate(keep.items()):
            shape = () if array is None else array.shape
            data = None if array is None else array.ctypes.data
            inputs[number] = Input(name.encode(), data, (ctypes.c_int64 * max(len(shape), 1))(*shape), len(shape))
        outputs = ctypes.c_void_p()
        check(library().mra_session_run(self._handle, inputs, len(keep), outputs))
        try:
            return self._read(outputs)
        finally:
            library().mra_outputs_free(outputs)

    def _read(self, outputs: ctypes.c_void_p) -> dict[str, Any]:
        lib, found = library(), {}
        for index in range(lib.mra_outputs_count(outputs)):
            name = lib.mra_outputs_name(outputs, index).decode()
            shape = lib.mra_outputs_shape(outputs, index)[: lib.mra_outputs_rank(outputs, index)]
            dtype = np.dtype(ELEMENTS[lib.mra_outputs_type(outputs, index)])
            elements = lib.mra_outputs_elements(outputs, index)
            data = ctypes.string_at(lib.mra_outputs_data(outputs, index), elements * dtype.itemsize)
            found[name] = np.frombuffer(data, dtype).reshape(shape)
            wide = np.empty(shape, np.float32)
            lib.mra_outputs_copy_float32(outputs, index, wide.ctypes.data)
            found[f"{name}/float32"] = wide
        return found

    def validate(self) -> None:
        check(library().mra_session_validate(self._handle))

    def compare_golden(self) -> list[dict[str, Any]]:
        lib, golden = library(), ctypes.c_void_p()
        check(lib.mra_session_compare_golden(self._handle, golden))
        rows = [lib.mra_golden_row(golden, index).contents for index in range(lib.mra_golden_count(golden))]
        read = [{name: getattr(row, name) for name, _ in GoldenRow._fields_} for row in rows]
        lib.mra_golden_free(golden)
        return [{name: value.decode() if isinstance(value, bytes) else value for name, value in row.items()} for row in read]

    def fact(self, name: str) -> Any:
        """backend, device, task, manifest, vocab_size or max_length."""
        value = getattr(library(), f"mra_session_{name}")(self._handle)
        return value.decode() if isinstance(value, bytes) else value

    def close(self) -> None:
        library().mra_session_close(self._handle)
        self._handle = ctypes.c_void_p()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
