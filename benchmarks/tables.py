"""Turns the results of cpu_attention.py and serve_load.py into markdown tables, so that no figure in the docs is typed by hand.

    python benchmarks/tables.py benchmarks/results/cpu-attention.json --table peers

    python benchmarks/tables.py --update docs/kernels.md

In a page, a table stands between two comments, the first of which says where it comes from; --update renders it again:

    <!-- benchmarks/results/cpu-attention.json peers -->

    <!-- end -->

Tables of the CUDA kernels' cost model are marked by benchmarks/gpu_cost.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import gpu_compiled
import gpu_cost

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "mra": "this kernel",
    "sdpa": "torch SDPA",
    "ort_mha": "ONNX Runtime MultiHeadAttention",
    "flex": "torch flex_attention, same blocks",
    "reference": "torch reference",
    "reference_compiled": "torch reference, compiled",
    "matmul": "large matrix product",
}
SERVERS = {
    "serve": "`mra-export serve`, text",
    "naive": "naive, text",
    "serve-v2": "`mra-export serve`, protocol v2",
    "triton": "Triton, python backend, protocol v2",
    "ray": "Ray Serve, protocol v2",
}
_MARKED = re.compile(r"(<!-- (benchmarks/results/\S+\.json) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]
Results = dict[str, Any]


def median(row: Row, name: str = "mra") -> float:
    """Milliseconds."""
    return float(row["timings"][name]["median"])


def gflops(row: Row) -> float:
    """Of the exact blocks' products alone, over the kernel's whole time."""
    return float(row["exact_gflop"]) / median(row) * 1e3


def share_of_matmul(row: Row) -> float:
    return gflops(row) / (row["matmul_gflop"] / median(row, "matmul") * 1e3)


def speedup(row: Row, peer: str) -> float:
    return median(row, peer) / median(row)


def peers(row: Row) -> list[str]:
    return [name for name in NAMES if name in row["timings"] and name not in ("mra", "matmul")]


def line(row: Row) -> str:
    """One row for a terminal."""
    parts = [f"N {row['length']} {row['dtype']} {row['threads']} threads: {_spread(row, 'mra')} ms"]
    parts.append(f"{gflops(row):.0f} GFLOP/s, {share_of_matmul(row):.0%} of a matrix product, error {row['max_error']:.1e}")
    parts += [f"{peer} {_spread(row, peer)} ms, {speedup(row, peer):.1f}x" for peer in peers(row)]
    parts += [f"{peer} left out: {reason}" for peer, reason in row["left_out"].items()]
    return "; ".join(parts)


def peers_table(results: Results) -> str:
    """Everything side by side: milliseconds (quartiles), and how many times as long a peer takes."""
    rows = results["results"]
    found = [name for name in NAMES if any(name in peers(row) for row in rows)]
    header = ["N", "dtype", "threads", f"{NAMES['mra']}, ms", "GFLOP/s", "of a matrix product", *(NAMES[name] for name in found)]
    lines = []
    for row in rows:
        cells = [str(row["length"]), row["dtype"], str(row["threads"]), _spread(row, "mra")]
        cells += [f"{gflops(row):.0f}", f"{share_of_matmul(row):.0%}"]
        cells += [f"{_spread(row, name)}, {speedup(row, name):.1f}x" if name in row["timings"] else "-" for name in found]
        lines.append(cells)
    reasons = {(peer, reason) for row in rows for peer, reason in row["left_out"].items()}
    notes = [f"{NAMES[peer]} is left out where: {reason}." for peer, reason in sorted(reasons)]
    return _table(header, lines) + "".join(f"\n{note}" for note in ["", *notes] if notes)


def lengths_table(results: Results) -> str:
    """Time per token, relative to N = 1024 (or the shortest above it that was measured)."""
    lines = []
    for (dtype, threads), rows in _groups(results, "dtype", "threads").items():
        base = next((row for row in rows if row["length"] >= 1024), rows[0])
        unit = median(base) / base["length"]
        for row in rows:
            per_token = median(row) / row["length"]
            relative = f"{per_token / unit:.2f} of N = {base['length']}"
            lines.append([str(row["length"]), dtype, str(threads), f"{per_token * 1e3:.2f}", relative])
    return _table(["N", "dtype", "threads", "us a token", "relative"], lines)


def dtypes_table(results: Results) -> str:
    """Each type's time beside float32's."""
    lines = []
    for (length, threads), rows in _groups(results, "length", "threads").items():
        base = next((row for row in rows if row["dtype"] == "float32"), None)
        for row in rows:
            ratio = f"{median(row) / median(base):.2f}" if base else "-"
            lines.append([str(length), str(threads), row["dtype"], _spread(row, "mra"), ratio, f"{row['max_error']:.1e}"])
    return _table(["N", "threads", "dtype", "ms", "of float32", "largest error"], lines)


def threads_table(results: Results) -> str:
    """Each number of threads beside the smallest, and beside torch's dense attention on as many."""
    lines = []
    for (length, dtype), rows in _groups(results, "length", "dtype").items():
        for row in rows:
            dense = f"{speedup(row, 'sdpa'):.1f}x" if "sdpa" in row["timings"] else "-"
            faster = f"{median(rows[0]) / median(row):.2f}x"
            lines.append([str(length), dtype, str(row["threads"]), _spread(row, "mra"), faster, dense])
    return _table(["N", "dtype", "threads", "ms", "scaling", "torch SDPA takes"], lines)


def machine_line(results: Results) -> str:
    """What the figures were measured on."""
    about = results["machine"]
    shapes = ", ".join(dict.fromkeys(row["shape"] for row in results["results"]))
    packages = ", ".join(f"{name} {about[name]}" for name in ("torch", "onnxruntime") if name in about)
    return (
        f"{about['cpu']}, {about['instruction_set']}; batch {about['batch']}, {about['heads']} heads of {about['head_size']}, "
        f"{shapes}; {packages}; commit {about['commit']}. Medians (quartiles)."
    )


def load_table(results: Results) -> str:
    """Each server at the highest rate at which it met the limit."""
    lines = []
    for name, server in results["servers"].items():
        best = server["best"]
        if best is None:
            slowest = min(server["runs"], key=lambda run: float(run["rate"]))
            lines.append([SERVERS[name], f"none met the limit: p99 {slowest['p99_ms']:.0f} ms at {slowest['rate']:.0f}", *[""] * 6])
            continue
        calls = sum(best["batches"].values())
        times = results.get("times_the_naive_throughput", {}).get(name)
        cells = [SERVERS[name], f"{best['throughput']:.0f}", *(f"{best[key]:.0f}" for key in ("p50_ms", "p95_ms", "p99_ms"))]
        cells += [f"{best['answered'] / calls:.2f}" if calls else "-", f"{times:.2f}" if times else "-"]
        lines.append([*cells, f"{server['closed_loop']:.0f}" if "closed_loop" in server else "-"])
    header = [
        "server",
        "requests/s",
        "p50, ms",
        "p95",
        "p99",
        "requests a call",
        "times the naive",
        "16 callers at once, requests/s",
    ]
    return _table(header, lines)


def load_line(results: Results) -> str:
    """The HTTP server beside the naive one."""
    serve, naive = (results["servers"][name]["best"] for name in ("serve", "naive"))
    closed = " and ".join(f"{results['servers'][name]['closed_loop']:.0f}" for name in ("serve", "naive"))
    times = results["times_the_naive_throughput"]["serve"]
    rates = f"{serve['throughput']:.0f} requests/s beside {naive['throughput']:.0f}, {times:.2f} times as many"
    tails = f"p99 {serve['p99_ms']:.0f} and {naive['p99_ms']:.0f} ms"
    return f"- {rates} ({tails}; {closed} with 16 callers at once; commit {results['machine']['commit']})"


def overload_line(results: Results) -> str:
    """What the HTTP server did with more than it can do."""
    run = results["servers"]["serve"]["overload"]
    refused = ", ".join(f"{count} refused as {kind}" for kind, count in run["errors"].items()) or "none refused"
    return (
        f"Of {run['sent']} requests at {run['rate']:.0f}/s {run['answered']} were answered, {run['throughput']:.0f}/s, {refused}."
    )


def load_machine_line(results: Results) -> str:
    """What the servers were measured on and asked."""
    about, lengths = results["machine"], results["lengths"]
    return (
        f"{about['cpu']}, {about['cores']} cores, which the client shares; {lengths['mean']:.0f} tokens on average, half up to "
        f"{lengths['median']:.0f}, the longest {lengths['longest']}; p99 at most {results['limit_ms']:.0f} ms in runs of "
        f"{results['seconds']:g} s; onnxruntime {about['onnxruntime']}; commit {about['commit']}."
    )


def soak_line(results: Results) -> str:
    """What a server held after so many requests."""
    soak = results["soak"]
    leaked = ", ".join(f"{count:+d} {name.replace('_', ' ')}" for name, count in soak["leaked"].items())
    errors = ", ".join(f"{count} {kind}" for kind, count in soak["errors"].items()) or "no error"
    return f"{soak['requests']:,} requests in {soak['seconds']:.0f} s: {errors}, memory at most {soak['growth']:+.2%}, {leaked}."


TABLES: dict[str, Callable[[Results], str]] = {
    **gpu_compiled.TABLES,
    "machine": machine_line,
    "peers": peers_table,
    "lengths": lengths_table,
    "dtypes": dtypes_table,
    "threads": threads_table,
    "load": load_table,
    "load_line": load_line,
    "load_machine": load_machine_line,
    "overload": overload_line,
    "soak": soak_line,
}


def markdown(results: Results) -> str:
    """Every table that these results have something to say in."""
    if "servers" in results:
        return "\n\n".join(TABLES[name](results) for name in ("load", "load_machine"))
    if "soak" in results:
        return soak_line(results)
    names = ["machine", "peers"]
    names += [f"{axis}s" for axis in ("length", "dtype") if len({row[axis] for row in results["results"]}) > 1]
    names += ["threads"] if len({row["threads"] for row in results["results"]}) > 1 else []
    return "\n\n".join(TABLES[name](results) for name in names)


_MODELLED = re.compile(r"(<!-- benchmarks/gpu_cost\.py (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(page: str, root: Path = ROOT) -> str:
    """The page with every marked table rendered from its results, and those of the cost model from the model."""

    def render(match: re.Match[str]) -> str:
        results = json.loads((root / match[2]).read_text())
        return f"{match[1]}\n{TABLES[match[3]](results)}\n\n{match[4]}"

    def render_model(match: re.Match[str]) -> str:
        return f"{match[1]}\n{gpu_cost.TABLES[match[2]]()}\n\n{match[3]}"

    return _MODELLED.sub(render_model, _MARKED.sub(render, page))


def _groups(results: Results, *axes: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by these axes, in the order of the others: lengths and threads ascending."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(results["results"], key=lambda row: (row["length"], row["threads"])):
        groups.setdefault(tuple(row[axis] for axis in axes), []).append(row)
    return groups


def _spread(row: Row, name: str) -> str:
    timing = row["timings"][name]
    digits = 2 if timing["median"] < 10 else 1 if timing["median"] < 100 else 0
    numbers = (f"{timing[key]:.{digits}f}" for key in ("median", "lower_quartile", "upper_quartile"))
    return "{} ({}-{})".format(*numbers)


def _table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


@click.command(help=__doc__)
@click.argument("result", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--table", type=click.Choice(tuple(TABLES)), help="One of them; default every one.")
@click.option("--update", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A page to render the tables of.")
def main(result: Path | None, table: str | None, update: Path | None) -> None:
    if (result is None) == (update is None):
        raise click.UsageError("Pass a result or --update PAGE, one of them.")
    if update is not None:
        update.write_text(updated(update.read_text()))
    elif result is not None:
        results = json.loads(result.read_text())
        print(TABLES[table](results) if table else markdown(results))


if __name__ == "__main__":
    main()
