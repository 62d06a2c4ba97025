"""What strains the board, looked at beside the calls: a call reads the last look and never waits for one."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from outrider.policy import UNKNOWN, Strain
from outrider_runtimes._forked import tell_of_fork
from outrider_runtimes.deadline import Clock
from outrider_runtimes.heat import read_heat
from outrider_runtimes.power import read_power

INTERVAL_S = 2.0  # between two looks; a processor's temperature changes in seconds
OLDEST_S = 10.0  # an older look says nothing of now
LINGER_S = 60.0  # so long after the last call nobody looks any more


class BoardWatch:
    """Looks in a thread of its own, as long as somebody asks. Safe from several threads.

    Args:
        root: where ``sys`` is, and ``usr/bin/vcgencmd`` on an older Raspberry Pi.
        clock: seconds, monotonic.
    """

    def __init__(self, root: Path = Path("/"), *, clock: Clock = time.monotonic) -> None:
        self._root = root
        self._clock = clock
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._asked_s = 0.0
        self._seen: tuple[float, Strain] | None = None
        tell_of_fork(self)

    def latest(self, now_s: float) -> Strain:
        """The last look, where it is not too old; else nothing is known. now_s: by the clock."""
        self._asked_s = now_s
        thread = self._thread
        if thread is None or not thread.is_alive():
            self._start()
        seen = self._seen
        return seen[1] if seen is not None and now_s - seen[0] <= OLDEST_S else UNKNOWN

    def look(self) -> None:
        """Look now."""
        heat, power = read_heat(self._root), read_power(self._root)
        self._seen = (
            self._clock(),
            Strain(
                celsius=heat.celsius,
                throttled=bool(heat.throttled),
                undervolted=heat.undervolted,
                battery=power.left if power.on_battery else None,
            ),
        )

    def close(self) -> None:
        """Look no more."""
        self._ended.set()

    def forked(self) -> None:
        """As ``Forked`` says: the next call starts a thread of the child's."""
        closed = self._ended.is_set()
        self._lock, self._ended, self._thread = threading.Lock(), threading.Event(), None
        if closed:
            self._ended.set()

    def _start(self) -> None:
        with self._lock:
            if self._ended.is_set() or (self._thread is not None and self._thread.is_alive()):
                return
            self._thread = threading.Thread(target=self._watch, name="outrider-strain", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        while self._clock() - self._asked_s <= LINGER_S:
            self.look()
            if self._ended.wait(INTERVAL_S):
                return
