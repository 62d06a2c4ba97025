"""Requests to one local session, one after the other, in a thread of its own behind a bounded queue."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from concurrent.futures import Future

from outrider_runtimes.bound import BoundSession
from outrider_runtimes.deadline import Clock, Deadline
from outrider_runtimes.errors import ConfigError, DeadlineExceeded, QueueFull, RunnerClosed
from outrider_runtimes.runner import Answer, moved_average
from outrider_runtimes.tensors import Array, Interface, Tensors

SICK_FACTOR = 10.0  # a late call is only late; one that takes ten times the usual is taken for stuck
SICK_UNMEASURED_S = 1.0  # the same, before any call was measured
CLOSE_TIMEOUT_S = 5.0  # a stuck call cannot be ended; close() leaves its thread behind, which is a daemon


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class _Job:
    arrays: list[Array]
    deadline: Deadline
    future: Future[Answer]
    submitted_s: float
    queued_s: float
    begun_s: float = 0.0


class Worker:
    """Runs a session's requests in the order in which they came; safe from several threads.

    It owns the session and closes it. The arrays of a request may not be changed before its future is done. A call
    inside an engine cannot be interrupted: while one is stuck, ``sick`` is true and new requests are refused, and
    those that wait end when it returns or the worker is closed.

    Args:
        session: what runs; no one else may use it.
        queue_size: how many requests may wait beside the one that runs.
        clock: seconds, monotonic.
    """

    def __init__(self, session: BoundSession, *, queue_size: int = 8, clock: Clock = time.monotonic) -> None:
        if queue_size < 0:
            raise ConfigError(f"queue_size is {queue_size}, expected 0 or more")
        self._session = session
        self._queue_size = queue_size
        self._clock = clock
        self._lock = threading.Lock()  # guards the five below
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._depth = 0
        self._ewma_s: float | None = None
        self._running: _Job | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="outrider-worker", daemon=True)
        self._thread.start()

    @property
    def interface(self) -> Interface:
        """What it takes and gives."""
        return self._session.interface

    @property
    def depth(self) -> int:
        """How many requests wait or run."""
        return self._depth

    @property
    def sick(self) -> bool:
        """Whether the running call has passed its deadline and taken ten times the usual: taken for stuck."""
        with self._lock:
            return self._is_sick()

    def submit(self, inputs: Tensors, deadline: Deadline) -> Future[Answer]:
        """Take one request; see ``runner.Runner``. The answer's ``queue`` is the time that it waited here.

        Raises:
            InputError: what was passed is not what the interface says.
            QueueFull: too many wait, or the worker is sick.
            RunnerClosed: the worker was closed.
        """
        submitted_s = self._clock()
        arrays = self._session.check(inputs)
        future: Future[Answer] = Future()
        if deadline.passed:
            future.set_exception(DeadlineExceeded("the deadline had passed before the request was queued"))
            return future
        job = _Job(arrays=arrays, deadline=deadline, future=future, submitted_s=submitted_s, queued_s=self._clock())
        with self._lock:
            if self._closed:
                raise RunnerClosed("the worker was closed")
            if self._is_sick():
                raise QueueFull("a call is stuck in the engine", hint="send it elsewhere, or load the model again")
            if self._depth > self._queue_size:
                raise QueueFull(f"{self._depth} requests wait or run, no more than {self._queue_size + 1} may")
            self._depth += 1
            self._queue.put(job)
        return future

    def estimate_ms(self) -> float | None:
        """Requests ahead and this one, each at the moving average of what a call took; None before the first."""
        with self._lock:
            return None if self._ewma_s is None else (self._depth + 1) * self._ewma_s * 1e3

    def close(self) -> None:
        """Fail what waits with RunnerClosed and free the session; wait for a running call, but not for a stuck one."""
        with self._lock:
            self._closed = True
            waiting = self._drained()
            self._depth -= len(waiting)
            self._queue.put(None)
        for job in waiting:
            _fail(job, RunnerClosed("the worker was closed before the request was begun"))
        if threading.current_thread() is not self._thread:  # a future's callback may close
            self._thread.join(CLOSE_TIMEOUT_S)

    def _is_sick(self) -> bool:
        job = self._running
        if job is None or not job.deadline.passed:
            return False
        usual_s = SICK_UNMEASURED_S if self._ewma_s is None else self._ewma_s * SICK_FACTOR
        return self._clock() - job.begun_s > usual_s

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
            self._answer(job)
            del job  # else its arrays live until the next request
        self._session.close()

    def _answer(self, job: _Job) -> None:
        """Run one job unless there is no point in it. The depth falls before the future ends, never after."""
        if not job.future.set_running_or_notify_cancel():
            self._finish()
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
            self._finish()
            job.future.set_exception(error)
        else:
            self._finish()
            job.future.set_result(answer)

    def _timed(self, job: _Job) -> Answer:
        check_s = job.queued_s - job.submitted_s
        answer = self._session.execute(job.arrays, check_ms=check_s * 1e3)
        done_s = self._clock()
        taken_s = done_s - job.begun_s
        with self._lock:
            self._ewma_s = moved_average(self._ewma_s, taken_s)
        timing = dataclasses.replace(
            answer.timing_ms, queue=(job.begun_s - job.queued_s) * 1e3, total=(done_s - job.submitted_s) * 1e3
        )
        return Answer(outputs=answer.outputs, timing_ms=timing)

    def _finish(self) -> None:
        with self._lock:
            self._running = None
            self._depth -= 1


def _fail(job: _Job, error: Exception) -> None:
    if job.future.set_running_or_notify_cancel():
        job.future.set_exception(error)
