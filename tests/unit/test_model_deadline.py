"""A Model's deadlines, queue and close, on a session that stops where a test tells it to."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from outrider.model import Prediction
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    DtypeError,
    QueueFull,
    RunnerClosed,
    UnknownTensor,
)
from support.doubling import ONE, WAIT_S, Doubler, Gate, bound, model_of


def test_a_stuck_engine_does_not_hold_a_caller_beyond_its_deadline(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outrider_runtimes.worker.SICK_UNMEASURED_S", WAIT_S)
    model = model_of(bound(gate))
    gate.stuck = True
    for _ in range(2):
        begun = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            model.infer(ONE, deadline_ms=50.0)
        assert time.monotonic() - begun < WAIT_S / 2
    gate.stuck = False
    gate.go.set()
    assert model.infer(ONE, deadline_ms=1e3 * WAIT_S).outputs["y"][0] == 2.0
    model.close()


def test_a_deadline_must_be_positive(gate: Gate) -> None:
    with model_of(bound(gate)) as model:
        for bad in (0.0, -1.0, float("nan")):
            with pytest.raises(ConfigError):
                model.infer(ONE, deadline_ms=bad)


def test_the_estimate_is_the_installs_until_calls_were_measured(gate: Gate) -> None:
    with model_of(bound(gate)) as unknown:
        assert unknown.estimate_ms() is None
    gate.closed = False
    day_ms = 86_400_000.0  # no call of this test takes as long
    model = model_of(bound(gate), expected_ms=day_ms)
    assert model.estimate_ms() == day_ms
    gate.stuck = True
    first = model.submit({"x": ONE}, Deadline.after_ms(None))
    gate.entered.wait(WAIT_S)
    assert model.estimate_ms() == 2 * day_ms
    gate.go.set()
    first.result(WAIT_S)
    measured_ms = model.estimate_ms()
    assert measured_ms is not None and 0.0 < measured_ms < day_ms
    model.close()


def test_submit_is_a_runners(gate: Gate) -> None:
    with model_of(bound(gate)) as model:
        answer = model.submit({"x": ONE}, Deadline.after_ms(1e3 * WAIT_S)).result(WAIT_S)
        assert answer.outputs["y"][0] == 2.0
        with pytest.raises(DtypeError):
            model.submit({"x": ONE.astype(np.float64)}, Deadline.after_ms(None))


@pytest.mark.parametrize("used", [None, 1e3 * WAIT_S])
def test_after_close_every_call_says_so(gate: Gate, used: float | None) -> None:
    model = model_of(bound(gate))
    model.infer(ONE, deadline_ms=used)
    model.close()
    model.close()
    assert gate.closed
    with pytest.raises(RunnerClosed):
        model.infer(ONE)
    with pytest.raises(RunnerClosed):
        model.infer(ONE, deadline_ms=1000.0)
    with pytest.raises(RunnerClosed):
        model.submit({"x": ONE}, Deadline.after_ms(None))


def test_a_model_that_was_never_used_with_a_deadline_starts_no_thread(gate: Gate) -> None:
    before = set(threading.enumerate())
    with model_of(bound(gate)) as model:
        model.infer(ONE)
        assert set(threading.enumerate()) <= before
    with model_of(bound(gate)) as closed:
        closed.close()
        with pytest.raises(RunnerClosed):
            closed.infer(ONE, deadline_ms=1000.0)
        assert set(threading.enumerate()) <= before


def test_close_waits_for_the_call_that_runs(gate: Gate) -> None:
    model = model_of(bound(gate))
    gate.stuck = True
    answers: list[Prediction] = []
    caller = threading.Thread(target=lambda: answers.append(model.infer(ONE)))
    caller.start()
    assert gate.entered.wait(WAIT_S)
    closer = threading.Thread(target=model.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive() and not gate.closed
    gate.go.set()
    caller.join(WAIT_S)
    closer.join(WAIT_S)
    assert answers[0].outputs["y"][0] == 2.0
    assert gate.closed


def test_a_call_that_loses_the_race_with_close_is_told_so(gate: Gate) -> None:
    model = model_of(bound(gate))
    late = model._run  # what a caller holds who looked it up just before
    model.close()
    model._run = late
    with pytest.raises(RunnerClosed):
        model.infer(ONE)


@pytest.mark.parametrize("drop", ["newest", "oldest"])
def test_drop_says_which_request_goes(gate: Gate, drop: Any) -> None:
    model = model_of(bound(gate), drop=drop)
    gate.stuck = True
    first = model.submit({"x": ONE}, Deadline.after_ms(None))
    gate.entered.wait(WAIT_S)
    waiting = [model.submit({"x": ONE}, Deadline.after_ms(None)) for _ in range(8)]
    if drop == "newest":
        with pytest.raises(QueueFull):
            model.submit({"x": ONE}, Deadline.after_ms(None))
    else:
        waiting.append(model.submit({"x": ONE}, Deadline.after_ms(None)))
        with pytest.raises(QueueFull):
            waiting.pop(0).result(0)
    gate.go.set()
    assert all(future.result(WAIT_S).outputs["y"][0] == 2.0 for future in [first, *waiting])
    model.close()


def test_several_inputs_want_names() -> None:
    session = Doubler()
    session.input_names = ("a", "b")
    with model_of(bound(session, "ab")) as model:
        with pytest.raises(UnknownTensor) as raised:
            model.infer(ONE)
        assert "['a', 'b']" in raised.value.hint
        assert model.infer({"b": ONE, "a": ONE}).outputs["y"][0] == 2.0
