"""The comparison with golden outputs: pure, so every rule is tested on small arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from outrider_runtimes.errors import FormatError
from outrider_runtimes.golden import DecisionCheck, GoldenReport, compare, largest_difference

NONE = DecisionCheck()
ARGMAX = DecisionCheck(kind="argmax", output="y", min_agreement=0.75)
LOGITS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]], np.float32)


def judge(given_, *, stored=LOGITS, reference=LOGITS, tolerance=0.1, decision=ARGMAX):
    return compare(
        {"y": given_}, stored={"y": stored}, reference={"y": reference}, tolerance={"y": tolerance}, decision=decision
    )


def test_equal_outputs_pass():
    assert judge(LOGITS) == GoldenReport(agreement=1.0, max_error={"y": 0.0}, failure="")
    assert judge(LOGITS).passed


def test_within_the_tolerance_passes_and_at_it():
    assert judge(LOGITS + np.float32(0.09)).passed
    assert judge(LOGITS + 0.5, tolerance=0.5).passed


def test_beyond_the_tolerance_fails_and_names_both_figures():
    report = judge(LOGITS + 0.25)
    assert "'y'" in report.failure and "0.25" in report.failure and "0.1" in report.failure
    assert report.max_error["y"] == pytest.approx(0.25)
    assert report.agreement == 1.0


def test_the_decision_is_against_the_reference_not_what_was_stored():
    other = LOGITS[[0, 1, 2, 1]]
    assert judge(other, stored=other).agreement == 0.75
    assert judge(other, stored=other).passed
    worse = LOGITS[[0, 1, 0, 1]]
    report = judge(worse, stored=worse)
    assert report.agreement == 0.5
    assert "50.0%" in report.failure and "75.0%" in report.failure


def test_several_decisions_a_row_each_count():
    given_ = np.zeros((2, 2, 3), np.float32)
    reference = given_.copy()
    reference[0, 0, 2] = 1
    report = judge(given_, stored=given_, reference=reference)
    assert report.agreement == 0.75


@pytest.mark.parametrize("where", [0, 5, 11])
def test_a_nan_anywhere_fails(where):
    bad = LOGITS.copy()
    bad.reshape(-1)[where] = np.nan
    assert "NaN" in judge(bad).failure
    assert "NaN" in judge(bad, stored=bad, reference=bad, tolerance=np.inf, decision=NONE).failure


def test_a_nan_in_an_output_that_is_not_stored_fails():
    report = compare({"y": np.array([np.nan])}, stored={}, reference={}, tolerance={}, decision=NONE)
    assert report.failure


def test_a_stored_nan_fails():
    stored = LOGITS.copy()
    stored[0, 0] = np.nan
    assert judge(LOGITS, stored=stored).max_error["y"] == np.inf
    assert not judge(LOGITS, stored=stored).passed


def test_equal_infinities_are_equal():
    infinite = np.array([[np.inf, -np.inf]], np.float32)
    assert judge(infinite, stored=infinite, reference=infinite).passed
    assert not judge(-infinite, stored=infinite, reference=infinite, tolerance=1e30).passed


@pytest.mark.parametrize("shape", [(4,), (4, 4), (3, 3), (1, 4, 3), (0, 3)])
def test_another_shape_fails_without_broadcasting(shape):
    report = judge(np.zeros(shape, np.float32), decision=NONE)
    assert "shape" in report.failure and report.max_error == {}


def test_an_output_too_few_too_many_or_without_a_bound_fails_by_its_name():
    y = {"y": LOGITS}
    missing = compare({}, stored=y, reference=y, tolerance={"y": 1.0}, decision=ARGMAX)
    assert "missing" in missing.failure and missing.agreement is None
    extra = compare({**y, "z": LOGITS}, stored=y, reference=y, tolerance={"y": 1.0}, decision=NONE)
    assert "'z'" in extra.failure
    untold = compare(y, stored=y, reference=y, tolerance={}, decision=NONE)
    assert "no tolerance" in untold.failure
    no_reference = compare(y, stored=y, reference={}, tolerance={"y": 1.0}, decision=ARGMAX)
    assert "decision rests" in no_reference.failure


def test_a_decision_that_cannot_be_made_fails():
    assert "axis" in judge(LOGITS, decision=DecisionCheck(kind="argmax", output="y", axis=2)).failure
    empty = LOGITS[:0]
    assert "no rows" in judge(empty, stored=empty, reference=empty).failure
    assert "reference" in judge(LOGITS, reference=LOGITS[:2]).failure


def test_integers_differ_exactly_and_bools_by_one():
    big = np.array([2**62, 2**62 + 1], np.int64)
    assert largest_difference(big, big) == 0.0
    assert largest_difference(np.array([0, 255], np.uint8), np.array([255, 255], np.uint8)) == 255.0
    assert largest_difference(np.array([True, False]), np.array([True, True])) == 1.0


floats = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.floats(-1e6, 1e6, width=32)
)


@given(floats, st.floats(0, 1e3))
def test_the_error_is_numpys(array, shift):
    moved = (array + np.float32(shift)).astype(np.float32)
    wanted = float(np.abs(moved.astype(np.float64) - array.astype(np.float64)).max())
    assert largest_difference(moved, array) == wanted
    assert judge(moved, stored=array, reference=array, tolerance=wanted, decision=NONE).passed


@pytest.mark.parametrize("check", [NONE, ARGMAX, DecisionCheck(kind="argmax", output="o", axis=1, min_agreement=1.0)])
def test_a_decision_check_comes_back_from_json(check):
    assert DecisionCheck.from_dict(check.to_dict()) == check


@pytest.mark.parametrize(
    "bad",
    [
        {},
        None,
        [],
        {"kind": "median"},
        {"kind": "argmax"},
        {"kind": "argmax", "output": 3},
        {"kind": "argmax", "output": "y", "axis": "last"},
        {"kind": "argmax", "output": "y", "axis": True},
        {"kind": "argmax", "output": "y", "min_agreement": 1.5},
        {"kind": "argmax", "output": "y", "min_agreement": "high"},
        {"kind": "argmax", "output": "y", "min_agreement": float("nan")},
    ],
)
def test_a_malformed_decision_check_is_a_format_error(bad):
    with pytest.raises(FormatError):
        DecisionCheck.from_dict(bad)
