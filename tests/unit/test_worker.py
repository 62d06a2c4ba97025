"""The worker over a session whose calls the test lets through one by one; nothing here waits for time to pass."""

from __future__ import annotations

import gc
import math
import queue
import threading
import weakref
from concurrent.futures import CancelledError, wait

import numpy as np
import pytest

from outrider_runtimes import worker as worker_module
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.engines import FileTensor
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    InferenceError,
    QueueFull,
    RunnerClosed,
    ShapeError,
)
from outrider_runtimes.tensors import Binding, Interface, TensorBinding, TensorSpec
from outrider_runtimes.worker import Worker

WAIT_S = 20.0
NEVER = Deadline(math.inf)


class ManualClock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


class GatedSession:
    """Doubles x. While ``gated``, a call says that it has begun and waits to be let through."""

    inputs = (FileTensor(name="x", dtype="float32", shape=(None,)),)
    outputs = (FileTensor(name="y", dtype="float32", shape=(None,)),)
    input_names, output_names = ("x",), ("y",)

    def __init__(self):
        self.gated, self.begun, self.let = False, threading.Semaphore(0), threading.Semaphore(0)
        self.seen, self.closed, self.during = [], threading.Event(), lambda: None

    def run(self, inputs):
        if self.gated:
            self.begun.release()
            assert self.let.acquire(timeout=WAIT_S)
        self.during()
        self.seen.append(float(inputs[0][0]))
        if inputs[0][0] < 0:
            raise InferenceError("a negative number")
        return [inputs[0] * 2]

    def close(self):
        self.closed.set()


@pytest.fixture
def session():
    return GatedSession()


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def make(session, clock):
    workers = []

    def build(**options):
        interface = Interface(
            inputs=(TensorSpec(name="x", dtype="float32", shape=(None,), axes="N"),),
            outputs=(TensorSpec(name="y", dtype="float32", shape=(None,), axes="N"),),
        )
        bound = [TensorBinding(name=n, file_name=n, dtype="float32", shape=(None,)) for n in "xy"]
        binding = Binding(inputs=(bound[0],), outputs=(bound[1],))
        workers.append(Worker(BoundSession(session, interface, binding), clock=clock, **options))
        return workers[-1]

    yield build
    session.let.release(1000)
    for worker in workers:
        worker.close()


def x(value):
    return {"x": np.array([value], np.float32)}


def result(future):
    return float(future.result(WAIT_S).outputs["y"][0])


def occupy(worker, session, value=1.0, deadline=NEVER):
    """A request that runs until ``session.let`` is released."""
    session.gated = True
    future = worker.submit(x(value), deadline)
    assert session.begun.acquire(timeout=WAIT_S)
    return future


def test_it_answers(make):
    worker = make()
    assert result(worker.submit(x(3), NEVER)) == 6.0
    assert worker.interface.inputs[0].name == "x"
    assert worker.depth == 0


def test_in_the_order_of_submission(make, session):
    worker = make(queue_size=20)
    futures = [occupy(worker, session, 0.0), *(worker.submit(x(i), NEVER) for i in range(1, 20))]
    session.let.release(20)
    assert [result(future) for future in futures] == [2.0 * i for i in range(20)]
    assert session.seen == [float(i) for i in range(20)]


def test_bad_input_is_raised_by_submit_and_nothing_is_queued(make, session):
    worker = make()
    with pytest.raises(ShapeError):
        worker.submit({"x": np.zeros((1, 1), np.float32)}, NEVER)
    assert worker.depth == 0
    assert result(worker.submit(x(1), NEVER)) == 2.0
    assert session.seen == [1.0]


def test_an_engines_error_is_the_futures_and_the_next_is_answered(make):
    worker = make()
    with pytest.raises(InferenceError, match="negative"):
        worker.submit(x(-1), NEVER).result(WAIT_S)
    assert result(worker.submit(x(1), NEVER)) == 2.0


@pytest.mark.parametrize("queue_size", [0, 1, 3])
def test_a_full_queue_refuses_at_once(make, session, queue_size):
    worker = make(queue_size=queue_size)
    taken = [occupy(worker, session), *(worker.submit(x(i), NEVER) for i in range(queue_size))]
    assert worker.depth == queue_size + 1
    with pytest.raises(QueueFull):
        worker.submit(x(9), NEVER)
    assert worker.depth == queue_size + 1
    session.let.release(len(taken))
    wait(taken, WAIT_S)
    session.let.release()
    assert result(worker.submit(x(5), NEVER)) == 10.0
    assert 9.0 not in session.seen


def test_a_negative_queue_or_another_word_for_drop_is_refused():
    with pytest.raises(ConfigError, match="queue_size"):
        Worker(None, queue_size=-1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="drop is 'all', expected 'newest' or 'oldest'"):
        Worker(None, drop="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("queue_size", [1, 3])
def test_with_drop_oldest_the_newest_wait_and_the_oldest_is_told(make, session, queue_size):
    worker = make(queue_size=queue_size, drop="oldest")
    first = occupy(worker, session)
    waiting = [worker.submit(x(value), NEVER) for value in range(10, 20)]
    assert worker.depth == queue_size + 1
    for dropped in waiting[:-queue_size]:
        assert dropped.done()
        with pytest.raises(QueueFull, match="newer"):
            dropped.result()
    session.let.release(queue_size + 1)
    assert result(first) == 2.0
    assert [result(kept) for kept in waiting[-queue_size:]] == [2.0 * v for v in range(20 - queue_size, 20)]
    assert worker.depth == 0


def test_drop_oldest_never_drops_the_call_that_runs(make, session):
    worker = make(queue_size=0, drop="oldest")
    running = occupy(worker, session)
    with pytest.raises(QueueFull, match="1 requests wait or run"):
        worker.submit(x(5), NEVER)
    session.let.release()
    assert result(running) == 2.0


def test_a_dropped_request_that_was_cancelled_frees_its_place(make, session):
    worker = make(queue_size=1, drop="oldest")
    occupy(worker, session)
    cancelled = worker.submit(x(5), NEVER)
    assert cancelled.cancel()
    kept = worker.submit(x(6), NEVER)
    session.let.release(2)
    assert result(kept) == 12.0
    assert worker.depth == 0


def test_work_whose_deadline_passed_in_the_queue_is_not_run(make, session, clock):
    worker = make()
    first = occupy(worker, session)
    late = worker.submit(x(7), Deadline.after_ms(50.0, clock=clock))
    in_time = worker.submit(x(8), Deadline.after_ms(5000.0, clock=clock))
    clock.now_s += 1.0
    session.let.release(3)
    with pytest.raises(DeadlineExceeded):
        late.result(WAIT_S)
    assert (result(first), result(in_time)) == (2.0, 16.0)
    assert session.seen == [1.0, 8.0]


def test_a_deadline_that_had_passed_before_is_a_failed_future(make, session, clock):
    worker = make()
    future = worker.submit(x(1), Deadline(clock.now_s - 1.0, clock=clock))
    assert future.done()
    with pytest.raises(DeadlineExceeded):
        future.result()
    assert session.seen == []


def test_a_cancelled_request_is_skipped(make, session):
    worker = make()
    first = occupy(worker, session)
    second, third = worker.submit(x(2), NEVER), worker.submit(x(3), NEVER)
    assert second.cancel()
    session.let.release(2)
    assert (result(first), result(third)) == (2.0, 6.0)
    with pytest.raises(CancelledError):
        second.result()
    assert session.seen == [1.0, 3.0]
    assert worker.depth == 0


def test_the_estimate_is_depth_times_a_moving_average(make, session, clock):
    worker = make()
    assert worker.estimate_ms() is None

    def takes(seconds):
        session.during = lambda: setattr(clock, "now_s", clock.now_s + seconds)

    takes(0.1)
    result(worker.submit(x(1), NEVER))
    assert worker.estimate_ms() == pytest.approx(100.0)
    takes(0.2)
    result(worker.submit(x(1), NEVER))
    assert worker.estimate_ms() == pytest.approx(120.0)
    occupy(worker, session)
    worker.submit(x(1), NEVER)
    assert worker.estimate_ms() == pytest.approx(3 * 120.0)


def test_a_failed_call_does_not_count_in_the_estimate(make):
    worker = make()
    with pytest.raises(InferenceError):
        worker.submit(x(-1), NEVER).result(WAIT_S)
    assert worker.estimate_ms() is None


def test_the_answer_says_how_long_it_waited(make, session, clock):
    worker = make()
    occupy(worker, session)
    waits = worker.submit(x(1), NEVER)
    clock.now_s += 0.25
    session.let.release(2)
    timing = waits.result(WAIT_S).timing_ms
    assert timing.queue == pytest.approx(250.0)
    assert timing.total >= timing.queue


def test_a_late_call_is_not_sick_a_stuck_one_is(make, session, clock):
    worker = make()
    session.during = lambda: setattr(clock, "now_s", clock.now_s + 0.1)
    result(worker.submit(x(1), NEVER))
    stuck = occupy(worker, session, deadline=Deadline.after_ms(50.0, clock=clock))
    assert not worker.sick
    clock.now_s += 0.5  # past the deadline, five times the usual
    assert not worker.sick
    clock.now_s += 0.6
    assert worker.sick
    assert not stuck.done()
    with pytest.raises(QueueFull, match="stuck"):
        worker.submit(x(1), NEVER)
    with pytest.raises(DeadlineExceeded, match="abandoned"):
        stuck.result(0)
    session.let.release(2)  # it comes back after all: its answer is nobody's any more
    while worker.sick:
        pass
    assert result(worker.submit(x(4), NEVER)) == 8.0
    assert session.seen == [1.0, 1.0, 4.0]


def test_what_waits_behind_a_stuck_call_ends_when_that_is_seen(make, session, clock):
    worker = make()
    occupy(worker, session, deadline=Deadline.after_ms(50.0, clock=clock))
    waiting = [worker.submit(x(i), NEVER) for i in range(3)]
    clock.now_s += 60.0
    with pytest.raises(QueueFull, match="stuck"):
        worker.submit(x(1), NEVER)
    assert worker.depth == 1
    for future in waiting:
        with pytest.raises(QueueFull, match="stuck"):
            future.result(0)


def test_a_call_that_outlives_close_is_sick(make, session, monkeypatch):
    monkeypatch.setattr(worker_module, "CLOSE_TIMEOUT_S", 0.01)
    worker = make()
    occupy(worker, session)
    assert not worker.sick
    worker.close()
    assert worker.sick


def test_a_call_without_a_deadline_is_never_sick(make, session, clock):
    worker = make()
    occupy(worker, session)
    clock.now_s += 1e6
    assert not worker.sick


def test_close_fails_what_waits_lets_the_running_call_end_and_frees_the_session(make, session):
    worker = make()
    running = occupy(worker, session)
    waiting = [worker.submit(x(i), NEVER) for i in range(3)]
    closing = threading.Thread(target=worker.close)
    closing.start()
    for future in waiting:
        with pytest.raises(RunnerClosed):
            future.result(WAIT_S)
    with pytest.raises(RunnerClosed):
        worker.submit(x(1), NEVER)
    session.let.release()
    assert result(running) == 2.0
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert session.closed.is_set()
    assert worker.depth == 0
    assert session.seen == [1.0]


def test_close_twice_and_submit_after_it(make):
    worker = make()
    worker.close()
    worker.close()
    with pytest.raises(RunnerClosed):
        worker.submit(x(1), NEVER)


def test_close_does_not_wait_for_ever_for_a_stuck_call(make, session, monkeypatch):
    monkeypatch.setattr(worker_module, "CLOSE_TIMEOUT_S", 0.01)
    worker = make()
    stuck = occupy(worker, session)
    worker.close()
    assert not session.closed.is_set()
    session.let.release()
    assert result(stuck) == 2.0
    assert session.closed.wait(WAIT_S)


def test_a_callback_may_close_and_may_submit(make, session):
    worker = make()
    second = queue.SimpleQueue()
    first = occupy(worker, session)
    first.add_done_callback(lambda _: second.put(worker.submit(x(5), NEVER)))
    session.let.release(2)
    assert result(first) == 2.0
    assert result(second.get(timeout=WAIT_S)) == 10.0
    third = worker.submit(x(6), NEVER)
    third.add_done_callback(lambda _: worker.close())
    session.let.release(2)
    assert session.closed.wait(WAIT_S)


def test_an_answered_requests_arrays_are_let_go(make):
    worker = make()
    array = np.array([1.0], np.float32)
    gone = weakref.ref(array)
    worker.submit({"x": array}, NEVER).result(WAIT_S)
    result(worker.submit(x(2), NEVER))
    del array
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("drop", ["newest", "oldest"])
def test_many_threads_lose_and_mix_nothing(make, session, drop):
    worker = make(queue_size=4, drop=drop)
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
    assert sorted(session.seen) == sorted(float(value) for value in answers)
    assert worker.depth == 0


def test_closing_under_load_ends_every_future(make):
    worker = make(queue_size=1000)
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
