"""A few daemon threads behind a bounded queue, for requests that wait in sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from outrider_runtimes._forked import made_before_fork, tell_of_fork
from outrider_runtimes.errors import QueueFull, RunnerClosed
from outrider_runtimes.runner import Answer


class HasFuture(Protocol):
    """A job by what its caller waits on."""

    @property
    def future(self) -> Future[Answer]:
        """Ends with what the job ends with."""
        ...


J = TypeVar("J", bound=HasFuture)


class Pool(Generic[J]):
    """Threads are started when they are needed, and stay. In a forked child others are; the parent's jobs end there.

    Attributes:
        closing: set by ``close``; a job that waits for the clock waits on it.
    """

    def __init__(self, run: Callable[[J], Answer], *, threads: int, queue_size: int, name: str) -> None:
        self.closing = threading.Event()
        self._run = run
        self._max_threads = threads
        self._room = threads + queue_size
        self._name = name
        self._jobs: SimpleQueue[J | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._inside = 0
        self._futures: set[Future[Answer]] = set()
        tell_of_fork(self)

    def put(self, job: J) -> None:
        """Take a job. Raises QueueFull, RunnerClosed."""
        with self._lock:
            if self.closing.is_set():
                raise RunnerClosed(f"{self._name} is closed")
            if self._inside >= self._room:
                raise QueueFull(f"{self._name} has {self._inside} requests on their way", hint="send fewer at once")
            self._inside += 1
            self._futures.add(job.future)
            job.future.add_done_callback(self._futures.discard)
            if self._inside > self._threads and self._threads < self._max_threads:
                self._threads += 1
                threading.Thread(target=self._work, name=f"outrider-remote-{self._threads}", daemon=True).start()
            self._jobs.put(job)

    def close(self) -> None:
        """End the threads when they are done; what waits for one ends with RunnerClosed."""
        with self._lock:
            self.closing.set()
            waiting = self._drained()
            for _ in range(self._threads):
                self._jobs.put(None)
        for job in waiting:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(RunnerClosed(f"{self._name} was closed"))

    def forked(self) -> None:
        """As ``Forked`` says. Whoever has a future of the parent's would wait for a thread that is not there."""
        for future in self._futures:
            Future.__init__(future)  # a lock inside may be held by a thread of the parent's
            future.set_exception(made_before_fork(f"a request of {self._name}"))
        self._futures = set()
        closed = self.closing.is_set()
        self.closing = threading.Event()
        if closed:
            self.closing.set()
        self._lock = threading.Lock()
        self._jobs = SimpleQueue()
        self._threads = self._inside = 0

    def _drained(self) -> list[J]:
        jobs: list[J] = []
        while True:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                return jobs
            if job is not None:
                jobs.append(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(job)

    def _do(self, job: J) -> None:
        if not job.future.set_running_or_notify_cancel():
            self._leave()
            return
        try:
            answer = self._run(job)
        except BaseException as error:
            self._leave()
            job.future.set_exception(error)
        else:
            # First, or who sends its next request at once would find itself still inside.
            self._leave()
            job.future.set_result(answer)

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
