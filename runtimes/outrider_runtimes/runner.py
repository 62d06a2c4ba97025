"""What answers requests: a worker over a local session, or a remote endpoint. Both have this face."""

from __future__ import annotations

import math
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import DeadlineExceeded, RunnerClosed
from outrider_runtimes.nouns import dataclass
from outrider_runtimes.tensors import Array, Interface, Tensors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

Drop = Literal["newest", "oldest"]  # which request is refused when too many wait

CLOSE_TIMEOUT_S = 5.0  # that a close waits for the call that runs
NEWEST_SHARE = 0.2  # of the newest duration in the average: five requests bring most of a change


class Timing(NamedTuple):
    """Where the time of one request went, in milliseconds. ``total`` is what the caller waited."""

    queue: float = 0.0
    pre: float = 0.0
    infer: float = 0.0
    post: float = 0.0
    network: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """What answered: a variant of a bundle on an engine. As in ``outrider.Prediction``."""

    variant: str
    engine: str
    bundle: str
    verified: bool


class Answer(NamedTuple):
    """Outputs at the interface, by name; the caller's to keep.

    ``served`` is set by a runner that may change what it serves between two calls.
    """

    outputs: dict[str, Array]
    timing_ms: Timing
    served: Served | None = None


class Runner(Protocol):
    """Answers requests at one interface."""

    @property
    def interface(self) -> Interface:
        """What it takes and gives."""
        ...

    def submit(self, inputs: Tensors, deadline: Deadline) -> Future[Answer]:
        """Take one request; return at once.

        The future ends by the deadline or soon after with an Answer, or with an InputError, an EngineError, a
        RunnerError or DeadlineExceeded; work whose deadline has passed is not begun. A caller that must not wait
        longer waits on the future with ``deadline.timeout_s()``.

        Raises:
            InputError: what was passed is not what the interface says; nothing was queued.
            QueueFull, RunnerClosed: nothing was queued.
        """
        ...

    def estimate_ms(self) -> float | None:
        """How long a request that is submitted now would take, by what was measured; None before anything was."""
        ...

    def close(self) -> None:
        """Free what it holds. Waiting requests end with RunnerClosed."""
        ...


def moved_average(average: float | None, newest: float) -> float:
    """The moving average of durations that ``estimate_ms`` is made of, after one more."""
    return newest if average is None else average + NEWEST_SHARE * (newest - average)


def first_ended(futures: Sequence[Future[Any]], seconds: float) -> bool:
    """Wait until one of them has ended, or for so long; whether one has. It gives up none of them."""
    # Not ``future.result(seconds)``: a signal's exception inside of that becomes a RuntimeError now and then.
    running = threading.Lock()
    running.acquire()

    def ended(_: Future[Any]) -> None:
        with suppress(RuntimeError):  # the second of them
            running.release()

    for future in futures:
        future.add_done_callback(ended)
    return running.acquire(timeout=-1 if seconds == math.inf else min(seconds, threading.TIMEOUT_MAX))


def wait(future: Future[Answer], deadline: Deadline) -> Answer:
    """What the future ends with, by the deadline; what comes later is dropped.

    Raises:
        DeadlineExceeded: it did not end in time.
        RunnerClosed: it was cancelled.
    """
    from concurrent.futures import CancelledError
    from concurrent.futures import TimeoutError as FutureTimeout

    left_s = deadline.remaining_s()
    try:
        if not first_ended([future], left_s):
            raise DeadlineExceeded("no answer in time")
    except BaseException:  # nobody waits for it any more
        future.cancel()
        raise
    try:
        return future.result()
    except DeadlineExceeded:
        raise
    except (FutureTimeout, TimeoutError):  # two classes before Python 3.11; a runner's own
        raise DeadlineExceeded("no answer in time") from None
    except CancelledError:
        raise RunnerClosed("the request was cancelled") from None
