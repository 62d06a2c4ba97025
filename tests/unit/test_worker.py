"""The worker over a session whose calls the test lets through one by one; nothing here waits for time to pass."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import CancelledError, wait

import numpy as np
import pytest

from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    InferenceError,
    QueueFull,
    ShapeError,
)
from outrider_runtimes.worker import Worker
from support.doubling import WAIT_S, result, x
from support.workers import NEVER, occupy


def test_a_worker_answers_and_is_empty_again(make_worker):
    worker = make_worker()
    assert result(worker.submit(x(3), NEVER)) == 6.0
    assert worker.interface.inputs[0].name == "x"
    assert worker.depth == 0


def test_in_the_order_of_submission(make_worker, gated):
    worker = make_worker(queue_size=20)
    futures = [occupy(worker, gated, 0.0), *(worker.submit(x(i), NEVER) for i in range(1, 20))]
    gated.let.release(20)
    assert [result(future) for future in futures] == [2.0 * i for i in range(20)]
    assert gated.seen == [float(i) for i in range(20)]


def test_bad_input_is_raised_by_submit_and_nothing_is_queued(make_worker, gated):
    worker = make_worker()
    with pytest.raises(ShapeError):
        worker.submit({"x": np.zeros((1, 1), np.float32)}, NEVER)
    assert worker.depth == 0
    assert result(worker.submit(x(1), NEVER)) == 2.0
    assert gated.seen == [1.0]


def test_an_engines_error_is_the_futures_and_the_next_is_answered(make_worker):
    worker = make_worker()
    with pytest.raises(InferenceError, match="negative"):
        worker.submit(x(-1), NEVER).result(WAIT_S)
    assert result(worker.submit(x(1), NEVER)) == 2.0


@pytest.mark.parametrize("queue_size", [0, 1, 3])
def test_a_full_queue_refuses_at_once(make_worker, gated, queue_size):
    worker = make_worker(queue_size=queue_size)
    taken = [occupy(worker, gated), *(worker.submit(x(i), NEVER) for i in range(queue_size))]
    assert worker.depth == queue_size + 1
    with pytest.raises(QueueFull):
        worker.submit(x(9), NEVER)
    assert worker.depth == queue_size + 1
    gated.let.release(len(taken))
    wait(taken, WAIT_S)
    gated.let.release()
    assert result(worker.submit(x(5), NEVER)) == 10.0
    assert 9.0 not in gated.seen


def test_a_negative_queue_or_another_word_for_drop_is_refused():
    with pytest.raises(ConfigError, match="queue_size"):
        Worker(None, queue_size=-1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="drop is 'all', expected 'newest' or 'oldest'"):
        Worker(None, drop="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("queue_size", [1, 3])
def test_with_drop_oldest_the_newest_wait_and_the_oldest_is_told(make_worker, gated, queue_size):
    worker = make_worker(queue_size=queue_size, drop="oldest")
    first = occupy(worker, gated)
    waiting = [worker.submit(x(value), NEVER) for value in range(10, 20)]
    assert worker.depth == queue_size + 1
    for dropped in waiting[:-queue_size]:
        assert dropped.done()
        with pytest.raises(QueueFull, match="newer"):
            dropped.result()
    gated.let.release(queue_size + 1)
    assert result(first) == 2.0
    assert [result(kept) for kept in waiting[-queue_size:]] == [2.0 * v for v in range(20 - queue_size, 20)]
    assert worker.depth == 0


def test_drop_oldest_never_drops_the_call_that_runs(make_worker, gated):
    worker = make_worker(queue_size=0, drop="oldest")
    running = occupy(worker, gated)
    with pytest.raises(QueueFull, match="1 requests wait or run"):
        worker.submit(x(5), NEVER)
    gated.let.release()
    assert result(running) == 2.0


def test_a_dropped_request_that_was_cancelled_frees_its_place(make_worker, gated):
    worker = make_worker(queue_size=1, drop="oldest")
    occupy(worker, gated)
    cancelled = worker.submit(x(5), NEVER)
    assert cancelled.cancel()
    kept = worker.submit(x(6), NEVER)
    gated.let.release(2)
    assert result(kept) == 12.0
    assert worker.depth == 0


def test_work_whose_deadline_passed_in_the_queue_is_not_run(make_worker, gated, clock):
    worker = make_worker()
    first = occupy(worker, gated)
    late = worker.submit(x(7), Deadline.after_ms(50.0, clock=clock))
    in_time = worker.submit(x(8), Deadline.after_ms(5000.0, clock=clock))
    clock.now_s += 1.0
    gated.let.release(3)
    with pytest.raises(DeadlineExceeded):
        late.result(WAIT_S)
    assert (result(first), result(in_time)) == (2.0, 16.0)
    assert gated.seen == [1.0, 8.0]


def test_a_deadline_that_had_passed_before_is_a_failed_future(make_worker, gated, clock):
    worker = make_worker()
    future = worker.submit(x(1), Deadline(clock.now_s - 1.0, clock=clock))
    assert future.done()
    with pytest.raises(DeadlineExceeded):
        future.result()
    assert gated.seen == []


def test_a_cancelled_request_is_skipped(make_worker, gated):
    worker = make_worker()
    first = occupy(worker, gated)
    second, third = worker.submit(x(2), NEVER), worker.submit(x(3), NEVER)
    assert second.cancel()
    gated.let.release(2)
    assert (result(first), result(third)) == (2.0, 6.0)
    with pytest.raises(CancelledError):
        second.result()
    assert gated.seen == [1.0, 3.0]
    assert worker.depth == 0


def test_an_answered_requests_arrays_are_let_go(make_worker):
    worker = make_worker()
    array = np.array([1.0], np.float32)
    gone = weakref.ref(array)
    worker.submit({"x": array}, NEVER).result(WAIT_S)
    result(worker.submit(x(2), NEVER))
    del array
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("drop", ["newest", "oldest"])
def test_many_threads_lose_and_mix_nothing(make_worker, gated, drop):
    worker = make_worker(queue_size=4, drop=drop)
    answers, refused, lock = {}, [], threading.Lock()

    def client(start):
        for value in range(start, start + 200):
            try:
                answer = result(worker.submit(x(value), NEVER))
            except QueueFull:
                with lock:
                    refused.append(value)
            else:
                with lock:
                    answers[value] = answer

    threads = [threading.Thread(target=client, args=(i * 200,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(answers) + len(refused) == 1600
    assert all(answer == 2.0 * value for value, answer in answers.items())
    assert sorted(gated.seen) == sorted(float(value) for value in answers)
    assert worker.depth == 0
