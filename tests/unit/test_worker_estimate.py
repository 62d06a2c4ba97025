"""How long a worker says that a call will take, and how long one took."""

from __future__ import annotations

import pytest

from outrider_runtimes.errors import (
    InferenceError,
)
from support.doubling import WAIT_S, result, x
from support.workers import NEVER, occupy


def test_the_estimate_is_depth_times_a_moving_average(make_worker, gated, clock):
    worker = make_worker()
    assert worker.estimate_ms() is None

    def takes(seconds):
        gated.during = lambda: setattr(clock, "now_s", clock.now_s + seconds)

    takes(0.1)
    result(worker.submit(x(1), NEVER))
    assert worker.estimate_ms() == pytest.approx(100.0)
    takes(0.2)
    result(worker.submit(x(1), NEVER))
    assert worker.estimate_ms() == pytest.approx(120.0)
    occupy(worker, gated)
    worker.submit(x(1), NEVER)
    assert worker.estimate_ms() == pytest.approx(3 * 120.0)


def test_a_failed_call_does_not_count_in_the_estimate(make_worker):
    worker = make_worker()
    with pytest.raises(InferenceError):
        worker.submit(x(-1), NEVER).result(WAIT_S)
    assert worker.estimate_ms() is None


def test_the_estimate_grows_with_a_call_that_takes_longer_than_usual(make_worker, gated, clock):
    worker = make_worker()
    gated.during = lambda: setattr(clock, "now_s", clock.now_s + 0.1)
    result(worker.submit(x(1), NEVER))
    occupy(worker, gated)
    assert worker.estimate_ms() == pytest.approx(2 * 100.0)
    clock.now_s += 0.1
    assert worker.estimate_ms() == pytest.approx(2 * 100.0)
    clock.now_s += 5.0
    assert worker.estimate_ms() == pytest.approx(2 * 100.0 + 5000.0)


def test_the_answer_says_how_long_it_waited(make_worker, gated, clock):
    worker = make_worker()
    occupy(worker, gated)
    waits = worker.submit(x(1), NEVER)
    clock.now_s += 0.25
    gated.let.release(2)
    timing = waits.result(WAIT_S).timing_ms
    assert timing.queue == pytest.approx(250.0)
    assert timing.total >= timing.queue
