"""Draws results: of cpu_attention.py time over the length and over the number of threads, of gpu_attention.py time over the length.

    python benchmarks/plots.py benchmarks/results/cpu-attention.json docs/images

    python benchmarks/plots.py --expected docs/images

A file of gpu_check.py holds one of gpu_attention.py's. --expected draws the cost model of the CUDA kernels instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import gpu_cost
import tables
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

rcParams["svg.hashsalt"] = "mra_export"  # the same results give the same file


def draw(results: tables.Results, folder: Path) -> list[Path]:
    """Writes cpu-attention-length.svg and, where there are several numbers of threads, cpu-attention-threads.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    rows = [row for row in results["results"] if row["dtype"] == "float32"]
    most = max((row["threads"] for row in rows), default=0)
    for name, x, chosen in (
        ("length", "length", [row for row in rows if row["threads"] == most]),
        ("threads", "threads", _longest_at_every_number_of_threads(rows)),
    ):
        if len({row[x] for row in chosen}) < 2:
            continue
        figure = Figure(figsize=(10, 4), layout="constrained")
        first, second = figure.subplots(1, 2)
        _lines(first, chosen, x, tables.median)
        first.set_ylabel("milliseconds")
        first.legend()
        if name == "length":
            figure.suptitle(f"{results['machine']['cpu']}, {most} threads, float32")
            _lines(second, chosen, x, lambda row, peer: tables.median(row, peer) / row["length"] * 1e3)
            second.set_ylabel("microseconds a token")
        else:
            figure.suptitle(f"{results['machine']['cpu']}, N = {chosen[0]['length']}, float32")
            one: dict[str, float] = {}
            for row in chosen:
                for peer in row["timings"]:
                    one.setdefault(peer, tables.median(row, peer))
            _lines(second, chosen, x, lambda row, peer, one=one: one[peer] / tables.median(row, peer), logarithmic=False)
            second.set_ylabel(f"times as fast as with {chosen[0]['threads']}")
        path = folder / f"cpu-attention-{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        written.append(path)
    return written


def _longest_at_every_number_of_threads(rows: list[tables.Row]) -> list[tables.Row]:
    """The rows of the longest N that was measured with every number of threads, fewest threads first."""
    counts = {row["threads"] for row in rows}
    for length in sorted({row["length"] for row in rows}, reverse=True):
        same = sorted((row for row in rows if row["length"] == length), key=lambda row: row["threads"])
        if {row["threads"] for row in same} == counts:
            return same
    return []


def _lines(axes: Axes, rows: list[tables.Row], x: str, y: Callable[..., Any], logarithmic: bool = True) -> None:
    """One line for the kernel and each peer that every row has, or that the shorter ones have."""
    rows = sorted(rows, key=lambda row: row[x])
    for name in ("mra", *dict.fromkeys(peer for row in rows for peer in tables.peers(row))):
        points = [(row[x], y(row, name)) for row in rows if name in row["timings"]]
        width = 2.5 if name == "mra" else 1.2
        axes.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=tables.NAMES[name])
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    ticks = sorted({row[x] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel({"length": "N", "threads": "threads"}[x])
    axes.grid(alpha=0.3)


GPU_NAMES = {
    "ours": "this kernel",
    "ours tf32x3": "this kernel, tf32x3",
    "flex": "flex_attention, same blocks",
    "authors": "the authors' kernels",
}


def draw_gpu(benchmark: dict[str, Any], folder: Path) -> list[Path]:
    """Writes gpu-attention-<dtype>.svg for each type: microseconds over N of all that was timed, roofline, cost model; by B."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for dtype in dict.fromkeys(row["dtype"] for row in benchmark["rows"]):
        rows = [row for row in benchmark["rows"] if row["dtype"] == dtype and not row["first"]]
        batches = sorted({row["batch"] for row in rows}, reverse=True)
        if not rows or all(sum(row["batch"] == batch for row in rows) < 2 for batch in batches):
            continue
        figure = Figure(figsize=(5.5 * len(batches), 4.5), layout="constrained")
        emulated = ", emulated: not a measurement" if benchmark["emulated"] else ""
        figure.suptitle(f"{benchmark['gpu'] or 'no GPU'}, {dtype}, H 12, D 64, four exact blocks a row{emulated}")
        for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
            own = sorted((row for row in rows if row["batch"] == batch), key=lambda row: row["length"])
            for name in dict.fromkeys(name for row in own for name in row["contestants"]):
                points = [(row["length"], time) for row in own if (time := _microseconds(row["contestants"].get(name))) is not None]
                width = 2.5 if name in ("ours", "ours tf32x3") else 1.2
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=GPU_NAMES.get(name, f"torch {name}"))
            for key, label, style in (("roofline_us", "roofline", "--"), ("expected_us", "cost model", ":")):
                points = [(row["length"], row[key]) for row in own if row[key] is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color="black", label=label)
            _over_lengths(axes, [row["length"] for row in own], f"B {batch}")
        path = folder / f"gpu-attention-{dtype}.svg"
        figure.savefig(path, metadata={"Date": None})
        written.append(path)
    return written


def _microseconds(contestant: dict[str, Any] | None) -> float | None:
    times = contestant["times_us"] if contestant else {}
    found = times.get("graph") or times.get("calls")
    return found["median"] if found else None


def _over_lengths(axes: Axes, lengths: list[int], title: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel="N", ylabel="microseconds", title=title)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


EXPECTED = "gpu-attention-expected.svg"
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def expected_times(gpu: gpu_cost.Gpu) -> str:
    """What the plot of the cost model shows, as text: it stands in the file, so that an old one is found out."""
    shapes = [gpu_cost.Shape(batch, n, n // 8) for batch in (8, 1) for n in _LENGTHS]
    times = [f"{shape.name}: {gpu_cost.expected(shape, 'bfloat16', gpu):.1f} us" for shape in shapes]
    return f"Expected, not measured: {gpu.name}, bfloat16; {'; '.join(times)}"


def draw_expected(folder: Path, gpu: gpu_cost.Gpu = gpu_cost.GPUS["H200"]) -> Path:
    """Writes EXPECTED: the cost model's time over N and what each launch has of it."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    figure.suptitle(f"Expected, not measured: {gpu.name}, bfloat16, H 12, D 64, four exact blocks a row")
    first, second = figure.subplots(1, 2)
    shapes = [gpu_cost.Shape(8, n, n // 8) for n in _LENGTHS]
    for batch in (8, 1):
        times = [gpu_cost.expected(gpu_cost.Shape(batch, n, n // 8), "bfloat16", gpu) for n in _LENGTHS]
        first.plot(_LENGTHS, times, marker="o", label=f"cost model, B {batch}")
    once = [gpu_cost.roofline(shape, "bfloat16", gpu) for shape in shapes]
    first.plot(_LENGTHS, once, "--", color="black", label="once through memory, B 8")
    goals = [(goal.length, goal.goal) for goal in gpu_cost.GOALS if not goal.full]
    first.plot(*zip(*goals, strict=True), "x", color="black", label="goals")
    _over_lengths(first, list(_LENGTHS), "one call")
    below = [0.0] * len(shapes)
    parts: dict[str, list[float]] = {}
    for index, shape in enumerate(shapes):
        for launch in gpu_cost.launches(shape, "bfloat16", gpu):
            parts.setdefault(launch.name, [0.0] * len(shapes))[index] = launch.expected(gpu) / gpu_cost.expected(
                shape, "bfloat16", gpu
            )
    for name, shares in parts.items():
        second.bar([str(n) for n in _LENGTHS], shares, bottom=below, label=name)
        below = [low + share for low, share in zip(below, shares, strict=True)]
    second.set(xlabel="N", title="share of each launch, B 8", ylim=(0, 1))
    second.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    path = folder / EXPECTED
    figure.savefig(path, metadata={"Date": None, "Description": expected_times(gpu)})
    return path


@click.command(help=__doc__)
@click.argument("result", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("folder", required=False, type=click.Path(path_type=Path, file_okay=False))
@click.option("--expected", type=click.Path(path_type=Path, file_okay=False), help="Draw the cost model into this folder.")
def main(result: Path | None, folder: Path | None, expected: Path | None) -> None:
    if expected is not None and result is None:
        paths = [draw_expected(expected)]
    elif result is not None and folder is not None and expected is None:
        results = json.loads(result.read_text())
        gpu = results.get("benchmark") or results
        paths = draw_gpu(gpu, folder) if "rows" in gpu else draw(results, folder)
    else:
        raise click.UsageError("Pass RESULT and FOLDER, or --expected FOLDER.")
    for path in paths:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
