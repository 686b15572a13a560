"""The results of gpu_check.py as a page of Markdown. Dictionaries in, text out; standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gpu_cost

_HOW = """Microseconds per call, median (quartiles). H 12, D 64, no padding. *graph*: one captured CUDA graph of calls on rotating
inputs, together larger than twice the L2 cache. *one*: a graph for each call. *calls*: plain calls from Python one after another.
Dense attention is torch's scaled_dot_product_attention; *best dense* is the fastest of its implementations that ran here. *flex*:
torch's flex_attention on the blocks that the kernel chose, without choosing them and without the low-resolution part. *roofline*:
each tensor moved once at this GPU's copy rate, or the exact blocks' products at its matrix rate, whichever takes longer, over our
time. *expected*: the cost model's time (docs/kernels-cuda.md), where it has this GPU's rates.
"""
GOAL_GPU, GOAL_DTYPE = "H200", "bfloat16"
AUTHORS_GOAL = 30.0


def markdown(result: Mapping[str, Any]) -> str:
    """result: what gpu_check.py writes as JSON."""
    machine = result["machine"]
    parts = [f"# GPU check: {machine['gpu']}, {result['date']}\n"]
    parts.append(_table(("", ""), ((name.replace("_", " "), _text(value)) for name, value in machine.items())))
    parts.append("## Steps\n")
    steps = [(step["title"], step["status"], f"{step['seconds']:.1f}", step["detail"]) for step in result["steps"]]
    parts.append(_table(("step", "result", "s", ""), steps))
    benchmark = result.get("benchmark")
    if benchmark:
        parts.append(_benchmark(benchmark))
    else:
        parts.append("## Times\n\nNot measured in this run.\n")
    if result.get("models"):
        parts.append(_models(result["models"]))
    return "\n".join(parts)


def _benchmark(benchmark: Mapping[str, Any]) -> str:
    parts = ["## Times\n", _HOW]
    ceilings = benchmark["ceilings"]
    if ceilings:
        rates = ", ".join(f"{dtype} product {rate / 1e6:.0f} TFLOP/s" for dtype, rate in ceilings["flops_per_us"].items())
        parts.append(f"Measured in this run: copy {ceilings['bytes_per_us'] / 1e6:.2f} TB/s, {rates}.\n")
    rows = benchmark["rows"]
    parts.append("### Goals\n")
    parts.append(_table(("", "goal", "measured", ""), goals(rows, str(benchmark.get("gpu")))))
    authors = {_key(row): row["contestants"]["authors"] for row in rows if "authors" in row["contestants"]}
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype]
        parts.append(f"### {dtype}\n")
        head = ["blocks as", "B", "N", "K", "graph", "one", "calls", "tf32x3, graph", "roofline", "expected"]
        head += ["torch's choice", "best dense", "", "flex", "", "authors (float32)", ""]
        parts.append(_table(head, (_row(row, authors.get(_key(row))) for row in own)))
    launches = [line for row in rows for line in _launches(row)]
    if launches:
        parts.append("### Launches\n")
        parts.append("Medians of the profiler's times, beside what the cost model expects and what it holds to decide.\n")
        parts.append(_table(("shape", "dtype", "kernel", "launch", "measured", "expected", "bound by"), launches))
    left_out = [*_left_out(rows), *benchmark.get("skipped", ())]
    if left_out:
        parts.append("Left out:\n")
        parts.append("\n".join(f"- {text}" for text in left_out) + "\n")
    return "\n".join(parts)


def _models(models: Mapping[str, Any]) -> str:
    parts = ["## Whole models\n"]
    layers = f" {models['layers']} layers." if models.get("layers") else ""
    parts.append(
        "Milliseconds of one call, median (quartiles), ids in and hidden states out on the GPU, random weights, no padding."
        f"{layers} *graph*: captured by this script; the peers named so capture by themselves. Last column: how many times as long "
        "the fastest dense RoBERTa takes.\n"
    )
    rows = []
    for row in models["rows"]:
        shown = [
            _time({"times_us": {kind: _thousandth(t) for kind, t in row["times_us"].items()}}, kind) for kind in ("calls", "graph")
        ]
        throughput = f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else "-"
        shape = (row["preset"], str(row["batch"]), str(row["length"]), row["dtype"], row["peer"])
        if not row["left_out"]:
            rows.append((*shape, *shown, throughput, _or_dash(row["vs_dense"], "{:.2f}x")))
    parts.append(_table(("model", "B", "N", "dtype", "", "calls", "graph", "tokens/s", ""), rows))
    reasons = dict.fromkeys((row["peer"], row["dtype"], row["left_out"]) for row in models["rows"] if row["left_out"])
    if reasons:
        parts.append("Left out:\n")
        parts.append("\n".join(f"- {peer}, {dtype}: {reason}" for peer, dtype, reason in reasons) + "\n")
    return "\n".join(parts)


def _thousandth(timing: Mapping[str, Any]) -> dict[str, float]:
    return {name: timing[name] / 1e3 for name in ("median", "lower_quartile", "upper_quartile")}


def goals(rows: Sequence[Mapping[str, Any]], gpu: str) -> list[tuple[str, str, str, str]]:
    """What is asked for, how much of it, what was measured, and "met", "missed" or why it is not judged."""
    found = []
    timed = [row for row in rows if row["dtype"] == GOAL_DTYPE]
    elsewhere = "" if GOAL_GPU in gpu else f"not judged: this is not an {GOAL_GPU}"
    for row in timed:
        if row["goal"] is not None:
            ours = row["contestants"]["ours"]
            time = _median(ours, "one" if row["batch"] == 1 else "graph")
            what = f"{_shape(row)}, {'graph of one call' if row['batch'] == 1 else 'graph'}"
            found.append(
                (what, f"{row['goal']:g} us", _or_dash(time, "{:.1f} us"), elsewhere or _met(time, row["goal"], least=False))
            )
    for row in timed:
        wanted = gpu_cost.DENSE_GOALS.get(row["length"]) if row["batch"] == 8 and row["model"] == "base-512-4" else None
        if wanted is not None:
            ratio = _ratio(_best(_best_dense(row)), _best(row["contestants"]["ours"]))
            found.append(
                (f"{_shape(row)}, best dense takes", f"{wanted:g}x", _or_dash(ratio, "{:.1f}x"), elsewhere or _met(ratio, wanted))
            )
    for row in rows:
        authors = _best(row["contestants"].get("authors"))
        if authors is not None and row["batch"] == 8:
            ratio = _ratio(authors, _best(row["contestants"]["ours"]))
            what = f"{_shape(row)}, float32, the authors' kernels take"
            found.append((what, f"{AUTHORS_GOAL:g}x", _or_dash(ratio, "{:.1f}x"), elsewhere or _met(ratio, AUTHORS_GOAL)))
    return found


def _shape(row: Mapping[str, Any]) -> str:
    return f"{row['model']}, B {row['batch']}, N {row['length']}"


def _met(measured: float | None, wanted: float, least: bool = True) -> str:
    if measured is None:
        return "not measured"
    return "met" if (measured >= wanted if least else measured <= wanted) else "missed"


def _ratio(other: float | None, mine: float | None) -> float | None:
    return other / mine if other and mine else None


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _launches(row: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for launch in row.get("launches", ()):
        expected = _or_dash(launch.get("expected_us"), "{:.1f}")
        kernel = f"{launch['contestant']}: {launch['kernel']}"
        measured = f"{launch['measured_us']:.1f}"
        yield _shape(row), row["dtype"], kernel, launch.get("launch", "-"), measured, expected, launch.get("bound", "-")


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["batch"], row["length"]


def _row(row: Mapping[str, Any], authors: Mapping[str, Any] | None) -> tuple[str, ...]:
    ours = row["contestants"]["ours"]
    mine = _best(ours)
    best = _best_dense(row)
    share = f"{row['roofline_us'] / mine:.0%}" if row["roofline_us"] and mine else "-"
    torchs, flex = row["contestants"].get("sdpa"), row["contestants"].get("flex")
    return (
        row["model"],
        str(row["batch"]),
        str(row["length"]),
        str(row["num_blocks"]),
        _time(ours, "graph"),
        _time(ours, "one"),
        _time(ours, "calls"),
        _time(row["contestants"].get("ours tf32x3")),
        share,
        _or_dash(row.get("expected_us"), "{:.1f}"),
        f"{_time(torchs)} ({_implementation(torchs)})" if torchs else "-",
        f"{_time(best)} ({_implementation(best)})" if best else "-",
        _times_faster(best, mine),
        _time(flex),
        _times_faster(flex, mine),
        _time(authors) if authors else "-",
        _times_faster(authors, mine),
    )


def _best_dense(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The fastest dense attention that ran."""
    dense = [c for name, c in row["contestants"].items() if name.startswith("sdpa") and _best(c) is not None]
    return min(dense, key=lambda contestant: _best(contestant) or 0.0, default=None)


def _median(contestant: Mapping[str, Any] | None, kind: str) -> float | None:
    """Microseconds."""
    found = contestant["times_us"].get(kind) if contestant else None
    return float(found["median"]) if found else None


def _best(contestant: Mapping[str, Any] | None) -> float | None:
    """Median microseconds: of the graph, or of plain calls where there is none."""
    graph = _median(contestant, "graph")
    return _median(contestant, "calls") if graph is None else graph


def _time(contestant: Mapping[str, Any] | None, kind: str = "") -> str:
    times = contestant["times_us"] if contestant else {}
    found = times.get(kind) if kind else times.get("graph") or times.get("calls")
    if not found:
        return "-"
    return f"{_number(found['median'])} ({_number(found['lower_quartile'])}-{_number(found['upper_quartile'])})"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _implementation(contestant: Mapping[str, Any]) -> str:
    return str(contestant["how"]).split(",")[0].removeprefix("torch chose ")


def _times_faster(other: Mapping[str, Any] | None, mine: float | None) -> str:
    theirs = _best(other)
    return f"{theirs / mine:.1f}x" if theirs and mine else "-"


def _left_out(rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Who has no times, and why; the same reason once, with how often."""
    seen: dict[tuple[str, str, str], int] = {}
    for row in rows:
        for name, contestant in row["contestants"].items():
            if contestant["left_out"]:
                key = (name, row["dtype"], contestant["left_out"])
                seen[key] = seen.get(key, 0) + 1
    for (name, dtype, reason), count in seen.items():
        yield f"{name}, {dtype}{f' ({count} shapes)' if count > 1 else ''}: {reason}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    return "not known" if value is None else str(value)
