"""What a device tells: predictions and events, into a spool on disk and from there to an MQTT broker.

Inference never waits for it. The callback of a prediction appends one tuple to a bounded queue; a thread of the
reporter builds records and commits them; another one sends them.
"""

from __future__ import annotations

import logging
import os
import random
import ssl
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from outrider.store import find_state_dir
from outrider.telemetry.mqtt import Credentials, parse_broker, to_credentials
from outrider.telemetry.publisher import Limits, Publisher
from outrider.telemetry.record import EVENT, PREDICTION, Range, check_device, encode_row
from outrider.telemetry.spool import HIGH, LOW, Account, Draft, Spool
from outrider_runtimes.deadline import LONGEST_MS
from outrider_runtimes.errors import ConfigError, TelemetryError
from outrider_runtimes.runner import Timing

if TYPE_CHECKING:
    from outrider.prediction import OnPrediction

log = logging.getLogger(__name__)

Level = Literal["spooled", "broker", "sink"]

# One transaction holds at most so many records: the disk's write-ahead log stays within a few megabytes.
_COMMIT_RECORDS: Final = 4096
_FLUSH_TICK_S: Final = 0.05
_TIMES: Final = Timing._fields

# A prediction on its way to the writer: when (monotonic s), source, reason, variant, engine, bundle, verified, timing.
# Its outputs are not kept: they may be large, and they are the caller's.
_Offered = tuple[float, str, str, str, str, str, bool, Timing]


class Watchable(Protocol):
    """What can be watched: a Model or a Hybrid."""

    def on_prediction(self, callback: OnPrediction) -> Callable[[], None]:
        """Have ``callback`` called with each Prediction; gives what ends it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ReporterAccount(Account):
    """The spool's account, and what this reporter did since it was opened.

    Attributes:
        offered: predictions and events that it was given.
        lost: of these, what never came onto the disk, because the queue in memory was full; their numbers are skipped.
    """

    offered: int
    lost: int


@dataclass(kw_only=True, slots=True, eq=False)
class _Waiter:
    """Someone who waits until what was offered is on the disk; ``last_seq`` says up to where that is."""

    done: threading.Event
    last_seq: int = 0


class Reporter:
    """Reports what it watches. Use it as a context manager, or ``close`` it.

    A broker that is not there is not an error: records wait in the spool.

    Attributes:
        device: its id.
        spool: the queue on disk.
        spool_error: why the last commit failed, such as a full disk; empty while all is well. What could not be
            committed stays in memory and is tried again.
    """

    def __init__(
        self,
        url: str,
        *,
        device: str,
        tls: ssl.SSLContext | str | os.PathLike[str] | None = None,
        credentials: Credentials | tuple[str, str | None] | None = None,
        state: str | Path | None = None,
        commit_interval_ms: float = 1000.0,
        max_bytes: int = 64 * 1024 * 1024,
        queue_size: int = 32_768,
        limits: Limits | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the spool and begin to connect; does not wait for the broker.

        Args:
            url: ``mqtt://host:1883`` or ``mqtts://host:8883``.
            device: 1 to 64 letters, digits, ``.``, ``_`` or ``-``; one reporter at a time has a device id.
            tls: for mqtts: an SSLContext, or the path of the CA certificates; None trusts the system's.
            credentials: user name and password.
            state: the state directory; by default the store's rule. The spool is ``telemetry/<device>.sqlite`` in it.
            commit_interval_ms: how long a record is in memory alone; what a kill -9 can lose.
            max_bytes: of the records that wait on disk; beyond it the oldest of the lowest priority are dropped.
            queue_size: how many records wait in memory for the next commit; beyond it they are lost and counted.
            limits: how much is under way at once.

        Raises:
            ConfigError: the url, the device id or a number is not usable.
            MissingExtra: paho-mqtt is not installed.
            StateDirectoryError, TelemetryError: the spool cannot be used, or another process has it.
        """
        broker = parse_broker(url, tls=tls)
        self.device = check_device(device)
        for name, value in (
            ("commit_interval_ms", commit_interval_ms),
            ("max_bytes", max_bytes),
            ("queue_size", queue_size),
        ):
            if not value > 0:
                raise ConfigError(f"{name} is {value}, expected a number above 0")
        if commit_interval_ms > LONGEST_MS:
            raise ConfigError(f"commit_interval_ms is {commit_interval_ms}, expected at most {LONGEST_MS:g}")
        self.spool_error = ""
        self._clock = clock
        self._wall_clock = wall_clock
        self._interval_s = commit_interval_ms / 1000.0
        self._queue: deque[_Offered | Draft] = deque()
        self._queue_size = queue_size
        self._boot_id = _boot_id()
        self._unwatch: list[Callable[[], None]] = []
        self._mutex = threading.Lock()
        self._committing = threading.Condition(self._mutex)
        self._losing = threading.Lock()  # for the sum alone: a callback never waits for what holds _mutex
        self._lost = 0
        self._lost_committed = 0  # under _mutex; so are the three below
        self._committed = 0
        self._waiters: list[_Waiter] = []
        self._drafts: list[Draft] = []  # the writer's: built, not committed yet
        self._receipts: deque[Range] = deque()
        self._wake = threading.Event()
        self._flushing = 0
        self._closing = False
        self._stopping = False
        self.spool = Spool(find_state_dir(state) / "telemetry" / f"{device}.sqlite", max_bytes=max_bytes)
        try:
            self._publisher = Publisher(
                self.spool,
                broker,
                device=device,
                boot_id=self._boot_id,
                on_receipt=self._take_receipt,
                credentials=to_credentials(credentials),
                limits=limits,
                rng=rng,
                clock=clock,
                wall_clock=wall_clock,
            )
        except BaseException:
            self.spool.close()
            raise
        self._writer = threading.Thread(target=self._write, name=f"outrider-spool-{device}", daemon=True)
        self._writer.start()
        self._publisher.start()
        if self.spool.recovered is not None:
            self.event("spool_recovered", reason=self.spool.recovered)

    @property
    def connected(self) -> bool:
        """Whether the broker is there now."""
        return self._publisher.connection.connected

    @property
    def last_error(self) -> str:
        """Why it is not, or was not last time; empty while all is well."""
        return self._publisher.connection.last_error

    def watch(self, source: Watchable) -> Callable[[], None]:
        """Report every prediction of ``source``, without its inputs and outputs. Gives what ends it.

        Raises:
            TelemetryError: the reporter is closed.
        """
        if self._closing:
            raise TelemetryError(f"the reporter of {self.device} is closed")
        queue, limit, clock, lose = self._queue, self._queue_size, self._clock, self._lose

        def offer(p: Any) -> None:
            if len(queue) < limit:
                queue.append((clock(), p.source, p.reason, p.variant, p.engine, p.bundle, p.verified, p.timing_ms))
            else:
                lose(1)

        unsubscribe = source.on_prediction(offer)

        def unwatch() -> None:
            if unwatch in self._unwatch:
                self._unwatch.remove(unwatch)
                unsubscribe()

        self._unwatch.append(unwatch)
        return unwatch

    def event(self, name: str, /, **details: Any) -> bool:
        """Report that something happened. Gives False when the queue was full: the event is lost and counted.

        Raises:
            TelemetryError: a field that JSON has no form for, more than a record may hold, or the reporter is closed.
        """
        if self._closing:
            raise TelemetryError(f"the reporter of {self.device} is closed")
        row = encode_row(
            kind=EVENT,
            boot_id=self._boot_id,
            wall_s=self._wall_clock(),
            monotonic_s=self._clock(),
            body={"name": name, "fields": details},
        )
        if len(self._queue) >= self._queue_size:
            self._lose(1)
            return False
        self._queue.append(Draft(body=row, priority=HIGH))
        return True

    def flush(self, timeout_s: float = 10.0, *, level: Level = "spooled") -> bool:
        """Wait until everything that was offered before this call has come as far as ``level``.

        Args:
            timeout_s: how long at most.
            level: ``spooled``: on this disk. ``broker``: the broker confirmed it, which is no promise that it survives
                there. ``sink``: the consumer's receipt is in the spool.

        Returns:
            Whether it has. False too when a record was dropped on the way.
        """
        if level not in ("spooled", "broker", "sink"):
            raise ConfigError(f"level is {level!r}, expected 'spooled', 'broker' or 'sink'")
        if self._closing:
            raise TelemetryError(f"the reporter of {self.device} is closed")
        timeout_s = min(timeout_s, threading.TIMEOUT_MAX)
        until = time.monotonic() + timeout_s
        waiter = _Waiter(done=threading.Event())
        dropped = self.spool.account().dropped
        with self._mutex:
            self._waiters.append(waiter)
            self._flushing += 1
        try:
            self._wake.set()
            if not waiter.done.wait(timeout_s):
                return False
            while not self._has_reached(level, waiter.last_seq):
                if time.monotonic() >= until:
                    return False
                with self._mutex:
                    self._committing.wait(_FLUSH_TICK_S)
        finally:
            with self._mutex:
                self._flushing -= 1
        return self.spool.account().dropped == dropped

    def account(self) -> ReporterAccount:
        """The account now. Exact for what is committed; ``offered`` is exact while nothing is being offered."""
        with self._mutex:
            spool = self.spool.account()
            waiting = len(self._queue) + len(self._drafts)
            offered = self._committed + self._lost + waiting
            return ReporterAccount(
                enqueued=spool.enqueued,
                delivered=spool.delivered,
                pending=spool.pending,
                dropped=spool.dropped,
                offered=offered,
                lost=self._lost,
            )

    def close(self) -> None:
        """Stop watching, disconnect, commit what was offered and close the spool. What is pending waits on the disk."""
        if self._closing:
            return
        for unwatch in list(self._unwatch):
            unwatch()
        self._closing = True
        self._publisher.close()
        self._stopping = True  # after the publisher: what it received last is committed too
        self._wake.set()
        self._writer.join()
        if uncommitted := len(self._drafts) + len(self._queue):
            log.error("%s: %d records could not be committed and are lost", self.spool.path, uncommitted)
        self.spool.close()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lose(self, count: int) -> None:
        with self._losing:
            self._lost += count

    def _take_receipt(self, ranges: tuple[Range, ...]) -> None:
        self._receipts.extend(ranges)
        if self._flushing:
            self._wake.set()

    def _has_reached(self, level: Level, seq: int) -> bool:
        if level == "spooled":
            return True
        if level == "broker" and self._publisher.confirmed_through >= seq:
            return True
        return self.spool.oldest_seq() > seq

    def _write(self) -> None:
        """The writer's thread: every interval, or sooner when someone waits, commit what is there."""
        while not self._stopping:
            self._wake.wait(self._interval_s)
            self._wake.clear()
            self._cycle()
        self._cycle()

    def _cycle(self) -> None:
        with self._mutex:
            waiters, self._waiters = self._waiters, []
        try:
            left = len(self._queue)
            due = left > 0 or self._drafts or self._receipts or self._lost_committed < self._lost
            while due:
                if not self._drafts:  # what failed to commit comes first: memory holds no more than the queue and it
                    left -= self._build(min(left, _COMMIT_RECORDS))
                self._commit()
                due = left > 0
        except TelemetryError as error:
            if str(error) != self.spool_error:
                log.error("%s", error)
            self.spool_error = str(error)
            with self._mutex:
                self._waiters = waiters + self._waiters
            return
        self.spool_error = ""
        for waiter in waiters:
            waiter.last_seq = self.spool.last_seq
            waiter.done.set()

    def _build(self, count: int) -> int:
        """Move that many from the queue to the drafts. Gives how many were taken."""
        to_wall_s = self._wall_clock() - self._clock()
        for _ in range(count):
            with self._mutex:
                offered = self._queue.popleft()
                if isinstance(offered, Draft):
                    self._drafts.append(offered)
                    continue
                try:
                    self._drafts.append(_prediction(offered, boot_id=self._boot_id, to_wall_s=to_wall_s))
                except TelemetryError as error:
                    self._lose(1)
                    log.error("a prediction that cannot be reported: %s", error)
        return count

    def _commit(self) -> None:
        ranges = [self._receipts.popleft() for _ in range(len(self._receipts))]
        with self._mutex:
            lost = self._lost - self._lost_committed
        try:
            self.spool.commit(self._drafts, lost=lost, ranges=ranges)
        except TelemetryError:
            self._receipts.extendleft(reversed(ranges))
            raise
        with self._mutex:
            self._committed += len(self._drafts)
            self._lost_committed += lost
            self._drafts = []
            self._committing.notify_all()
        self._publisher.wake()


def _prediction(offered: _Offered, *, boot_id: str, to_wall_s: float) -> Draft:
    at_s, source, reason, variant, engine, bundle, verified, timing = offered
    body = {
        "source": source,
        "reason": reason,
        "variant": variant,
        "engine": engine,
        "bundle": bundle,
        "verified": verified,
        "timing_ms": {name: round(getattr(timing, name), 3) for name in _TIMES},
    }
    row = encode_row(kind=PREDICTION, boot_id=boot_id, wall_s=at_s + to_wall_s, monotonic_s=at_s, body=body)
    return Draft(body=row, priority=LOW)


def _boot_id() -> str:
    """The kernel's id of this boot; where there is none, one for this process."""
    try:
        return str(uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()))
    except (OSError, ValueError):
        return str(uuid.uuid4())
