"""How alike two variants answer, on what evaluate asked both."""

from __future__ import annotations

import numpy as np
import pytest

from outrider_exporters import likeness as module
from outrider_exporters.likeness import Likeness, Recording, likeness


def ask(predict, *parts):
    recording = Recording(predict)
    for part in parts:
        recording({"x": part})
    return recording


def scores(inputs):
    return {"y": inputs["x"].copy()}


X = np.random.default_rng(0).standard_normal((40, 2)).astype(np.float32)


def test_snr_and_changed_decisions_by_hand():
    other = np.array([[3.0, 0.0], [0.0, 0.1]], np.float32)
    plain = ask(lambda x: {"y": np.array([[2.0, 0.0], [0.1, 0.0]], np.float32)}, X[:2])
    after = ask(lambda x: {"y": other}, X[:2])
    made = likeness(plain, after, decides="y")
    power, noise = 4.0 + 0.01, 1.0 + 0.02
    assert made.snr_db == pytest.approx(10 * np.log10(power / noise), rel=1e-6)
    assert (made.rows, made.changed) == (2, 0.5)
    assert likeness(plain, after).changed is None
    assert made.to_dict() == {"rows": 2, "snr_db": made.snr_db, "changed": 0.5}


def test_the_same_answers_have_no_difference():
    made = likeness(ask(scores, X[:20], X[20:]), ask(scores, X[:20], X[20:]), decides="y")
    assert made == Likeness(rows=40, snr_db=None, changed=0.0)


def test_only_what_both_were_asked_counts():
    """A decoder that feeds its own answers back asks two variants different things."""
    turned = ask(lambda inputs: {"y": -inputs["x"]}, X[:10], X[10:20] + 1, X[20:])
    made = likeness(ask(scores, X[:10], X[10:20], X[20:]), turned, decides="y")
    assert made.rows == 30
    assert made.changed == 1.0
    assert likeness(ask(scores, X), ask(scores, X + 1), decides="y") == Likeness(rows=0, snr_db=None, changed=None)
    assert likeness(ask(scores, X), Recording(scores)).rows == 0


def test_it_answers_as_the_function_does_and_stops_keeping_what_is_too_much(monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", X[:10].nbytes)
    recording = ask(scores, X[:10], X[10:])
    assert len(recording.calls) == 1
    assert np.array_equal(recording({"x": X})["y"], X)
    assert likeness(recording, ask(scores, X[:10], X[10:])).rows == 10


def test_another_dtype_or_shape_or_name_is_another_question():
    plain = ask(scores, X)
    for inputs in ({"x": X.astype(np.float64)}, {"z": X}, {"x": X.reshape(20, 4)}):
        other = Recording(lambda given: {"y": np.zeros((1, 2))})
        other(inputs)
        assert likeness(plain, other).rows == 0
    empty = ask(scores, X[:0])
    assert likeness(empty, ask(scores, X[:0])) == Likeness(rows=0, snr_db=None, changed=None)
