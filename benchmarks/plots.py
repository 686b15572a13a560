"""Draws the results of cpu_attention.py: time over the length, and over the number of threads.

python benchmarks/plots.py benchmarks/results/cpu-attention.json docs/images
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
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


@click.command(help=__doc__)
@click.argument("result", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(result: Path, folder: Path) -> None:
    for path in draw(json.loads(result.read_text()), folder):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
