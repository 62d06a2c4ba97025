"""A worker's call that is late, and one that is stuck: who is told, and who watches."""

from __future__ import annotations

import threading

import pytest

from outrider_runtimes import worker as worker_module
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    DeadlineExceeded,
    QueueFull,
)
from outrider_runtimes.worker import Worker
from support.doubling import WAIT_S, result, x
from support.workers import NEVER, occupy


def test_a_late_call_is_not_sick_a_stuck_one_is(make_worker, gated, clock):
    worker = make_worker()
    gated.during = lambda: setattr(clock, "now_s", clock.now_s + 0.3)
    result(worker.submit(x(1), NEVER))
    stuck = occupy(worker, gated, deadline=Deadline.after_ms(50.0, clock=clock))
    assert not worker.sick
    clock.now_s += 2.5  # past the deadline, eight times the usual, and long enough where nothing is usual yet
    assert not worker.sick
    clock.now_s += 0.6
    assert worker.sick
    assert not stuck.done()
    with pytest.raises(QueueFull, match="stuck"):
        worker.submit(x(1), NEVER)
    with pytest.raises(DeadlineExceeded, match="abandoned"):
        stuck.result(0)
    gated.let.release(2)  # it comes back after all: its answer is nobody's any more
    while worker.sick:
        pass
    assert result(worker.submit(x(4), NEVER)) == 8.0
    assert gated.seen == [1.0, 1.0, 4.0]


def test_before_any_call_was_measured_one_that_is_late_by_a_second_is_stuck(make_worker, gated, clock):
    worker = make_worker()
    occupy(worker, gated, deadline=Deadline.after_ms(50.0, clock=clock))
    clock.now_s += 0.9
    assert not worker.sick
    clock.now_s += 0.2
    assert worker.sick


def test_what_waits_behind_a_stuck_call_ends_when_that_is_seen(make_worker, gated, clock):
    worker = make_worker()
    occupy(worker, gated, deadline=Deadline.after_ms(50.0, clock=clock))
    waiting = [worker.submit(x(i), NEVER) for i in range(3)]
    clock.now_s += 60.0
    with pytest.raises(QueueFull, match="stuck"):
        worker.submit(x(1), NEVER)
    assert worker.depth == 1
    for future in waiting:
        with pytest.raises(QueueFull, match="stuck"):
            future.result(0)


def test_a_stuck_call_that_was_given_up_ends_what_waits_though_nobody_submits_again(
    make_worker, gated, clock, monkeypatch
):
    monkeypatch.setattr(worker_module, "LATE_LOOK_S", 0.001)
    worker = make_worker()
    stuck = occupy(worker, gated, deadline=Deadline.after_ms(50.0, clock=clock))
    waiting = [worker.submit(x(i), NEVER) for i in range(3)]
    clock.now_s += 60.0
    assert not stuck.cancel()  # as whoever waited for it does at its deadline
    for future in waiting:
        with pytest.raises(QueueFull, match="stuck"):
            future.result(WAIT_S)
    with pytest.raises(DeadlineExceeded, match="abandoned"):
        stuck.result(WAIT_S)
    assert worker.sick
    gated.let.release(2)
    while worker.sick:
        pass
    assert result(worker.submit(x(4), NEVER)) == 8.0


def watching() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "outrider-worker-watch"}


def test_a_late_call_that_was_given_up_and_comes_back_is_watched_by_one_thread_until_then(make_worker, gated, clock):
    worker = make_worker()
    gated.during = lambda: setattr(clock, "now_s", clock.now_s + 1.0)
    result(worker.submit(x(1), NEVER))  # a second is usual
    for _ in range(3):
        before = watching()
        late = occupy(worker, gated, deadline=Deadline.after_ms(50.0, clock=clock))
        waits, behind = worker.submit(x(2), NEVER), worker.submit(x(3), NEVER)
        clock.now_s += 1.0
        for _ in range(10):
            assert not late.cancel()
        assert len(watching() - before) == 1
        gated.let.release()
        assert result(late) == 2.0  # late, not stuck: who still waits for it has it
        assert gated.begun.acquire(timeout=WAIT_S)  # that of the second one
        while watching() - before:
            pass
        assert not behind.done()
        gated.let.release(2)
        assert (result(waits), result(behind)) == (4.0, 6.0)
        assert gated.begun.acquire(timeout=WAIT_S)


def test_a_call_is_watched_though_the_watch_over_the_one_before_has_not_gone_yet(
    make_worker, gated, clock, monkeypatch
):
    monkeypatch.setattr(worker_module, "LATE_LOOK_S", 0.001)
    watch, go, late = Worker._watch, threading.Event(), []

    def watch_late(self, job, ended):
        if not late:
            late.append(job)
            assert ended.wait(WAIT_S)
            assert go.wait(WAIT_S)
        watch(self, job, ended)

    monkeypatch.setattr(Worker, "_watch", watch_late)
    worker = make_worker()
    first = occupy(worker, gated, deadline=Deadline.after_ms(50.0, clock=clock))
    second = worker.submit(x(2), Deadline.after_ms(60.0, clock=clock))
    behind = worker.submit(x(3), NEVER)
    assert not first.cancel()
    gated.let.release()  # it comes back, and the next one runs
    assert gated.begun.acquire(timeout=WAIT_S)
    assert not second.cancel()
    go.set()
    clock.now_s += 60.0
    with pytest.raises(QueueFull, match="stuck"):
        behind.result(WAIT_S)
    assert late
    gated.let.release()


def test_a_call_without_a_deadline_is_not_watched_and_one_that_waits_is_cancelled(make_worker, gated, clock):
    worker = make_worker()
    first = occupy(worker, gated)
    second = worker.submit(x(2), Deadline.after_ms(50.0, clock=clock))
    before = watching()
    assert not first.cancel()
    assert second.cancel()
    assert watching() <= before
    gated.let.release(2)
    assert result(first) == 2.0


def test_a_call_that_outlives_close_is_sick(make_worker, gated, monkeypatch):
    monkeypatch.setattr(worker_module, "CLOSE_TIMEOUT_S", 0.01)
    worker = make_worker()
    occupy(worker, gated)
    assert not worker.sick
    worker.close()
    assert worker.sick


def test_a_call_without_a_deadline_is_never_sick(make_worker, gated, clock):
    worker = make_worker()
    occupy(worker, gated)
    clock.now_s += 1e6
    assert not worker.sick
