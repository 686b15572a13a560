"""The numbers of a parity row against hand-made arrays, and what never passes."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mra_export.parity import FAIL, PASS, SKIP, Row, judge, measure, passed

FINITE = st.floats(-1e3, 1e3, width=32)


def row(actual, expected, tolerance=1e-3, **options) -> Row:
    return judge("outputs", "torch", "fp32", "case", "logits", actual, expected, tolerance, **options)


def test_the_measures_of_a_small_example() -> None:
    expected = np.array([[1.0, 2.0], [0.0, -4.0]])
    actual = np.array([[1.5, 2.0], [0.1, -4.0]])
    found = measure(actual, expected)
    assert found.elements == 4
    assert found.max_abs == 0.5
    assert found.max_rel == 0.5, "0.1 where 0 is expected has no relative error"
    assert found.smallest_tolerance == pytest.approx(0.25), "0.5 <= t + t * 1"
    assert found.argmax_agreement == 1.0
    assert found.cosine == pytest.approx((1.5 + 4 + 16) / (np.sqrt(1 + 4 + 16) * np.sqrt(2.25 + 4 + 0.01 + 16)))
    assert found.p999_abs == pytest.approx(0.5, rel=1e-2)


@given(arrays.arrays(np.float32, (3, 4), elements=FINITE), arrays.arrays(np.float32, (3, 4), elements=FINITE))
def test_the_smallest_tolerance_is_the_smallest(actual, expected) -> None:
    t = measure(actual, expected).smallest_tolerance
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    assert (np.abs(a - b) <= (t + t * np.abs(b)) * (1 + 1e-12)).all()
    if t > 0:
        assert not (np.abs(a - b) <= 0.999 * (t + t * np.abs(b))).all()
    assert row(actual, expected, t).status == PASS
    assert row(actual, expected, 0.999 * t).status == (PASS if t == 0 else FAIL)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["actual", "expected", "both"])
def test_what_is_not_finite_never_passes(bad, side) -> None:
    good = np.ones((2, 3))
    broken = good.copy()
    broken[1, 2] = bad
    pair = {"actual": (broken, good), "expected": (good, broken), "both": (broken, broken)}[side]
    found = row(*pair, tolerance=1e30)
    assert found.status == FAIL
    assert "never accepted" in found.reason
    json.dumps(found.as_dict(), allow_nan=False)


def test_nan_at_a_position_that_does_not_count_fails_too() -> None:
    actual, expected = np.ones((2, 3)), np.ones((2, 3))
    actual[1, 0] = np.nan
    assert row(actual, expected, keep=np.array([True, False])).status == FAIL


def test_only_kept_positions_are_compared() -> None:
    expected = np.zeros((1, 3, 2))
    actual = expected.copy()
    actual[0, 2] = 100.0
    assert row(actual, expected, keep=np.array([[True, True, False]])).status == PASS
    assert row(actual, expected).status == FAIL


def test_argmax_over_positions_leaves_padding_out() -> None:
    expected = np.array([[1.0, 3.0, 9.0]])
    actual = np.array([[1.0, 3.0, 0.0]])
    assert measure(actual, expected, np.array([[True, True, False]])).argmax_agreement == 1.0
    assert measure(actual, expected).argmax_agreement == 0.0


@pytest.mark.parametrize(
    ("actual", "expected", "keep", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), None, r"shape \(2, 3\), expected \(2, 4\)"),
        (np.ones((2, 3)), np.ones((2, 3)), np.ones(3, bool), "leading axes"),
        (np.ones((2, 3)), np.ones((2, 3)), np.zeros(2, bool), "no position is kept"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_fails_as_a_row(actual, expected, keep, message) -> None:
    with pytest.raises(ValueError, match=message):
        measure(actual, expected, keep)
    assert row(actual, expected, keep=keep).status == FAIL


def test_bfloat16_and_float16_are_read_exactly() -> None:
    values = np.array([[0.1, 1.5, -3.25]])
    for dtype in (ml_dtypes.bfloat16, np.float16):
        rounded = values.astype(dtype)
        assert measure(rounded, rounded.astype(np.float64)).max_abs == 0.0


def test_a_report_needs_a_comparison_and_no_failure() -> None:
    good = row(np.ones(2), np.ones(2))
    bad = row(np.ones(2), np.zeros(2))
    skipped = Row("outputs", "torch", "fp32", "case", "", SKIP, "no reason")
    assert passed([good, skipped])
    assert not passed([good, bad])
    assert not passed([skipped])
    assert not passed([])


def test_where_blocks_were_chosen_freely_one_token_in_a_hundred_may_be_off() -> None:
    expected = np.zeros((200, 50))
    actual = np.random.default_rng(0).normal(size=expected.shape) * 1e-6
    actual[[3, 4]] *= 1e6  # two tokens whose every value moved
    assert row(actual, expected).status == FAIL
    free = row(actual, expected, free=True)
    assert free.status == PASS
    assert free.needed < 1e-5 < free.difference.smallest_tolerance
    more = actual.copy()
    more[[5, 6]] *= 1e6
    assert row(more, expected, free=True).status == FAIL
    lone = actual.copy()
    lone[7, 7] = 1.0  # one value that moved alone
    assert row(lone, expected, free=True).status == FAIL
    lone[7, 7] = np.nan
    assert row(lone, expected, free=True).status == FAIL
    few = np.zeros(3)
    assert row(few + np.array([0, 0, 1.0]), few, free=True).status == FAIL, "of few values every one counts"
