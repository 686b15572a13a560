"""mra::attention in PyTorch on the GPU: forward, backward, autocast, torch.compile, streams and CUDA graphs.

    python tests/gpu/torch_check.py [--library PATH] [--only NAME]

Needs torch, numpy and transformers. Results are compared with the torch reference in float64 on the same GPU, with the blocks that
the kernel chose. Nothing in it may wait for the GPU: torch's sync debug mode makes that an error. One line for each check; exit
status 1 if one failed, 0 if all passed, 77 if there is nothing to run on. `--device cpu` with the library of tests/emulator is how
this script itself is tested.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import needs

NEEDED = {"numpy": "numpy", "torch": "torch", "transformers": "transformers"}
ROUNDING = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Of the largest value: a result of the kernel, or a gradient from inputs of this type."""


@dataclass(frozen=True)
class Place:
    """device: where the tensors live. small: shapes that the emulation can run in seconds."""

    device: Any
    small: bool

    @property
    def is_cuda(self) -> bool:
        return bool(self.device.type == "cuda")


@dataclass(frozen=True)
class Case:
    """leaves: query, key and value (B, N, H * D), which require gradients; mask: (B, N) int32; grad: the context's."""

    attributes: Any
    leaves: list[Any]
    mask: Any
    grad: Any

    def run(self) -> Any:
        from mra_export.model.op import attention

        return attention(*self.leaves, self.mask, *self.attributes.as_dict().values())

    def gradients(self, context: Any) -> Sequence[Any]:
        import torch

        return torch.autograd.grad(context, self.leaves, self.grad.to(context.dtype))


def make_case(place: Place, dtype: str, length: int = 0, seed: int = 0, batch: int = 2) -> Case:
    import torch
    from kernel_check import Device, make_inputs

    from mra_export.contract import Attributes

    length = length or (140 if place.small else 1000)
    attributes = Attributes(2, max(4, length // 8), 0.125, "full", 1, 1)
    made = make_inputs(Device(None, place.device, place.small), batch, length, 2, 32, getattr(torch, dtype), "padding", seed)
    leaves = [x.nan_to_num(0.0).requires_grad_() for x in (made.query, made.key, made.value)]
    generator = torch.Generator().manual_seed(seed + 1)
    return Case(attributes, leaves, made.mask, torch.randn(leaves[0].shape, generator=generator).to(leaves[0]))


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def close(name: str, actual: Any, wanted: Any, dtype: str) -> None:
    limit = ROUNDING[dtype] * float(wanted.abs().max()) + 1e-6
    worst = float((actual.detach().double() - wanted).abs().max())
    expect(worst <= limit, f"{name} differs by {worst:.1e}, more than {limit:.1e}")


def check_case(case: Case, dtype: str, context: Any, gradients: Sequence[Any]) -> None:
    """Values and gradients against the reference in float64 with the kernel's blocks."""
    import torch

    from mra_export.model import compiled
    from mra_export.model.attention import Selection, mra_attention

    query, key, value = (x.detach().to(getattr(torch, dtype)) for x in case.leaves)
    chosen, excluded = compiled.selection(query, key, case.mask, case.attributes)
    nothing = query.new_zeros(())
    forced = Selection(chosen, excluded, nothing, nothing, nothing)
    double = [x.double().requires_grad_() for x in (query, key, value)]
    wanted = mra_attention(*double, case.mask, case.attributes, selection=forced)
    close("the context", context.detach(), wanted.detach(), dtype)
    grad = case.grad.to(context.dtype).double()
    for name, actual, want in zip(["query", "key", "value"], gradients, torch.autograd.grad(wanted, double, grad), strict=True):
        close(f"the gradient of {name}", actual, want, dtype)


@contextlib.contextmanager
def no_waiting(place: Place) -> Iterator[None]:
    """Within, waiting for the GPU is an error."""
    import torch

    if not place.is_cuda:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def values_and_gradients(place: Place) -> str:
    count = 0
    for dtype in ROUNDING:
        for length in (1, 33, 140) if place.small else (1, 33, 1000, 4224):
            case = make_case(place, dtype, length, seed=length)
            case.run()  # what is made once is made now
            with no_waiting(place):
                context = case.run()
                gradients = case.gradients(context)
            expect(context.dtype == case.leaves[0].dtype, f"the context is {context.dtype}")
            check_case(case, dtype, context, gradients)
            count += 1
    return f"{count} calls"


def autocast(place: Place) -> str:
    import torch

    types = ("float16", "bfloat16") if place.is_cuda else ("bfloat16",)
    for dtype in types:
        case = make_case(place, "float32", seed=5)
        with torch.autocast(place.device.type, dtype=getattr(torch, dtype)):
            context = case.run()
        expect(context.dtype == getattr(torch, dtype), f"the context is {context.dtype}")
        gradients = case.gradients(context)
        expect(all(x.dtype == torch.float32 for x in gradients), "a gradient is not float32")
        check_case(case, dtype, context, gradients)
    return ", ".join(types)


def compile_(place: Place) -> str:
    import torch

    inductor = place.is_cuda and importlib.util.find_spec("triton") is not None
    ways: list[dict[str, Any]] = [{"backend": "aot_eager"}]
    if inductor:
        ways = [{"backend": "inductor"}, {"backend": "inductor", "mode": "reduce-overhead"}]
    case = make_case(place, "float32", seed=7)
    arguments = tuple(case.attributes.as_dict().values())

    def layer(query: Any, key: Any, value: Any, mask: Any) -> Any:
        return torch.ops.mra.attention(query * 2, key, value, mask, *arguments) + 1

    wanted = layer(*case.leaves, case.mask)
    expected = torch.autograd.grad(wanted, case.leaves, case.grad)
    for way in ways:
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, **way)
        for _ in range(1 if place.small else 4):  # CUDA graphs are captured at the second or third call
            context = compiled(*case.leaves, case.mask)
            gradients = torch.autograd.grad(context, case.leaves, case.grad)
        close("the context", context, wanted.detach().double(), "float32")
        for actual, want in zip(gradients, expected, strict=True):
            close("a gradient", actual, want.double(), "float32")
    return ", ".join(" ".join(way.values()) for way in ways)


def graph(place: Place) -> str:
    """Forward and backward in one captured graph, replayed with new data."""
    import torch

    need_cuda(place, "CUDA graphs")
    for dtype in ROUNDING:
        case = make_case(place, dtype, 1152)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                case.gradients(case.run())
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            context = case.run()
            gradients = case.gradients(context)
        for seed in (11, 12, 13):
            new = make_case(place, dtype, 1152, seed=seed)
            with torch.no_grad():
                for mine, other in zip((*case.leaves, case.mask, case.grad), (*new.leaves, new.mask, new.grad), strict=True):
                    mine.copy_(other)
            captured.replay()
            expect(torch.equal(context, new.run()), f"{dtype}: a replay differs from a plain call")
            check_case(case, dtype, context, gradients)
    return "3 types, 3 replays each"


def streams(place: Place) -> str:
    import torch

    need_cuda(place, "streams")
    cases = [make_case(place, "bfloat16", 2048, seed=seed) for seed in range(4)]
    wanted = [case.run() for case in cases]
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for case in cases:
            with torch.cuda.stream(torch.cuda.Stream()):
                found.append(case.run())
        torch.cuda.synchronize()
        expect(all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), "a call beside others gave other bits")
    return "4 at once, 10 times"


def another_device(place: Place) -> str:
    """Tensors decide, not the current device."""
    import torch

    if not place.is_cuda or torch.cuda.device_count() < 2:
        skip("needs two GPUs")
    case = make_case(Place(torch.device("cuda", 1), place.small), "float16")
    with torch.cuda.device(0):
        context = case.run()
        gradients = case.gradients(context)
    check_case(case, "float16", context, gradients)
    return torch.cuda.get_device_name(1)


def memory(place: Place) -> str:
    """The backward takes less than one dense N x N matrix for each head would."""
    import torch

    need_cuda(place, "the GPU's memory")
    batch, length = 8, 4096
    case = make_case(place, "bfloat16", length, batch=batch)
    context = case.run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.gradients(context)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    dense = batch * case.attributes.num_heads * length * length * 4
    expect(taken < dense, f"the backward took {taken >> 20} MB, N x N are {dense >> 20} MB")
    return f"{taken >> 20} MB, N x N would be {dense >> 20} MB"


def skip(reason: str) -> None:
    from kernel_check import SkippedError

    raise SkippedError(reason)


def need_cuda(place: Place, what: str) -> None:
    if not place.is_cuda:
        skip(f"{what}: needs a GPU")


CHECKS: dict[str, Callable[[Place], str]] = {
    function.__name__.rstrip("_"): function
    for function in (values_and_gradients, autocast, compile_, graph, streams, another_device, memory)
}


@contextlib.contextmanager
def library_used(path: Path, emulated: bool) -> Iterator[None]:
    """mra::attention takes this library; emulated: for the CPU's tensors what a GPU's tensors would get."""
    import kernel_check

    from mra_export import kernel
    from mra_export.model import compiled

    kept = (kernel.library, compiled.takes, compiled._on_gpu, compiled._stream_of)
    loaded = kernel_check.load(path)
    kernel.library = lambda: loaded  # type: ignore[assignment]
    if emulated:
        compiled.takes = lambda query: query.dtype in compiled._DTYPES
        compiled._on_gpu = lambda query: True
        compiled._stream_of = lambda device: contextlib.nullcontext(0)
    try:
        yield
    finally:
        kernel.library, compiled.takes, compiled._on_gpu, compiled._stream_of = kept  # type: ignore[assignment]


def main(arguments: list[str] | None = None, write: Callable[[str], Any] = sys.stdout.write) -> int:
    parser = argparse.ArgumentParser(description="Check mra::attention in PyTorch on a GPU.")
    parser.add_argument("--library", type=Path, help="libmra_attention built with CUDA; default: the installed one")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for the emulated library")
    parser.add_argument("--only", choices=sorted(CHECKS), help="one check")
    options = parser.parse_args(arguments)
    gone = needs.missing(NEEDED)
    if gone:
        return needs.skip(gone, write)
    import torch

    from mra_export import kernel, libraries

    if options.device == "cuda" and not torch.cuda.is_available():
        return needs.skip(f"torch {torch.__version__} finds no CUDA GPU", write)
    path = options.library or libraries.find("kernels")
    if path is None:
        return needs.skip("libmra_attention is not built", write)
    if not kernel.has_cuda(path):
        return needs.skip(f"{path} was built without CUDA", write)
    emulated = options.device == "cpu"
    place = Place(torch.device(options.device), small=emulated)
    write(f"{path} on {'emulated' if emulated else torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    failures: list[str] = []
    import kernel_check

    with library_used(path, emulated):
        for name, check in CHECKS.items():
            if options.only in (None, name):
                with kernel_check.reported(name, failures, write) as note:
                    note(check(place))
    write(f"{len(failures)} failed\n")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
