"""The certified threshold, on scores whose true risk is known."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import bdtr

from outrider_exporters.certify import SHARES, certify, fewest_rows, p_value, rows_needed, thresholds
from outrider_runtimes.errors import ConfigError, ExportError
from support.effort import effort

WORST = 0.2  # of the least sure answers, so many are wrong


def population(rng, rows):
    """Scores in 0..1, and answers that are wrong with probability ``WORST * (1 - score)^3``."""
    scores = rng.random(rows)
    return scores, rng.random(rows) < WORST * (1.0 - scores) ** 3


def true_risk(threshold):
    """Among the answers with at least that score: the mean of the above."""
    return WORST * (1.0 - threshold) ** 3 / 4.0


@given(st.integers(0, 400), st.integers(1, 400), st.floats(0.001, 0.5))
def test_the_p_value_is_a_binomial_tail(wrong, kept, alpha):
    assert p_value(wrong, kept, alpha) == pytest.approx(bdtr(min(wrong, kept), kept, alpha), rel=1e-9, abs=1e-300)


@given(st.floats(0.001, 0.3), st.floats(0.01, 0.5))
def test_the_fewest_rows_certify_and_one_less_does_not(alpha, delta):
    least = fewest_rows(alpha, delta)
    assert p_value(0, least, alpha) <= delta
    assert least == 1 or p_value(0, least - 1, alpha) > delta


def test_one_percent_at_ninety_takes_the_230_of_the_literature():
    assert fewest_rows(0.01, 0.1) == 230


def test_the_certificate_is_broken_no_more_often_than_it_says():
    rng = np.random.default_rng(0)
    alpha, delta, broken, tries = 0.01, 0.1, 0, 200
    for _ in range(tries):
        places, _ = population(rng, 400)
        try:
            made = certify(*population(rng, 2000), places, alpha=alpha, delta=delta)
        except ExportError:
            continue
        broken += true_risk(made.chosen.threshold) > alpha
    assert broken < tries * delta


def test_a_plug_in_threshold_would_be_broken_half_of_the_time():
    """What the certificate is for: the smallest threshold whose observed risk is alpha has none."""
    rng = np.random.default_rng(1)
    broken = 0
    for _ in range(100):
        scores, wrong = population(rng, 2000)
        order = np.argsort(-scores)
        risks = np.cumsum(wrong[order]) / np.arange(1, len(order) + 1)
        broken += true_risk(scores[order][np.flatnonzero(risks <= 0.01)[-1]]) > 0.01
    assert broken > 30


def test_it_keeps_most_of_what_may_be_kept_and_shows_the_curve():
    rng = np.random.default_rng(2)
    made = certify(*population(rng, 200_000), population(rng, 20_000)[0], alpha=0.01, delta=0.1)
    keepable = 0.2 ** (1 / 3)  # true_risk(1 - keepable) is 0.01
    assert made.chosen.kept == pytest.approx(keepable, abs=0.03)
    assert 1.0 - made.chosen.threshold == pytest.approx(keepable, abs=0.03)
    assert [point.threshold for point in made.curve] == sorted((p.threshold for p in made.curve), reverse=True)
    assert len(made.curve) == len(SHARES)
    assert made.chosen in made.curve
    assert made.curve[-1].kept == pytest.approx(1.0, abs=0.001)
    assert made.chosen.risk <= 0.01


@settings(max_examples=effort(30), deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_thresholds_do_not_look_at_labels(seed):
    """Fixed order, fixed places: turning labels changes what is chosen and never what is tried."""
    rng = np.random.default_rng(seed)
    scores, wrong = population(rng, 1000)
    places, _ = population(rng, 100)
    tried = []
    for labels in (wrong, np.zeros_like(wrong)):
        try:
            tried.append([p.threshold for p in certify(scores, labels, places, alpha=0.02, delta=0.1).curve])
        except ExportError:
            tried.append(thresholds(places))
    assert tried[0] == tried[1] == thresholds(places)


def test_too_few_rows_say_how_many_it_takes():
    rng = np.random.default_rng(3)
    scores, _ = population(rng, 100)
    with pytest.raises(ExportError, match=r"100 calibration rows cannot certify .*it takes 230 even where"):
        certify(scores, np.zeros(100, bool), scores, alpha=0.01, delta=0.1)


def test_no_threshold_is_below_the_least_that_is_allowed():
    """As of detections: that an answer without a box is never wrong on these rows does not make it a sure one."""
    rng = np.random.default_rng(6)
    scores = np.where(rng.random(2000) < 0.3, 0.0, rng.random(2000))
    none_wrong = np.zeros(2000, bool)
    free = certify(scores, none_wrong, scores, alpha=0.05, delta=0.1)
    assert (free.chosen.threshold, free.chosen.kept) == (0.0, 1.0)
    bounded = certify(scores, none_wrong, scores, alpha=0.05, delta=0.1, least=1e-30)
    assert bounded.chosen.threshold == 1e-30
    assert bounded.chosen.kept == np.mean(scores > 0.0)
    assert bounded.curve[-1] == bounded.chosen


def test_rows_that_nearly_do_say_how_many_would():
    rng = np.random.default_rng(4)
    scores = rng.random(500)
    wrong = np.zeros(500, bool)
    wrong[np.argsort(-scores)[:400:100]] = True  # 1 % of the surest
    with pytest.raises(ExportError, match=r"about \d+ would") as caught:
        certify(scores, wrong, scores, alpha=0.02, delta=0.001)
    assert int(re.search(r"about (\d+) would", str(caught.value)).group(1)) > 500


def test_with_barely_enough_rows_it_does_not_say_that_no_number_would():
    rng = np.random.default_rng(7)
    scores = rng.random(60)
    with pytest.raises(ExportError, match=r"60 calibration rows .* about \d+ would") as caught:
        certify(scores, scores < 0.4, scores, alpha=0.05, delta=0.1)
    count = int(re.search(r"about (\d+) would", str(caught.value)).group(1))
    scores = rng.random(count)
    assert count > 60
    assert certify(scores, scores < 0.4, scores, alpha=0.05, delta=0.1).chosen.kept > 0.3


def test_a_network_that_is_wrong_everywhere_is_told_so():
    rng = np.random.default_rng(5)
    scores = rng.random(3000)
    with pytest.raises(ExportError, match=r"3000 calibration rows show no threshold with .* surest \d+%"):
        certify(scores, rng.random(3000) < 0.3, scores, alpha=0.01, delta=0.1)


@pytest.mark.parametrize(("risk", "kept"), [(0.001, 1.0), (0.004, 0.5), (0.0, 0.2)])
def test_the_rows_that_are_asked_for_would_do(risk, kept):
    rows = rows_needed(risk, kept, 0.01, 0.1)
    count = int(rows * kept)
    assert p_value(int(np.ceil(count * risk)), count, 0.01) <= 0.1 * 1.1  # rounding of the share to whole rows
    assert rows_needed(0.01, 1.0, 0.01, 0.1) is None
    assert rows_needed(0.00999, 1.0, 0.01, 0.1) is None
    assert rows_needed(0.0, 0.0, 0.01, 0.1) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"scores": np.ones(3)}, "not one value a row"),
        ({"places": np.array([])}, "not one value a row"),
        ({"scores": np.array([1.0, np.nan])}, "NaN or infinite"),
        ({"places": np.array([np.inf])}, "NaN or infinite"),
    ],
)
def test_what_cannot_be_certified_at_all_is_refused(changes, message):
    arguments = {
        "scores": np.ones(2),
        "wrong": np.zeros(2, bool),
        "places": np.ones(1),
        "alpha": 0.1,
        "delta": 0.1,
        **changes,
    }
    with pytest.raises(ConfigError, match=message):
        certify(**arguments)
