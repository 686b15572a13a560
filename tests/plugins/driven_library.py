"""A libmra_attention that this process cannot load, such as another architecture's, behind the functions of the one it can.

tests/cpp/mra_attention_driver.cc, linked with that library, is the other end: one process serves any number of calls. It takes a
copy of every tensor, so it also checks what only it can see: nothing is written outside the outputs, and no input is.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import queue
import struct
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from mra_export import kernel

TARGET, CONTRACT_VERSION, STATUS_STRING, WORKSPACE_SIZE, ATTENTION, SELECTION = range(6)
ADDRESS, INPUT, OUTPUT, WORKSPACE = range(4)
NONE, STD, OPENMP, SHUFFLED, NO_LOOP = range(5)

LOWEST_ADDRESS = 65536
"""No memory is mapped below: what is there is no tensor but a test's stand-in for one, handed over as it is."""

PARALLEL_FOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)


@PARALLEL_FOR
def _std(*_: Any) -> None:
    raise AssertionError("the driver runs its own mra_parallel_for_std")


@PARALLEL_FOR
def _openmp(*_: Any) -> None:
    raise AssertionError("the driver runs its own mra_parallel_for_openmp")


class DrivenLibrary:
    """The CPU functions of mra_attention.h as ctypes has them, called in a driver process.

    A parallel_for other than the library's two is taken for one that runs the tasks on one thread in a random order: a callback
    cannot cross to the driver, which has its own.
    """

    mra_parallel_for_std = _std
    mra_parallel_for_openmp = _openmp

    def __init__(self, command: list[str | Path]) -> None:
        """command: runs the driver, in this process's environment."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the driver
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # Many more threads than cores, and an emulator: waiting must not spin.
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        )
        self._ids = itertools.count()
        self._answers: dict[int, queue.SimpleQueue[bytes | None]] = {}
        self._lock = threading.Lock()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def stand_in(self, patch: pytest.MonkeyPatch) -> None:
        """mra_export.kernel calls this library from now on, each time with a workspace of exactly the size that it needs."""
        patch.setattr(kernel, "library", lambda: self)
        patch.setattr(kernel, "_KEPT_WORKSPACE_BYTES", 0)
        patch.setattr(kernel, "_kept", kernel._Kept())

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._reader.join(60)
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def mra_attention_cpu_target(self) -> bytes | None:
        return self._call(struct.pack("<B", TARGET)) or None

    def mra_attention_contract_version(self) -> int:
        return int(struct.unpack("<i", self._call(struct.pack("<B", CONTRACT_VERSION)))[0])

    def mra_status_string(self, status: int) -> bytes:
        return self._call(struct.pack("<Bi", STATUS_STRING, status))

    def mra_attention_cpu_workspace_size(self, params: Any, num_threads: int, size: Any) -> int:
        wanted = (num_threads, size is not None, size.value if size is not None else 0)
        answer = self._call(struct.pack("<B", WORKSPACE_SIZE) + _packed(params) + struct.pack("<iBQ", *wanted))
        status, value = struct.unpack("<iQ", answer)
        if size is not None:
            size.value = value
        return int(status)

    def mra_attention_cpu(self, params: Any, *arguments: Any) -> int:
        """arguments: the addresses of query, key, value, mask, context and workspace, the workspace's size, the MraThreads'."""
        tensor, mask, _, _ = _sizes(params)
        shapes = [(INPUT, *tensor)] * 3 + [(INPUT, *mask), (OUTPUT, *tensor)]
        return self._run(ATTENTION, params, shapes, *arguments)

    def mra_attention_cpu_selection(self, params: Any, *arguments: Any) -> int:
        """arguments: the addresses of query, key, mask, blocks, score and workspace, the workspace's size, the MraThreads'."""
        tensor, mask, blocks, score = _sizes(params)
        shapes = [(INPUT, *tensor)] * 2 + [(INPUT, *mask), (OUTPUT, *blocks), (OUTPUT, *score)]
        return self._run(SELECTION, params, shapes, *arguments)

    def _run(self, function: int, params: Any, shapes: list[tuple[int, int, int]], *arguments: Any) -> int:
        *addresses, workspace_size, threads = arguments
        request = struct.pack("<B", function) + _packed(params)
        outputs: list[tuple[int, int]] = []  # address, size
        for (kind, size, alignment), address in zip([*shapes, (WORKSPACE, workspace_size, 64)], addresses, strict=True):
            if address is None or address < LOWEST_ADDRESS:
                request += struct.pack("<BQ", ADDRESS, address or 0)
                continue
            request += struct.pack("<BQ", kind, size)
            if kind != WORKSPACE:
                request += struct.pack("<B", alignment)
            # What is there before the call: all of an input; a byte that stands for all of an output or workspace.
            request += ctypes.string_at(address, size if kind == INPUT else 1)
            if kind == OUTPUT:
                outputs.append((address, size))
        answer = self._call(request + struct.pack("<Q", workspace_size) + self._threads(threads))
        (length,) = struct.unpack_from("<Q", answer)
        wrong, answer = answer[8 : 8 + length], answer[8 + length :]
        assert not wrong, wrong.decode()
        (status,) = struct.unpack_from("<i", answer)
        start = 4
        for address, size in outputs:
            ctypes.memmove(address, answer[start : start + size], size)
            start += size
        assert start == len(answer)
        return int(status)

    def _threads(self, address: int | None) -> bytes:
        if address is None:
            return struct.pack("<Bi", NONE, 1)
        threads = kernel.Threads.from_address(address)
        known = {None: NO_LOOP, _address(_std): STD, _address(_openmp): OPENMP}
        return struct.pack("<Bi", known.get(threads.parallel_for, SHUFFLED), threads.num_threads)

    def _call(self, request: bytes) -> bytes:
        mine: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        with self._lock:
            number = next(self._ids)
            self._answers[number] = mine
            try:
                self._process.stdin.write(struct.pack("<QQ", number, len(request)) + request)
                self._process.stdin.flush()
            except BrokenPipeError:
                mine.put(None)
            if self._ended:
                mine.put(None)
        answer = mine.get(timeout=300)
        if answer is None:
            self._errors.seek(0)
            status = self._process.wait(60)
            raise AssertionError(f"the driver ended with status {status}: {self._errors.read().decode(errors='replace')}")
        return answer

    def _read(self) -> None:
        """Hands every answer to the thread that waits for it; None to all, once the driver has ended."""
        output = self._process.stdout
        while len(head := output.read(16)) == 16:
            number, size = struct.unpack("<QQ", head)
            payload = output.read(size)
            if len(payload) < size:
                break
            self._answers.pop(number).put(payload)
        with self._lock:
            self._ended = True
            for waiting in self._answers.values():
                waiting.put(None)


def _packed(params: Any) -> bytes:
    return b"\0" if params is None else b"\1" + bytes(params)


def _sizes(params: Any) -> tuple[tuple[int, int], ...]:
    """(bytes, alignment) of a tensor of type T, the mask, the block states and the scores; zeros where params are none."""
    if params is None:
        return ((0, 1),) * 4
    element = 4 if params.dtype == kernel.DTYPES["float32"] else 2
    tokens = params.batch * params.length
    pairs = params.batch * params.num_heads * (-(-params.length // 32)) ** 2
    return (tokens * params.num_heads * params.head_size * element, element), (tokens * 4, 4), (pairs, 1), (pairs * 4, 4)


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value
