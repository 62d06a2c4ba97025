"""How sure an answer is, against the formulas written out row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import entr, logsumexp, softmax

from outrider_runtimes.errors import FormatError
from outrider_runtimes.scores import Score
from outrider_runtimes.tensors import Interface, TensorSpec

LOGITS = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(2, 6)), elements=st.floats(-30, 30, width=32))


def interface(dtype="float32", shape=(None, 3), axes="NC"):
    one = TensorSpec(name="x", dtype="float32", shape=(None, 2), axes="NC")
    return Interface(inputs=(one,), outputs=(TensorSpec(name="y", dtype=dtype, shape=shape, axes=axes),))


@given(LOGITS)
def test_the_scores_are_their_formulas(logits):
    odds = softmax(logits.astype(np.float64), axis=1)
    best = np.sort(odds, axis=1)
    wanted = {
        "margin": best[:, -1] - best[:, -2],
        "entropy": 1.0 - entr(odds).sum(axis=1) / math.log(logits.shape[1]),
        "energy": logsumexp(logits.astype(np.float64), axis=1),
    }
    for kind, rows in wanted.items():
        given_rows = Score(kind=kind, output="y").rows({"y": logits})
        assert given_rows == pytest.approx(rows, abs=1e-9)
        assert Score(kind=kind, output="y").least({"y": logits}) == given_rows.min()
    for kind in ("margin", "entropy"):
        of_odds = Score(kind=kind, output="y", values="probabilities").rows({"y": odds})
        assert of_odds == pytest.approx(wanted[kind], abs=1e-9)


@given(LOGITS, st.floats(-10, 10))
def test_margin_and_entropy_do_not_feel_a_shift_and_energy_does(logits, shift):
    for kind in ("margin", "entropy"):
        score = Score(kind=kind, output="y")
        assert score.rows({"y": logits.astype(np.float64) + shift}) == pytest.approx(
            score.rows({"y": logits}), abs=1e-9
        )
    energy = Score(kind="energy", output="y")
    assert energy.rows({"y": logits.astype(np.float64) + shift}) == pytest.approx(energy.rows({"y": logits}) + shift)


def test_of_several_places_the_least_sure_counts():
    sure, torn = [9.0, 0.0, 0.0], [1.0, 1.0, 0.0]
    rows = Score(output="y").rows({"y": np.array([[sure, sure], [sure, torn]])})
    assert rows[0] > 0.99
    assert rows[1] == pytest.approx(0.0)


def test_an_empty_detection_is_the_least_sure_there_is():
    score = Score(kind="detection", output="y", values="probabilities")
    assert list(score.rows({"y": np.array([[0.2, 0.9, 0.0], [0.0, 0.0, 0.0]])})) == [0.9, 0.0]
    assert list(score.rows({"y": np.zeros((2, 0))})) == [0.0, 0.0]


def test_an_empty_detection_is_uncertain_under_every_threshold_that_may_be():
    score = Score(kind="detection", output="y", values="probabilities")
    assert score.least({"y": np.zeros((1, 5))}) < score.least_threshold
    assert score.least({"y": np.full((1, 5), 1e-6)}) > score.least_threshold
    assert Score(output="y").least_threshold == -math.inf


@pytest.mark.parametrize("kind", ["margin", "entropy", "energy", "detection"])
def test_a_nan_is_never_sure(kind):
    score = Score(kind=kind, output="y")
    rows = score.rows({"y": np.array([[1.0, 0.0, 2.0], [np.nan, 0.0, 1.0]], np.float32)})
    assert np.isfinite(rows[0])
    assert np.isnan(rows[1])
    assert not score.least({"y": np.array([[np.nan, 0.0, 1.0]])}) >= 0.0


def test_no_rows_leave_nothing_to_doubt():
    assert Score(output="y").least({"y": np.zeros((0, 3))}) == math.inf
    assert Score(output="y").least({"y": np.array([3.0, 1.0])}) == pytest.approx(math.tanh(1.0))


@pytest.mark.parametrize("score", [Score(output="y"), Score(kind="entropy", output="p", values="probabilities")])
def test_a_score_comes_back_from_json(score):
    assert Score.from_dict(score.to_dict()) == score


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "luck"}, "kind is 'luck'"),
        ({"values": "odds"}, "values is 'odds'"),
        ({"kind": "energy", "values": "probabilities"}, "energy"),
    ],
)
def test_a_score_that_there_is_not(changes, message):
    with pytest.raises(FormatError, match=message):
        Score(**{"output": "y", **changes})


@pytest.mark.parametrize("data", [{}, {"kind": 1, "output": "y", "values": "logits"}, [], None, "margin"])
def test_a_malformed_score_is_a_format_error(data):
    with pytest.raises(FormatError, match="score"):
        Score.from_dict(data)


@pytest.mark.parametrize(
    ("score", "given_interface", "message"),
    [
        (Score(output="z"), interface(), "there is no output 'z'"),
        (Score(output="y"), interface("int64"), "expected float"),
        (Score(output="y"), interface(shape=(None, 1)), r"expected float \[..., 2 or more\]"),
        (Score(output="y"), interface(shape=(), axes=""), "expected float"),
    ],
)
def test_an_output_that_cannot_be_judged(score, given_interface, message):
    with pytest.raises(FormatError, match=message):
        score.check(given_interface)


def test_outputs_that_can_be_judged():
    Score(output="y").check(interface())
    Score(output="y").check(interface(shape=(None, None)))
    Score(kind="detection", output="y").check(interface(shape=(None, 1)))
