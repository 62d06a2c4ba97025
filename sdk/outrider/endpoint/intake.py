"""Who is let in: how many requests at once, with how many bytes, and nobody any more once the endpoint stops."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from outrider.endpoint.refusals import RETRY_AFTER_S, Refused
from outrider_runtimes.errors import ConfigError

Estimate = Callable[[], float | None]  # as ``Runner.estimate_ms``

# A queue of this length is some 200 ms of a model that answers 300 requests a second.
QUEUE = 64
# Bytes of bodies inside, as a multiple of the longest one that is taken: a body is held until its reply.
BODIES_AT_ONCE = 4
MAX_RETRY_AFTER_S = 60


class Intake:
    """The bounds on what is inside, over HTTP and gRPC. Safe from several threads.

    Args:
        queue: requests for one model that may wait for it, or run in it, at once.
        body_bytes: the longest body that is taken.
    """

    def __init__(self, *, queue: int = QUEUE, body_bytes: int) -> None:
        if queue < 1:
            raise ConfigError(f"queue is {queue}, expected 1 or more")
        self._queue = queue
        self._max_held_bytes = BODIES_AT_ONCE * body_bytes
        self._lock = threading.Lock()
        self._inside: dict[str, int] = {}
        self._queued: dict[str, int] = {}
        self._held_bytes = 0
        self._stopping = False

    @property
    def stopping(self) -> bool:
        """Whether nothing new is let in."""
        return self._stopping

    @property
    def held_bytes(self) -> int:
        """Bytes of bodies inside."""
        return self._held_bytes

    def stop(self) -> None:
        """Let nobody in any more. Who is inside stays."""
        self._stopping = True

    def inside(self, model: str | None = None) -> int:
        """Requests for that model, or for any, between head and reply."""
        return sum(self._inside.values()) if model is None else self._inside.get(model, 0)

    def queued(self, model: str) -> int:
        """Of those, the ones that wait for the model or run in it."""
        return self._queued.get(model, 0)

    def is_full(self, model: str) -> bool:
        """Whether as many wait for that model as may."""
        return self._queued.get(model, 0) >= self._queue

    def check_open(self, estimates: Mapping[str, Estimate], *, size: int = 0) -> None:
        """Refuse what may be for any of these models, while it is not yet known which, or how long its body is.

        Args:
            estimates: by model, as ``visit`` takes them.
            size: bytes that there must be room for.

        Raises:
            Refused: the endpoint is being stopped (503), as many wait as may for each of them (429), or there is not
                so much room (503).
        """
        if self._stopping:
            raise Refused(503, "stopping", "the endpoint is being stopped", retry_after_s=RETRY_AFTER_S)
        if estimates and all(self.is_full(model) for model in estimates):
            raise self._full(next(iter(estimates.values())))
        if self._held_bytes + size > self._max_held_bytes:
            raise _no_memory()

    def stay(self, model: str) -> Callable[[], None]:
        """Count one request as inside until what this gives is called: its reply is still being sent."""
        self._enter(model)
        return lambda: self._leave(model)

    def _enter(self, model: str) -> None:
        with self._lock:
            self._inside[model] = self._inside.get(model, 0) + 1

    def _leave(self, model: str) -> None:
        with self._lock:
            self._inside[model] -= 1

    def visit(self, model: str, *, estimate_ms: Estimate) -> Visit:
        """To be inside while a ``with`` of it runs: enter before the body is read.

        A body that is still on its way takes no room in the queue, or slow ones would keep everyone else out.

        Args:
            model: the name of one that is served.
            estimate_ms: how long a request for it would take now; asked for ``Retry-After`` alone.

        Raises:
            Refused: the endpoint is being stopped (503), or as many wait as may (429).
        """
        if self._stopping or self.is_full(model) or self._held_bytes > self._max_held_bytes:
            self.check_open({model: estimate_ms})
        return Visit(self, model, estimate_ms)

    def holding(self) -> Held:
        """To account for the bytes of a message, and then of its reply. Whoever asks frees them."""
        return Held(self)

    @contextmanager
    def sending(self, size: int) -> Iterator[None]:
        """While it runs, a reply of so many bytes is being read."""
        held = self.holding()
        try:
            held.become(size, anyway=True)
            yield
        finally:
            held.free()

    def _full(self, estimate_ms: Estimate) -> Refused:
        text = f"{self._queue} requests wait for this model, no more may"
        return Refused(429, "queue_full", text, retry_after_s=retry_after_s(estimate_ms()))


class Held:
    """Bytes inside, at first none, until they are freed. Safe from several threads."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._size = 0
        self._freed = False

    def become(self, size: int, *, anyway: bool = False) -> None:
        """They are so many now.

        Args:
            anyway: also where those of all are too many: a reply is there, whatever is said of it.

        Raises:
            Refused: those of all are too many (503).
        """
        with self._intake._lock:
            more = 0 if self._freed else size - self._size
            full = more > 0 and not anyway and self._intake._held_bytes + more > self._intake._max_held_bytes
            if not full:
                self._intake._held_bytes += more
                self._size += more
        if full:
            raise _no_memory()

    def free(self) -> None:
        """They are gone, and none come any more. Again is harmless."""
        self.become(0)
        self._freed = True


class Visit:
    """One request inside. Not shared between threads. ``held_bytes`` is what came of its body."""

    def __init__(self, intake: Intake, model: str, estimate_ms: Estimate) -> None:
        self._intake = intake
        self._model = model
        self._estimate_ms = estimate_ms
        self._inside = False
        self.held_bytes = 0

    def __enter__(self) -> Visit:
        self.enter()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def enter(self) -> None:
        """What the beginning of the ``with`` does."""
        self._intake._enter(self._model)
        self._inside = True

    def leave(self) -> None:
        """What the end of the ``with`` does. Again is harmless; in any thread."""
        with self._intake._lock:
            if self._inside:
                self._inside = False
                self._intake._inside[self._model] -= 1
                self._intake._held_bytes -= self.held_bytes

    def hold(self, size: int) -> None:
        """Account for bytes of its body before they are kept. Raises Refused (503) where all bodies are too many."""
        with self._intake._lock:
            full = self._intake._held_bytes + size > self._intake._max_held_bytes
            if self._inside and not full:
                self._intake._held_bytes += size
                self.held_bytes += size
        if full:
            raise _no_memory()

    def check_time(self, left_s: float) -> None:
        """Refuse now what the queue would keep until its time has passed.

        With nothing else queued it is let through whatever the estimate says, which only a call can correct.

        Args:
            left_s: seconds that the caller has.

        Raises:
            Refused: 503.
        """
        if self._intake.queued(self._model) == 0:
            return
        needed_ms = self._estimate_ms()
        if needed_ms is None or needed_ms <= left_s * 1e3:
            return
        text = f"it would take some {needed_ms:.0f} ms from now, the request has {left_s * 1e3:.0f} ms left"
        raise Refused(503, "no_time", text, retry_after_s=retry_after_s(needed_ms))

    def queued(self) -> Place:
        """To wait for the model, or run in it, while a ``with`` of it runs. Entering raises Refused (429) where as
        many wait as may.
        """
        return Place(self._intake, self._model, self._estimate_ms)


class Place:
    """In the queue. A class, as ``Visit`` is one: a generator's ``with`` takes some microseconds of each request."""

    def __init__(self, intake: Intake, model: str, estimate_ms: Estimate) -> None:
        self._intake = intake
        self._model = model
        self._estimate_ms = estimate_ms
        self._taken = False

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *_: object) -> None:
        self.leave()

    def enter(self) -> None:
        """What the beginning of the ``with`` does. Raises Refused."""
        intake, model = self._intake, self._model
        with intake._lock:
            queued = intake._queued.get(model, 0)
            full = queued >= intake._queue
            if not full:
                intake._queued[model] = queued + 1
                self._taken = True
        if full:
            raise intake._full(self._estimate_ms)

    def leave(self) -> None:
        """What the end of the ``with`` does. Again is harmless; in any thread."""
        with self._intake._lock:
            if self._taken:
                self._taken = False
                self._intake._queued[self._model] -= 1


def _no_memory() -> Refused:
    text = "too many bytes of requests are on their way"
    return Refused(503, "no_memory", text, retry_after_s=RETRY_AFTER_S)


def retry_after_s(estimate_ms: float | None) -> int:
    """Whole seconds until the queue of now will have passed, 1 to 60."""
    return RETRY_AFTER_S if estimate_ms is None else min(MAX_RETRY_AFTER_S, max(1, math.ceil(estimate_ms / 1e3)))
