"""What the CUDA kernels should cost: bytes, operations and expected microseconds of each launch, on GPUs whose rates are known.

    python benchmarks/gpu_cost.py [--gpu H200] [--batch 8] [--length 4096] [--dtype bfloat16]

A model: expected, not measured. A launch takes as long as the resource that it keeps busy the longest, all others hidden behind
it, or as long as its slowest CTA lasts alone; and a gap before it. `python benchmarks/tables.py --update docs/kernels-cuda.md`
renders its tables; gpu_attention.py puts its times beside measured ones. Standard library only.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

BLOCK = 32
FUSED_BLOCKS = 128
"""Up to this many block rows one CTA selects for a head; three launches, five above."""
SHORT_ROW = 32
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Architecture:
    """Per SM. shared: bytes, of which a CTA takes 1024 for itself. From the CUDA C++ Programming Guide, compute capabilities."""

    warps: int
    ctas: int
    shared: int
    registers: int = 65536

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """CTAs that an SM holds at once. registers: of one thread. shared: bytes of one CTA."""
        warps = -(-threads // 32)
        each_quarter = self.registers // 4 // (-(-registers * 32 // 256) * 256)  # a warp's registers are in its scheduler's quarter
        of_registers = 4 * each_quarter // warps
        return min(self.ctas, self.warps // warps, of_registers, self.shared // (-(-shared // 128) * 128 + 1024))


ARCHITECTURES = {
    "80": Architecture(64, 32, 164 << 10),
    "86": Architecture(48, 16, 100 << 10),
    "89": Architecture(48, 24, 100 << 10),
    "90": Architecture(64, 32, 228 << 10),
    "100": Architecture(64, 32, 228 << 10),
    "120": Architecture(48, 24, 100 << 10),
}


@dataclass(frozen=True)
class Gpu:
    """Rates that a kernel can reach. clock: GHz under load. copy, l2: TB/s. cache: bytes of L2 that outlast a launch.

    fma: share of the float32 peak. tensor: TFLOP/s of dense 16-bit products at the peak, mma: the share of it that mma.sync
    reaches; TF32 has half. launch: microseconds between two launches of a graph that depend on one another. sources: the rate's
    name -> where it is from.
    """

    name: str
    architecture: str
    sms: int
    clock: float
    copy: float
    l2: float
    cache: float
    tensor: float
    mma: float
    sources: dict[str, str]
    fma: float = 0.6
    launch: float = 1.0
    block_cycles: float = 750.0

    @property
    def per_sm(self) -> dict[str, float]:
        """Of one SM, each microsecond."""
        cycles = self.clock * 1e3
        tensor = self.tensor * 1e6 / self.sms * self.mma
        return {
            "FMA": 256 * cycles * self.fma,
            "tensor": tensor,
            "TF32": tensor / 2,
            "MUFU": 16 * cycles,
            "shared": 128 * cycles,
            "issue": 4 * cycles,
        }

    @property
    def whole(self) -> dict[str, float]:
        """Of the whole GPU, each microsecond."""
        return {"HBM": self.copy * 1e6, "L2": self.l2 * 1e6}


_SPECIFIED = "NVIDIA's data sheet"
_BENCHES = "gpu-benches (github.com/te42kyfo/gpu-benches)"
_LUO = "Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture (arXiv 2402.13499)"
ASSUMED = {
    "float32 products at 60 % of the peak": f"assumed; {_BENCHES}, gpu-roofline/h200.txt, reaches 42 of 67 TFLOP/s",
    "1 us from a launch to the next in a graph": "assumed",
    "750 cycles for one block, alone": "assumed: 32 mma in chains of two and four, 16 ldmatrix, softmax of 16 x 32 by a warp",
    "265 cycles for a load from L2, 650 from memory": f"{_BENCHES}, gpu-latency/h100_pcie.txt",
    "an SM each cycle: 128 FMA, 16 exponentials, 128 bytes of shared memory, 4 instructions": "CUDA C++ Programming Guide",
}
"""Of every GPU."""
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "H200",
            "90",
            132,
            1.75,
            copy=4.3,
            l2=6.8,
            cache=40e6,
            tensor=989,
            mma=0.62,
            sources={
                "copy": "measured on one before this project, as was a bf16 product of 790 TFLOP/s",
                "l2": f"70 % of the 9.7 TB/s that {_BENCHES}, gpu-l2-cache/h200.txt, streams",
                "tensor": _SPECIFIED,
                "mma": f"{_LUO}: mma.sync reaches about 62 % of the peak, wgmma nearly all",
            },
        ),
        Gpu(
            "H100",
            "90",
            132,
            1.7,
            copy=3.0,
            l2=6.6,
            cache=40e6,
            tensor=989,
            mma=0.62,
            sources={
                "copy": f"assumed 90 % of the 3.35 TB/s of {_SPECIFIED}",
                "l2": "as the H200, whose chip it is, by the clock",
                "tensor": _SPECIFIED,
                "mma": _LUO,
            },
        ),
        Gpu(
            "A100",
            "80",
            108,
            1.41,
            copy=1.75,
            l2=3.8,
            cache=30e6,
            tensor=312,
            mma=0.9,
            sources={
                "copy": f"{_BENCHES}, gpu-l2-cache/a100_80.txt, sets above the L2",
                "l2": "70 % of the 5.4 TB/s there",
                "tensor": _SPECIFIED,
                "mma": "assumed: mma.sync is this GPU's own instruction",
            },
        ),
        Gpu(
            "L40S",
            "89",
            142,
            2.2,
            copy=0.8,
            l2=3.6,
            cache=80e6,
            tensor=362,
            mma=0.9,
            sources={
                "copy": f"{_BENCHES}, gpu-l2-cache/l40.txt, sets above the L2 (an L40, the same memory)",
                "l2": "70 % of the 5.2 TB/s there",
                "tensor": _SPECIFIED,
                "mma": "assumed: mma.sync is this GPU's own instruction",
            },
        ),
    )
}


@dataclass(frozen=True)
class Shape:
    """One call. full: block rows that hold every key block (the first-rows prior). goal: microseconds, bfloat16, H200."""

    batch: int
    length: int
    num_blocks: int
    full: int = 0
    goal: float | None = None
    heads: int = 12
    head_size: int = 64

    @property
    def blocks(self) -> int:
        """nb"""
        return -(-self.length // BLOCK)

    @property
    def budget(self) -> int:
        return min(self.num_blocks, self.blocks**2)

    @property
    def chunk(self) -> int:
        return max(SHORT_ROW, 2 * -(-self.budget // self.blocks))

    @property
    def name(self) -> str:
        return f"B {self.batch}, N {self.length}" + (", d3" if self.full else "")


GOALS = (
    *(Shape(8, n, n // 8, goal=goal) for n, goal in ((512, 18), (1024, 35), (4096, 120), (16384, 700))),
    Shape(8, 4096, 1024, full=3, goal=220),
    Shape(1, 512, 64, goal=12),
)


@dataclass(frozen=True)
class Launch:
    """uses: resource -> how much of it all CTAs use, bytes, flop, operations or warp instructions.

    cycles: that the slowest CTA lasts where nothing else runs. mean_cycles: an average one; 0 where all are alike.
    registers: of a thread, at most, what the build is checked for. shared: bytes of a CTA.
    """

    name: str
    ctas: int
    threads: int
    registers: int
    shared: int
    uses: dict[str, float] = field(default_factory=dict)
    cycles: float = 0.0
    mean_cycles: float = 0.0

    def resident(self, gpu: Gpu) -> int:
        return max(1, ARCHITECTURES[gpu.architecture].resident(self.threads, self.registers, self.shared))

    def waves(self, gpu: Gpu) -> float:
        return self.ctas / (gpu.sms * self.resident(gpu))

    def times(self, gpu: Gpu) -> dict[str, float]:
        """Microseconds that each resource is busy, and "latency": that CTAs last one after another. Longest first."""
        busiest = math.ceil(self.ctas / gpu.sms) / self.ctas  # an SM's share of the work, where CTAs are alike
        found = {name: used / gpu.whole[name] for name, used in self.uses.items() if name in gpu.whole}
        found |= {name: used * busiest / gpu.per_sm[name] for name, used in self.uses.items() if name in gpu.per_sm}
        # Uneven CTAs follow one another as places become free, the longest first; alike ones go in waves.
        in_turn = self.mean_cycles * self.waves(gpu) if self.mean_cycles else self.cycles * math.ceil(self.waves(gpu))
        found["latency"] = max(self.cycles, in_turn) / (gpu.clock * 1e3)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def bound(self, gpu: Gpu) -> str:
        """The resource that decides."""
        return next(iter(self.times(gpu)))

    def expected(self, gpu: Gpu) -> float:
        """Microseconds, with the gap before it."""
        return gpu.launch + next(iter(self.times(gpu).values()))


_MEMORY, _L2 = 650.0, 265.0
"""Cycles from a load to its value."""
_START = 2 * _L2 + 300
"""Cycles of a CTA before its first useful instruction: it begins, finds what its work is, and loads the first of it."""
_BARRIER = 50.0
_KEY_INSTRUCTIONS = 12
"""Of each pair in each of RADIX_PASSES passes: digit, who has the same, histogram."""
_RADIX_PASSES = 2
"""Of eleven bits: after two digits the search is mostly over."""
_STAGED = {32: 64, 64: 32, 128: 8}
"""Block rows that a select kernel has room for -> dimensions that its logits take from memory at a time."""
_FLIGHT = 48.0
"""Bytes a cycle that one CTA of 512 threads draws from L2: sixteen loads of 4 bytes each under way, some 700 cycles each."""
_LOW_SHARE = 0.5
"""Of what mma.sync reaches, in a product that waits at barriers for its operands."""


def launches(shape: Shape, dtype: str, gpu: Gpu, tf32x3: bool = False) -> list[Launch]:
    """The launches of one call in order: three up to FUSED_BLOCKS block rows, five above. tf32x3: float32 on tensor cores."""
    nb, heads = shape.blocks, shape.batch * shape.heads
    size, d = BYTES[dtype], shape.head_size
    tensor_bytes = shape.batch * shape.length * shape.heads * d * size  # of query, key, value or context
    pooled = heads * nb * d * 4  # of one of the three pooled tensors
    vectors = math.ceil(shape.heads * d * size / 16)  # of a token; a thread of pool sums one over a block's tokens
    tiles = math.ceil(vectors / 128)
    pool = Launch(
        "pool",
        shape.batch * nb * 3 * tiles,
        threads=math.ceil(vectors / tiles / 32) * 32,
        registers=96,
        shared=0,
        uses={"HBM": 3.0 * tensor_bytes, "issue": 3 * tensor_bytes / 16 / 32 * (6 + 3 * 16 / size)},
        cycles=_L2 + 2 * _MEMORY + 600,  # the mask, then two groups of sixteen loads
    )
    kept = 3 * tensor_bytes <= gpu.cache  # what pool read is still in L2 when attend reads it
    attend = _attend(shape, dtype, gpu, tensor_bytes, kept, tf32x3)
    if nb <= FUSED_BLOCKS:
        return [pool, _select(heads, nb, d, gpu, tensor_cores=size == 2), attend]
    pairs = float(heads * nb * nb)
    where = "L2" if pairs * 4 <= gpu.cache else "HBM"  # where the logits are between launches
    logits = Launch(
        "logits",
        heads * (-(-nb // 128)) ** 2,
        threads=256,
        registers=128,
        shared=18432,
        uses={
            "FMA": 2 * pairs * d,
            "shared": pairs * d,  # 8 x 8 pairs of a thread read 16 floats for 64 products
            "L2": 2 * pooled * -(-nb // 128),
            "HBM": 0.0 if where == "L2" else pairs * 4,
        },
        cycles=_START + 128 * 128 * d / (128 * gpu.fma),
    )
    select = Launch(
        "select",
        heads,
        threads=512,
        registers=128,
        shared=82 << 10,
        uses={where: 2 * pairs * 4, "issue": 2 * pairs * _KEY_INSTRUCTIONS / 32},  # a histogram, then lists; the rest is on chip
        cycles=_START + 2 * nb * nb * 4 / _FLIGHT + 60 * _BARRIER,
    )
    low = Launch(
        "low resolution",
        heads * -(-nb // 64),
        threads=256,
        registers=128,
        shared=27 << 10,
        uses={
            where: pairs * 4,
            "L2": (pairs * 4 if where == "L2" else 0) + pooled * -(-nb // 64),
            "TF32" if size == 2 else "FMA": 2 * pairs * d,
            "MUFU": pairs,
            "issue": pairs / 32 * 16,
        },
        cycles=_START + nb / 32 * (2 * _BARRIER + 400),
    )
    return [pool, logits, select, low, attend]


def _select(heads: int, nb: int, d: int, gpu: Gpu, tensor_cores: bool) -> Launch:
    """One CTA for a head, alone on its SM; its phases follow one another, so their cycles add up. 256 threads make the logits."""
    rows = next(rows for rows in (32, 64, 128) if nb <= rows)
    pairs = rows * rows
    tensor = gpu.per_sm["TF32"] / (gpu.clock * 1e3) * _LOW_SHARE
    phases = {
        "start": _START,
        "logits": pairs * d / (128 * gpu.fma) + math.ceil(d / _STAGED[rows]) * 2 * _BARRIER,
        "keys": pairs * 2 * _KEY_INSTRUCTIONS / 128,
        "radix": _RADIX_PASSES * (pairs * _KEY_INSTRUCTIONS / 128 + 6 * _BARRIER),
        "lists": pairs * _KEY_INSTRUCTIONS / 128 + 10 * _BARRIER,
        "weights": pairs / 16 + pairs * _KEY_INSTRUCTIONS / 128,
        "low resolution": 2 * pairs * d / tensor if tensor_cores else pairs * d / (128 * gpu.fma),
    }
    return Launch(
        "select",
        heads,
        threads=256 if rows == 32 else 512,
        registers=128,
        shared=18432 + 4 * rows * (rows + 4) + 12 * rows + 288,
        uses={
            "FMA": 2.0 * heads * pairs * d * (1 if tensor_cores else 2),
            "TF32": 2.0 * heads * pairs * d if tensor_cores else 0.0,
            "MUFU": float(heads * pairs),
            "L2": 3.0 * heads * nb * d * 4,
        },
        cycles=sum(phases.values()),
    )


def _attend(shape: Shape, dtype: str, gpu: Gpu, tensor_bytes: float, kept: bool, tf32x3: bool) -> Launch:
    nb, heads, d, size = shape.blocks, shape.batch * shape.heads, shape.head_size, BYTES[dtype]
    blocks = float(heads * shape.budget)
    mean = shape.budget / nb
    longest = min(shape.chunk, nb if shape.full else 2 * mean)  # without full rows: the longest is twice the mean, assumed
    slots = nb + (shape.budget // shape.chunk if nb > shape.chunk else 0)  # enough for any selection; the rest return at once
    items = nb + (shape.full * (-(-nb // shape.chunk) - 1) if nb > shape.chunk else 0)
    split = heads * shape.full * -(-nb // shape.chunk) if nb > shape.chunk else 0
    partial = split * (BLOCK * d + 2 * BLOCK) * 4
    tile = 2 * BLOCK * d * size
    flop = 4.0 * BLOCK * BLOCK * d * blocks
    uses = {
        "HBM": (1 if kept else 4) * tensor_bytes,
        "L2": blocks * tile + tensor_bytes + heads * nb * d * 4 + partial,  # reads; what is written goes the other way
        "MUFU": blocks * BLOCK * BLOCK,
    }
    half = tile / 2  # keys or values of a block
    if size == 2:  # two warps, 16 query tokens each: a tile is written once and read twice
        uses |= {"tensor": flop, "shared": blocks * tile * 3, "issue": blocks * 2 * 380 * d / 64}
        registers, shared, cycles = 128, 3 * tile, gpu.block_cycles * d / 64
    elif tf32x3:  # two warps, every other block each
        uses |= {"TF32": 3 * flop, "shared": blocks * tile * 2.5, "issue": blocks * 1400 * d / 64}
        registers, shared, cycles = 168, 5 * half, 3 * gpu.block_cycles * d / 64
    else:  # 131072 products for 64 dimensions, 32 to an instruction, with 8 x 4 and 8 x 8 sums a thread
        uses |= {"FMA": flop, "shared": blocks * tile * 3.5, "issue": blocks * 4900 * d / 64}
        registers, shared, cycles = 168, 5 * half + 2 * 4096, 3000.0 * d / 64
    around = _START + 2 * _L2 + 700  # list, tokens, first tiles; at the end low-resolution part and context
    each = (around * items + cycles * shape.budget) / slots  # the cycles of a CTA, on average
    return Launch("attend", heads * slots, 64, registers, int(shared), uses, around + longest * cycles, each)


def expected(shape: Shape, dtype: str, gpu: Gpu, tf32x3: bool = False) -> float:
    """Microseconds of one call in a CUDA graph."""
    return sum(launch.expected(gpu) for launch in launches(shape, dtype, gpu, tf32x3))


def roofline(shape: Shape, dtype: str, gpu: Gpu) -> float:
    """Microseconds in which query, key, value and context go through memory once."""
    return 4 * shape.batch * shape.length * shape.heads * shape.head_size * BYTES[dtype] / gpu.whole["HBM"]


FLASH_ATTENTION_3 = {512: 333.0, 1024: 392.0, 4096: 476.0, 16384: 497.0}
"""N -> TFLOP/s of dense attention, heads of 64, 16-bit, on an H100: flash-attention's published charts."""
DENSE_GOALS = {512: 1.0, 4096: 8.0, 16384: 20.0}
"""N -> how many times as long dense attention is to take."""

WHAT_IFS: tuple[tuple[str, Callable[[Gpu], Gpu]], ...] = (
    ("as assumed", lambda gpu: gpu),
    ("L2 5.5 TB/s", lambda gpu: replace(gpu, l2=5.5)),
    ("L2 9.7 TB/s", lambda gpu: replace(gpu, l2=9.7)),
    ("memory 3.9 TB/s", lambda gpu: replace(gpu, copy=3.9)),
    ("FMA at 40 % of the peak", lambda gpu: replace(gpu, fma=0.4)),
    ("launch gap 2 us", lambda gpu: replace(gpu, launch=2.0)),
    ("1000 cycles a block", lambda gpu: replace(gpu, block_cycles=1000.0)),
    ("mma.sync at 40 % of the peak", lambda gpu: replace(gpu, mma=0.4)),
)


def launches_table(gpu: Gpu = GPUS["H200"], dtype: str = "bfloat16", shapes: Sequence[Shape] = GOALS) -> str:
    """Each launch of each shape."""
    head = ["shape", "launch", "CTAs", "waves", "memory MB", "L2 MB", "FMA GFLOP", "tensor GFLOP", "expected us", "bound by"]
    rows = []
    for shape in shapes:
        for launch in launches(shape, dtype, gpu):
            uses = launch.uses
            tensor = uses.get("tensor", 0) + uses.get("TF32", 0)
            scaled = (uses.get("HBM", 0) / 1e6, uses.get("L2", 0) / 1e6, uses.get("FMA", 0) / 1e9, tensor / 1e9)
            amounts = [_number(amount) for amount in scaled]
            name = shape.name if launch.name == "pool" else ""
            rows.append([name, launch.name, str(launch.ctas), f"{launch.waves(gpu):.2f}", *amounts])
            rows[-1] += [_number(launch.expected(gpu)), launch.bound(gpu)]
    return _table(head, rows)


def goals_table(gpu: Gpu = GPUS["H200"], dtype: str = "bfloat16") -> str:
    """The goals under each assumption; what misses its goal is bold."""
    head = ["", *(f"{shape.name}: {shape.goal:g} us" for shape in GOALS)]
    rows = []
    for name, change in WHAT_IFS:
        times = [expected(shape, dtype, change(gpu)) for shape in GOALS]
        cells = [
            _number(time) if time <= (shape.goal or 0) else f"**{_number(time)}**" for time, shape in zip(times, GOALS, strict=True)
        ]
        rows.append([name, *cells])
    rows.append(["once through memory", *(_number(roofline(shape, dtype, gpu)) for shape in GOALS)])
    return _table(head, rows)


def verdict(gpu: Gpu = GPUS["H200"], dtype: str = "bfloat16") -> str:
    """A line for each goal: whether the model meets it, by how much, and which changed assumption turns that round."""
    lines = []
    for shape in GOALS:
        goal = shape.goal or 0.0
        times = {name: expected(shape, dtype, change(gpu)) for name, change in WHAT_IFS}
        first, *others = times
        met = times[first] <= goal
        turned = [name for name in others if (times[name] <= goal) != met]
        turn = f"{'missed' if met else 'met'} with {' or '.join(turned)}" if turned else "with each of these assumptions"
        lines.append(f"- {shape.name}: {'met' if met else 'missed'}, {_number(times[first])} of {goal:g} us; {turn}")
    return "\n".join(lines)


def dense_table(gpu: Gpu = GPUS["H200"], dtype: str = "bfloat16") -> str:
    """Beside dense attention as published."""
    rows = []
    for n, rate in FLASH_ATTENTION_3.items():
        shape = Shape(8, n, n // 8)
        taken = 4.0 * shape.batch * shape.heads * n * n * shape.head_size / (rate * 1e6)
        mine = expected(shape, dtype, gpu)
        goal = DENSE_GOALS.get(n)
        met = "-" if goal is None else f"{goal:g}x, {'met' if taken / mine >= goal else 'missed'}"
        rows.append([shape.name, _number(mine), _number(taken), f"{taken / mine:.1f}x", met])
    return _table(["shape", f"expected, {gpu.name}", "FlashAttention-3, H100, published", "times as long", "goal"], rows)


def gpus_table() -> str:
    """Expected microseconds of the goals' shapes on each GPU and type."""
    head = ["GPU", "type", *(shape.name for shape in GOALS)]
    rows = []
    for gpu in GPUS.values():
        for dtype, tf32x3 in (("bfloat16", False), ("float32", False), ("float32", True)):
            name = "float32, tf32x3" if tf32x3 else dtype
            rows.append([gpu.name, name, *(_number(expected(shape, dtype, gpu, tf32x3)) for shape in GOALS)])
    return _table(head, rows)


def rates_table() -> str:
    """What the model takes for granted, and from where."""
    rows = []
    for gpu in GPUS.values():
        rows.append([gpu.name, f"{gpu.clock:g} GHz under load", "assumed, below the boost clock"])
        values = {
            "copy": f"{gpu.copy:g} TB/s",
            "l2": f"{gpu.l2:g} TB/s",
            "tensor": f"{gpu.tensor:g} TFLOP/s, 16-bit",
            "mma": f"{gpu.mma:.0%} of it through mma.sync",
        }
        rows += [[gpu.name, values.get(name, name), source] for name, source in gpu.sources.items()]
    rows += [["each", name, source] for name, source in ASSUMED.items()]
    return _table(["GPU", "rate", "source"], rows)


def attend_table(gpu: Gpu = GPUS["H200"]) -> str:
    """Cycles of an SM that one chosen block keeps each resource busy in attend, by type."""
    shape = Shape(8, 4096, 512)
    variants = (("float16, bfloat16", "bfloat16", False), ("float32", "float32", False), ("float32, tf32x3", "float32", True))
    head = ["resource", *(name for name, _, _ in variants)]
    resources = ("L2", "shared", "issue", "tensor", "TF32", "FMA", "MUFU")
    per_block = []
    for _, dtype, tf32x3 in variants:
        attend = launches(shape, dtype, gpu, tf32x3)[-1]
        blocks = shape.batch * shape.heads * shape.budget
        rates = gpu.per_sm | {name: rate / gpu.sms for name, rate in gpu.whole.items()}
        per_block.append({name: used / blocks / rates[name] * gpu.clock * 1e3 for name, used in attend.uses.items()})
    rows = [[name, *(_number(found[name]) if name in found else "-" for found in per_block)] for name in resources]
    return _table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "launches": launches_table,
    "goals": goals_table,
    "verdict": verdict,
    "dense": dense_table,
    "gpus": gpus_table,
    "rates": rates_table,
    "attend": attend_table,
}


def _number(value: float) -> str:
    return "-" if value == 0 else f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What the CUDA kernels should cost; a model, not a measurement.")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="H200")
    parser.add_argument("--dtype", choices=tuple(BYTES), default="bfloat16")
    parser.add_argument("--batch", type=int, help="with --length: one shape; default: the goals' shapes")
    parser.add_argument("--length", type=int, help="N; four exact blocks a row unless --blocks says otherwise")
    parser.add_argument("--blocks", type=int, help="K")
    parser.add_argument("--full", type=int, default=0, help="block rows that hold every key block")
    options = parser.parse_args(arguments)
    shapes: Sequence[Shape] = GOALS
    if options.length:
        budget = options.blocks or 4 * -(-options.length // BLOCK)
        shapes = (Shape(options.batch or 1, options.length, budget, options.full),)
    gpu = GPUS[options.gpu]
    print(f"{gpu.name}, {options.dtype}: expected, not measured\n")
    print(launches_table(gpu, options.dtype, shapes))
    for shape in shapes:
        print(f"{shape.name}: {expected(shape, options.dtype, gpu):.1f} us")


if __name__ == "__main__":
    main()
