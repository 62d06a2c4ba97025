"""What the risk benchmark draws and judges, on a population whose risk is known; the glyphs; a promise's line."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks import shown
from benchmarks.glyphs import CLASSES, SIDE, draw_glyphs
from benchmarks.promise import at_least, at_most
from benchmarks.risk import ALPHA, MAX_SOFTMAX, MOST_VIOLATED, PLUG_IN, judged_splits

ROWS = 30_000


def population(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Three classes' logits, and answers that are the wronger the nearer the first two are: risk 0 at the surest."""
    margin = rng.random(ROWS)
    logits = np.stack([10.0 * margin, np.zeros(ROWS), np.full(ROWS, -5.0)], axis=1).astype(np.float32)
    return logits, rng.random(ROWS) < 0.12 * (1.0 - margin) ** 3


def test_the_certified_threshold_keeps_what_the_others_break() -> None:
    rng = np.random.default_rng(0)
    found = judged_splits(*population(rng), splits=40, rng=rng)
    violated = {name: figures["violated"] for name, figures in found["thresholds"].items()}
    assert violated["margin"] == violated["entropy"] <= MOST_VIOLATED * 40 / 200
    assert violated[PLUG_IN] > 10
    assert violated[MAX_SOFTMAX] == 40
    margin = found["thresholds"]["margin"]
    assert margin["risk_mean"] < ALPHA < found["thresholds"][MAX_SOFTMAX]["risk_mean"]
    assert 0.3 < margin["kept_mean"] < found["thresholds"][PLUG_IN]["kept_mean"]
    assert [line["met"] for line in found["promises"]] == [True] * 4 + [False]  # too few rows judge it here
    assert found["promises"][-1]["measured"] == ROWS - 2_500
    text = shown.risk(found)
    assert f"| margin, certified | {violated['margin']} | " in text
    assert "| max-softmax 0.9 | 40 | 0 | " in text
    assert text.endswith("- missed: rows that judge each threshold: 2.75e+04, 50000 was asked")


def test_a_split_that_cannot_be_certified_is_a_refusal_and_not_a_violation() -> None:
    rng = np.random.default_rng(1)
    logits, _ = population(rng)
    found = judged_splits(logits, rng.random(ROWS) < 0.3, splits=3, rng=rng)
    assert found["thresholds"]["margin"] == {
        "violated": 0, "refused": 3, "risk_mean": 0.0, "risk_most": 0.0, "kept_mean": 0.0,
    }  # fmt: skip
    assert found["thresholds"][MAX_SOFTMAX]["violated"] == 3
    assert [line["met"] for line in found["promises"]] == [True, True, False, False, False]  # and is not kept by that


def test_the_same_generator_draws_the_same_glyphs_and_no_row_twice() -> None:
    one, other = (draw_glyphs(1_200, np.random.default_rng(5)) for _ in range(2))
    assert one.images.tobytes() == other.images.tobytes()
    assert one.labels.tolist() == other.labels.tolist()
    assert (one.images.shape, one.images.dtype) == ((1_200, 1, SIDE, SIDE), np.float32)
    assert (one.images.min(), one.images.max()) == (0.0, 1.0)
    assert len(np.unique(one.images.reshape(1_200, -1), axis=0)) == 1_200
    assert np.bincount(one.labels, minlength=CLASSES).min() > 80
    assert draw_glyphs(10, np.random.default_rng(6)).labels.tolist() != one.labels[:10].tolist()


def test_the_glyphs_tell_their_class_and_not_too_easily() -> None:
    """By the nearest mean image: far better than chance, far from right."""
    learn, test = (draw_glyphs(rows, np.random.default_rng(rows)) for rows in (2_000, 1_000))
    means = np.stack([learn.images[learn.labels == label].mean(axis=0).ravel() for label in range(CLASSES)])
    apart = ((test.images.reshape(len(test.labels), 1, -1) - means) ** 2).sum(axis=-1)
    assert 0.4 < np.mean(apart.argmin(axis=1) == test.labels) < 0.9


@pytest.mark.parametrize(("measured", "most", "least"), [(1.0, True, False), (2.0, True, True), (3.0, False, True)])
def test_a_promise_is_kept_or_missed_by_its_figure(measured: float, most: bool, least: bool) -> None:
    assert at_most("x", measured, 2.0)["met"] is most
    assert at_least("x", measured, 2.0, note="why") == {
        "promise": "x", "asked": 2.0, "measured": measured, "met": least, "note": "why",
    }  # fmt: skip
    assert at_least("x", float("nan"), 2.0)["met"] is at_most("x", float("nan"), 2.0)["met"] is False
