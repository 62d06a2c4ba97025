"""The batcher: which requests go together and when, by pure functions on a clock that the test holds, and the whole of
it over a runner that the test holds. Nothing here waits for time to pass."""

from __future__ import annotations

import dataclasses
import math
import threading
from concurrent.futures import CancelledError, Future

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.admit.curve import BatchCurve, BatchPlan, Point
from outrider.endpoint.batching import Batcher, Waiting, batched, hold_s, together
from outrider.model import BundleInfo
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    InferenceError,
    NotFiniteError,
    QueueFull,
    RunnerClosed,
    ShapeError,
)
from outrider_runtimes.runner import Answer, Timing
from outrider_runtimes.tensors import Interface, TensorSpec
from support.runners import CLASSES, INTERFACE, NumpyRunner

WAIT_S = 120.0
NEVER = Deadline(math.inf)
# One row 10 ms, eight 17 ms: bound by its weights.
POINTS = tuple(Point(rows=rows, best_ms=9.0 + rows, runs=9) for rows in (1, 2, 4, 8))
CURVE = BatchCurve(variant="v", engine="e", threads=1, points=POINTS)
PLAN = BatchPlan(rows=8, delay_ms=5.0, gain=4.7, curve=CURVE)


def now_s() -> float:
    return 100.0


def waiting(rows: int = 1, *, left_ms: float = math.inf, width: int = CLASSES, alone: bool = False) -> Waiting:
    deadline = Deadline(now_s() + left_ms / 1e3, clock=now_s)
    return Waiting(arrays=[np.zeros((rows, width), np.float32)], deadline=deadline, alone=alone)


def rows_of(jobs: list[Waiting]) -> list[int]:
    return [job.rows for job in jobs]


class TestWhichGoTogether:
    def test_those_that_came_first_up_to_the_most_rows(self) -> None:
        assert rows_of(together([waiting(3), waiting(4), waiting(2), waiting(1)], PLAN)) == [3, 4]

    def test_one_with_more_rows_than_that_goes_alone(self) -> None:
        assert rows_of(together([waiting(50), waiting(1)], PLAN)) == [50]
        assert rows_of(together([waiting(1), waiting(50), waiting(1)], PLAN)) == [1]

    def test_other_sizes_of_other_axes_do_not_mix(self) -> None:
        short, long = waiting(width=3), waiting(width=9)
        assert together([short, long, short], PLAN) == [short, short]

    def test_one_whose_batch_failed_goes_alone(self) -> None:
        assert rows_of(together([waiting(2, alone=True), waiting(1)], PLAN)) == [2]
        assert rows_of(together([waiting(1), waiting(2, alone=True), waiting(4)], PLAN)) == [1, 4]

    def test_a_batch_grows_only_while_its_tightest_deadline_can_be_met(self) -> None:
        assert rows_of(together([waiting(left_ms=12.5), *[waiting() for _ in range(6)]], PLAN)) == [1, 1, 1]
        assert rows_of(together([waiting(), waiting(3, left_ms=12.0), waiting()], PLAN)) == [1, 1]  # not in time anyway

    def test_a_pace_slower_than_at_install_counts(self) -> None:
        assert len(together([waiting(left_ms=13.5) for _ in range(8)], PLAN)) == 4
        assert len(together([waiting(left_ms=13.5) for _ in range(8)], PLAN, pace=1.2)) == 2

    def test_under_overload_those_with_time_left_go_first_where_that_gives_twice_the_rate(self) -> None:
        late, early = waiting(left_ms=10.5), [waiting(left_ms=50.0) for _ in range(8)]
        assert together([late, *early], PLAN) == early
        two = [waiting(left_ms=50.0) for _ in range(2)]
        assert together([late, *two], PLAN) == [late]

    @given(st.lists(st.tuples(st.integers(0, 12), st.floats(0.1, 100.0), st.sampled_from([3, 4])), min_size=1))
    def test_never_more_rows_than_allowed_never_mixed_never_twice(self, given_jobs: list) -> None:
        queue = [waiting(rows, left_ms=left_ms, width=width) for rows, left_ms, width in given_jobs]
        batch = together(queue, PLAN)
        assert batch and len({id(job) for job in batch}) == len(batch)
        assert len({job.kind for job in batch}) == 1
        assert sum(rows_of(batch)) <= PLAN.rows or len(batch) == 1
        order = [id(job) for job in queue]
        places = [order.index(id(job)) for job in batch]
        assert places == sorted(places)


class TestHowLongItWaits:
    def held_ms(self, *jobs: Waiting, company: int = 8, waited_ms: float = 0.0) -> float:
        queue = list(jobs)
        batch = together(queue, PLAN)
        return hold_s(queue, batch, PLAN, company=company, waited_s=waited_ms / 1e3) * 1e3

    def test_a_client_that_is_alone_never_waits(self) -> None:
        assert self.held_ms(waiting(), company=1) == 0.0
        assert self.held_ms(waiting(), company=0) == 0.0

    def test_where_others_were_about_it_waits_for_them_and_no_longer_than_the_delay(self) -> None:
        assert self.held_ms(waiting(), waiting()) == pytest.approx(5.0)
        assert self.held_ms(waiting(), waited_ms=3.0) == pytest.approx(2.0)
        assert self.held_ms(waiting(), waited_ms=6.0) == 0.0
        assert self.held_ms(waiting(3), waiting(5)) == 0.0
        assert self.held_ms(waiting(1), waiting(2), company=3) == 0.0

    def test_a_batch_that_cannot_grow_does_not_wait(self) -> None:
        assert self.held_ms(waiting(5), waiting(4)) == 0.0
        assert self.held_ms(waiting(1, alone=True)) == 0.0

    def test_it_is_sent_off_early_enough_for_the_tightest_deadline(self) -> None:
        assert self.held_ms(waiting(left_ms=14.0)) == pytest.approx(2.0)  # 10 to run, 2 of margin
        assert self.held_ms(waiting(), waiting(left_ms=14.0)) == pytest.approx(1.0)
        assert self.held_ms(waiting(left_ms=3.0)) == 0.0
        assert self.held_ms(waiting(), waiting(width=9, left_ms=13.0)) == pytest.approx(1.0)  # of another kind


class Recorded(NumpyRunner):
    """It notes the rows of each call, and fails a call that has a row of ``poison``."""

    poison = np.float32(13.0)
    sick = False

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.calls: list[int] = []

    def submit(self, inputs, deadline):
        self.calls.append(len(inputs["x"]))
        if (inputs["x"] == self.poison).any():
            future: Future[Answer] = Future()
            future.set_exception(InferenceError("poison"))
            return future
        return super().submit(inputs, deadline)


@pytest.fixture
def runner():
    made = Recorded(gain=2.0)
    yield made
    made.close()


@pytest.fixture
def batcher(runner):
    made = Batcher(runner, PLAN)
    yield made
    made.close()


def x(*values: float) -> dict[str, np.ndarray]:
    return {"x": np.repeat(np.array(values, np.float32)[:, None], CLASSES, axis=1)}


def test_while_one_batch_runs_the_next_gathers_and_each_gets_its_own_rows_bit_for_bit(batcher, runner) -> None:
    runner.hold()
    futures = [batcher.submit(x(*range(n, 2 * n)), NEVER) for n in (1, 2, 3, 1)]
    assert runner.calls == [1]  # nobody was about
    runner.let_go()
    for n, future in zip((1, 2, 3, 1), futures, strict=True):
        answer = future.result(WAIT_S)
        assert answer.outputs["logits"].tobytes() == (x(*range(n, 2 * n))["x"] * np.float32(2.0)).tobytes()
        assert answer.timing_ms.total >= answer.timing_ms.queue >= 0.0
    assert runner.calls == [1, 6]


def test_the_thread_sends_a_batch_whose_time_to_wait_is_over(batcher, runner) -> None:
    runner.hold()
    first = [batcher.submit(x(1.0), NEVER) for _ in range(4)]
    runner.let_go()
    for future in first:
        future.result(WAIT_S)
    assert batcher.submit(x(5.0), NEVER).result(WAIT_S).outputs["logits"][0, 0] == 10.0  # four were about, one came
    assert runner.calls == [1, 3, 1]


def test_one_bad_neighbour_fails_alone(batcher, runner) -> None:
    runner.hold()
    running = batcher.submit(x(0.0), NEVER)
    bad = batcher.submit(x(13.0), NEVER)
    good = [batcher.submit(x(float(n)), NEVER) for n in (1, 2)]
    runner.let_go()
    assert [future.result(WAIT_S).outputs["logits"][0, 0] for future in (running, *good)] == [0.0, 2.0, 4.0]
    with pytest.raises(InferenceError, match="poison"):
        bad.result(WAIT_S)
    assert runner.calls == [1, 3, 1, 1, 1]


def test_a_request_that_fails_alone_is_not_run_twice(batcher, runner) -> None:
    with pytest.raises(InferenceError, match="poison"):
        batcher.submit(x(13.0), NEVER).result(WAIT_S)
    assert runner.calls == [1]


def test_a_whole_queue_of_failures_ends_without_sinking_into_the_stack(runner) -> None:
    with_room = Batcher(runner, PLAN, queue_size=800)
    runner.hold()
    first = with_room.submit(x(0.0), NEVER)
    bad = [with_room.submit(x(13.0), NEVER) for _ in range(700)]  # two frames each would be too deep
    runner.let_go()
    first.result(WAIT_S)
    for future in bad:
        with pytest.raises(InferenceError):
            future.result(WAIT_S)
    with_room.close()


def test_what_the_runner_refuses_fails_all_of_the_batch_and_the_next_goes_on(batcher, runner) -> None:
    runner.hold()
    running = batcher.submit(x(0.0), NEVER)
    refused = [batcher.submit(x(1.0), NEVER) for _ in range(2)]
    runner.refusal = lambda: QueueFull("no room")
    runner.let_go()
    running.result(WAIT_S)
    for future in refused:
        with pytest.raises(QueueFull, match="no room"):
            future.result(WAIT_S)
    runner.refusal = None
    assert batcher.submit(x(3.0), NEVER).result(WAIT_S).outputs["logits"][0, 0] == 6.0


def test_a_batch_that_came_back_with_other_rows_is_nobodys_answer(batcher, runner) -> None:
    class Short(Recorded):
        def _finish(self, inputs, deadline, future):
            outputs = {"logits": inputs["x"][:1]}
            future.set_result(Answer(outputs, Timing()))

    short = Short()
    over = Batcher(short, PLAN)
    short.hold()
    futures = [over.submit(x(float(n)), NEVER) for n in range(3)]
    short.let_go()
    assert [future.result(WAIT_S).outputs["logits"][0, 0] for future in futures] == [0.0, 1.0, 2.0]
    assert short.calls == [1, 2, 1, 1]
    over.close()


def test_what_was_cancelled_or_came_too_late_is_not_run(runner) -> None:
    clock = [50.0]
    batcher = Batcher(runner, PLAN, clock=lambda: clock[0])

    def deadline(at_s: float) -> Deadline:
        return Deadline(at_s, clock=lambda: clock[0])

    with pytest.raises(DeadlineExceeded):
        batcher.submit(x(1.0), deadline(49.0)).result(WAIT_S)
    runner.hold()
    running = batcher.submit(x(1.0), deadline(1000.0))
    gone, late, good = (batcher.submit(x(float(n)), deadline(at_s)) for n, at_s in ((2, 900.0), (3, 60.0), (4, 900.0)))
    assert gone.cancel()
    clock[0] = 61.0
    runner.let_go()
    running.result(WAIT_S)
    assert good.result(WAIT_S).outputs["logits"][0, 0] == 8.0
    with pytest.raises(DeadlineExceeded, match="while the request waited"):
        late.result(WAIT_S)
    with pytest.raises(CancelledError):
        gone.result(WAIT_S)
    assert runner.calls == [1, 1]
    batcher.close()


def test_a_job_whose_time_passes_between_two_looks_at_the_clock_is_not_lost(runner) -> None:
    batcher = Batcher(runner, PLAN, queue_size=1)
    looks: list[float] = []

    def clock() -> float:
        looks.append(0.0 if len(looks) < 2 else 100.0)  # one look when it is submitted, one when the queue is full
        return looks[-1]

    runner.hold()
    running = batcher.submit(x(1.0), NEVER)
    late = batcher.submit(x(2.0), Deadline(50.0, clock=clock))
    with pytest.raises(QueueFull):
        batcher.submit(x(3.0), NEVER)
    runner.let_go()
    running.result(WAIT_S)
    with pytest.raises(DeadlineExceeded):
        late.result(WAIT_S)
    batcher.close()


def test_a_batch_stuck_beyond_its_deadline_does_not_keep_the_next_from_the_runner(runner) -> None:
    clock = [50.0]
    batcher = Batcher(runner, PLAN, clock=lambda: clock[0])
    runner.hold()
    stuck = batcher.submit(x(1.0), Deadline(60.0, clock=lambda: clock[0]))
    clock[0] = 61.0
    after = batcher.submit(x(2.0), Deadline(900.0, clock=lambda: clock[0]))
    assert runner.calls == [1, 1]
    runner.let_go()
    assert after.result(WAIT_S).outputs["logits"][0, 0] == 4.0
    with pytest.raises(DeadlineExceeded):
        stuck.result(WAIT_S)
    batcher.close()


def test_the_queue_is_bounded_and_those_who_left_make_room(runner) -> None:
    batcher = Batcher(runner, PLAN, queue_size=2)
    runner.hold()
    batcher.submit(x(0.0), NEVER)
    leaving, _ = (batcher.submit(x(1.0), NEVER) for _ in range(2))
    with pytest.raises(QueueFull, match="2 requests wait"):
        batcher.submit(x(2.0), NEVER)
    leaving.cancel()
    kept = batcher.submit(x(3.0), NEVER)
    runner.let_go()
    assert kept.result(WAIT_S).outputs["logits"][0, 0] == 6.0
    batcher.close()


def test_bad_input_is_refused_before_it_meets_a_neighbour(batcher, runner) -> None:
    with pytest.raises(ShapeError):
        batcher.submit({"x": np.zeros((1, 9), np.float32)}, NEVER)
    with pytest.raises(NotFiniteError):
        batcher.submit(x(math.nan), NEVER)
    assert runner.calls == []


def test_closing_ends_what_waits_frees_the_runner_and_ends_the_thread(runner) -> None:
    batcher = Batcher(runner, PLAN)
    runner.hold()
    batcher.submit(x(0.0), NEVER)
    waits = batcher.submit(x(1.0), NEVER)
    batcher.close()
    batcher.close()
    with pytest.raises(RunnerClosed):
        waits.result(WAIT_S)
    with pytest.raises(RunnerClosed):
        batcher.submit(x(2.0), NEVER)
    with pytest.raises(RunnerClosed):
        runner.submit(x(2.0), NEVER)
    assert not [t for t in threading.enumerate() if t is batcher._thread]


def test_the_estimate_counts_what_runs_and_what_waits(runner) -> None:
    batcher = Batcher(runner, PLAN, clock=now_s)
    never = Deadline(math.inf, clock=now_s)
    assert batcher.estimate_ms() == 10.0
    runner.hold()
    batcher.submit(x(0.0), never)
    assert batcher.estimate_ms() == 20.0
    for _ in range(9):
        batcher.submit(x(1.0), never)
    assert batcher.estimate_ms() == 10.0 + 17.0 + 11.0
    batcher.close()


def test_it_says_of_itself_what_its_runner_does(batcher, runner) -> None:
    runner.bundle, runner.variant, runner.engine = object(), "onnx-int8", "onnxruntime"
    assert (batcher.bundle, batcher.variant, batcher.engine) == (runner.bundle, "onnx-int8", "onnxruntime")
    assert batcher.interface is INTERFACE and batcher.plan is PLAN and not batcher.sick


@pytest.mark.parametrize("pays", [True, False])
def test_a_model_is_batched_where_its_install_measured_that_it_pays(runner, pays: bool) -> None:
    runner.bundle = BundleInfo(name="m", version=1, digest="d", verified=False)
    points = POINTS if pays else POINTS[:1]
    runner.batches = dataclasses.replace(CURVE, points=points).to_dict()
    found = batched(runner, queue_size=5)
    assert isinstance(found, Batcher) == pays
    if pays:
        assert found.plan.rows == 8 and found.plan.delay_ms == 5.0
        found.close()
    else:
        assert found is runner


def test_an_interface_without_a_batch_axis_is_refused() -> None:
    scalar = TensorSpec(name="x", dtype="float32", shape=())
    runner = NumpyRunner(interface=Interface(inputs=(scalar,), outputs=INTERFACE.outputs))
    with pytest.raises(ConfigError, match="no free axis N"):
        Batcher(runner, PLAN)
    runner.close()


def test_from_many_threads_every_request_gets_its_own_answer(batcher) -> None:
    failures: list[object] = []
    answered = threading.Semaphore(0)

    def client(number: int) -> None:
        for turn in range(50):
            wanted = 100.0 * (number + 1) + turn
            got = batcher.submit(x(wanted), NEVER).result(WAIT_S).outputs["logits"]
            if got.shape != (1, CLASSES) or (got != wanted * 2).any():
                failures.append((wanted, got))
            answered.release()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not failures
    assert all(answered.acquire(blocking=False) for _ in range(8 * 50))
