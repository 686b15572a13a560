"""Run by test_guards.py in a process of its own: emulated calls whose buffers lie against inaccessible pages.

`guarded_calls.py end|start [short BUFFER]`: buffers end or start at such a page; `short` makes one of them four bytes smaller than
it must be, which has to be noticed. An access outside ends the process with a report. tests/ and tests/emulator/ must be
on PYTHONPATH.
"""

from __future__ import annotations

import ctypes
import sys

import emulated
import ml_dtypes
import numpy as np
import oracles

from mra_export.contract import Attributes

# B, H, N, D, K, mode, F, G
CALLS = (
    (1, 1, 1, 8, 1, "full", 0, 0),
    (2, 2, 33, 9, 2, "full", 0, 0),
    (1, 3, 100, 33, 5, "sparse", 1, 0),
    (2, 1, 65, 255, 4, "full", 0, 1),
    (1, 1, 512, 64, 64, "full", 0, 0),
    (1, 1, 36 * 32 - 1, 12, 100, "full", 2, 1),  # split rows
    (1, 1, 129 * 32 - 7, 8, 300, "full", 2, 0),  # more than 128 blocks, split rows
)


def guarded(name: str, array: np.ndarray, at_end: bool, short: int = 0) -> int:
    """The address of a guarded copy of the array, `short` bytes of it cut off."""
    size = array.nbytes - short
    address = emulated.library().mra_emulation_allocate(name.encode(), size, at_end)
    ctypes.memmove(address, array.ctypes.data, size)
    return address


def run(case: oracles.OpCase, arrays: tuple[np.ndarray, ...], at_end: bool, short: str | None, mode: str = "fma") -> None:
    lib = emulated.library()
    params = emulated.params_for(arrays[0], case.attributes, mode)
    size = emulated.workspace_size(params)
    addresses = [
        guarded(name, array, at_end, 4 if name == short else 0)
        for name, array in zip(("query", "key", "value", "mask"), arrays, strict=True)
    ]
    output_bytes = arrays[0].nbytes - (4 if short == "context" else 0)
    context = lib.mra_emulation_allocate(b"context", output_bytes, at_end)
    workspace = lib.mra_emulation_allocate(b"workspace", size, at_end)
    lib.mra_emulation_seed(7)
    status = lib.mra_attention_cuda(params, *addresses, context, workspace, size, None)
    if status:
        raise emulated.StatusError(status)

    for address, array in zip(addresses, arrays, strict=True):
        if ctypes.string_at(address, array.nbytes) != array.tobytes():
            raise AssertionError("an input was written")
    want = emulated.attention(*arrays, case.attributes, seed=3, float32_mode=mode)
    if ctypes.string_at(context, want.nbytes) != want.tobytes():
        raise AssertionError("the context differs from that of an unguarded call")
    check_gaps(params, ctypes.string_at(workspace, size))


def check_gaps(params: emulated.Params, workspace: bytes) -> None:
    """What lies between the workspace's sections must still be the poison it started with."""
    numbers = (ctypes.c_uint64 * 64)()
    count = emulated.library().mra_emulation_workspace_sections(params, numbers)
    ends = [0]
    for n in range(count):
        offset, size = numbers[2 * n], numbers[2 * n + 1]
        if offset - ends[-1] < (64 if n else 0):
            raise AssertionError(f"section {n} starts {offset - ends[-1]} bytes after the one before: 64 or more are wanted")
        ends.append(offset + size)
    starts = [numbers[2 * n] for n in range(1, count)] + [len(workspace)]
    for n, (end, start) in enumerate(zip(ends[1:], starts, strict=True)):
        if workspace[end:start].strip(b"\xff"):
            raise AssertionError(f"written past the end of workspace section {n}")


def main() -> None:
    at_end = sys.argv[1] == "end"
    short = sys.argv[3] if sys.argv[2:3] == ["short"] else None
    emulated.library().mra_emulation_catch_faults()
    for index, (batch, heads, length, head_size, budget, mode, first, diagonal) in enumerate(CALLS):
        attributes = Attributes(heads, budget, 0.3, mode, first, diagonal)
        case = oracles.make_case(attributes, batch, length, head_size, oracles.MASKS[index % len(oracles.MASKS)], 0.5, seed=index)
        if short is not None:
            case.mask[:] = 1  # masked tokens are not read
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            if dtype is not np.float32 and (length > 600 or short is not None):
                continue  # what differs by type was seen on the shorter ones
            run(case, (*(x.astype(dtype) for x in (case.query, case.key, case.value)), case.mask), at_end, short)
        if short is None:
            run(case, case.arrays, at_end, short, "tf32x3")
    sys.stdout.write(f"{len(CALLS)} shapes\n")


if __name__ == "__main__":
    main()
