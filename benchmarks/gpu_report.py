"""The results of gpu_check.py as a page of Markdown. Dictionaries in, text out; standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_HOW = """Microseconds per call, median (quartiles). H 12, D 64, no padding. *graph*: one captured CUDA graph of calls on rotating
inputs, together larger than twice the L2 cache. *calls*: plain calls from Python one after another. Dense attention is torch's
scaled_dot_product_attention; *best dense* is the fastest of its implementations that ran here. *roofline*: each tensor moved once
at this GPU's copy rate, or the exact blocks' products at its matrix rate, whichever takes longer, over our time.
"""


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
    return "\n".join(parts)


def _benchmark(benchmark: Mapping[str, Any]) -> str:
    parts = ["## Times\n"]
    parts.append(_HOW)
    ceilings = benchmark["ceilings"]
    if ceilings:
        rates = ", ".join(f"{dtype} product {rate / 1e6:.0f} TFLOP/s" for dtype, rate in ceilings["flops_per_us"].items())
        parts.append(f"Measured in this run: copy {ceilings['bytes_per_us'] / 1e6:.2f} TB/s, {rates}.\n")
    authors = {_key(row): row["contestants"]["authors"] for row in benchmark["rows"] if "authors" in row["contestants"]}
    for dtype in dict.fromkeys(row["dtype"] for row in benchmark["rows"]):
        rows = [row for row in benchmark["rows"] if row["dtype"] == dtype]
        parts.append(f"### {dtype}\n")
        head = (
            "blocks as",
            "B",
            "N",
            "K",
            "ours, graph",
            "ours, calls",
            "goal, H200",
            "roofline",
            "torch's choice",
            "best dense",
            "",
        )
        parts.append(_table((*head, "authors (float32)", ""), (_row(row, authors.get(_key(row))) for row in rows)))
    left_out = list(_left_out(benchmark["rows"]))
    if left_out:
        parts.append("Left out:\n")
        parts.append("\n".join(f"- {text}" for text in left_out) + "\n")
    return "\n".join(parts)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["batch"], row["length"]


def _row(row: Mapping[str, Any], authors: Mapping[str, Any] | None) -> tuple[str, ...]:
    ours = row["contestants"]["ours"]
    mine = _best(ours)
    dense = {name: c for name, c in row["contestants"].items() if name.startswith("sdpa") and _best(c) is not None}
    name = min(dense, key=lambda name: _best(dense[name]) or 0.0, default=None)
    best = dense[name] if name is not None else None
    goal = f"{row['goal']:g}" if row["goal"] is not None and row["dtype"] == "bfloat16" else ""
    share = f"{row['roofline_us'] / mine:.0%}" if row["roofline_us"] and mine else "-"
    torchs = row["contestants"].get("sdpa")
    return (
        row["model"],
        str(row["batch"]),
        str(row["length"]),
        str(row["num_blocks"]),
        _time(ours, "graph"),
        _time(ours, "calls"),
        goal,
        share,
        f"{_time(torchs)} ({_implementation(torchs)})" if torchs else "-",
        f"{_time(best)} ({_implementation(best)})" if best else "-",
        _times_faster(best, mine),
        _time(authors) if authors else "-",
        _times_faster(authors, mine),
    )


def _best(contestant: Mapping[str, Any] | None) -> float | None:
    """Median microseconds: of the graph, or of plain calls where there is none."""
    times = contestant["times_us"] if contestant else {}
    chosen = times.get("graph") or times.get("calls")
    return float(chosen["median"]) if chosen else None


def _time(contestant: Mapping[str, Any] | None, kind: str = "") -> str:
    times = contestant["times_us"] if contestant else {}
    found = times.get(kind) if kind else times.get("graph") or times.get("calls")
    if not found:
        return "-"
    return f"{_number(found['median'])} ({_number(found['lower_quartile'])}-{_number(found['upper_quartile'])})"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


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
