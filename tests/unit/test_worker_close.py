"""The end of a worker: what runs, what waits, and what comes after."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import wait

import pytest

from outrider_runtimes import worker as worker_module
from outrider_runtimes.errors import (
    QueueFull,
    RunnerClosed,
)
from support.doubling import WAIT_S, result, x
from support.workers import NEVER, occupy


def test_close_fails_what_waits_lets_the_running_call_end_and_frees_the_session(make_worker, gated):
    worker = make_worker()
    running = occupy(worker, gated)
    waiting = [worker.submit(x(i), NEVER) for i in range(3)]
    closing = threading.Thread(target=worker.close)
    closing.start()
    for future in waiting:
        with pytest.raises(RunnerClosed):
            future.result(WAIT_S)
    with pytest.raises(RunnerClosed):
        worker.submit(x(1), NEVER)
    gated.let.release()
    assert result(running) == 2.0
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert gated.closed.wait(WAIT_S)
    assert worker.depth == 0
    assert gated.seen == [1.0]


def test_close_twice_and_submit_after_it(make_worker):
    worker = make_worker()
    worker.close()
    worker.close()
    with pytest.raises(RunnerClosed):
        worker.submit(x(1), NEVER)


def test_close_does_not_wait_for_ever_for_a_stuck_call(make_worker, gated, monkeypatch):
    monkeypatch.setattr(worker_module, "CLOSE_TIMEOUT_S", 0.01)
    worker = make_worker()
    stuck = occupy(worker, gated)
    worker.close()
    assert not gated.closed.is_set()
    gated.let.release()
    assert result(stuck) == 2.0
    assert gated.closed.wait(WAIT_S)


def test_a_callback_may_close_and_may_submit(make_worker, gated):
    worker = make_worker()
    second = queue.SimpleQueue()
    first = occupy(worker, gated)
    first.add_done_callback(lambda _: second.put(worker.submit(x(5), NEVER)))
    gated.let.release(2)
    assert result(first) == 2.0
    assert result(second.get(timeout=WAIT_S)) == 10.0
    third = worker.submit(x(6), NEVER)
    third.add_done_callback(lambda _: worker.close())
    gated.let.release(2)
    assert gated.closed.wait(WAIT_S)


def test_closing_under_load_ends_every_future(make_worker):
    worker = make_worker(queue_size=1000)
    futures, started = [], threading.Event()

    def client():
        try:
            while True:
                futures.append(worker.submit(x(len(futures)), NEVER))
                if len(futures) > 100:
                    started.set()
        except (RunnerClosed, QueueFull):
            started.set()

    thread = threading.Thread(target=client)
    thread.start()
    assert started.wait(WAIT_S)
    worker.close()
    thread.join(WAIT_S)
    done, pending = wait(futures, WAIT_S)
    assert not pending
    assert all(future.exception() is None or isinstance(future.exception(), RunnerClosed) for future in done)
    assert worker.depth == 0
