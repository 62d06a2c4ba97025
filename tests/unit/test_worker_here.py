"""A call that the worker's caller runs in its own thread, and when it does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outrider.installer import TRIAL_CALLS, install
from outrider.model import load
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import DeadlineExceeded, InferenceError, InputError, QueueFull, RunnerClosed
from outrider_runtimes.runner import Answer
from outrider_runtimes.worker import Worker
from support.doubling import WAIT_S, Gate, GatedSession, model_of, result, x
from support.doubling import bound as bound_to
from support.realbundles import expected, images, make_real_bundle
from support.workers import NEVER, occupy


def number(answer: Answer | None) -> float:
    assert answer is not None
    return float(answer.outputs["y"][0])


def test_the_calling_thread_runs_it(make_worker, gated):
    threads: list[threading.Thread] = []
    gated.during = lambda: threads.append(threading.current_thread())
    worker = make_worker()
    assert number(worker.run_here(x(3), NEVER)) == 6.0
    assert result(worker.submit(x(4), NEVER)) == 8.0
    assert threads[0] is threading.current_thread() is not threads[1]


def test_where_a_call_runs_or_waits_it_is_to_be_submitted(make_worker, gated):
    worker = make_worker()
    running = occupy(worker, gated, 1.0)
    waiting = worker.submit(x(2), NEVER)
    assert worker.run_here(x(3), NEVER) is None
    gated.let.release(2)
    assert (result(running), result(waiting)) == (2.0, 4.0)
    gated.holding = False
    while (answer := worker.run_here(x(3), NEVER)) is None:  # its thread is on its way out of the call
        pass
    assert number(answer) == 6.0
    assert gated.seen == [1.0, 2.0, 3.0]


def test_what_is_wrong_is_raised_and_leaves_the_worker_as_it_was(make_worker, gated, clock):
    worker = make_worker()
    with pytest.raises(InputError):
        worker.run_here({}, NEVER)
    with pytest.raises(InferenceError, match="negative"):
        worker.run_here(x(-1), NEVER)
    with pytest.raises(DeadlineExceeded, match="had passed"):
        worker.run_here(x(1), Deadline(clock.now_s, clock=clock))
    assert worker.depth == 0 and not worker.sick
    assert number(worker.run_here(x(1), NEVER)) == 2.0
    worker.close()
    with pytest.raises(RunnerClosed):
        worker.run_here(x(1), NEVER)
    assert gated.seen == [-1.0, 1.0]


def test_it_counts_in_the_estimate(make_worker, gated, clock):
    gated.during = lambda: setattr(clock, "now_s", clock.now_s + 0.25)
    worker = make_worker()
    assert worker.estimate_ms() is None
    worker.run_here(x(1), NEVER)
    assert worker.estimate_ms() == pytest.approx(250.0)


@pytest.fixture
def stuck(make_worker, gated, clock) -> Iterator[tuple[Worker, threading.Thread]]:
    """A worker whose caller is stuck in the call that it runs, and that caller."""
    worker = make_worker(queue_size=1)
    gated.holding = True
    thread = threading.Thread(target=worker.run_here, args=(x(1), Deadline.after_ms(50.0, clock=clock)))
    thread.start()
    assert gated.begun.acquire(timeout=WAIT_S)
    yield worker, thread
    gated.let.release(10)
    thread.join(WAIT_S)


def test_others_see_that_it_is_stuck(stuck, gated, clock):
    worker, thread = stuck
    waiting = worker.submit(x(2), NEVER)
    assert not worker.sick and worker.run_here(x(3), NEVER) is None
    clock.now_s += 60.0
    assert worker.sick
    with pytest.raises(QueueFull, match="stuck"):
        worker.submit(x(4), NEVER)
    with pytest.raises(QueueFull, match="stuck"):
        waiting.result(WAIT_S)
    gated.let.release(2)
    thread.join(WAIT_S)
    assert not worker.sick
    assert result(worker.submit(x(5), NEVER)) == 10.0


def test_what_waits_behind_it_is_run_when_it_comes_back(stuck, gated):
    worker, _ = stuck
    waiting = worker.submit(x(2), NEVER)
    assert gated.seen == []
    gated.let.release(2)
    assert result(waiting) == 4.0
    assert gated.seen == [1.0, 2.0]


def test_close_waits_for_it_and_not_for_ever(stuck, gated, monkeypatch):
    worker, thread = stuck
    monkeypatch.setattr("outrider_runtimes.worker.CLOSE_TIMEOUT_S", 0.05)
    worker.close()
    assert worker.sick and not gated.closed.is_set()
    gated.let.release(2)
    thread.join(WAIT_S)
    assert gated.closed.wait(WAIT_S)


def test_of_many_threads_one_runs_at_a_time_and_none_is_lost():
    inside, most = 0, 0
    session = GatedSession()

    def during() -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        inside -= 1

    session.during = during
    worker = Worker(bound_to(session), queue_size=64)
    got: list[float] = []

    def ask(first: int) -> None:
        for value in range(first, first + 200):
            answer = worker.run_here(x(value), NEVER)
            got.append(result(worker.submit(x(value), NEVER)) if answer is None else number(answer))

    threads = [threading.Thread(target=ask, args=(200 * at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worker.close()
    assert sorted(got) == [2.0 * value for value in range(800)]
    assert most == 1


def test_a_model_whose_call_may_be_more_than_a_call_is_not_run_here():
    isolated = model_of(bound_to(Gate()), isolation="process")
    assert isolated.run_here(x(1), NEVER) is None
    isolated.close()
    with model_of(bound_to(Gate())) as plain:
        assert number(plain.run_here(x(1), NEVER)) == 2.0


@pytest.mark.slow
def test_a_bundle_on_trial_is_run_here_when_it_has_proved_itself(tmp_path: Path) -> None:
    for version in (1, 2):
        make_real_bundle(tmp_path / f"{version}.outrider", version=version, seed=version)
        install(tmp_path / f"{version}.outrider", state=tmp_path)
    named = {"image": images(1)}
    with load("tiny", state=tmp_path) as model:
        for _ in range(TRIAL_CALLS):
            assert model.run_here(named, NEVER) is None
            model.infer(named)
        answer = model.run_here(named, NEVER)
        assert answer is not None
        np.testing.assert_allclose(answer.outputs["logits"], expected(images(1), 2), atol=1e-3)
    with load("tiny", state=tmp_path) as model:
        assert model.run_here(named, NEVER) is not None


@pytest.mark.slow
def test_on_a_ladder_it_is_not_run_here(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider", formats=("onnx", "tflite"))
    rungs = ["tflite-float32", "onnx-float32"]
    with load(tmp_path / "b.outrider", state=tmp_path, ladder=rungs, latency_ms=1e6) as model:
        assert model.run_here({"image": images(1)}, NEVER) is None
