"""Shows what each stage of the CPU kernel costs, on one thread: instructions by callgrind, time by perf.

callgrind counts every instruction, exactly and the same on any machine; valgrind knows no AVX-512, so that is the AVX2 kernel. perf
takes samples of the CPU clock and needs no hardware counters: shares of the time of whatever kernel this machine runs.

Both run a build of their own, in which every stage (MRA_STAGE in the kernel's source) is a function of its own. What a stage calls
counts as the stage's; what belongs to none is shown under its function's name.

    python benchmarks/cpu_stages.py --length 512

    python benchmarks/cpu_stages.py --length 4096 --preset base-4096-8-d3 --tool perf --json stages.json
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from cpu_attention import Shape, preset_shape
from measure import machine

from mra_export import kernel
from mra_export.contract import BLOCK_SIZE, Attributes

ROOT = Path(__file__).resolve().parent.parent
STAGES = {
    "LoadBlock": "pack",
    "PackBlocks": "pack",
    "ComputeLogits": "select",
    "FindBoundary": "select",
    "Choose": "select",
    "LowResolution": "attend",
    "LogitsOfBlocks": "attend",
    "SoftmaxOfBlocks": "attend",
    "ValuesOfBlocks": "attend",
    "WriteContext": "attend",
}
"""Function -> phase. docs/kernels.md says what each does."""
OTHER = "other"
TOOLS = ("callgrind", "perf")
_PERF_HZ = 4000
_SMALL = 0.001
"""Share below which a function that is no stage is not worth a line."""


@dataclass(frozen=True)
class Stage:
    """cost: instructions of one call (callgrind) or samples (perf). share: of all of the kernel's."""

    phase: str
    name: str
    cost: float
    share: float


@dataclass(frozen=True)
class Profile:
    """tool: of TOOLS. instruction_set: that of the kernel that ran. total: instructions of one call, or its milliseconds.

    multiply_adds: those of the exact blocks of one call, the least that any kernel must do.
    """

    tool: str
    instruction_set: str
    total: float
    multiply_adds: int
    stages: list[Stage]


@dataclass(frozen=True)
class Run:
    """One shape, ready to run: the program, and a file with its inputs."""

    program: Path
    inputs: Path
    length: int
    dtype: str
    head_size: int
    attributes: Attributes

    @property
    def multiply_adds(self) -> int:
        blocks = -(-self.length // BLOCK_SIZE)
        return min(self.attributes.num_blocks, blocks * blocks) * BLOCK_SIZE**2 * 2 * self.head_size * self.attributes.num_heads

    def command(self, calls: int) -> list[str]:
        a = self.attributes
        numbers = (kernel.DTYPES[self.dtype], self.length, a.num_heads, self.head_size, a.num_blocks)
        priors = (a.initial_prior_first_n_blocks, a.initial_prior_diagonal_n_blocks)
        return [str(self.program), str(self.inputs), *map(str, (*numbers, *priors, calls))]


def build(folder: Path) -> Path:
    """The profiling program, built into this folder."""
    for command in (
        ["cmake", "-S", str(ROOT / "mra_export" / "plugins"), "-B", str(folder), "-DMRA_PROFILE=ON", "-DMRA_BUILD_CUDA=OFF"],
        ["cmake", "--build", str(folder), "--target", "mra_attention_stages", "--parallel", str(os.cpu_count())],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return folder / "mra_attention_stages"


def write_inputs(path: Path, length: int, shape: Shape, dtype: str) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(length, shape.heads * shape.head_size).to(getattr(torch, dtype)) for _ in range(3)]
    path.write_bytes(b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors))


def callgrind(run: Run, folder: Path) -> Profile:
    """Instructions of one call: another would take as many."""
    out = folder / "callgrind.out"
    options = ["--dump-line=no", "--compress-pos=no", "--compress-strings=no", "--separate-callers=6", "--collect-atstart=no"]
    options += ["--toggle-collect=mra_attention_cpu", f"--callgrind-out-file={out}"]
    environment = {**os.environ, "MRA_ATTENTION_CPU_TARGET": "avx2"}
    printed = _run(["valgrind", "--tool=callgrind", *options, *run.command(1)], environment)
    costs = parse_callgrind(out.read_text().splitlines())
    return Profile("callgrind", printed.split()[0], sum(costs.values()), run.multiply_adds, stages(costs))


def perf(run: Run, folder: Path, seconds: float) -> Profile:
    """Samples while the program runs for about this long."""
    one = float(_run(run.command(3), dict(os.environ)).split()[1])
    calls = max(3, round(seconds * 1e3 / one))
    data = folder / "perf.data"
    record = ["perf", "record", "--quiet", "--event", "cpu-clock:u", "--call-graph", "fp"]
    record += ["--freq", str(_PERF_HZ), "--output", str(data), "--"]
    printed = _run([*record, *run.command(calls)], dict(os.environ)).split()
    script = _run(["perf", "script", "--input", str(data), "--fields", "ip,sym"], dict(os.environ))
    return Profile("perf", printed[0], float(printed[1]), run.multiply_adds, stages(parse_perf(script.splitlines())))


Stack = tuple[str, ...]
"""Functions, innermost first."""


def parse_callgrind(lines: Iterable[str]) -> Counter[Stack]:
    """Instructions of each function with its callers. --separate-callers names a function "itself'caller'its caller"."""
    costs: Counter[Stack] = Counter()
    stack: Stack = ()
    skip = False
    for line in lines:
        if line.startswith("fn="):
            stack = tuple(line[3:].strip().split("'"))
        elif line.startswith("calls="):
            skip = True  # the next line is what was called, counted there
        elif re.match(r"\d+ \d+", line):
            if not skip:
                costs[stack] += int(line.split()[1])
            skip = False
    return costs


def parse_perf(lines: Iterable[str]) -> Counter[Stack]:
    """Samples of each function with its callers. A sample is a line for each: address and name; an empty line ends it."""
    costs: Counter[Stack] = Counter()
    frames: list[str] = []
    for line in (*lines, ""):
        address, _, function = line.strip().partition(" ")
        if address:
            frames.append(function.strip())
        elif frames:
            costs[tuple(frames)] += 1
            frames = []
    return costs


def stages(costs: Counter[Stack]) -> list[Stage]:
    """Costs by stage, in the order of STAGES, then what belongs to none, small ones together."""
    found: Counter[tuple[str, str]] = Counter()
    for stack, cost in costs.items():
        found[stage_of(stack)] += cost
    total = sum(found.values())
    for (phase, name), cost in list(found.items()):
        if phase == OTHER and cost < _SMALL * total:
            del found[phase, name]
            found[OTHER, "the rest"] += cost
    order = {name: index for index, name in enumerate(STAGES)}
    ranked = sorted(found.items(), key=lambda item: (order.get(item[0][1], len(order)), -item[1]))
    return [Stage(phase, name, cost, cost / total) for (phase, name), cost in ranked]


def stage_of(stack: Stack) -> tuple[str, str]:
    """(phase, stage): the innermost stage of the stack, else its innermost function."""
    names = [short_name(function) for function in stack]
    stage = next((name for name in names if name in STAGES), None)
    return (OTHER, names[0]) if stage is None else (STAGES[stage], stage)


def short_name(function: str) -> str:
    """Such as PackHead of "void mra::avx2::(anonymous namespace)::PackHead<float>(mra::Problem const&, long)"."""
    text = re.sub(r"\(anonymous namespace\)::", "", function)
    match = re.match(r"(?:[\w ]+\s)?(?:\w+::)*(~?\w+)", text)
    return match[1] if match else function


def table(profile: Profile) -> str:
    """As markdown. Instructions for each multiply-add of the exact blocks, or milliseconds of a call."""
    counted = profile.tool == "callgrind"
    unit = "instructions for each exact multiply-add" if counted else "ms of a call"
    whole = profile.total / profile.multiply_adds if counted else profile.total
    lines = [f"| phase | stage | share | {unit} |", "| --- | --- | --- | --- |"]
    for phase in dict.fromkeys(stage.phase for stage in profile.stages):
        rows = [stage for stage in profile.stages if stage.phase == phase]
        share = sum(stage.share for stage in rows)
        lines.append(f"| **{phase}** | | **{share:.1%}** | **{share * whole:.4f}** |")
        lines += [f"| | {stage.name} | {stage.share:.1%} | {stage.share * whole:.4f} |" for stage in rows]
    lines.append(f"| **all** | | | **{whole:.4f}** |")
    return "\n".join(lines)


def _run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    return done.stdout


@click.command(help=__doc__)
@click.option("--length", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--dtype", type=click.Choice(sorted(kernel.DTYPES)), default="float32", show_default=True)
@click.option("--preset", type=click.Choice(("base-512-4", "base-4096-8-d3")), help="Attributes of a published checkpoint.")
@click.option("--heads", type=int, default=12, show_default=True)
@click.option("--head-size", type=int, default=64, show_default=True)
@click.option("--blocks-per-row", type=int, default=4, show_default=True)
@click.option("--tool", "tools", multiple=True, type=click.Choice(TOOLS), help="Default: both.")
@click.option("--seconds", type=float, default=5.0, show_default=True, help="How long perf takes samples.")
@click.option("--build", "build_folder", type=click.Path(path_type=Path, file_okay=False), help="Build here, and keep it.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write everything to this file.")
def main(
    length: int,
    dtype: str,
    preset: str | None,
    heads: int,
    head_size: int,
    blocks_per_row: int,
    tools: tuple[str, ...],
    seconds: float,
    build_folder: Path | None,
    json_path: Path | None,
) -> None:
    tools = tools or TOOLS
    for program in ("cmake", *("valgrind" if tool == "callgrind" else tool for tool in tools)):
        if shutil.which(program) is None:
            raise click.ClickException(f"{program} is not installed: install it, or choose another --tool")
    shape = preset_shape(preset) if preset else Shape(f"K = {blocks_per_row} a row", heads, head_size, blocks_per_row)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        program = build(build_folder or folder / "build")
        write_inputs(folder / "inputs", length, shape, dtype)
        run = Run(program, folder / "inputs", length, dtype, shape.head_size, shape.attributes(length))
        profiles = [callgrind(run, folder) if tool == "callgrind" else perf(run, folder, seconds) for tool in tools]
    for profile in profiles:
        whole = f"{profile.total:.0f} instructions a call" if profile.tool == "callgrind" else f"{profile.total:.3f} ms a call"
        print(f"\n{profile.tool}: N {length}, {dtype}, {shape.name}, 1 thread, {profile.instruction_set}: {whole}\n")
        print(table(profile))
    if json_path:
        about = machine() | {"batch": 1, "heads": shape.heads, "head_size": shape.head_size, "threads": 1}
        facts = {"shape": shape.name, "length": length, "dtype": dtype, "profiles": [asdict(profile) for profile in profiles]}
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({"machine": about, **facts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
