"""Who is told of the calls of a Model or a Hybrid that gave no answer, and whose doing that was."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest

from outrider.hybrid import Hybrid
from outrider.policy import Policy
from outrider.prediction import Failure
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    DtypeError,
    InferenceError,
    InputError,
    QueueFull,
    RemoteUnavailable,
    RunnerClosed,
    ShapeError,
    UnknownTensor,
)
from support.doubling import ONE, Doubler, Gate, GatedSession, bound, model_of, x
from support.interrupts import interrupted
from support.sides import GENEROUS_MS, NOWHERE, SURE, UNSURE
from support.straight import StraightRunner
from support.told_failures import Told

FAR_MS = 120_000.0


def policy(**changes: object) -> Policy:
    return Policy(GENEROUS_MS, min_margin=0.5, **changes)  # type: ignore[arg-type]


@pytest.fixture
def sides() -> tuple[StraightRunner, StraightRunner]:
    return StraightRunner(), StraightRunner()


@pytest.mark.parametrize("deadline_ms", [None, FAR_MS])
@pytest.mark.parametrize(
    ("inputs", "kind", "refused"),
    [
        (np.ones((1, 2), np.float32), ShapeError, True),
        (np.ones(1, np.float64), DtypeError, True),
        ({"z": ONE}, UnknownTensor, True),
        ("nothing at all", InputError, True),
        (x(-1.0), InferenceError, False),
    ],
)
def test_a_call_of_a_model_that_fails_is_told_once(
    inputs: object, kind: type[Exception], refused: bool, deadline_ms: float | None
) -> None:
    with model_of(bound(GatedSession())) as model:
        told = Told(model)
        model.infer(ONE)
        with pytest.raises(kind) as raised:
            model.infer(inputs, deadline_ms=deadline_ms)  # type: ignore[arg-type]
        assert told.failures == [Failure(raised.value, refused)]
        assert len(told.predictions) == 1
        told.end()
        with pytest.raises(kind):
            model.infer(inputs, deadline_ms=deadline_ms)  # type: ignore[arg-type]
        assert len(told.failures) == 1


def test_a_model_that_is_late_full_or_closed_is_told(gate: Gate) -> None:
    model = model_of(bound(gate), queue_size=1)
    told = Told(model)
    gate.stuck = True
    model.submit({"x": ONE}, Deadline.after_ms(FAR_MS))
    assert gate.entered.wait(FAR_MS / 1e3)
    with pytest.raises(DeadlineExceeded):
        model.infer(ONE, deadline_ms=10.0)
    with suppress(QueueFull):  # where the one that nobody waits for is in the queue still
        model.submit({"x": ONE}, Deadline.after_ms(FAR_MS))
    with pytest.raises(QueueFull):
        model.infer(ONE, deadline_ms=FAR_MS)
    gate.go.set()
    model.close()
    for deadline_ms, kind in ((None, RunnerClosed), (-1.0, ConfigError)):
        with pytest.raises(kind):
            model.infer(ONE, deadline_ms=deadline_ms)
    assert told.names == ["DeadlineExceeded", "QueueFull", "RunnerClosed", "refused: ConfigError"]
    assert told.predictions == []


def test_a_call_of_a_hybrid_that_both_sides_failed_is_told_once(sides: tuple[StraightRunner, StraightRunner]) -> None:
    edge, cloud = sides
    with Hybrid(edge, cloud, policy(), root=NOWHERE) as hybrid:
        told = Told(hybrid)
        edge.error, cloud.error = InferenceError("broke"), RemoteUnavailable("down")
        with pytest.raises(InferenceError) as raised:
            hybrid.infer({"x": SURE})
        assert told.failures == [Failure(raised.value, False)]
        cloud.error = None
        assert hybrid.infer({"x": SURE}).reason == "edge_failed"
        edge.error, edge.never, cloud.never = None, True, True
        with pytest.raises(DeadlineExceeded):
            hybrid.infer({"x": SURE}, deadline_ms=20.0)
        with pytest.raises(ShapeError):
            hybrid.infer({"x": SURE[0]})
        with pytest.raises(ConfigError):
            hybrid.infer({"x": SURE}, deadline_ms=float("nan"))
        assert told.names == ["InferenceError", "DeadlineExceeded", "refused: ShapeError", "refused: ConfigError"]
    assert len(told.predictions) == 1


class Fixed(Doubler):
    """A file that was made for one size."""

    def run(self, inputs: object) -> list[np.ndarray]:
        raise ShapeError("the file was made for others")


def test_a_size_that_the_interface_allows_and_no_side_takes_is_not_the_callers_doing(
    sides: tuple[StraightRunner, StraightRunner],
) -> None:
    with model_of(bound(Fixed())) as model:
        told = Told(model)
        for inputs in (ONE, np.ones((1, 2), np.float32)):
            with pytest.raises(ShapeError):
                model.infer(inputs)
    assert told.names == ["ShapeError", "refused: ShapeError"]
    edge, cloud = sides
    edge.error, cloud.error = ShapeError("the file was made for others"), RemoteUnavailable("down")
    with Hybrid(edge, cloud, policy(), root=NOWHERE) as hybrid:
        told = Told(hybrid)
        with pytest.raises(ShapeError):
            hybrid.infer({"x": SURE})
    assert told.names == ["ShapeError"]


def test_after_close_a_hybrid_tells_nobody(sides: tuple[StraightRunner, StraightRunner]) -> None:
    hybrid = Hybrid(*sides, policy(), root=NOWHERE)
    told = Told(hybrid)
    hybrid.close()
    with pytest.raises(RunnerClosed):
        hybrid.infer({"x": SURE})
    assert told.failures == []


def test_a_callback_that_fails_changes_no_error_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Failure) -> None:
        raise RuntimeError("the disk is full")

    with model_of(bound(GatedSession())) as model:
        model.on_failure(fail)
        told = Told(model)
        for _ in range(3):
            with pytest.raises(InferenceError, match="negative"):
                model.infer(x(-1.0))
    assert len(told.failures) == 3
    assert [record.exc_info[1].args for record in caplog.records if record.exc_info] == [("the disk is full",)]


class Alarm(Exception):
    """What a program's own signal handler may raise, to end a call."""


def interrupt_everywhere(call: Callable[[], object], kind: type[BaseException], told: Told) -> int:
    """At each point of a call: it is told as answered, as failed where the exception is no interrupt, or not at all."""
    at = 0
    while True:
        at += 1
        call()  # what the one before left in a queue has run then
        told.forget()
        whole = not interrupted(call, at, kind)
        counts = (len(told.predictions), len(told.failures))
        assert counts in ((0, 0), (1, 0)) or (counts == (0, 1) and kind is Alarm), f"at point {at}"
        if whole:
            assert counts == (1, 0)
            return at


# Not an Alarm within a deadline: out of a future's callback, concurrent.futures logs an Exception and goes on.
@pytest.mark.parametrize(
    ("kind", "deadline_ms"), [(KeyboardInterrupt, None), (KeyboardInterrupt, FAR_MS), (Alarm, None)]
)
def test_a_call_that_is_interrupted_anywhere_counts_once_or_not_at_all(
    kind: type[BaseException], deadline_ms: float | None
) -> None:
    with model_of(bound(Doubler())) as model:
        model.infer(ONE, deadline_ms=FAR_MS)
        assert interrupt_everywhere(lambda: model.infer(ONE, deadline_ms=deadline_ms), kind, Told(model)) > 10


def test_so_does_a_hybrids(sides: tuple[StraightRunner, StraightRunner]) -> None:
    with Hybrid(*sides, policy(failures_in_a_row=10**6), root=NOWHERE, rng=random.Random(1)) as hybrid:
        assert interrupt_everywhere(lambda: hybrid.infer({"x": UNSURE}), KeyboardInterrupt, Told(hybrid)) > 30
