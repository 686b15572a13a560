"""Times the CUDA attention kernel beside torch's dense attention, flex_attention and the authors' kernels, in one run.

    python benchmarks/gpu_attention.py [--json FILE] [--seconds S] [--limit S] [--dtype bfloat16] [--authors-build FOLDER]

Every contestant's answer is checked before it is timed. They take turns, so that whatever else the GPU does hits all of them. Each
run goes through several sets of inputs, together larger than twice the L2 cache, so that no call finds its inputs there. Times are
from CUDA events, per call: "graph" from a captured CUDA graph of all sets, "one" from a graph for each set (B 1 only), "calls" from
plain calls one after another, with what the host adds. The profiler gives each launch's own time, beside what the cost model
expects. Needs numpy and torch. `--device cpu --library EMULATED` runs it on the emulated kernel at toy shapes: a test of this
script, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
import authors_kernels
import gpu_cost
import gpu_peers
import kernel_check
import torch
from gpu_measure import Clock, Contestant, KernelTime, first_line, kernel_times, name_of, take_turns
from kernel_check import Device, Inputs
from torch import Tensor

from mra_export import kernel, libraries
from mra_export.contract import Attributes, attention_scale

SKIPPED = kernel_check.SKIPPED
HEAD_SIZE = 64
MOST_SETS = 64
DTYPES = ("bfloat16", "float16", "float32")
TF32X3 = "ours tf32x3"
OURS = ("ours", TF32X3)


@dataclass(frozen=True)
class Shape:
    """model: the published configuration whose blocks these are."""

    model: str
    batch: int
    length: int
    num_blocks: int
    first: int = 0
    diagonal: int = 0
    heads: int = 12

    @property
    def attributes(self) -> Attributes:
        return Attributes(self.heads, self.num_blocks, attention_scale(HEAD_SIZE), "full", self.first, self.diagonal)

    @property
    def cost(self) -> gpu_cost.Shape:
        """The shape as the cost model has it."""
        return gpu_cost.Shape(self.batch, self.length, self.num_blocks, self.first, heads=self.heads, head_size=HEAD_SIZE)

    @property
    def goal(self) -> float | None:
        """Microseconds in bfloat16 on an H200, where there is one."""
        mine = (self.batch, self.length, self.num_blocks, self.first)
        goals = {(goal.batch, goal.length, goal.num_blocks, goal.full): goal.goal for goal in gpu_cost.GOALS}
        return goals.get(mine) if self.heads == 12 else None


SHAPES = (
    *(Shape("base-512-4", 8, n, n // 8) for n in (512, 1024, 4096, 16384)),
    Shape("base-4096-8-d3", 8, 4096, 1024, 3, 1),
    *(Shape("base-512-4", 1, n, n // 8) for n in (512, 1024, 4096, 16384)),
    Shape("base-4096-8-d3", 1, 4096, 1024, 3, 1),
)
EMULATED_SHAPES = (Shape("base-512-4", 2, 64, 3),)


def input_sets(device: torch.device, shape: Shape, dtype: torch.dtype) -> list[Inputs]:
    """Sets of normal inputs, no padding, together above twice the L2 cache."""
    size = (shape.batch, shape.length, shape.heads * HEAD_SIZE)
    one = 3 * math.prod(size) * torch.empty((), dtype=dtype).element_size()
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    generator = torch.Generator(device).manual_seed(0)
    mask = torch.ones(size[:2], dtype=torch.int32, device=device)
    return [
        Inputs(*(torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(3)), mask)
        for _ in range(max(2, min(MOST_SETS, math.ceil(2 * cache / one))))
    ]


def has_tf32x3() -> bool:
    """Whether this library's float32 can run on tensor cores."""
    return any(name == "float32_mode" for name, *_ in kernel.Params._fields_)


def ours(device: Device, shape: Shape, sets: Sequence[Inputs], tf32x3: bool = False) -> Contestant:
    """The kernel. tf32x3: float32 on tensor cores, judged beside the exact kernel, which is checked by itself."""
    params = kernel_check.params_for(sets[0], shape.attributes)
    if tf32x3:
        params.float32_mode = 1
    workspace = kernel_check.workspace_for(device, params).tensor
    contexts = [torch.empty_like(inputs.query) for inputs in sets]
    calls = [
        lambda inputs=inputs, context=context: kernel_check.launch(device, params, inputs, context, workspace)
        for inputs, context in zip(sets, contexts, strict=True)
    ]
    contestant = Contestant(TF32X3 if tf32x3 else "ours", "mra_attention_cuda", list(calls), one_graph=shape.batch == 1)
    try:
        first = gpu_peers.first_row(sets[0])
        if not tf32x3:  # includes selection beside the CPU kernel
            contestant.how += f", check: {kernel_check.check_call(device, first, shape.attributes)}"
        alone = kernel_check.run(device, first, shape.attributes)
        calls[0]()
        device.synchronize()
        apart = float((contexts[0][:1].float() - alone.float()).abs().max())
        what = "the exact kernel's context and this" if tf32x3 else "a batch row alone and in its batch"
        kernel_check.expect(apart <= gpu_peers.TOLERANCE[alone.dtype], f"{what} are {apart:.1e} apart")
    except AssertionError as error:
        contestant.left_out = f"wrong, so not timed: {error}"
    return contestant


def chosen(device: Device, attributes: Attributes) -> Callable[[Inputs], Tensor]:
    """inputs -> the blocks that the kernel chose, (B, H, nb, nb) bool."""
    return lambda inputs: kernel_check.selection(device, inputs, attributes)[0] == 2


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reached in this run. bytes_per_us: of a copy, read and written; flops_per_us: of a matrix product, by dtype."""

    bytes_per_us: float
    flops_per_us: dict[str, float]


def ceilings(clock: Clock, dtypes: Sequence[torch.dtype]) -> Ceilings | None:
    if not clock.is_cuda:
        return None
    source = torch.empty(2**30, dtype=torch.uint8, device=clock.device).random_()
    target = torch.empty_like(source)
    copied = min(clock.elapsed(lambda: target.copy_(source)) for _ in range(10))
    flops = {}
    for dtype in dtypes:
        side = 4096 if dtype == torch.float32 else 8192
        a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
        taken = statistics.median([clock.elapsed(lambda a=a, b=b: a @ b) for _ in range(8)][2:])
        flops[name_of(dtype)] = 2 * side**3 / taken
    return Ceilings(2 * source.numel() / copied, flops)


def roofline(shape: Shape, dtype: torch.dtype, found: Ceilings) -> float:
    """Microseconds that the operator takes at least here: each tensor moved once, or the exact blocks' products, what is longer."""
    elements = shape.batch * shape.length * shape.heads * HEAD_SIZE
    moved = 4 * elements * torch.empty((), dtype=dtype).element_size() / found.bytes_per_us
    flops = shape.batch * shape.heads * shape.num_blocks * 32 * 32 * HEAD_SIZE * 4
    return max(moved, flops / found.flops_per_us[name_of(dtype)])


def launch_rows(
    contestant: Contestant, measured: Sequence[KernelTime], expected: Sequence[gpu_cost.Launch], gpu: gpu_cost.Gpu | None
) -> list[dict[str, Any]]:
    """Each launch's measured time, beside the cost model's where their number is the same and the GPU is known."""
    rows: list[dict[str, Any]] = [{"contestant": contestant.name, "kernel": each.name, "measured_us": each.us} for each in measured]
    if gpu is not None and len(expected) == len(rows):
        for row, launch in zip(rows, expected, strict=True):
            row |= {"launch": launch.name, "expected_us": launch.expected(gpu) - gpu.launch, "bound": launch.bound(gpu)}
    return rows


def known_gpu(name: str) -> gpu_cost.Gpu | None:
    """The cost model's rates for the GPU of this name; its H100 and A100 are not the slower ones of the PCIe cards."""
    if "PCIe" in name or "PCIE" in name:
        return None
    return next((gpu for gpu in gpu_cost.GPUS.values() if re.search(rf"\b{gpu.name}\b", name)), None)


@dataclass(frozen=True)
class Place:
    """Where and beside what is timed. seconds: for each shape. kernels: the authors', compiled, or None with the reason."""

    device: Device
    seconds: float
    found: Ceilings | None
    kernels: Any
    reason: str

    @property
    def clock(self) -> Clock:
        return Clock(self.device.torch_device)


def measure(place: Place, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """One row of the results, JSON-ready."""
    device, clock, found = place.device, place.clock, place.found
    sets = input_sets(clock.device, shape, dtype)
    contestants = [ours(device, shape, sets)]
    if dtype == torch.float32 and has_tf32x3():
        contestants.append(ours(device, shape, sets, tf32x3=True))
    contestants += gpu_peers.dense(sets, shape.attributes)
    contestants.append(gpu_peers.flex(sets, shape.attributes, chosen(device, shape.attributes)))
    if dtype == torch.float32:
        contestants.append(gpu_peers.authors(sets, shape.attributes, place.kernels, place.reason))
    gpu = known_gpu(torch.cuda.get_device_name(clock.device)) if clock.is_cuda else None
    launches: list[dict[str, Any]] = []
    with torch.no_grad():
        take_turns(clock, contestants, place.seconds)
        for contestant in contestants:
            if contestant.name not in OURS or contestant.left_out or not clock.is_cuda:
                continue
            try:
                measured = kernel_times(contestant.calls, "mra::")
            except (RuntimeError, ValueError) as error:
                contestant.how += f", launches not timed: {first_line(error)}"
                continue
            if not measured:
                contestant.how += ", launches not timed: the profiler sees no kernel, as without CUPTI"
            model = gpu_cost.launches(shape.cost, name_of(dtype), gpu, contestant.name == TF32X3) if gpu else []
            launches += launch_rows(contestant, measured, model, gpu)
    row: dict[str, Any] = {**asdict(shape), "goal": shape.goal, "head_size": HEAD_SIZE, "dtype": name_of(dtype)}
    row |= {"input_sets": len(sets), "roofline_us": roofline(shape, dtype, found) if found else None}
    row["expected_us"] = gpu_cost.expected(shape.cost, name_of(dtype), gpu) if gpu else None
    row["launches"] = launches
    row["contestants"] = {contestant.name: contestant.as_dict() for contestant in contestants}
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
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeat for several; default: all")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each shape and dtype (default %(default)s)")
    parser.add_argument("--limit", type=float, default=math.inf, help="begin no shape after this many seconds")
    parser.add_argument("--authors-build", type=Path, help="folder to compile the authors' kernels in; default: they are left out")
    parser.add_argument("--json", type=Path, help="write everything to this file, after each shape")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        write(f"SKIP all: torch {torch.__version__} finds no CUDA GPU\n")
        return SKIPPED
    path = options.library or libraries.find("kernels")
    if path is None:
        write("SKIP all: libmra_attention is not built\n")
        return SKIPPED
    end = time.monotonic() + options.limit
    device = Device(kernel_check.load(path), torch.device(options.device), small=False)
    clock = Clock(device.torch_device)
    dtypes = [getattr(torch, name) for name in options.dtype or DTYPES]
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
    place = Place(device, options.seconds, found, kernels, reason)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for dtype in dtypes:  # the goals' type first, should the time not suffice
        for shape in SHAPES if device.is_cuda else EMULATED_SHAPES:
            name = f"{shape.model} B {shape.batch} N {shape.length} {name_of(dtype)}"
            if time.monotonic() > end:
                skipped.append(f"{name}: the time of --limit was over")
                continue
            try:
                rows.append(measure(place, shape, dtype))
                write(line(rows[-1]) + "\n")
            except torch.cuda.OutOfMemoryError:
                skipped.append(f"{name}: the GPU has too little memory")
            if device.is_cuda:
                torch.cuda.empty_cache()
            if options.json:
                result = {
                    "emulated": not device.is_cuda,
                    "gpu": torch.cuda.get_device_name(clock.device) if device.is_cuda else None,
                    "authors": reason or "compiled",
                    "ceilings": asdict(found) if found else None,
                    "skipped": skipped,
                    "rows": rows,
                }
                options.json.write_text(json.dumps(result, indent=1) + "\n")
    for text in skipped:
        write(f"SKIP {text}\n")
    wrong = [row for row in rows if any(row["contestants"][name]["left_out"] for name in OURS if name in row["contestants"])]
    write(f"{len(rows)} rows, {len(wrong)} wrong{f', {len(skipped)} left out' if skipped else ''}\n")
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
