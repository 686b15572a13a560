"""Times the CUDA attention kernel beside torch's dense attention and the authors' kernels, on the same inputs, in one run.

    python benchmarks/gpu_attention.py [--json FILE] [--seconds S] [--dtype bfloat16] [--authors-build FOLDER]

Every contestant's answer is checked before it is timed. They take turns, so that whatever else the GPU does hits all of them. Each
run goes through several sets of inputs, together larger than twice the L2 cache, so that no call finds its inputs there. Times are
from CUDA events, per call: "graph" from a captured CUDA graph of all sets, "calls" from plain calls one after another, with what
the host adds. Needs numpy and torch. `--device cpu --library EMULATED` runs it on the emulated kernel at toy shapes: a test of this
script, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import authors_kernels
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mra_export import kernel, libraries
from mra_export.contract import Attributes, attention_scale

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
import kernel_check
from kernel_check import Device, Inputs

SKIPPED = kernel_check.SKIPPED
HEADS, HEAD_SIZE = 12, 64
MOST_SETS = 64
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
"""Our name of each of torch's fused dense attentions -> torch's."""
DENSE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest absolute error of dense attention beside float64, for values of unit size; also of our batch row beside itself alone."""
AUTHORS_TOLERANCE, AUTHORS_ROWS = 2e-3, 0.99
"""Absolute, and the share of tokens that must keep it: their scores round otherwise, so near-tied blocks fall otherwise."""


@dataclass(frozen=True)
class Shape:
    """model: the published configuration whose blocks these are. goal: microseconds in bfloat16 on an H200, where there is one."""

    model: str
    batch: int
    length: int
    num_blocks: int
    first: int = 0
    diagonal: int = 0
    goal: float | None = None

    @property
    def attributes(self) -> Attributes:
        return Attributes(HEADS, self.num_blocks, attention_scale(HEAD_SIZE), "full", self.first, self.diagonal)


SHAPES = (
    *(Shape("base-512-4", 8, n, n // 8, goal=goal) for n, goal in ((512, 18), (1024, 35), (4096, 120), (16384, 700))),
    Shape("base-4096-8-d3", 8, 4096, 1024, 3, 1, goal=220),
    *(Shape("base-512-4", 1, n, n // 8, goal=goal) for n, goal in ((512, 12), (1024, None), (4096, None), (16384, None))),
    Shape("base-4096-8-d3", 1, 4096, 1024, 3, 1),
)
EMULATED_SHAPES = (Shape("base-512-4", 2, 64, 3),)


@dataclass(frozen=True)
class Timing:
    """Microseconds per call."""

    median: float
    lower_quartile: float
    upper_quartile: float
    fastest: float
    rounds: int


@dataclass
class Contestant:
    """calls: one for each set of inputs. how: what it ran on. left_out: why there are no times."""

    name: str
    how: str = ""
    calls: list[Callable[[], object]] = field(default_factory=list)
    capturable: bool = True
    left_out: str = ""
    times: dict[str, Timing] = field(default_factory=dict)


class Clock:
    """Times runs of queued work, in microseconds: CUDA events, or the host's clock where the kernels are emulated."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def elapsed(self, run: Callable[[], object]) -> float:
        if not self.device.is_cuda:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e6
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def captured(self, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
        """All calls as one CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what a first call allocates or plans must not be captured
                calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay


def take_turns(clock: Clock, contestants: Sequence[Contestant], seconds: float) -> None:
    """Fills in the times: rounds of one run each until `seconds` are over, at least three."""
    runs: list[tuple[Contestant, str, Callable[[], object], list[float]]] = []
    for contestant in contestants:
        if contestant.left_out:
            continue
        calls = list(contestant.calls)
        runs.append((contestant, "calls", lambda calls=calls: [call() for call in calls] and None, []))
        if contestant.capturable and clock.device.is_cuda:
            runs.append((contestant, "graph", clock.captured(calls), []))
    for _, _, run, _ in runs:
        clock.elapsed(run)
    end = time.monotonic() + seconds
    rounds = 0
    while rounds < 3 or time.monotonic() < end:
        for contestant, _, run, times in runs:
            times.append(clock.elapsed(run) / len(contestant.calls))
        rounds += 1
    for contestant, kind, _, times in runs:
        lower, median, upper = statistics.quantiles(times, n=4)
        contestant.times[kind] = Timing(median, lower, upper, min(times), len(times))


def input_sets(device: Device, shape: Shape, dtype: torch.dtype) -> list[Inputs]:
    """Sets of normal inputs, no padding, together above twice the L2 cache."""
    size = (shape.batch, shape.length, HEADS * HEAD_SIZE)
    one = 3 * math.prod(size) * torch.empty((), dtype=dtype).element_size()
    cache = torch.cuda.get_device_properties(device.torch_device).L2_cache_size if device.is_cuda else 0
    generator = torch.Generator(device.torch_device).manual_seed(0)
    mask = torch.ones(size[:2], dtype=torch.int32, device=device.torch_device)
    return [
        Inputs(*(torch.randn(size, generator=generator, device=device.torch_device).to(dtype) for _ in range(3)), mask)
        for _ in range(max(2, min(MOST_SETS, math.ceil(2 * cache / one))))
    ]


def ours(device: Device, shape: Shape, sets: Sequence[Inputs]) -> Contestant:
    params = kernel_check.params_for(sets[0], shape.attributes)
    workspace = kernel_check.workspace_for(device, params).tensor
    contexts = [torch.empty_like(inputs.query) for inputs in sets]
    calls = [
        lambda inputs=inputs, context=context: kernel_check.launch(device, params, inputs, context, workspace)
        for inputs, context in zip(sets, contexts, strict=True)
    ]
    contestant = Contestant("ours", "mra_attention_cuda", list(calls))
    try:
        # Batch rows are independent: the first alone keeps the float64 reference small. Includes selection beside the CPU kernel.
        first = Inputs(*(getattr(sets[0], name)[:1] for name in ("query", "key", "value", "mask")))
        contestant.how += f", check: {kernel_check.check_call(device, first, shape.attributes)}"
        alone = kernel_check.run(device, first, shape.attributes)
        calls[0]()
        device.synchronize()
        apart = float((contexts[0][:1].float() - alone.float()).abs().max())
        kernel_check.expect(apart <= DENSE_TOLERANCE[alone.dtype], f"a batch row alone and in its batch are {apart:.1e} apart")
    except AssertionError as error:
        contestant.left_out = f"wrong, so not timed: {error}"
    return contestant


def dense_contestants(device: Device, shape: Shape, sets: Sequence[Inputs]) -> list[Contestant]:
    """torch's own choice first, then each fused implementation that it did not choose."""
    heads = [tuple(_heads(x) for x in (inputs.query, inputs.key, inputs.value)) for inputs in sets]
    chosen = _torchs_choice(heads[0])
    default = Contestant("sdpa", f"torch chose {chosen}", [lambda h=h: scaled_dot_product_attention(*h) for h in heads])
    found = [default]
    for name, backend in DENSE.items() if device.is_cuda else ():
        if name == chosen:
            continue

        def call(h: Any, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*h)

        found.append(Contestant(f"sdpa {name}", name, [lambda h=h, call=call: call(h) for h in heads]))
    for contestant in found:
        try:
            error = _dense_error(contestant.calls[0](), heads[0])
            allowed = DENSE_TOLERANCE[sets[0].query.dtype]
            contestant.how += f", error {error:.1e}"
            if not error <= allowed:
                contestant.left_out = f"error {error:.1e} is above {allowed}: not timed"
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            contestant.left_out = str(error).splitlines()[0]
    return found


def _heads(x: Tensor) -> Tensor:
    """(B, N, H * D) -> (B, H, N, D), the same memory."""
    return x.unflatten(2, (HEADS, HEAD_SIZE)).transpose(1, 2)


def _torchs_choice(heads: Sequence[Tensor]) -> str:
    try:
        backend = SDPBackend(torch._fused_sdp_choice(*heads))
    except (AttributeError, RuntimeError, ValueError):
        return "what it does not tell"  # an internal function of torch
    return next((name for name, known in DENSE.items() if known == backend), backend.name.lower())


def _dense_error(context: Any, heads: Sequence[Tensor]) -> float:
    """Beside float64, for the first and the last 64 queries of the first batch row."""
    query, key, value = (x[0].double() for x in heads)
    worst = 0.0
    for part in (slice(0, 64), slice(-64, None)):
        weights = torch.softmax(query[:, part] @ key.transpose(1, 2) / math.sqrt(HEAD_SIZE), -1)
        worst = max(worst, float((context[0, :, part].double() - weights @ value).abs().max()))
    return worst


def authors(shape: Shape, sets: Sequence[Inputs], kernels: Any, reason: str) -> Contestant:
    """kernels: compiled, or None with the reason."""
    contestant = Contestant("authors", "float32", capturable=False, left_out=reason)  # they launch on the default stream
    if reason:
        return contestant
    try:
        few = sets[:8]  # they copy their inputs
        calls = [authors_kernels.prepare(kernels, x.query, x.key, x.value, x.mask, shape.attributes) for x in few]
        agree = authors_agree(calls[0](), few[0], shape)
        contestant.how += f", {agree:.2%} of tokens agree"
        if agree < AUTHORS_ROWS:
            contestant.left_out = f"only {agree:.1%} of tokens agree with the operator: not timed"
        contestant.calls = list(calls)
    except (authors_kernels.LeftOutError, RuntimeError) as error:
        contestant.left_out = str(error).splitlines()[0]
    return contestant


def authors_agree(context: Tensor, inputs: Inputs, shape: Shape) -> float:
    """Share of the first batch row's tokens and heads whose context is the reference's, within AUTHORS_TOLERANCE."""
    row = [getattr(inputs, name)[:1] for name in ("query", "key", "value", "mask")]
    expected = kernel_check.mra_attention(*(x.float() for x in row[:3]), row[3], shape.attributes)
    error = (context[:1] - expected).unflatten(2, (HEADS, HEAD_SIZE)).abs().amax(-1)
    return float((error <= AUTHORS_TOLERANCE).float().mean())


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reached in this run. bytes_per_us: of a copy, read and written; flops_per_us: of a matrix product, by dtype."""

    bytes_per_us: float
    flops_per_us: dict[str, float]


def ceilings(clock: Clock, dtypes: Sequence[torch.dtype]) -> Ceilings | None:
    if not clock.device.is_cuda:
        return None
    source = torch.empty(2**30, dtype=torch.uint8, device=clock.device.torch_device).random_()
    target = torch.empty_like(source)
    copied = min(clock.elapsed(lambda: target.copy_(source)) for _ in range(10))
    flops = {}
    for dtype in dtypes:
        side = 4096 if dtype == torch.float32 else 8192
        a, b = (torch.randn(side, side, device=clock.device.torch_device).to(dtype) for _ in range(2))
        taken = statistics.median([clock.elapsed(lambda a=a, b=b: a @ b) for _ in range(8)][2:])
        flops[_name(dtype)] = 2 * side**3 / taken
    return Ceilings(2 * source.numel() / copied, flops)


def roofline(shape: Shape, dtype: torch.dtype, found: Ceilings) -> float:
    """Microseconds that the operator takes at least here: each tensor moved once, or the exact blocks' products, what is longer."""
    elements = shape.batch * shape.length * HEADS * HEAD_SIZE
    moved = 4 * elements * torch.empty((), dtype=dtype).element_size() / found.bytes_per_us
    flops = shape.batch * HEADS * shape.num_blocks * 32 * 32 * HEAD_SIZE * 4
    return max(moved, flops / found.flops_per_us[_name(dtype)])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(
    clock: Clock, shape: Shape, dtype: torch.dtype, seconds: float, found: Ceilings | None, kernels: Any, reason: str
) -> dict[str, Any]:
    """One row of the results, JSON-ready."""
    sets = input_sets(clock.device, shape, dtype)
    contestants = [ours(clock.device, shape, sets), *dense_contestants(clock.device, shape, sets)]
    if dtype == torch.float32:
        contestants.append(authors(shape, sets, kernels, reason))
    with torch.no_grad():
        take_turns(clock, contestants, seconds)
    row: dict[str, Any] = {**asdict(shape), "heads": HEADS, "head_size": HEAD_SIZE, "dtype": _name(dtype), "input_sets": len(sets)}
    row["roofline_us"] = roofline(shape, dtype, found) if found else None
    row["contestants"] = {
        c.name: {"how": c.how, "left_out": c.left_out, "times_us": {kind: asdict(t) for kind, t in c.times.items()}}
        for c in contestants
    }
    return row


def line(row: dict[str, Any]) -> str:
    """A row as one line of text: medians of the graph where there is one, else of plain calls."""
    parts = []
    for name, contestant in row["contestants"].items():
        times = contestant["times_us"].get("graph") or contestant["times_us"].get("calls")
        parts.append(f"{name} {times['median']:.1f} us" if times else f"{name} left out ({contestant['left_out']})")
    return f"{row['model']} B {row['batch']} N {row['length']} {row['dtype']}: {', '.join(parts)}"


def main(arguments: list[str] | None = None, write: Callable[[str], Any] = sys.stdout.write) -> int:
    parser = argparse.ArgumentParser(description="Time the CUDA attention kernel beside dense attention.")
    parser.add_argument("--library", type=Path, help="libmra_attention built with CUDA; default: the installed one")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for the emulated library, at toy shapes")
    parser.add_argument("--dtype", action="append", choices=["bfloat16", "float16", "float32"], help="default: bfloat16, float32")
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each shape and dtype (default %(default)s)")
    parser.add_argument("--authors-build", type=Path, help="folder to compile the authors' kernels in; default: they are left out")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        write(f"SKIP all: torch {torch.__version__} finds no CUDA GPU\n")
        return SKIPPED
    path = options.library or libraries.find("kernels")
    if path is None:
        write("SKIP all: libmra_attention is not built\n")
        return SKIPPED
    device = Device(kernel_check.load(path), torch.device(options.device), small=False)
    clock = Clock(device)
    dtypes = [getattr(torch, name) for name in options.dtype or ("bfloat16", "float32")]
    kernels, reason = None, "not asked for: --authors-build"
    if options.authors_build:
        try:
            kernels, reason = authors_kernels.compile_kernels(options.authors_build), ""
        except authors_kernels.LeftOutError as error:
            reason = str(error)
    write(f"authors' kernels: {reason or 'compiled'}\n")
    compared = "compared with the CPU kernel" if kernel.available() else "NOT compared: libmra_attention is not installed"
    write(f"selection {compared}\n")
    found = ceilings(clock, dtypes)
    rows = []
    for shape in SHAPES if device.is_cuda else EMULATED_SHAPES:
        for dtype in dtypes:
            try:
                rows.append(measure(clock, shape, dtype, options.seconds, found, kernels, reason))
                write(line(rows[-1]) + "\n")
            except torch.cuda.OutOfMemoryError:
                write(f"SKIP {shape.model} B {shape.batch} N {shape.length} {_name(dtype)}: the GPU has too little memory\n")
            if device.is_cuda:
                torch.cuda.empty_cache()
    if options.json:
        result = {
            "emulated": not device.is_cuda,
            "authors": reason or "compiled",
            "ceilings": asdict(found) if found else None,
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [row for row in rows if row["contestants"]["ours"]["left_out"]]
    write(f"{len(rows)} rows, {len(wrong)} wrong\n")
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
