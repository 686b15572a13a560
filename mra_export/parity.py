"""How far one runtime's arrays are from the reference's: arrays in, report rows out. numpy only.

A row is judged by one number, the smallest t for which |actual - expected| <= t + t * |expected| holds everywhere; the rest of
the row is there to read. NaN and Inf never pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

PASS, FAIL, SKIP = "pass", "fail", "skip"


@dataclass(frozen=True)
class Difference:
    """What `measure` found. Relative errors are |actual - expected| / |expected| where expected is not 0.

    argmax_agreement: share of positions whose largest entry on the last axis is the same, 1.0 = all.
    smallest_tolerance: the smallest t with |actual - expected| <= t + t * |expected| everywhere.
    """

    elements: int
    nan: int
    inf: int
    max_abs: float
    p999_abs: float
    max_rel: float
    p999_rel: float
    cosine: float
    argmax_agreement: float
    smallest_tolerance: float


@dataclass(frozen=True)
class Row:
    """One line of a parity report.

    check: what was compared ("outputs", "golden", "operator", "selection", "canary", "padding").
    case: the input, in words. status: "pass", "fail" or "skip", with the reason beside it.
    """

    check: str
    backend: str
    dtype: str
    case: str
    output: str
    status: str
    reason: str
    tolerance: float | None = None
    difference: Difference | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Flat and JSON-ready: the difference's fields stand beside the row's own; what is not finite becomes null."""
        flat = {name: value for name, value in asdict(self).items() if name not in ("difference", "detail")}
        flat.update(asdict(self.difference) if self.difference is not None else {})
        flat.update(self.detail)
        return {name: _json_number(value) for name, value in flat.items()}


def measure(actual: npt.ArrayLike, expected: npt.ArrayLike, keep: npt.NDArray[np.bool_] | None = None) -> Difference:
    """Compare two arrays of one shape, in float64.

    keep: bool, its shape the leading axes of the arrays': only these positions count (real tokens). NaN and Inf are counted
    everywhere, also at positions that are not kept. Raises ValueError where the shapes differ or nothing is kept.
    """
    a = np.asarray(actual).astype(np.float64)
    b = np.asarray(expected).astype(np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shape {a.shape}, expected {b.shape}")
    if keep is None:
        keep = np.ones(b.shape[: max(b.ndim - 1, 1)], dtype=bool)
    if keep.shape != b.shape[: keep.ndim]:
        raise ValueError(f"keep has shape {keep.shape}: it must be the leading axes of {b.shape}")
    nan = int(np.isnan(a).sum() + np.isnan(b).sum())
    inf = int(np.isinf(a).sum() + np.isinf(b).sum())
    x, y = a[keep].reshape(-1), b[keep].reshape(-1)
    if not x.size:
        raise ValueError("nothing to compare: no position is kept")
    if nan or inf:
        worst = float("inf")
        return Difference(x.size, nan, inf, worst, worst, worst, worst, float("nan"), 0.0, worst)
    error = np.abs(x - y)
    size = np.abs(y)
    relative = error[size > 0] / size[size > 0] if (size > 0).any() else np.zeros(1)
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return Difference(
        elements=x.size,
        nan=0,
        inf=0,
        max_abs=float(error.max()),
        p999_abs=float(np.percentile(error, 99.9)),
        max_rel=float(relative.max()),
        p999_rel=float(np.percentile(relative, 99.9)),
        cosine=float(x @ y) / norms if norms else float(not error.any()),
        argmax_agreement=_argmax_agreement(a, b, keep),
        smallest_tolerance=float((error / (1.0 + size)).max()),
    )


def judge(
    check: str,
    backend: str,
    dtype: str,
    case: str,
    output: str,
    actual: npt.ArrayLike,
    expected: npt.ArrayLike,
    tolerance: float,
    *,
    keep: npt.NDArray[np.bool_] | None = None,
    note: str = "",
    detail: dict[str, Any] | None = None,
) -> Row:
    """Measure and decide. A passing row's reason is `note`; a failing one's says what is wrong, then `note`."""
    try:
        difference = measure(actual, expected, keep)
    except ValueError as error:
        return Row(check, backend, dtype, case, output, FAIL, str(error), tolerance, None, detail or {})
    if difference.nan or difference.inf:
        status, reason = FAIL, f"{difference.nan} NaN and {difference.inf} Inf: never accepted"
    elif difference.smallest_tolerance <= tolerance:
        status, reason = PASS, ""
    else:
        status, reason = FAIL, f"needs a tolerance of {difference.smallest_tolerance:.2e}, allowed {tolerance:.2e}"
    reason = "; ".join(part for part in (reason, note) if part)
    return Row(check, backend, dtype, case, output, status, reason, tolerance, difference, detail or {})


def passed(rows: Sequence[Row]) -> bool:
    """True when no row failed and at least one was really compared."""
    return all(row.status != FAIL for row in rows) and any(row.status == PASS for row in rows)


def _argmax_agreement(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], keep: npt.NDArray[np.bool_]) -> float:
    if keep.ndim == a.ndim:  # the last axis is the sequence (answer spans): other positions cannot win
        a, b = np.where(keep, a, -np.inf), np.where(keep, b, -np.inf)
        rows = np.asarray(keep.any(axis=-1))
    else:
        rows = keep
    return float(np.mean(a[rows].argmax(axis=-1) == b[rows].argmax(axis=-1)))


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
