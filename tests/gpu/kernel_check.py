"""Checks the compiled CUDA kernel on a real GPU, through the C API, with torch CUDA tensors. Needs numpy, torch and mra_export.

    python tests/gpu/kernel_check.py [--library PATH] [--only NAME] [--small]

Values are compared with the torch reference in float64 on the same GPU, the blocks forced to those that the kernel chose; selection
with the CPU kernel, bit for bit. One line for each check; exit status 1 if one failed, 0 if all passed, 77 if there is nothing to
run on. `--device cpu` runs the same checks on the emulated library of tests/emulator, which is how this script itself is tested.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_reference import Selection, mra_attention

from mra_export import kernel, libraries
from mra_export.contract import Attributes
from mra_export.kernel import Params, make_params

SKIPPED = 77
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SENTINEL = 0xA5
MARGIN = 4096
"""Bytes of SENTINEL on each side of every buffer."""


class SkippedError(Exception):
    """This check cannot run here; the text says why."""


@dataclass(frozen=True)
class Device:
    """The library under test and where its tensors live. small: shapes that the emulation can run in seconds."""

    lib: Any
    torch_device: torch.device
    small: bool

    @property
    def is_cuda(self) -> bool:
        return self.torch_device.type == "cuda"

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.is_cuda else 0

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Inputs:
    """query, key, value: (B, N, H * D); mask: (B, N) int32."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor


class Guarded:
    """A tensor inside a larger buffer whose margins must keep their sentinel. Its content starts as NaN bytes."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = torch.empty((), dtype=dtype).element_size()
        for length in shape:
            size *= length
        self.memory = torch.full((size + 2 * MARGIN,), SENTINEL, dtype=torch.uint8, device=device.torch_device)
        inner = self.memory[MARGIN : MARGIN + size]
        inner.fill_(0xFF)
        self.tensor = inner.view(dtype).view(shape)

    def check(self, name: str) -> None:
        margins = torch.cat([self.memory[:MARGIN], self.memory[-MARGIN:]])
        expect(bool((margins == SENTINEL).all()), f"the kernel wrote outside {name}")


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def make_inputs(
    device: Device, batch: int, length: int, heads: int, head_size: int, dtype: torch.dtype, masking: str, seed: int = 0
) -> Inputs:
    """Normal values with a drift, so that blocks differ; NaN at masked tokens.

    masking: none, holes, padding, dead blocks or dead row.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, heads * head_size)
    drift = torch.randn(shape, generator=generator).cumsum(1) / 6
    query, key = (0.5 * (torch.randn(shape, generator=generator) + sign * drift) for sign in (1, -1))
    value = torch.randn(shape, generator=generator)
    mask = torch.ones(batch, length, dtype=torch.int32)
    if masking == "holes":
        mask = (torch.rand(batch, length, generator=generator) < 0.6).int()
    elif masking == "padding":
        for b in range(batch):
            mask[b, int(torch.randint(1, length + 1, (), generator=generator)) :] = 0
    elif masking == "dead blocks":
        blocks = (torch.rand(batch, -(-length // 32), generator=generator) < 0.6).int()
        mask = blocks.repeat_interleave(32, 1)[:, :length].contiguous()
    elif masking == "dead row":
        mask[batch - 1] = 0
    hidden = (mask == 0)[:, :, None]
    tensors = [x.masked_fill(hidden, float("nan")).to(dtype).to(device.torch_device) for x in (query, key, value)]
    return Inputs(*tensors, mask.to(device.torch_device))


def params_for(inputs: Inputs, attributes: Attributes, float32_mode: str = "fma") -> Params:
    batch, length, hidden = inputs.query.shape
    dtype, head_size = str(inputs.query.dtype).removeprefix("torch."), hidden // attributes.num_heads
    return make_params(attributes, dtype, batch, length, head_size, float32_mode=float32_mode)


def workspace_for(device: Device, params: Params, fill: int = 0xFF) -> Guarded:
    size = ctypes.c_size_t()
    check_status(device, device.lib.mra_attention_cuda_workspace_size(params, size))
    guarded = Guarded(device, (size.value,), torch.uint8)
    expect(guarded.tensor.data_ptr() % 64 == 0, "torch gave memory that is not 64-byte aligned")
    guarded.tensor.fill_(fill)
    return guarded


def check_status(device: Device, status: int) -> None:
    expect(status == 0, f"status {status}: {device.lib.mra_status_string(status).decode()}")


def run(device: Device, inputs: Inputs, attributes: Attributes, fill: int = 0xFF, float32_mode: str = "fma") -> Tensor:
    """The kernel's context, checked for writes outside its buffers."""
    params = params_for(inputs, attributes, float32_mode)
    workspace = workspace_for(device, params, fill)
    context = Guarded(device, tuple(inputs.query.shape), inputs.query.dtype)
    launch(device, params, inputs, context.tensor, workspace.tensor)
    device.synchronize()
    context.check("context")
    workspace.check("workspace")
    return context.tensor


def launch(device: Device, params: Params, inputs: Inputs, context: Tensor, workspace: Tensor) -> None:
    pointers = (tensor.data_ptr() for tensor in (inputs.query, inputs.key, inputs.value, inputs.mask, context, workspace))
    check_status(device, device.lib.mra_attention_cuda(params, *pointers, workspace.numel(), device.stream()))


def selection(device: Device, inputs: Inputs, attributes: Attributes) -> tuple[Tensor, Tensor]:
    """States (B, H, nb, nb) uint8 and scores float32 of the kernel, on the CPU."""
    params = params_for(inputs, attributes)
    nb = -(-inputs.query.shape[1] // 32)
    shape = (inputs.query.shape[0], attributes.num_heads, nb, nb)
    states, score = Guarded(device, shape, torch.uint8), Guarded(device, shape, torch.float32)
    workspace = workspace_for(device, params)
    pointers = (t.data_ptr() for t in (inputs.query, inputs.key, inputs.mask, states.tensor, score.tensor, workspace.tensor))
    check_status(device, device.lib.mra_attention_cuda_selection(params, *pointers, workspace.tensor.numel(), device.stream()))
    device.synchronize()
    for name, guarded in (("blocks", states), ("score", score), ("workspace", workspace)):
        guarded.check(name)
    return states.tensor.cpu(), score.tensor.cpu()


def cpu_selection(inputs: Inputs, attributes: Attributes) -> tuple[Tensor, Tensor]:
    """The same from the CPU kernel."""
    lib, params = kernel.library(), params_for(inputs, attributes)
    query, key, mask = (tensor.cpu() for tensor in (inputs.query, inputs.key, inputs.mask))
    nb = -(-query.shape[1] // 32)
    states = torch.empty((query.shape[0], attributes.num_heads, nb, nb), dtype=torch.uint8)
    score = torch.empty(states.shape)
    size = ctypes.c_size_t()
    expect(lib.mra_attention_cpu_workspace_size(params, 1, size) == 0, "the CPU kernel refused the parameters")
    memory = torch.empty(size.value + 64, dtype=torch.uint8)
    aligned = memory.data_ptr() + -memory.data_ptr() % 64
    pointers = (tensor.data_ptr() for tensor in (query, key, mask, states, score))
    expect(lib.mra_attention_cpu_selection(params, *pointers, aligned, size.value, None) == 0, "the CPU kernel failed")
    return states, score


def check_call(device: Device, inputs: Inputs, attributes: Attributes, float32_mode: str = "fma") -> str:
    """Selection, values, and the same bits from another workspace content."""
    states, score = selection(device, inputs, attributes)
    if kernel.available():
        cpu_states, cpu_score = cpu_selection(inputs, attributes)
        expect(torch.equal(states, cpu_states), f"{int((states != cpu_states).sum())} pairs are selected otherwise than on the CPU")
        expect(torch.equal(score.nan_to_num(7e30), cpu_score.nan_to_num(7e30)), "scores differ from the CPU's")
    context = run(device, inputs, attributes, float32_mode=float32_mode)
    again = run(device, inputs, attributes, fill=0x5A, float32_mode=float32_mode)
    expect(torch.equal(context.view(torch.uint8), again.view(torch.uint8)), "a second call gave other bits")

    states = states.to(device.torch_device)
    forced = Selection(states == 2, states > 0, states.long(), torch.zeros_like(states, dtype=torch.float64), torch.zeros(()))
    real = inputs.mask != 0
    exact = [tensor.double().masked_fill(~real[:, :, None], 0) for tensor in (inputs.query, inputs.key, inputs.value)]
    want = mra_attention(*exact, inputs.mask, attributes, selection=forced)
    batch, length, _ = want.shape
    norms = [x.view(batch, length, attributes.num_heads, -1).norm(dim=-1).max() for x in exact[:2]]
    largest_logit = float(attributes.scale * norms[0] * norms[1])
    # A float32 logit is off by a few ulps of the largest possible one; the result rounds once to its type. For 16-bit types, tensor
    # cores take weights rounded to that type, and the low-resolution part in tf32.
    relative = 4 * 2.0**-24 * (8 + largest_logit)
    if inputs.query.dtype != torch.float32:
        low = 3 * 2.0**-11 if attributes.approx_mode == "full" else 0.0
        relative += HALF_ULP[inputs.query.dtype] * 1.001 + 2.0**-24 + low
    arithmetic = float(exact[2].abs().max()) * relative
    tolerance = arithmetic + HALF_ULP[inputs.query.dtype] * 1.001 * want.abs() + 1e-7
    difference = (context.double() - want).abs()
    expect(bool(torch.isfinite(context).all()), "the context is not finite")
    expect(bool((difference <= tolerance).all()), f"error is {float((difference / tolerance).max()):.2f} times the tolerance")
    return f"{float((difference / tolerance).max()):.2f} of the tolerance"


# ---------------------------------------------------------------------------------------------------------------------------------


def values(device: Device) -> str:
    # B, H, N, D, K, mode, F, G
    calls = [
        (1, 1, 1, 8, 1, "full", 0, 0),
        (3, 2, 33, 9, 2, "sparse", 0, 1),
        (2, 3, 100, 31, 5, "full", 1, 0),
        (1, 2, 512, 64, 64, "full", 0, 0),
        (1, 1, 1150, 12, 110, "full", 2, 1),
    ]
    if not device.small:
        calls += [
            (8, 12, 512, 64, 64, "full", 0, 0),
            (2, 5, 1000, 255, 90, "full", 2, 3),
            (2, 2, 700, 256, 10**9, "sparse", 0, 0),
            (2, 12, 4096, 64, 1024, "full", 3, 1),
            (1, 4, 4097, 128, 700, "full", 0, 1),
            (1, 2, 16384, 64, 2048, "full", 3, 1),
            (1, 2, 16384, 32, 2048, "sparse", 0, 0),
        ]
    worst = ""
    kinds = [*((dtype, "fma") for dtype in DTYPES), (torch.float32, "tf32x3")]
    maskings = ("none", "holes", "padding", "dead blocks", "dead row")
    for index, (batch, heads, length, head_size, budget, mode, first, diagonal) in enumerate(calls):
        for dtype, float32_mode in kinds:
            attributes = Attributes(heads, budget, 0.125, mode, first, diagonal, padding_invariant=index % 2 == 1)
            inputs = make_inputs(device, batch, length, heads, head_size, dtype, maskings[index % len(maskings)], seed=index)
            try:
                worst = max(worst, check_call(device, inputs, attributes, float32_mode))
            except AssertionError as error:
                call = f"B {batch} N {length} D {head_size} {attributes} {dtype} {float32_mode}"
                raise AssertionError(f"{call}: {error}") from error
    return f"{len(calls) * len(kinds)} calls, worst error {worst}"


def ties(device: Device) -> str:
    for budget in (1, 7, 36, 37, 143, 144):
        inputs = make_inputs(device, 1, 96, 1, 8, torch.float32, "none")
        repeated = Inputs(*(x.repeat(1, 4, 1) for x in (inputs.query, inputs.key, inputs.value)), inputs.mask.repeat(1, 4))
        check_call(device, repeated, Attributes(1, budget, 0.25))
    return "6 budgets"


def not_a_number(device: Device) -> str:
    attributes = Attributes(2, 4, 0.25, "full", 0, 1)
    clean_inputs = make_inputs(device, 2, 130, 2, 8, torch.float32, "none")
    clean = run(device, clean_inputs, attributes)
    for bad in (float("nan"), float("inf"), float("-inf")):
        for name in ("query", "key", "value"):
            inputs = make_inputs(device, 2, 130, 2, 8, torch.float32, "none")
            getattr(inputs, name)[1, 40, 11] = bad
            context = run(device, inputs, attributes)
            expect(torch.equal(context[0], clean[0]), f"{bad} in {name} reached another batch row")
            expect(torch.equal(context[1, :, :8], clean[1, :, :8]), f"{bad} in {name} reached another head")
    return "9 places"


def many_heads(device: Device) -> str:
    batch = 3 if device.small else 70000
    attributes = Attributes(1, 2, 0.3)
    return check_call(device, make_inputs(device, batch, 33, 1, 8, torch.float16, "holes"), attributes)


def same_bits(device: Device) -> str:
    length, heads, times = (1152, 1, 3) if device.small else (4096, 12, 30)
    attributes = Attributes(heads, length // 4, 0.125, "full", 3, 1)
    inputs = make_inputs(device, 1, length, heads, 16, torch.float16, "padding")
    first = run(device, inputs, attributes)
    for n in range(times):
        again = run(device, inputs, attributes, fill=n)
        expect(torch.equal(first.view(torch.int16), again.view(torch.int16)), f"run {n + 2} gave other bits")
    return f"{times + 1} runs"


def graph(device: Device) -> str:
    """One captured graph, replayed with new data: split rows, and the launches of more than 128 blocks."""
    if not device.is_cuda:
        raise SkippedError("CUDA graphs need a GPU")
    for length in (1152, 4224):
        attributes = Attributes(2, length // 5, 0.125, "full", 2, 1)
        inputs = make_inputs(device, 1, length, 2, 64, torch.float16, "padding", seed=1)
        params = params_for(inputs, attributes)
        workspace = workspace_for(device, params)
        context = torch.empty_like(inputs.query)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            launch(device, params, inputs, context, workspace.tensor)
        for seed in range(2, 5):
            new = make_inputs(device, 1, length, 2, 64, torch.float16, "holes", seed=seed)
            for name in ("query", "key", "value", "mask"):
                getattr(inputs, name).copy_(getattr(new, name))
            captured.replay()
            torch.cuda.synchronize()
            expect(torch.equal(context, run(device, new, attributes)), f"N {length}: replay {seed - 1} differs from a plain call")
    return "2 graphs, 3 replays each"


def streams(device: Device) -> str:
    if not device.is_cuda:
        raise SkippedError("streams need a GPU")
    attributes = Attributes(4, 300, 0.125, "full", 1, 1)
    inputs = [make_inputs(device, 1, 2048, 4, 64, torch.bfloat16, "padding", seed=n) for n in range(4)]
    want = [run(device, x, attributes) for x in inputs]
    params = params_for(inputs[0], attributes)
    workspaces = [workspace_for(device, params) for _ in inputs]
    contexts = [torch.empty_like(x.query) for x in inputs]
    torch.cuda.synchronize()
    for _ in range(10):
        for x, context, workspace in zip(inputs, contexts, workspaces, strict=True):
            with torch.cuda.stream(torch.cuda.Stream()):
                launch(device, params, x, context, workspace.tensor)
        torch.cuda.synchronize()
        for context, expected in zip(contexts, want, strict=True):
            expect(torch.equal(context, expected), "a call beside others gave other bits")
    return "4 at once, 10 times"


def errors(device: Device) -> str:
    attributes = Attributes(1, 4, 0.125)
    inputs = make_inputs(device, 1, 64, 1, 8, torch.float32, "none")
    params = params_for(inputs, attributes)
    workspace = workspace_for(device, params).tensor
    context = torch.empty_like(inputs.query)
    good = [tensor.data_ptr() for tensor in (inputs.query, inputs.key, inputs.value, inputs.mask, context, workspace)]
    refused = [([*good[:n], None, *good[n + 1 :]], workspace.numel()) for n in range(6)]
    refused += [(good, workspace.numel() - 1), ([*good[:5], good[5] + 32], workspace.numel())]
    for pointers, size in refused:
        expect(device.lib.mra_attention_cuda(params, *pointers, size, device.stream()) != 0, "a bad argument was accepted")
    params.head_size = 300
    expect(device.lib.mra_attention_cuda(params, *good, workspace.numel(), device.stream()) != 0, "head_size 300 was accepted")
    return f"{len(refused) + 1} refused"


CHECKS: dict[str, Callable[[Device], str]] = {
    function.__name__: function for function in (values, ties, not_a_number, many_heads, same_bits, graph, streams, errors)
}


def load(path: Path) -> Any:
    lib = ctypes.CDLL(str(path))
    pointer, size, params = ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(Params)
    lib.mra_status_string.restype = ctypes.c_char_p
    lib.mra_attention_cuda_workspace_size.argtypes = (params, ctypes.POINTER(size))
    lib.mra_attention_cuda.argtypes = (params, *[pointer] * 6, size, pointer)
    lib.mra_attention_cuda_selection.argtypes = (params, *[pointer] * 6, size, pointer)
    return lib


@contextmanager
def reported(name: str, failures: list[str], write: Callable[[str], Any]) -> Iterator[Callable[[str], None]]:
    """One line for a check, whatever becomes of it."""
    start = time.monotonic()
    notes: list[str] = []
    try:
        yield notes.append
    except SkippedError as reason:
        write(f"SKIP {name}: {reason}\n")
    except Exception as error:
        failures.append(name)
        detail = "" if isinstance(error, AssertionError) else "\n" + traceback.format_exc()
        write(f"FAIL {name}: {error}{detail}\n")
    else:
        write(f"ok   {name}: {' '.join(notes)} ({time.monotonic() - start:.1f} s)\n")


def main(arguments: list[str] | None = None, write: Callable[[str], Any] = sys.stdout.write) -> int:
    parser = argparse.ArgumentParser(description="Check the compiled CUDA kernel on a GPU.")
    parser.add_argument("--library", type=Path, help="libmra_attention built with CUDA; default: the installed one")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for the emulated library")
    parser.add_argument("--only", choices=sorted(CHECKS), help="one check")
    parser.add_argument("--small", action="store_true", help="shapes that the emulation and compute-sanitizer can run in seconds")
    options = parser.parse_args(arguments)

    if options.device == "cuda" and not torch.cuda.is_available():
        write("SKIP all: torch finds no CUDA GPU\n")
        return SKIPPED
    path = options.library or libraries.find("kernels")
    if path is None:
        write("SKIP all: libmra_attention is not built\n")
        return SKIPPED
    device = Device(load(path), torch.device(options.device), options.small or options.device == "cpu")
    probe = ctypes.c_size_t()
    status = device.lib.mra_attention_cuda_workspace_size(make_params(Attributes(1, 1, 1.0), "float32", 1, 1, 8), probe)
    if status != 0:
        write(f"SKIP all: {path}: {device.lib.mra_status_string(status).decode()}\n")
        return SKIPPED
    place = torch.cuda.get_device_name() if device.is_cuda else "emulated"
    compared = "compared" if kernel.available() else "NOT compared: libmra_attention is not installed"
    write(f"{path} on {place}, torch {torch.__version__}; selection with the CPU kernel {compared}\n")
    failures: list[str] = []
    for name, check in CHECKS.items():
        if options.only in (None, name):
            with reported(name, failures, write) as note:
                note(check(device))
    write(f"{len(failures)} failed\n")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
