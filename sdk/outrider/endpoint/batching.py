"""Requests put together along ``N``, run in one call, and taken apart again: a Runner around a Runner."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from outrider.admit.curve import BatchCurve, BatchPlan, plan_batches, unbatchable
from outrider_runtimes.deadline import Clock, Deadline
from outrider_runtimes.errors import ConfigError, DeadlineExceeded, InferenceError, QueueFull, RunnerClosed
from outrider_runtimes.runner import Answer, moved_average
from outrider_runtimes.tensors import Array, Interface, Tensors, compile_check

if TYPE_CHECKING:
    from outrider.endpoint.models import BundleRunner
    from outrider.model import BundleInfo, Model

log = logging.getLogger(__name__)

QUEUE_SIZE = 128
# A batch is sent this much before the point at which its tightest deadline could just be met: threads wake late.
MARGIN_S = 0.002
WORTH_PASSING = 2.0  # times the rows/s, for which those that have time go before one that has little

_NOT_THE_BATCH = (QueueFull, RunnerClosed, DeadlineExceeded)  # what ends a batch without a fault of its rows


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class Waiting:
    """One request that waits, or runs in a batch.

    Attributes:
        arrays: in the interface's order, each [rows, ...].
        kind: what must be equal for two to go together: the sizes of all axes but N.
        alone: it was in a batch that failed.
    """

    arrays: list[Array]
    deadline: Deadline
    future: Future[Answer] = dataclasses.field(default_factory=Future)
    submitted_s: float = 0.0
    alone: bool = False
    rows: int = dataclasses.field(init=False)
    kind: tuple[tuple[int, ...], ...] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.arrays[0].shape[0]
        self.kind = tuple(array.shape[1:] for array in self.arrays)


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class _Batch:
    """``sending``: the runner has not yet been given it, so that whoever gives it still stands above on the stack."""

    jobs: list[Waiting]
    deadline: Deadline
    sent_s: float
    sending: bool = True

    @property
    def rows(self) -> int:
        return _rows(self.jobs)


class _Next(NamedTuple):
    """What is to be done now: a batch to send, or so long to wait; and whose time has passed."""

    batch: _Batch | None
    hold_s: float
    dead: list[Waiting]


def together(waiting: Sequence[Waiting], plan: BatchPlan, *, pace: float = 1.0) -> list[Waiting]:
    """Which of those that wait make the next batch, in the order in which they came.

    The first always; then those of its kind while they fit into ``plan.rows``, and while the batch can still be run in
    the time that the tightest of them has left. One with more rows than that goes alone, and so does one whose batch
    failed before. Under overload every first one has little time left, and to obey it would make all batches small and
    everything later still: where those with enough time for a full batch make one of twice the rows/s, they go first.

    Args:
        waiting: at least one.
        pace: how long calls take here over what was measured at install.
    """
    first = waiting[0]
    if first.alone:
        return [first]
    alike = [job for job in waiting if job.kind == first.kind and not job.alone]
    obliging = _grown(alike, plan, pace)
    full_s = _needed_s(min(plan.rows, _rows(alike)), plan, pace)
    patient = [job for job in alike if job.deadline.remaining_s() >= full_s]
    if not patient or patient[0] is first:
        return obliging
    full = _grown(patient, plan, pace)
    return full if _rate(full, plan) >= WORTH_PASSING * _rate(obliging, plan) else obliging


def hold_s(
    waiting: Sequence[Waiting],
    batch: Sequence[Waiting],
    plan: BatchPlan,
    *,
    company: int,
    waited_s: float,
    pace: float = 1.0,
) -> float:
    """How long the batch may wait for more rows, in seconds; 0 where it must be sent now.

    A batch waits only for as many rows as were about when the last one ended, so that a client which is alone never
    waits; no longer than the plan's delay; and never so long that the tightest deadline is missed by it.

    Args:
        waiting: all that wait.
        batch: those of them that ``together`` chose.
        company: how many rows waited or ran when the last batch ended.
        waited_s: how long the first one has waited.
    """
    rows = _rows(batch)
    left_out = sum(job.kind == batch[0].kind for job in waiting) > len(batch)
    if batch[0].alone or left_out or rows >= min(company, plan.rows):
        return 0.0
    spare_s = min(job.deadline.remaining_s() for job in waiting) - _needed_s(rows, plan, pace) - MARGIN_S
    return max(0.0, min(plan.delay_ms / 1e3 - waited_s, spare_s))


def _grown(alike: Sequence[Waiting], plan: BatchPlan, pace: float) -> list[Waiting]:
    chosen, rows, left_s = [alike[0]], alike[0].rows, alike[0].deadline.remaining_s()
    for job in alike[1:]:
        if rows + job.rows > plan.rows:
            break
        tightest_s = min(left_s, job.deadline.remaining_s())
        if _needed_s(rows + job.rows, plan, pace) <= tightest_s:
            chosen.append(job)
            rows, left_s = rows + job.rows, tightest_s
    return chosen


def _needed_s(rows: int, plan: BatchPlan, pace: float) -> float:
    return plan.curve.cost_ms(rows) * pace / 1e3


def _rate(jobs: Sequence[Waiting], plan: BatchPlan) -> float:
    """Rows per millisecond."""
    rows = _rows(jobs)
    return rows / plan.curve.cost_ms(rows) if rows else 0.0


def _rows(jobs: Iterable[Waiting]) -> int:
    return sum(job.rows for job in jobs)


def batched(model: Model, *, queue_size: int = QUEUE_SIZE) -> BundleRunner:
    """A Batcher around the model where what its install measured says that batching pays, else the model itself.

    Raises:
        StoreError: what the store kept of batches is malformed.
    """
    plan = plan_batches(None if model.batches is None else BatchCurve.from_dict(model.batches))
    if isinstance(plan, str):
        log.info("%s is not batched: %s", model.bundle.name, plan)
        return model
    log.info("%s is batched: up to %d rows, %.1f times the rows/s", model.bundle.name, plan.rows, plan.gain)
    return Batcher(model, plan, queue_size=queue_size)


class Batcher:
    """Runs the requests to one runner in batches along N. It owns the runner and closes it; safe from several threads.

    One batch is with the runner at a time; meanwhile the next one gathers. A request whose caller cancelled its future,
    or whose deadline has passed, is not run. When a batch fails, each of its requests is run once more alone, so that
    only the one to blame fails. What a request gets are its rows of the batch's outputs, bit for bit; they share memory
    with those of its neighbours.

    Args:
        runner: what runs. Inputs with values that are not finite do not get so far.
        plan: how many rows, and how long the first one waits; see ``outrider.admit.curve.plan_batches``.
        queue_size: how many requests may wait.
        clock: seconds, monotonic; that of the deadlines.

    Raises:
        ConfigError: requests at this interface cannot be put together.
    """

    def __init__(
        self, runner: BundleRunner, plan: BatchPlan, *, queue_size: int = QUEUE_SIZE, clock: Clock = time.monotonic
    ) -> None:
        if reason := unbatchable(runner.interface):
            raise ConfigError(f"requests cannot be batched: {reason}")
        self.plan = plan
        self._runner = runner
        self._queue_size = queue_size
        self._clock = clock
        self._names = [spec.name for spec in runner.interface.inputs]
        self._check = compile_check(runner.interface)
        self._changed = threading.Condition()  # guards the six below
        self._waiting: deque[Waiting] = deque()
        self._running: _Batch | None = None
        self._company = 0
        self._pace = 1.0
        self._closed = False
        self._wake_s = math.inf
        self._thread = threading.Thread(target=self._watch, name="outrider-batcher", daemon=True)
        self._thread.start()

    @property
    def interface(self) -> Interface:
        """What it takes and gives."""
        return self._runner.interface

    @property
    def bundle(self) -> BundleInfo:
        """Which bundle answers now."""
        return self._runner.bundle

    @property
    def variant(self) -> str:
        """Which variant of it."""
        return self._runner.variant

    @property
    def engine(self) -> str:
        """On which engine."""
        return self._runner.engine

    @property
    def expected_ms(self) -> None:
        """Not of one call: several are put together."""
        return None

    @property
    def sick(self) -> bool:
        """Whether a batch is taken for stuck in the engine."""
        return self._runner.sick

    def submit(self, inputs: Tensors, deadline: Deadline) -> Future[Answer]:
        """Take one request; see ``Runner.submit``. The answer's ``queue`` is the time that it waited here and there.

        Raises:
            InputError: what was passed is not what the interface says.
            QueueFull: too many wait.
            RunnerClosed: it was closed.
        """
        submitted_s = self._clock()
        arrays = self._check(inputs)
        future: Future[Answer] = Future()
        if deadline.passed:
            future.set_exception(DeadlineExceeded("the deadline had passed before the request was queued"))
            return future
        job = Waiting(arrays=arrays, deadline=deadline, future=future, submitted_s=submitted_s)
        with self._changed:
            if self._closed:
                raise RunnerClosed("the batcher was closed")
            dead = self._drop_dead() if len(self._waiting) >= self._queue_size else []
            full = len(self._waiting) >= self._queue_size
            if not full:
                self._waiting.append(job)
        _expire(dead)
        if full:
            raise QueueFull(f"{self._queue_size} requests wait, no more may")
        self._advance()
        return future

    def run_here(self, inputs: Tensors, deadline: Deadline) -> None:
        """Never: who comes first does not run what others are put together with."""

    def estimate_ms(self) -> float:
        """The rest of the batch that runs, full batches of what waits, and the one of a request submitted now."""
        with self._changed:
            running, pace = self._running, self._pace
            batches, rest = divmod(_rows(self._waiting) + 1, self.plan.rows)
        cost_ms = self.plan.curve.cost_ms
        left_ms = 0.0
        if running is not None:
            left_ms = max(0.0, cost_ms(running.rows) * pace - (self._clock() - running.sent_s) * 1e3)
        return left_ms + pace * (batches * cost_ms(self.plan.rows) + (cost_ms(rest) if rest else 0.0))

    def close(self) -> None:
        """Fail what waits with RunnerClosed and close the runner, which ends what runs. Again is harmless."""
        with self._changed:
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        _fail(waiting, RunnerClosed("the batcher was closed before the request was begun"))
        self._runner.close()
        if threading.current_thread() is not self._thread:  # a future's callback may close
            self._thread.join()

    def _watch(self) -> None:
        """The thread that sends what has waited long enough. What is due at once is sent by whoever makes it due."""
        while True:
            with self._changed:
                while not self._closed and (left_s := self._wake_s - self._clock()) > 0.0:
                    self._changed.wait(None if left_s == math.inf else left_s)
                if self._closed:
                    return
                self._wake_s = math.inf
            self._advance()

    def _advance(self) -> None:
        """Send the next batch if it is due; else see that the thread wakes when it may be."""
        with self._changed:
            found = self._next()
            if found.hold_s < math.inf:
                self._wake_in(found.hold_s)
        _expire(found.dead)
        if found.batch is not None:
            self._send(found.batch)

    def _wake_in(self, seconds: float) -> None:
        """Under the lock."""
        wake_s = self._clock() + seconds
        if wake_s < self._wake_s:
            self._wake_s = wake_s
            self._changed.notify()

    def _next(self) -> _Next:
        """Under the lock.

        A batch that is still with the runner after its last deadline is held against nobody: it may be stuck there,
        and a Worker finds that out only when it is asked for more.
        """
        if self._closed or not self._waiting:
            return _Next(None, math.inf, [])
        if self._running is not None and not self._running.deadline.passed:
            return _Next(None, self._running.deadline.remaining_s(), [])
        dead = self._drop_dead()
        if not self._waiting:
            return _Next(None, math.inf, dead)
        waiting, now_s = list(self._waiting), self._clock()
        jobs = together(waiting, self.plan, pace=self._pace)
        waited_s = now_s - jobs[0].submitted_s
        left_s = hold_s(waiting, jobs, self.plan, company=self._company, waited_s=waited_s, pace=self._pace)
        if left_s > 0.0:
            return _Next(None, left_s, dead)
        for job in jobs:
            self._waiting.remove(job)
        latest = max((job.deadline for job in jobs), key=lambda deadline: deadline.at_s)
        self._running = _Batch(jobs=jobs, deadline=latest, sent_s=now_s)
        return _Next(self._running, math.inf, dead)

    def _drop_dead(self) -> list[Waiting]:
        """Under the lock: take out the cancelled, and those whose time has passed, and return the latter."""
        dead: list[Waiting] = []
        kept: deque[Waiting] = deque()
        for job in self._waiting:
            if not job.future.cancelled():
                (dead if job.deadline.passed else kept).append(job)  # one look at the clock: it goes on meanwhile
        self._waiting = kept
        return dead

    def _send(self, batch: _Batch) -> None:
        # A job that failed in a batch is running already as its caller sees it.
        batch.jobs = [job for job in batch.jobs if job.alone or job.future.set_running_or_notify_cancel()]
        try:
            if not batch.jobs:
                raise CancelledError
            future = self._runner.submit(self._joined(batch.jobs), batch.deadline)
        except BaseException as error:
            self._failed(batch, error)
            self._ended(batch)
            if not isinstance(error, Exception):
                raise
        else:
            future.add_done_callback(lambda done: self._done(batch, done))
        batch.sending = False

    def _joined(self, jobs: Sequence[Waiting]) -> dict[str, Array]:
        if len(jobs) == 1:
            return dict(zip(self._names, jobs[0].arrays, strict=True))
        columns = zip(*(job.arrays for job in jobs), strict=True)
        return {name: np.concatenate(column) for name, column in zip(self._names, columns, strict=True)}

    def _done(self, batch: _Batch, future: Future[Answer]) -> None:
        """In the runner's thread, or in that of ``_send`` where the runner had ended it before."""
        try:
            self._share(batch, future.result())
        except BaseException as error:
            self._failed(batch, error)
        self._ended(batch)

    def _share(self, batch: _Batch, answer: Answer) -> None:
        now_s = self._clock()
        expected_s = self.plan.curve.cost_ms(batch.rows) / 1e3
        if expected_s > 0.0:
            with self._changed:
                self._pace = moved_average(self._pace, (now_s - batch.sent_s) / expected_s)
        for job, outputs in zip(batch.jobs, _taken_apart(answer.outputs, batch.jobs), strict=True):
            timing = answer.timing_ms._replace(
                queue=answer.timing_ms.queue + (batch.sent_s - job.submitted_s) * 1e3,
                total=(now_s - job.submitted_s) * 1e3,
            )
            job.future.set_result(Answer(outputs, timing, answer.served))

    def _failed(self, batch: _Batch, error: BaseException) -> None:
        if len(batch.jobs) <= 1 or isinstance(error, _NOT_THE_BATCH):
            _fail(batch.jobs, error)
            return
        with self._changed:
            closed = self._closed
            if not closed:
                for job in reversed(batch.jobs):
                    job.alone = True
                    self._waiting.appendleft(job)
        if closed:
            _fail(batch.jobs, error)

    def _ended(self, batch: _Batch) -> None:
        """The runner is free for the next one, unless the time of this one had passed and another runs already."""
        with self._changed:
            if self._running is not batch:
                return
            self._running = None
            self._company = batch.rows + _rows(self._waiting)
            if batch.sending:  # not deeper and deeper into the stack
                self._wake_in(0.0)
                return
        self._advance()


def _taken_apart(outputs: dict[str, Array], jobs: Sequence[Waiting]) -> list[dict[str, Array]]:
    """Each job's rows. Raises InferenceError where the batch has not as many rows as went in."""
    if len(jobs) == 1:
        return [outputs]
    rows = _rows(jobs)
    for name, array in outputs.items():
        if array.shape[0] != rows:
            raise InferenceError(f"output {name!r} of {rows} rows has {array.shape[0]}")
    ends = list(accumulate(job.rows for job in jobs))
    return [
        {name: array[end - job.rows : end] for name, array in outputs.items()}
        for job, end in zip(jobs, ends, strict=True)
    ]


def _expire(jobs: Iterable[Waiting]) -> None:
    _fail(jobs, DeadlineExceeded("the deadline passed while the request waited"))


def _fail(jobs: Iterable[Waiting], error: BaseException) -> None:
    for job in jobs:
        if job.alone or job.future.running() or job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)
