"""How an agent ends: what was offered gets onto the disk, and a call that hangs is not waited for without a bound."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from outrider.agent.logs import say
from outrider_runtimes.errors import TelemetryError

if TYPE_CHECKING:
    from outrider.telemetry import Reporter

LAST_CALL_S: Final = 10.0  # after a stop, the input under way may take so long
FLUSH_S: Final = 5.0  # what was offered gets onto the disk
LAST_SEND_S: Final = 2.0  # and from there to a broker that is there; what does not get there waits
STOPS: Final = frozenset({signal.SIGTERM, signal.SIGINT})
STUCK: Final = 1  # the exit code of an agent whose last call did not end


class Bound:
    """While it is entered, a signal to stop gives its holder ``within_s``; then ``overdue`` is called, on a thread.

    The signal is heard by the descriptor that Python's own handler writes to (``signal.set_wakeup_fd``): a main thread
    that is inside an engine runs no handler that is written in Python. Only from the main thread.
    """

    def __init__(self, within_s: float, overdue: Callable[[], object]) -> None:
        self._within_s = within_s
        self._overdue = overdue
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="outrider-stop", daemon=True)

    def __enter__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        self._ended.set()
        with contextlib.suppress(BlockingIOError):  # full of signals: it wakes up all the same
            os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _watch(self) -> None:
        while not (self._ended.is_set() or STOPS & set(os.read(self._read, 4096))):
            pass
        if not self._ended.wait(self._within_s):
            self._overdue()


def flush(reporter: Reporter) -> None:
    """Have what was offered on the disk and, where the broker is there, sent. What could not be is logged."""
    try:
        reporter.flush(FLUSH_S)
        if reporter.connected and not reporter.held_back:
            reporter.flush(LAST_SEND_S, level="broker")
    except TelemetryError as error:
        say("flush_failed", level=logging.ERROR, error=str(error), hint=error.hint)


def leave(reporter: Reporter, call_s: float | None) -> None:
    """End the process, of which a thread is stuck where nothing can reach it, with exit code ``STUCK``."""
    say(
        "stop_overdue",
        level=logging.ERROR,
        error=f"the input under way did not end within {LAST_CALL_S:g} s of the stop",
        hint='model.deadline_ms with model.isolation = "process" ends a call that hangs',
        call_s=None if call_s is None else round(call_s, 3),
    )
    flush(reporter)
    os._exit(STUCK)
