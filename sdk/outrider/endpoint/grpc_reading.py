"""Messages of gRPC calls, asked for only when there is room for the longest one that may come.

grpc holds a message until it is whole, and says nothing of it before. Until a message is asked for no more of it comes
than the call's window of flow control, 64 KiB; so what bounds the bytes on their way is how many are asked for at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from outrider.endpoint.intake import Held
from outrider.endpoint.refusals import RETRY_AFTER_S, Refused
from outrider_runtimes.deadline import Clock
from outrider_runtimes.errors import InputError

AT_ONCE = 16
WITHIN_S = 10.0  # from when it is asked for: 8 MiB at a little under 1 MB/s
TURN_S = 5.0  # until it is asked for


class Reading:
    """Takes the one message of each call, so many at once, each within its time. Safe from several threads.

    Args:
        message_bytes: the longest that one may be; all that come count as this.
        too_slow: called for each that was not whole in time; its call is ended with CANCELLED.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        message_bytes: int,
        too_slow: Callable[[], None],
        at_once: int = AT_ONCE,
        within_s: float = WITHIN_S,
        turn_s: float = TURN_S,
        clock: Clock = time.monotonic,
    ) -> None:
        self._message_bytes = message_bytes
        self._too_slow = too_slow
        self._within_s = within_s
        self._turn_s = turn_s
        self._clock = clock
        self._turns = threading.BoundedSemaphore(at_once)
        self._changed = threading.Condition()  # guards the two below
        self._due_s: dict[Any, float] = {}  # by call, in the order in which they began: the first one is due first
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="outrider-grpc-reading", daemon=True)
        self._thread.start()

    def read(self, messages: Iterator[bytes], context: Any, held: Held) -> bytes:
        """The call's message; ``held`` are then its bytes.

        Raises:
            Refused: there is no room for it (503), or the caller went away (499).
            InputError: the call has no message.
        """
        if not self._turns.acquire(timeout=min(self._turn_s, context.time_remaining())):
            text = "too many messages are on their way"
            raise Refused(503, "no_memory", text, retry_after_s=RETRY_AFTER_S)
        try:
            held.become(self._message_bytes)
            data = self._read(messages, context)
            held.become(len(data))
            return data
        finally:
            self._turns.release()

    def close(self) -> None:
        """End the thread that watches."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _read(self, messages: Iterator[bytes], context: Any) -> bytes:
        with self._changed:
            self._due_s[context] = self._clock() + self._within_s
            if len(self._due_s) == 1:
                self._changed.notify()
        try:
            return next(messages)
        except StopIteration:
            raise InputError("the call has no message") from None
        except Exception:  # grpc raises one of its own, which says nothing
            raise Refused(499, "gone", "the caller went away, or its message did not come in time") from None
        finally:
            with self._changed:
                self._due_s.pop(context, None)

    def _watch(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (left_s := self._first_s() - self._clock()) > 0.0:
                    self._changed.wait(min(left_s, threading.TIMEOUT_MAX))
                if self._closed:
                    return
                late = next(iter(self._due_s))
                del self._due_s[late]
            self._too_slow()
            late.cancel()

    def _first_s(self) -> float:
        return next(iter(self._due_s.values()), float("inf"))
