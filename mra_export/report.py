"""A parity report: as a table, as JSON, as JUnit."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mra_export.bundle import Bundle
from mra_export.parity import FAIL, PASS, SKIP, Row, passed

if TYPE_CHECKING:
    from rich.console import Group

_CHECKS = ("golden", "outputs", "selection", "operator", "canary", "padding", "accuracy", "polygraphy")


@dataclass(frozen=True)
class Report:
    """rows: every comparison. seconds: how long it took."""

    bundle: Bundle
    rows: list[Row]
    seconds: float

    @property
    def passed(self) -> bool:
        """No row failed and at least one was compared."""
        return passed(self.rows)

    @property
    def failed_rows(self) -> list[Row]:
        return [row for row in self.rows if row.status == FAIL]

    def as_dict(self) -> dict[str, Any]:
        manifest = self.bundle.manifest
        return {
            "bundle": str(self.bundle.path),
            "passed": self.passed,
            "model": manifest.model.model_dump(),
            "task": manifest.task,
            "dtype": manifest.dtype,
            "padding_invariant": manifest.padding_invariant,
            "seconds": round(self.seconds, 2),
            "machine": {"processor": platform.machine(), "system": platform.platform(), "cpus": os.cpu_count()},
            "versions": versions(),
            "rows": [row.as_dict() for row in self.rows],
        }

    def summary(self) -> list[dict[str, Any]]:
        """One line for each runtime and check: the worst of its rows."""
        lines = []
        for backend in dict.fromkeys(row.backend for row in self.rows):
            for check in _CHECKS:
                rows = [row for row in self.rows if (row.backend, row.check) == (backend, check)]
                if rows:
                    lines.append(_summarise(backend, check, rows))
        return lines

    def table(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        manifest = self.bundle.manifest
        title = f"{manifest.model.architecture}, {manifest.task}, {manifest.dtype}: distance from PyTorch in float32"
        table = Table(highlight=False)
        for name in (
            "runtime",
            "check",
            "cases",
            "max abs",
            "p99.9 abs",
            "max rel",
            "cosine",
            "argmax",
            "needs",
            "allowed",
            "result",
        ):
            table.add_column(name, justify="left" if name in ("runtime", "check", "result") else "right", no_wrap=name != "result")
        colours = {PASS: "green", FAIL: "bold red", SKIP: "yellow"}
        previous = None
        for line in self.summary():
            if previous not in (None, line["backend"]):
                table.add_section()
            shown = [line["backend"] if line["backend"] != previous else "", line["check"], str(line["cases"])]
            shown += [_shown(line[key], text) for key, text in _COLUMNS]
            result = line["status"] + (f": {line['reason']}" if line["reason"] else "")
            table.add_row(*shown, Text(result, style=colours[line["status"]]))
            previous = line["backend"]
        return Group(Text(title, style="bold"), table)

    def json(self) -> str:
        return json.dumps(self.as_dict(), indent=1) + "\n"

    def junit(self) -> str:
        """One test case per row, one suite per runtime."""
        root = ElementTree.Element("testsuites", name=f"mra-export verify {self.bundle.path.name}", time=f"{self.seconds:.2f}")
        for backend in dict.fromkeys(row.backend for row in self.rows):
            rows = [row for row in self.rows if row.backend == backend]
            counts = {status: sum(row.status == status for row in rows) for status in (FAIL, SKIP)}
            suite = ElementTree.SubElement(
                root,
                "testsuite",
                name=backend,
                tests=str(len(rows)),
                failures=str(counts[FAIL]),
                skipped=str(counts[SKIP]),
                errors="0",
            )
            for row in rows:
                name = ": ".join(part for part in (row.check, row.case, row.output) if part)
                case = ElementTree.SubElement(suite, "testcase", classname=f"{backend}.{row.dtype}", name=name)
                if row.status == FAIL:
                    ElementTree.SubElement(case, "failure", message=row.reason).text = json.dumps(row.as_dict())
                elif row.status == SKIP:
                    ElementTree.SubElement(case, "skipped", message=row.reason)
        ElementTree.indent(root)
        return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def write_atomically(path: Path, content: str | bytes) -> None:
    """A reader sees the old file or the whole new one. Text is written as UTF-8. Raises OSError."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content if isinstance(content, bytes) else content.encode())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def versions() -> dict[str, str]:
    """Installed versions of what takes part."""
    found = {"python": platform.python_version()}
    for name in (
        "mra-export",
        "torch",
        "onnx",
        "onnxruntime",
        "onnxruntime-gpu",
        "tensorrt",
        "tensorrt-rtx-cu13",
        "polygraphy",
        "transformers",
        "numpy",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


_COLUMNS: tuple[tuple[str, str], ...] = (
    ("max_abs", ".1e"),
    ("p999_abs", ".1e"),
    ("max_rel", ".1e"),
    ("cosine", ".6f"),
    ("argmax", ".1%"),
    ("needs", ".1e"),
    ("allowed", ".0e"),
)


def _shown(value: float | None, text: str) -> str:
    return "" if value is None else format(value, text)


def _summarise(backend: str, check: str, rows: list[Row]) -> dict[str, Any]:
    failed = [row for row in rows if row.status == FAIL]
    skipped = [row for row in rows if row.status == SKIP]
    compared = [row for row in rows if row.status != SKIP]
    found = [row.difference for row in compared if row.difference is not None]

    def worst(of: Callable[[Iterable[float]], float], name: str) -> float | None:
        return of(getattr(difference, name) for difference in found) if found else None

    line: dict[str, Any] = {
        "backend": backend,
        "check": check,
        "cases": len({row.case for row in compared}),
        "max_abs": worst(max, "max_abs"),
        "p999_abs": worst(max, "p999_abs"),
        "max_rel": worst(max, "max_rel"),
        "cosine": worst(min, "cosine"),
        "argmax": worst(min, "argmax_agreement"),
        "needs": max((row.needed for row in compared if row.needed is not None), default=None),
        "allowed": next((row.tolerance for row in compared if row.tolerance is not None), None),
        "status": FAIL if failed else PASS if compared else SKIP,
        "reason": "",
    }
    if check == "selection" and compared and all(row.detail for row in compared):
        differing = sum(row.detail["differing"] for row in compared)
        line["reason"] = (
            f"lowest overlap of a layer {min(row.detail['overlap'] for row in compared):.2%}, {differing} near-ties differ"
        )
    if check == "accuracy":
        line["reason"] = rows[0].reason
    elif failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        line["reason"] = f"{failed[0].case}: {failed[0].reason}{more}"
    elif skipped:
        left_out = skipped[0].reason
        measured = [row for row in compared if row.difference is not None]
        if measured:
            largest = max(measured, key=lambda row: row.difference.elements if row.difference else 0)
            left_out = f"{len(skipped)} left out, the largest that ran is {largest.case}: {left_out}"
        line["reason"] = "; ".join(part for part in (line["reason"], left_out) if part)
    return line
