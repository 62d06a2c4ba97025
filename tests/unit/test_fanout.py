"""A batch over several runners: split and collected in order, whatever one of them does."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider import fanout
from outrider.fanout import (
    INTRODUCTION_SHARE,
    MOST_PART_BYTES,
    PARTS_AN_ENDPOINT,
    Ledger,
    Share,
    fan_out,
    introduce,
    split,
)
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    InputError,
    InterfaceMismatch,
    QueueFull,
    RemoteRefused,
    RemoteUnavailable,
    RunnerError,
)
from outrider_runtimes.tensors import Interface, TensorSpec
from support.runners import CLASSES, INTERFACE, OTHER_INTERFACE, NumpyRunner

PATIENCE_MS = 60_000.0
X = np.random.default_rng(0).random((101, CLASSES), np.float32)


@pytest.fixture
def runners() -> Iterator[list[NumpyRunner]]:
    made = [NumpyRunner(gain=2.0) for _ in range(3)]
    yield made
    for runner in made:
        runner.close()


def answered(runners, inputs=X, *, deadline_ms=PATIENCE_MS):
    return fan_out(runners, INTERFACE, {"x": inputs}, Deadline.after_ms(deadline_ms))


def fail(runner, how, times, error) -> None:
    """So often by its ``error`` or its ``refusal``, and then no more."""
    left = times

    def failing():
        nonlocal left
        left -= 1
        setattr(runner, how, failing if left else None)
        return error

    setattr(runner, how, failing)


@given(st.integers(0, 5000), st.integers(1, 9), st.integers(0, 3 * MOST_PART_BYTES))
def test_a_batch_is_split_whole_in_order_and_evenly(rows, endpoints, row_bytes):
    parts = split(rows, endpoints=endpoints, row_bytes=row_bytes)
    assert [at for part in parts for at in range(part.start, part.stop)] == list(range(rows))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 1 or max(sizes) * row_bytes <= MOST_PART_BYTES + row_bytes
    if rows:
        assert min(sizes) >= 1
        assert len(parts) >= min(rows, endpoints * PARTS_AN_ENDPOINT)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32))
def test_whatever_fails_every_part_is_answered_once_and_none_is_lost(parts, endpoints, seed):
    """Endpoints answer, fail and stall in any order."""
    chance = random.Random(seed)
    ledger = Ledger(waiting=deque(range(parts)))
    held: list[tuple[int, int]] = []
    first_answers: list[int] = []
    while len(ledger.done) < parts:
        endpoint = chance.randrange(endpoints)
        if (part := ledger.take(endpoint)) is not None:
            assert part not in ledger.done
            assert (part, endpoint) not in held
            held.append((part, endpoint))
        assert held, "nobody holds a part and none can be taken"
        if chance.random() < 0.7:
            part, endpoint = held.pop(chance.randrange(len(held)))
            if chance.random() < 0.5:
                ledger.failed(part, endpoint)
            elif ledger.answered(part):
                first_answers.append(part)
    assert sorted(first_answers) == list(range(parts))


def test_an_idle_endpoint_takes_the_oldest_part_that_others_hold_and_none_twice():
    ledger = Ledger(waiting=deque(range(2)))
    assert [ledger.take(0), ledger.take(0)] == [0, 1]
    assert [ledger.take(1), ledger.take(1), ledger.take(1), ledger.take(0)] == [0, 1, None, None]
    ledger.failed(0, 0)
    assert not ledger.waiting  # the other still has it
    assert ledger.answered(0)
    assert not ledger.answered(0)
    ledger.failed(0, 1)
    assert not ledger.waiting
    ledger.failed(1, 0)
    ledger.failed(1, 1)
    assert list(ledger.waiting) == [1]


@pytest.mark.parametrize("rows", [1, 7, 101])
def test_rows_come_back_in_order_each_from_one_runner(runners, rows):
    found = answered(runners, X[:rows])
    np.testing.assert_array_equal(found.outputs["logits"], 2.0 * X[:rows])
    assert sum(share.rows for share in found.shares) == rows
    assert all((share.failures, share.said) == (0, "") for share in found.shares)


def test_what_one_does_not_answer_another_does(runners):
    asked = 0

    def error():
        nonlocal asked
        asked += 1
        if asked > fanout.FLYING:  # it is asked again: one of its failures has been heard of
            runners[2].let_go()
        return RemoteUnavailable("connection refused")

    runners[0].error = error
    runners[1].refusal = lambda: QueueFull("too many")
    runners[2].hold()
    found = answered(runners)
    np.testing.assert_array_equal(found.outputs["logits"], 2.0 * X)
    assert [share.rows for share in found.shares] == [0, 0, 101]
    assert found.shares[0].said == "connection refused"
    assert found.shares[1].said == "too many"
    assert found.shares[0].failures >= 1


def test_one_that_hangs_is_waited_for_by_nobody(runners):
    runners[1].hold()
    found = answered(runners)
    np.testing.assert_array_equal(found.outputs["logits"], 2.0 * X)
    assert found.shares[1].rows == 0
    assert found.shares[0].rows + found.shares[2].rows == 101


def test_endpoints_that_have_enough_to_do_are_asked_again_for_as_long_as_there_is_time(monkeypatch):
    monkeypatch.setattr(fanout, "REST_S", 1e-4)
    monkeypatch.setattr(fanout, "REST_MOST_S", 1e-3)
    runner = NumpyRunner(gain=2.0)
    fail(runner, "error", 10 * fanout.HOPELESS_AFTER, RemoteRefused("too many wait", status=429, retry_after_s=1.0))
    found = answered([runner])
    np.testing.assert_array_equal(found.outputs["logits"], 2.0 * X)
    runner.refusal = lambda: RemoteRefused("too many wait", status=503, retry_after_s=1.0)
    with pytest.raises(DeadlineExceeded):
        answered([runner], deadline_ms=50.0)
    runner.refusal = None
    runner.error = lambda: RemoteRefused("no such thing", status=503)
    with pytest.raises(RunnerError, match="no such thing"):
        answered([runner])
    runner.close()


class CreepingClock:
    """Seconds that pass a little with every look, and while somebody sleeps."""

    def __init__(self, step_s: float) -> None:
        self.now_s, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.mark.parametrize("step_s", [0.003, 0.03, 0.07, 0.15, 0.5])
def test_a_rest_that_ends_between_two_looks_at_the_clock_costs_nobody_the_deadline(monkeypatch, step_s):
    clock = CreepingClock(step_s)
    monkeypatch.setattr(fanout.time, "sleep", clock.sleep)
    runner = NumpyRunner(gain=2.0)
    fail(runner, "refusal", 2000, QueueFull("too many wait"))  # more often than the rests can double
    found = fan_out([runner], INTERFACE, {"x": X}, Deadline(1e6, clock=clock), clock=clock)
    np.testing.assert_array_equal(found.outputs["logits"], 2.0 * X)
    assert found.shares[0].failures == 2000
    runner.close()


def test_one_endpoint_alone_that_fails_for_a_moment_is_asked_again():
    runner = NumpyRunner(gain=2.0)
    fail(runner, "error", 3, RemoteUnavailable("restarting"))
    found = answered([runner])
    np.testing.assert_array_equal(found.outputs["logits"], 2.0 * X)
    assert found.shares[0] == Share(rows=101, failures=3, said="restarting")
    runner.close()


def test_all_that_fail_are_named_by_the_last_failure(runners):
    for runner in runners:
        runner.error = lambda: RemoteUnavailable("connection refused", hint="is it running?")
    with pytest.raises(
        RunnerError, match=r"every endpoint fails, 0 of 24 parts are answered: connection refused"
    ) as caught:
        answered(runners)
    assert caught.value.hint == "is it running?"


def test_a_batch_that_takes_too_long_ends_by_its_deadline(runners):
    for runner in runners:
        runner.hold()
    with pytest.raises(DeadlineExceeded, match="0 of 24 parts are answered"):
        answered(runners, deadline_ms=80.0)


@pytest.mark.parametrize("status", [400, 413])
def test_a_request_that_is_wrong_everywhere_is_not_tried_everywhere(runners, status):
    for runner in runners:
        runner.error = lambda: RemoteRefused("no", status=status)
    with pytest.raises(RemoteRefused, match="no"):
        answered(runners)
    assert sum(runner.submitted for runner in runners) <= 2 * len(runners)


def test_bad_input_is_refused_before_anything_is_sent(runners):
    with pytest.raises(InputError):
        answered(runners, X[:, :2])
    assert not any(runner.submitted for runner in runners)


def test_an_answer_without_a_batch_cannot_be_joined(runners):
    whole = Interface(
        inputs=INTERFACE.inputs, outputs=(TensorSpec(name="mean", dtype="float32", shape=(CLASSES,), axes="C"),)
    )
    with pytest.raises(ConfigError, match="a batch cannot be split: 'mean' has no axis N"):
        fan_out(runners, whole, {"x": X}, Deadline.after_ms(PATIENCE_MS))


def test_what_has_no_batch_goes_along_with_every_part():
    scaled = Interface(
        inputs=(*INTERFACE.inputs, TensorSpec(name="unused", dtype="float32", shape=(3,), axes="C")),
        outputs=INTERFACE.outputs,
    )
    runners = [NumpyRunner(interface=scaled) for _ in range(2)]
    inputs = {"x": X, "unused": np.ones(3, np.float32)}
    found = fan_out(runners, scaled, inputs, Deadline.after_ms(PATIENCE_MS))
    np.testing.assert_array_equal(found.outputs["logits"], X)
    for runner in runners:
        runner.close()


class There(NumpyRunner):
    """One that says what it takes when it is asked, as a Remote; or why it does not."""

    def __init__(self, url, *, bundle="a" * 64, interface=INTERFACE, away=None):
        super().__init__(interface=interface)
        self.url, self.bundle, self._away = url, bundle, away

    def connect(self, deadline):
        assert deadline.remaining_s() <= INTRODUCTION_SHARE * PATIENCE_MS / 1e3
        if self._away is not None:
            raise self._away
        return self.interface


def introduced(*remotes):
    try:
        return introduce(remotes, Deadline.after_ms(PATIENCE_MS))
    finally:
        for remote in remotes:
            remote.close()


def test_one_that_is_away_is_named_and_the_others_go_on():
    gone = RemoteUnavailable("connection refused")
    interface, away = introduced(There("http://a", away=gone), There("http://b"), There("http://c"))
    assert interface == INTERFACE
    assert away == {0: gone}
    with pytest.raises(RemoteUnavailable, match="connection refused"):
        introduced(There("http://a", away=DeadlineExceeded("late")), There("http://b", away=gone))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"interface": OTHER_INTERFACE}, "http://b and http://a have different interfaces"),
        ({"bundle": "b" * 64}, "http://b and http://a serve different bundles"),
    ],
)
def test_one_batch_is_answered_by_one_model(other, message):
    with pytest.raises(InterfaceMismatch, match=message):
        introduced(There("http://a"), There("http://b", **other))


def test_where_there_is_no_endpoint_that_is_said():
    with pytest.raises(ConfigError, match="no endpoint to ask"):
        introduce([], Deadline.after_ms(1000.0))
    with pytest.raises(ConfigError, match="no endpoint to ask"):
        fan_out([], INTERFACE, {"x": np.zeros((1, CLASSES), np.float32)}, Deadline.after_ms(1000.0))
