"""The test for drift: its two error rates, its episodes, and that it is one number after another."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.hybrid.drift import ANSWERS_A_FALSE_ALARM, MOST_WATCHED, ODDS, Drift, Evidence, observed
from support.effort import effort

BOUND = 0.01


def run(shares, bound: float = BOUND, evidence: Evidence | None = None) -> tuple[Evidence, list[int]]:
    """The evidence after these answers, and after how many of them an episode began."""
    evidence, began = evidence or Evidence(bound=bound), []
    for at, share in enumerate(shares, start=1):
        evidence, begins = observed(evidence, float(share))
        began += [at] if begins else []
    return evidence, began


def drawn(seed: int, rate: float, count: int) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < rate


def test_at_the_bound_itself_false_alarms_are_as_rare_as_is_promised():
    """At most n over ANSWERS_A_FALSE_ALARM of the runs of n answers; 5 standard deviations above that is no chance."""
    runs, count = 100, 1000
    alarms = sum(bool(run(drawn(seed, BOUND, count))[1]) for seed in range(runs))
    share = count / ANSWERS_A_FALSE_ALARM
    assert alarms <= runs * share + 5 * math.sqrt(runs * share * (1 - share))


@pytest.mark.parametrize(("times", "most"), [(3, 2500), (5, 800), (10, 300)])
def test_a_rate_that_is_worse_is_seen_soon(times, most):
    waits = [run(drawn(seed, BOUND * times, 5 * most))[1][0] for seed in range(5)]
    assert np.median(waits) <= most


def test_a_long_good_time_before_does_not_delay_it():
    fresh = run(drawn(1, 0.1, 2000))[1][0]
    good, alarms = run(drawn(2, BOUND / 2, 10_000))
    assert alarms == []
    assert run(drawn(1, 0.1, 2000), evidence=good)[1][0] <= fresh


def test_an_episode_is_told_once_and_another_after_it_has_ended():
    shares = np.concatenate([drawn(1, 0.2, 2000), drawn(2, BOUND / 2, 3000), drawn(3, 0.2, 2000)])
    began = run(shares)[1]
    assert len(began) == 2
    assert began[0] < 2000 and 5000 < began[1] < 7000


def test_it_tells_how_many_differ_of_how_many_since_the_evidence_began():
    evidence, began = run([0.0] * 500 + [1.0] * 20)
    assert len(began) == 1
    assert evidence.alarmed
    assert evidence.differing / evidence.answers == 1.0
    assert evidence.answers == began[0] - 500


def test_rows_of_one_answer_count_as_one_observation():
    """Half of a batch differs: as strong as the odds allow for one answer, however many rows it has."""
    one, _ = observed(Evidence(bound=BOUND), 0.5)
    assert one.answers == 1
    assert 0 < max(one.logs) < math.log(ODDS[-1])


@settings(max_examples=effort(200), deadline=None)
@given(st.floats(0.001, 0.9), st.sampled_from(ODDS), st.floats(0.0, 1.0))
def test_no_step_gains_on_average_where_the_mean_is_at_most_the_bound(bound, odds, mean):
    """The property that the promise stands on: the ratio is at least 0, linear, and 1 on average at the bound."""
    from outrider.hybrid.drift import _ratio, _worse

    worse = _worse(bound, odds)
    assert bound < worse < 1.0
    average = mean * _ratio(1.0, null=bound, other=worse) + (1 - mean) * _ratio(0.0, null=bound, other=worse)
    assert average == pytest.approx(_ratio(mean, null=bound, other=worse))
    assert _ratio(mean, null=bound, other=worse) > 0.0
    if mean <= bound:
        assert average <= 1.0 + 1e-9


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 1.0), max_size=50), st.floats(0.001, 0.9))
def test_more_difference_is_never_less_evidence(shares, bound):
    milder = [share / 2 for share in shares]
    worse, mild = run(shares, bound)[0], run(milder, bound)[0]
    assert worse.alarmed or all(a >= b for a, b in zip(worse.logs, mild.logs, strict=True))


# --- several samples


def test_samples_do_not_mix_and_another_bound_begins_anew():
    drift = Drift()
    for _ in range(3):
        assert drift.note("a", BOUND, 1.0) is None
    assert drift.note("b", BOUND, 1.0) is None
    assert drift.note("a", 0.5, 1.0) is None
    told = [drift.note("a", BOUND, 1.0) for _ in range(50)]
    assert sum(each is not None for each in told) == 1


def test_the_longest_unseen_is_forgotten_so_that_memory_is_bounded():
    drift = Drift()
    for number in range(10 * MOST_WATCHED):
        drift.note(number, BOUND, 1.0)
        drift.note("kept", BOUND, 0.0)
    assert len(drift._samples) == MOST_WATCHED
    assert "kept" in drift._samples


def test_an_answer_waits_for_the_one_that_is_being_counted():
    drift, inside = Drift(), threading.Event()
    second = threading.Thread(target=lambda: (inside.wait(30), drift.note("a", 0.3, 1.0)))

    class Slow(float):
        def __mul__(self, other):
            inside.set()
            second.join(0.02)  # it ends here only where nothing keeps it out
            return float(self) * other

    second.start()
    drift.note("a", 0.3, Slow(1.0))
    second.join(30)
    assert drift._samples["a"].answers == 2


def test_many_threads_see_one_episode_once():
    drift, told = Drift(), []

    def note() -> None:
        for _ in range(200):
            if drift.note("a", BOUND, 1.0) is not None:
                told.append(1)

    threads = [threading.Thread(target=note) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert told == [1]
