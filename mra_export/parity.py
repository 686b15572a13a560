"""How far one runtime's arrays are from the reference's: arrays in, report rows out. numpy only.

A row is judged by one number, the smallest t for which |actual - expected| <= t + t * |expected| holds everywhere, or, where each
side chose its blocks freely, for 99 % of the values. The rest of the row is there to read. NaN and Inf never pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

PASS, FAIL, SKIP = "pass", "fail", "skip"
FREE_SHARE = 0.99
"""A near-tie that falls the other way moves the outputs of 32 tokens as far as it likes, and says nothing about arithmetic. So,
where blocks were chosen freely, this share of the values is judged."""
LONE = 300
"""A near-tie moves all values of a token. One whose error is this many times its token's median is something else: judged too."""
_LARGEST = float(np.finfo(np.float32).max)
_CHUNK = 1 << 22
"""Elements widened to float64 at a time: the logits of a large vocabulary are gigabytes as float64."""


@dataclass(frozen=True)
class Difference:
    """What `measure` found. Relative errors are |actual - expected| / |expected| where expected is not 0.

    argmax_agreement: share of positions whose largest entry on the last axis is the same, 1.0 = all.
    smallest_tolerance: the smallest t with |actual - expected| <= t + t * |expected| everywhere. free_tolerance, where it was asked
    for: the same for FREE_SHARE of the values, and for those that stand alone in their token (LONE).
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
    free_tolerance: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of a parity report.

    check: what was compared ("outputs", "golden", "operator", "selection", "canary", "padding", "accuracy").
    case: the input, in words. status: "pass", "fail" or "skip", with the reason beside it. needed: the tolerance that would have
    passed; tolerance: the one allowed.
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
    needed: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Flat and JSON-ready: the difference's fields stand beside the row's own; what is not finite becomes null."""
        flat = {name: value for name, value in asdict(self).items() if name not in ("difference", "detail")}
        flat.update(asdict(self.difference) if self.difference is not None else {})
        flat.update(self.detail)
        return {name: _json_number(value) for name, value in flat.items()}


def measure(
    actual: npt.ArrayLike, expected: npt.ArrayLike, keep: npt.NDArray[np.bool_] | None = None, free: bool = False
) -> Difference:
    """Compare two arrays of one shape, in float64.

    keep: bool, its shape the leading axes of the arrays': only these positions count (real tokens). NaN and Inf are counted
    everywhere, also at positions that are not kept. Raises ValueError where the shapes differ or nothing is kept.
    """
    a, b = np.asarray(actual), np.asarray(expected)
    if a.shape != b.shape:
        raise ValueError(f"shape {a.shape}, expected {b.shape}")
    if keep is None:
        keep = np.ones(b.shape[: max(b.ndim - 1, 1)], dtype=bool)
    if keep.shape != b.shape[: keep.ndim]:
        raise ValueError(f"keep has shape {keep.shape}: it must be the leading axes of {b.shape}")
    x, y = a[keep].reshape(-1), b[keep].reshape(-1)
    if not x.size:
        raise ValueError("nothing to compare: no position is kept")
    nan, inf = (sum(int(np.count_nonzero(test(array))) for array in (a, b)) for test in (np.isnan, np.isinf))
    if nan or inf:
        worst = float("inf")
        return Difference(x.size, nan, inf, worst, worst, worst, worst, float("nan"), 0.0, worst, worst)
    errors, relatives, needs = (np.empty(x.size, np.float32) for _ in range(3))
    max_abs = max_rel = smallest = product = x_square = y_square = 0.0
    for start in range(0, x.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        x_part, y_part = x[part].astype(np.float64), y[part].astype(np.float64)
        error, size = np.abs(x_part - y_part), np.abs(y_part)
        relative = np.divide(error, size, out=np.zeros_like(error), where=size > 0)
        max_abs, max_rel = max(max_abs, float(error.max())), max(max_rel, float(relative.max()))
        need = error / (1.0 + size)
        smallest = max(smallest, float(need.max()))
        product, x_square, y_square = (
            total + float(left @ right)
            for total, left, right in ((product, x_part, y_part), (x_square, x_part, x_part), (y_square, y_part, y_part))
        )
        errors[part], relatives[part] = np.minimum(error, _LARGEST), np.minimum(relative, _LARGEST)
        needs[part] = need
    norms = (x_square * y_square) ** 0.5
    return Difference(
        elements=x.size,
        nan=0,
        inf=0,
        max_abs=max_abs,
        p999_abs=_quantile(errors, 0.999),
        max_rel=max_rel,
        p999_rel=_quantile(relatives, 0.999),
        cosine=product / norms if norms else float(max_abs == 0),
        argmax_agreement=_argmax_agreement(a, b, keep),
        smallest_tolerance=smallest,
        free_tolerance=_free_tolerance(needs.reshape(a[keep].shape)) if free else None,
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
    free: bool = False,
    note: str = "",
    detail: dict[str, Any] | None = None,
) -> Row:
    """Measure and decide. free: both sides chose their blocks themselves, see FREE_SHARE.

    A passing row's reason is `note`; a failing one's says what is wrong, then `note`.
    """
    try:
        difference = measure(actual, expected, keep, free)
    except ValueError as error:
        return Row(check, backend, dtype, case, output, FAIL, str(error), tolerance, detail=detail or {})
    needed = difference.smallest_tolerance if difference.free_tolerance is None else difference.free_tolerance
    if difference.nan or difference.inf:
        status, reason = FAIL, f"{difference.nan} NaN and {difference.inf} Inf: never accepted"
    elif needed <= tolerance:
        status, reason = PASS, ""
    else:
        status, reason = FAIL, f"needs a tolerance of {needed:.2e}, allowed {tolerance:.2e}"
    reason = "; ".join(part for part in (reason, note) if part)
    return Row(check, backend, dtype, case, output, status, reason, tolerance, difference, needed, detail or {})


def passed(rows: Sequence[Row]) -> bool:
    """True when no row failed and at least one was really compared."""
    return all(row.status != FAIL for row in rows) and any(row.status == PASS for row in rows)


def _quantile(values: npt.NDArray[np.float32], share: float) -> float:
    """The smallest value that this share of them is not above. Reorders the array."""
    index = int(np.ceil(share * values.size)) - 1
    values.partition(index)
    return float(values[index])


def _free_tolerance(needs: npt.NDArray[np.float32]) -> float:
    """needs: (tokens,) or (tokens, ..., values of a token)."""
    tolerance = _quantile(needs.reshape(-1).copy(), FREE_SHARE)
    if needs.ndim < 2:
        return tolerance
    tokens = needs.reshape(-1, needs.shape[-1])
    beyond = tokens[tokens.max(axis=-1) > tolerance]
    lone = beyond[beyond > LONE * np.median(beyond, axis=-1, keepdims=True)]
    return max(tolerance, float(lone.max())) if lone.size else tolerance


def _argmax_agreement(a: npt.NDArray[Any], b: npt.NDArray[Any], keep: npt.NDArray[np.bool_]) -> float:
    rows = keep
    if keep.ndim == a.ndim:  # the last axis is the sequence (answer spans): other positions cannot win
        a, b = np.where(keep, a, -np.inf), np.where(keep, b, -np.inf)
        rows = np.asarray(keep.any(axis=-1))
    return float(np.mean((a.argmax(axis=-1) == b.argmax(axis=-1))[rows]))


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
