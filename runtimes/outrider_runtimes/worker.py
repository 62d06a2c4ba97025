"""Requests to one local session, one after the other, in a thread of its own behind a bounded queue."""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import NamedTuple, Protocol, get_args

from outrider_runtimes._forked import made_before_fork, tell_of_fork
from outrider_runtimes.deadline import Clock, Deadline
from outrider_runtimes.errors import ConfigError, DeadlineExceeded, QueueFull, RunnerClosed, RunnerStuck
from outrider_runtimes.runner import CLOSE_TIMEOUT_S, Answer, Drop, moved_average
from outrider_runtimes.tensors import Array, Interface, Tensors

SICK_FACTOR = 10.0  # a late call is only late; one that takes ten times the usual is taken for stuck
SICK_UNMEASURED_S = 1.0  # the same, before any call was measured
WORKER_THREAD = "outrider-worker"
STUCK = "a call is stuck in the engine"
LATE_LOOK_S = 0.05  # between two looks at a call that somebody gave up; there is none otherwise
STUCK_LOOKS = 20  # in a row: a session in a process of its own is killed meanwhile, and what waits is answered


class Executor(Protocol):
    """What a worker runs: a ``BoundSession``, or what stands for one. Only its worker's thread calls ``execute``."""

    @property
    def interface(self) -> Interface:
        """What it takes and gives."""
        ...

    def check(self, inputs: Tensors) -> list[Array]:
        """The inputs in the interface's order. Raises InputError."""
        ...

    def execute(self, arrays: list[Array], *, check_ms: float = 0.0) -> Answer:
        """Run what ``check`` returned. Raises InputError, InferenceError."""
        ...

    def close(self) -> None:
        """Free it."""
        ...


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class _Job:
    arrays: list[Array]
    deadline: Deadline
    future: Future[Answer]
    submitted_s: float
    queued_s: float
    begun_s: float = 0.0


class _Here(NamedTuple):
    """A call that runs in its caller's thread."""

    deadline: Deadline
    begun_s: float


class _InOneStep(threading.Condition):
    """A condition that a ``with`` enters and leaves by its lock's own methods, which are in C.

    Threading's are in Python: what a signal's handler raises (Ctrl-C) inside of them leaves the lock taken for ever,
    and who needs it next, the worker's thread, waits for ever.
    """

    def __init__(self) -> None:
        self._own = threading.RLock()
        super().__init__(self._own)

    @property
    def __enter__(self) -> Callable[[], bool]:
        return self._own.__enter__

    @property
    def __exit__(self) -> Callable[..., None]:  # noqa: PLE0302
        return self._own.__exit__


class _Given(Future[Answer]):
    """A future whose ``cancel``, where it comes too late to keep the call from running, says that nobody waits."""

    def __init__(self, given_up: Callable[[Future[Answer]], None]) -> None:
        super().__init__()
        self._condition = _InOneStep()
        self._given_up = given_up

    def cancel(self) -> bool:
        cancelled = super().cancel()
        if not cancelled and not self.done():
            self._given_up(self)
        return cancelled


class Worker:
    """Runs a session's requests in the order in which they came; safe from several threads.

    It owns the session and closes it. The arrays of a request may not be changed before its future is done. A call
    inside an engine cannot be interrupted: while one is stuck, ``sick`` is true. It is then abandoned, when the next
    request comes, or without one where somebody gave it up (``cancel`` of its future): its future and those that wait
    end with an error, and requests are refused until it returns, which it may never do. What can be interrupted is a
    session in a process of its own, see ``outrider_runtimes.isolated``.

    Args:
        session: what runs; no one else may use it.
        queue_size: how many requests may wait beside the one that runs.
        drop: which request is refused when too many wait: the ``"newest"``, which is not taken, or the ``"oldest"``
            of those that wait, whose future ends with QueueFull: for a camera, where the latest frame counts.
        clock: seconds, monotonic.
    """

    def __init__(
        self, session: Executor, *, queue_size: int = 8, drop: Drop = "newest", clock: Clock = time.monotonic
    ) -> None:
        if queue_size < 0:
            raise ConfigError(f"queue_size is {queue_size}, expected 0 or more")
        if drop not in get_args(Drop):
            raise ConfigError(f"drop is {drop!r:.40}, expected 'newest' or 'oldest'")
        self._session = session
        self._queue_size = queue_size
        self._drop = drop
        self._clock = clock
        self._lock = threading.Lock()  # guards the six below
        self._turn = threading.Lock()  # who runs a call
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._taken: set[_Job] = set()  # what waits or runs
        self._ewma_s: float | None = None
        self._running: _Job | _Here | None = None
        self._closed = False
        self._watched_ended: threading.Event | None = None
        self._left = False
        self._forked = False
        tell_of_fork(self)
        self._thread = threading.Thread(target=self._serve, name=WORKER_THREAD, daemon=True)
        self._thread.start()

    @property
    def interface(self) -> Interface:
        """What it takes and gives."""
        return self._session.interface

    @property
    def depth(self) -> int:
        """How many requests wait or run."""
        return len(self._taken)

    @property
    def sick(self) -> bool:
        """Whether the running call has passed its deadline and taken ten times the usual: taken for stuck.

        So is one that still runs when ``close`` has waited for it long enough.
        """
        with self._lock:
            return self._is_sick()

    def submit(self, inputs: Tensors, deadline: Deadline) -> Future[Answer]:
        """Take one request; see ``runner.Runner``. The answer's ``queue`` is the time that it waited here.

        Raises:
            InputError: what was passed is not what the interface says.
            QueueFull: too many wait and none of them can be dropped.
            RunnerStuck: the worker is sick.
            RunnerClosed: the worker was closed, or made before a fork.
        """
        submitted_s = self._clock()
        arrays = self._session.check(inputs)
        future = _Given(self._given_up)
        if deadline.passed:
            future.set_exception(DeadlineExceeded("the deadline had passed before the request was queued"))
            return future
        job = _Job(arrays=arrays, deadline=deadline, future=future, submitted_s=submitted_s, queued_s=self._clock())
        with self._lock:
            self._check_open()
            stuck = self._running if self._is_sick() else None
            dropped = self._drained() if stuck is not None else self._make_room()
            self._taken.difference_update(dropped)
            full = self.depth > self._queue_size
            if stuck is None and not full:
                self._queue.put(job)
                self._taken.add(job)  # after it: interrupted in between, the request is run and no place is lost
        if stuck is not None:
            _abandon(stuck, dropped)
            raise RunnerStuck(STUCK, hint="send it elsewhere, or load the model again")
        for each in dropped:
            _fail(each, QueueFull("a newer request took its place"))
        if full:
            raise QueueFull(f"{self.depth} requests wait or run, no more than {self._queue_size + 1} may")
        return future

    def run_here(self, inputs: Tensors, deadline: Deadline) -> Answer | None:
        """Run one request in the calling thread, where none waits or runs; else None, and it is to be submitted.

        For calls that take less than to wake another thread does. One that is stuck keeps its caller for ever.

        Raises:
            InputError, RunnerClosed: as ``submit``.
            DeadlineExceeded: the deadline has passed.
            InferenceError: the engine failed.
        """
        if self._taken or not self._turn.acquire(blocking=False):
            return None
        begun_s = self._clock()
        try:
            with self._lock:
                self._check_open()
                self._running = _Here(deadline, begun_s)
            if deadline.passed:
                raise DeadlineExceeded("the deadline had passed before the request was run")
            answer = self._session.execute(self._session.check(inputs))
            with self._lock:
                self._ewma_s = moved_average(self._ewma_s, self._clock() - begun_s)
            return answer
        finally:
            self._running = None
            self._turn.release()

    def estimate_ms(self) -> float | None:
        """Requests ahead and this one, each at the moving average of what a call took; None before the first.

        A call that already takes longer than that is taken for as long as it has lasted, so that a stuck one shows.
        """
        with self._lock:
            usual_s, job = self._ewma_s, self._running
            if usual_s is None:
                return None
            over_s = 0.0 if job is None else max(0.0, self._clock() - job.begun_s - usual_s)
            return ((self.depth + 1) * usual_s + over_s) * 1e3

    def close(self) -> None:
        """Fail what waits with RunnerClosed and free the session; wait for a running call, but not for a stuck one."""
        with self._lock:
            self._closed = True
            waiting = self._drained()
            self._taken.difference_update(waiting)
            self._queue.put(None)
        for job in waiting:
            _fail(job, RunnerClosed("the worker was closed before the request was begun"))
        if threading.current_thread() is not self._thread:  # a future's callback may close
            self._thread.join(CLOSE_TIMEOUT_S)  # a stuck call cannot be ended; its thread, a daemon, is left behind
            self._left = True

    def forked(self) -> None:
        """As ``Forked`` says: an engine's threads are not in the child, so that it refuses requests there."""
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._queue, self._taken, self._running = queue.SimpleQueue(), set(), None
        self._watched_ended, self._closed, self._forked = None, True, True

    def _check_open(self) -> None:
        """Under the lock."""
        if self._forked:
            raise made_before_fork("the model's worker")
        if self._closed:
            raise RunnerClosed("the worker was closed")

    def _is_sick(self) -> bool:
        job = self._running
        if job is None or self._left:
            return job is not None
        if not job.deadline.passed:
            return False
        usual_s = SICK_UNMEASURED_S if self._ewma_s is None else self._ewma_s * SICK_FACTOR
        return self._clock() - job.begun_s > usual_s

    def _given_up(self, future: Future[Answer]) -> None:
        """Nobody waits for the call that runs any more: if it is stuck, that is not left to the next request to see."""
        with self._lock:
            job, watched = self._running, self._watched_ended
            if not isinstance(job, _Job) or job.future is not future or (watched is not None and not watched.is_set()):
                return
            if job.deadline.at_s == math.inf:  # it may take for ever
                return
            ended = self._watched_ended = threading.Event()
        name = "outrider-worker-watch"
        threading.Thread(target=self._watch, args=(job, ended), name=name, daemon=True).start()

    def _watch(self, job: _Job, ended: threading.Event) -> None:
        """Until a call that was given up ends, or is stuck; one at a time."""
        looks = 0
        while looks < STUCK_LOOKS and not ended.wait(LATE_LOOK_S):
            looks = looks + 1 if self.sick else 0
        with self._lock:
            stuck = self._running is job and self._is_sick()
            waiting = self._drained() if stuck else []
            self._taken.difference_update(waiting)
        if stuck:
            _abandon(job, waiting)
        with self._lock:
            if self._watched_ended is ended:  # else another call is watched by now
                self._watched_ended = None

    def _make_room(self) -> list[_Job]:
        """Under the lock: what has to go so that one more may wait; the thread may take one at the same moment."""
        if self._drop == "newest" or self.depth <= self._queue_size:
            return []
        with suppress(queue.Empty):
            oldest = self._queue.get_nowait()
            return [] if oldest is None else [oldest]
        return []

    def _drained(self) -> list[_Job]:
        jobs: list[_Job] = []
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                return jobs
            if job is not None:
                jobs.append(job)

    def _serve(self) -> None:
        while True:
            job = self._queue.get()
            if job is None:
                break
            with self._turn:
                self._answer(job)
            del job  # else its arrays live until the next request
        with self._turn:
            self._session.close()

    def _answer(self, job: _Job) -> None:
        """Run one job unless there is no point in it. The depth falls before the future ends, never after."""
        if not job.future.set_running_or_notify_cancel():
            self._finish(job)
            return
        with self._lock:
            job.begun_s = self._clock()
            self._running = job
            closed = self._closed
        try:
            if closed:
                raise RunnerClosed("the worker was closed before the request was begun")
            if job.deadline.passed:
                raise DeadlineExceeded("the deadline passed while the request waited")
            answer = self._timed(job)
        except BaseException as error:
            self._finish(job)
            with suppress(InvalidStateError):  # it was stuck, and abandoned
                job.future.set_exception(error)
        else:
            self._finish(job)
            with suppress(InvalidStateError):
                job.future.set_result(answer)

    def _timed(self, job: _Job) -> Answer:
        check_s = job.queued_s - job.submitted_s
        answer = self._session.execute(job.arrays, check_ms=check_s * 1e3)
        done_s = self._clock()
        taken_s = done_s - job.begun_s
        with self._lock:
            self._ewma_s = moved_average(self._ewma_s, taken_s)
        timing = answer.timing_ms._replace(
            queue=(job.begun_s - job.queued_s) * 1e3, total=(done_s - job.submitted_s) * 1e3
        )
        return answer._replace(timing_ms=timing)

    def _finish(self, job: _Job) -> None:
        with self._lock:
            if self._watched_ended is not None:
                self._watched_ended.set()
            self._running = None
            self._taken.discard(job)


def _abandon(stuck: _Job | _Here, waiting: list[_Job]) -> None:
    for each in waiting:
        _fail(each, RunnerStuck(STUCK))
    if isinstance(stuck, _Here):
        return
    with suppress(InvalidStateError):
        stuck.future.set_exception(DeadlineExceeded(f"{STUCK}; it was abandoned"))


def _fail(job: _Job, error: Exception) -> None:
    if job.future.set_running_or_notify_cancel():
        job.future.set_exception(error)
