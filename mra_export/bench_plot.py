"""A benchmark as a picture. matplotlib is optional: it is looked for when a plot is asked for."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path

from mra_export.bench import BenchReport
from mra_export.errors import ContractError, MissingPackageError

FORMATS = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Raises ContractError for a file that is neither .png nor .svg, MissingPackageError without matplotlib."""
    if path.suffix not in FORMATS:
        raise ContractError(f"{path} is no file to plot into: name it .png or .svg")
    if find_spec("matplotlib") is None:
        raise MissingPackageError("plots need matplotlib, which is not installed: pip install matplotlib, or leave --plot out")


def draw(report: BenchReport, suffix: str) -> bytes:
    """Latency (line: the median; band: the fastest call to the 95th percentile) and tokens per second over the length.

    suffix: of FORMATS. Returns the file's content. Raises as `check_plot`.
    """
    check_plot(Path("plot" + suffix))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    lines = dict.fromkeys((row.backend, row.batch) for row in report.measurements)
    for backend, batch in lines:
        rows = sorted(
            (row for row in report.measurements if (row.backend, row.batch) == (backend, batch)), key=lambda row: row.length
        )
        lengths = [row.length for row in rows]
        label = f"{backend}, batch {batch}"
        (line,) = latency.plot(lengths, [row.p50_ms for row in rows], marker="o", label=label)
        highest = [row.p50_ms if row.p95_ms is None else row.p95_ms for row in rows]
        latency.fill_between(lengths, [row.min_ms for row in rows], highest, color=line.get_color(), alpha=0.2, linewidth=0)
        throughput.plot(lengths, [row.tokens_per_second for row in rows], marker="o", label=label)
    ticks = sorted({row.length for row in report.measurements})
    for axes, name in ((latency, "milliseconds of a call"), (throughput, "tokens per second")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("length")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    latency.legend()
    manifest = report.bundle.manifest
    figure.suptitle(f"{manifest.model.architecture}, {manifest.dtype}, {report.machine['model']}")
    content = io.BytesIO()
    figure.savefig(content, format=suffix.removeprefix("."), dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
    return content.getvalue()
