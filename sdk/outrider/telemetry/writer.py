"""Between the inference path and the spool: a bounded queue in memory, and the thread that empties it.

What is offered is a tuple, or a draft that is ready; records are built, counted, sampled and committed here.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from outrider.telemetry.inputs import flagged
from outrider.telemetry.metrics import MAX_JUDGED_BYTES, Judged, Tally, memory_rss_bytes
from outrider.telemetry.record import EVENT, METRICS, PREDICTION, Range, encode_row
from outrider.telemetry.spool import LOW, NORMAL, Account, Draft, Spool
from outrider_runtimes.errors import TelemetryError
from outrider_runtimes.heat import Heat
from outrider_runtimes.runner import Timing

log = logging.getLogger(__name__)

# One transaction holds at most so many records: the disk's write-ahead log stays within a few megabytes.
_COMMIT_RECORDS: Final = 4096
# Copies of judged outputs in the queue together.
_JUDGED_BYTES: Final = 8 * 1024 * 1024
_JUDGED_ROWS: Final = 64
_EXPIRE_EVERY_S: Final = 60.0
# Receipts alone are no reason to sync the disk for each: what is lost of them comes again, and the consumer drops it.
_RECEIPTS_EVERY_S: Final = 0.25
_TIMES: Final = Timing._fields
_NOTHING: Final = Account(enqueued=0, delivered=0, pending=0, dropped=0)

# A Prediction on its way to the writer: without its outputs, which are its first field. They may be large, and they are
# the caller's.
_Told = tuple[str, str, str, bool, Timing, str, str]
# When (monotonic s), the prediction, and a copy of what is judged of it.
_Offered = tuple[float, _Told, bytes | None, Judged | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """A request that got no answer, on its way to the writer: the error's name, and whether it is the caller's own."""

    at_s: float
    error: str
    refused: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How much is written, and when.

    Attributes:
        commit_interval_s: how long what is offered is in memory alone.
        queue_size: how many of them at most.
        sample: the share of the predictions that are reported in full; flagged ones are in any case.
        metrics_interval_s: None for no metrics.
    """

    commit_interval_s: float
    queue_size: int
    sample: float
    metrics_interval_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """What is around a writer.

    Attributes:
        clock, wall_clock: seconds, monotonic and since 1970.
        synchronised: whether something keeps the clock right; None where that is not known.
        heat: a look at the board.
        rng: draws the sample.
    """

    clock: Callable[[], float]
    wall_clock: Callable[[], float]
    synchronised: Callable[[], bool | None]
    heat: Callable[[], Heat]
    rng: random.Random


@dataclass(frozen=True, kw_only=True, slots=True)
class ReporterAccount(Account):
    """The spool's account, and what this reporter did since it was opened.

    ``offered`` = committed by it + ``aggregated`` + ``lost`` + what waits in memory.

    Attributes:
        offered: predictions, failures, events, inputs and metrics that came to it.
        aggregated: of these, predictions that went into the metrics alone, because they were not in the sample.
        lost: of these, what never came onto the disk, because the queue in memory was full or it has no form as a
            record; their numbers are skipped.
    """

    offered: int
    lost: int
    aggregated: int = 0


@dataclass(kw_only=True, slots=True, eq=False)
class _Waiter:
    """Someone who waits until what was offered is on the disk; ``last_seq`` says up to where that is."""

    done: threading.Event
    last_seq: int = 0


class Writer:
    """The queue and its thread. Offering never waits.

    Attributes:
        error: why the spool could not be opened or the last commit failed, such as a full disk; empty while all is
            well. What could not be committed stays in memory and is tried again.
        drift: the last score of a drift event; None before one.
        unsynced: whether nothing kept the clock right at the last look.
    """

    def __init__(
        self,
        opener: Callable[[], Spool],
        *,
        name: str,
        boot_id: str,
        settings: Settings,
        world: World,
        committed: Callable[[], None],
        summarized: Callable[[dict[str, Any]], None],
    ) -> None:
        """Nothing is written before ``start``.

        ``opener`` opens the spool: in ``open`` or, where that failed, in every interval until it can. ``committed`` is
        called on the writer's thread after each commit, ``summarized`` with the body of each metrics record.
        """
        self.error = ""
        self._said = ""  # of it, in the log
        self._unmade = 0
        self.drift: float | None = None
        self.unsynced = world.synchronised() is False
        self._spool: Spool | None = None
        self._tried = threading.Event()  # to open it
        self._opener = opener
        self._boot_id = boot_id
        self._settings = settings
        self._world = world
        self._told = committed
        self._summarized = summarized
        self._queue: deque[_Offered | Draft | Failed] = deque()
        self._mutex = threading.Lock()
        self._committing = threading.Condition(self._mutex)
        self._losing = threading.Lock()  # for the sum alone: a callback never waits for what holds _mutex
        self._lost = 0
        self._lost_committed = 0  # under _mutex; so are the five below
        self._committed = 0
        self._aggregated = 0
        self._awaited: list[int] = []  # the numbers that someone waits for
        self._waiters: list[_Waiter] = []
        self._drafts: list[Draft] = []  # built, not committed yet
        self._receipts: deque[Range] = deque()
        self._received_through = 0
        self._cycles_without = 0  # a commit, while receipts wait
        self._tally = Tally(began_s=world.clock())
        self._expired_s = world.clock()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"outrider-spool-{name}", daemon=True)

    def open(self) -> Spool:
        """The spool, opened where it is not. Raises TelemetryError; then ``error`` says why."""
        if self._spool is None:
            try:
                self._spool = self._opener()
            except TelemetryError as error:
                self.error = str(error)
                raise
            finally:
                self._tried.set()
        return self._spool

    def wait_opened(self) -> None:
        """Wait until the spool is open, or could not be opened when it was tried first."""
        self._tried.wait()

    def start(self) -> None:
        """Begin to write; a spool that nobody has tried to open is opened at once."""
        if not self._tried.is_set():
            self._wake.set()
        self._thread.start()

    def is_mine(self, thread: threading.Thread) -> bool:
        """Whether it is the thread that writes."""
        return thread is self._thread

    def offer(self, item: Draft | Failed) -> bool:
        """Take what is ready to be written; False when the queue was full: it is lost and counted."""
        if len(self._queue) >= self._settings.queue_size:
            self.lose(1)
            return False
        self._queue.append(item)
        return True

    def failed(self, error: BaseException, *, refused: bool) -> bool:
        """Take a request that got no answer; as ``offer``."""
        return self.offer(Failed(at_s=self._world.clock(), error=type(error).__name__, refused=refused))

    def callback(self, judged: Judged | None) -> Callable[[Any], None]:
        """What takes a Prediction: some hundred nanoseconds, no lock unless the queue is full."""
        queue, limit, clock, lose = self._queue, self._settings.queue_size, self._world.clock, self.lose
        append = queue.append

        def offer(p: Any) -> None:
            if len(queue) < limit:
                append((clock(), p[1:], None, None))
            else:
                lose(1)

        if judged is None:
            return offer
        output, most_bytes = judged.output, min(MAX_JUDGED_BYTES, _JUDGED_ROWS * judged.row_bytes)
        most = min(limit, _JUDGED_BYTES // most_bytes)

        def offer_judged(p: Any) -> None:
            waiting = len(queue)
            if waiting >= limit:
                lose(1)
                return
            said = p.outputs[output] if waiting < most and output in p.outputs else None
            data = said.tobytes() if said is not None and said.nbytes <= most_bytes else None
            queue.append((clock(), p[1:], data, judged))

        return offer_judged

    def lose(self, count: int) -> None:
        """So many found no place."""
        with self._losing:
            self._lost += count

    def received(self, ranges: tuple[Range, ...], *, through: int) -> None:
        """A consumer's receipt: written with the next commit of records, or when someone waits for it, or soon.

        ``through``: all up to this number have theirs, or have left the spool.
        """
        self._receipts.extend(ranges)
        self._received_through = through
        if self._receipts_wanted():
            self._wake.set()

    def flush(self, timeout_s: float, reached: Callable[[int], bool], *, tick_s: float) -> bool:
        """Wait until what was offered before is on the disk, and then until ``reached`` says so of its last number."""
        until = time.monotonic() + timeout_s
        waiter = _Waiter(done=threading.Event())
        with self._mutex:
            self._waiters.append(waiter)
        self._wake.set()
        if not waiter.done.wait(timeout_s):
            return False
        with self._mutex:
            self._awaited.append(waiter.last_seq)
        try:
            if self._receipts_wanted():  # the last one came meanwhile
                self._wake.set()
            while not reached(waiter.last_seq):
                if time.monotonic() >= until:
                    return False
                with self._mutex:
                    self._committing.wait(tick_s)
            return True
        finally:
            with self._mutex:
                self._awaited.remove(waiter.last_seq)

    def _receipts_wanted(self) -> bool:
        """Whether the receipts that are here are to be committed now: all that someone waits for, or many."""
        receipts = tuple(self._receipts)
        awaited = any(seq <= self._received_through for seq in tuple(self._awaited))
        return bool(receipts) and (awaited or sum(last - first + 1 for first, last in receipts) >= _COMMIT_RECORDS)

    def account(self) -> ReporterAccount:
        """See ReporterAccount. ``offered`` is exact while nothing is being offered."""
        self.wait_opened()
        with self._mutex:
            spool = _NOTHING if self._spool is None else self._spool.account()
            waiting = len(self._queue) + len(self._drafts)
            return ReporterAccount(
                **asdict(spool),
                offered=self._committed + self._lost + self._aggregated + waiting,
                lost=self._lost,
                aggregated=self._aggregated,
            )

    def close(self) -> int:
        """Commit what was offered and end the thread. Gives how many could not be committed."""
        self._stopping = True
        self._wake.set()
        self._thread.join()
        return len(self._drafts) + len(self._queue)

    def _run(self) -> None:
        """Every interval, or sooner when someone waits, commit what is there."""
        while not self._stopping:
            self._wake.wait(self._settings.commit_interval_s)
            self._wake.clear()
            self._cycle()
        self._cycle(last=True)

    def _cycle(self, *, last: bool = False) -> None:
        with self._mutex:
            waiters, self._waiters = self._waiters, []
        try:
            self.unsynced = self._world.synchronised() is False
            spool = self.open()
            self._write_all(spool, last=last)
            self._expire(spool)
        except Exception as error:  # whatever it is, the thread lives on: what is offered waits for it
            self._failed(error)
            with self._mutex:
                self._waiters = waiters + self._waiters
            return
        self.error = self._said = ""
        for waiter in waiters:
            waiter.last_seq = spool.last_seq
            waiter.done.set()

    def _failed(self, error: Exception) -> None:
        foreseen = isinstance(error, TelemetryError)
        self.error = str(error) if foreseen else f"a fault of what writes the spool: {error!r}"
        if self.error != self._said:
            log.error("%s", self.error, exc_info=None if foreseen else error)
        self._said = self.error

    def _write_all(self, spool: Spool, *, last: bool) -> None:
        left = len(self._queue)
        due = left > 0 or self._drafts or self._lost_committed < self._lost or self._receipts_due(last=last)
        while due:
            if not self._drafts:  # what failed to commit comes first: memory holds no more than the queue and it
                left -= self._build(min(left, _COMMIT_RECORDS))
            self._commit(spool)
            due = left > 0
        if self._summarize(last=last):
            self._commit(spool)

    def _receipts_due(self, *, last: bool) -> bool:
        """Whether there are receipts to be committed although there is nothing else."""
        if not self._receipts:
            return False
        self._cycles_without += 1
        waited_s = self._cycles_without * self._settings.commit_interval_s
        return last or waited_s >= _RECEIPTS_EVERY_S or self._receipts_wanted()

    def _build(self, count: int) -> int:
        """Move that many from the queue to the drafts. Gives how many were taken."""
        to_wall_s = self._world.wall_clock() - self._world.clock()
        for _ in range(count):
            with self._mutex:
                offered = self._queue.popleft()
                try:
                    draft = self._draft(offered, to_wall_s)
                except Exception as error:  # a source is the user's: what it tells may be anything
                    self.lose(1)
                    self._tell_unmade(error)
                    continue
                if draft is None:
                    self._aggregated += 1
                else:
                    self._drafts.append(draft)
        return count

    def _tell_unmade(self, error: Exception) -> None:
        self._unmade += 1
        if self._unmade & (self._unmade - 1) == 0:  # 1, 2, 4, 8...: a source that tells nonsense tells it every time
            exc_info = None if isinstance(error, TelemetryError) else error
            log.error("a record that cannot be made, %d so far: %s", self._unmade, error, exc_info=exc_info)

    def _draft(self, offered: _Offered | Draft | Failed, to_wall_s: float) -> Draft | None:
        """Count it; the record of it, or None for one that is not in the sample."""
        if isinstance(offered, Draft):
            return offered
        if isinstance(offered, Failed):
            self._tally.failed(offered.error, refused=offered.refused)
            name = "inference_refused" if offered.refused else "inference_failed"
            failed = {"name": name, "fields": {"error": offered.error}}
            return self._row(EVENT, failed, at_s=offered.at_s, to_wall_s=to_wall_s, priority=LOW)
        at_s, (variant, engine, bundle, verified, timing, source, reason), said, judged = offered
        self._tally.predicted(source, reason, variant, timing.total)
        if said is not None and judged is not None:
            self._tally.judge(judged, said)
        sample = self._settings.sample
        if sample < 1.0 and not flagged(source, reason) and self._world.rng.random() >= sample:
            return None
        body: dict[str, Any] = {
            "source": source,
            "reason": reason,
            "variant": variant,
            "engine": engine,
            "bundle": bundle,
            "verified": verified,
            "timing_ms": {name: round(getattr(timing, name), 3) for name in _TIMES},
        }
        return self._row(PREDICTION, body, at_s=at_s, to_wall_s=to_wall_s, priority=LOW)

    def _row(self, kind: str, body: dict[str, Any], *, at_s: float, to_wall_s: float, priority: int) -> Draft:
        row = encode_row(
            kind=kind,
            boot_id=self._boot_id,
            wall_s=at_s + to_wall_s,
            monotonic_s=at_s,
            body=body,
            clock_unsynced=self.unsynced,
        )
        return Draft(body=row, priority=priority)

    def _summarize(self, *, last: bool) -> bool:
        """Where the interval is over, its metrics become a draft. Gives whether they did."""
        every_s, now_s, tally = self._settings.metrics_interval_s, self._world.clock(), self._tally
        due = every_s is not None and (now_s - tally.began_s >= every_s or (last and not tally.empty))
        if every_s is None or not due or self._drafts:
            return False
        body = tally.body(now_s, heat=self._world.heat(), memory_rss_bytes=memory_rss_bytes(), drift=self.drift)
        try:
            draft = self._row(METRICS, body, at_s=now_s, to_wall_s=self._world.wall_clock() - now_s, priority=NORMAL)
        except TelemetryError as error:  # names that a source gave, so long that there is no record of them
            self.lose(1)
            log.error("metrics that cannot be made: %s", error)
            self._tally = Tally(began_s=now_s)
            return False
        with self._mutex:
            self._drafts.append(draft)
        self._tally = Tally(began_s=now_s)
        self._summarized(body)
        return True

    def _expire(self, spool: Spool) -> None:
        age_s, now_s = spool.max_age_s, self._world.clock()
        if age_s is not None and now_s - self._expired_s >= min(_EXPIRE_EVERY_S, age_s / 10):
            self._expired_s = now_s
            if expired := spool.expire():
                log.warning("%s: %d records were too old and are dropped", spool.path, expired)

    def _commit(self, spool: Spool) -> None:
        ranges = [self._receipts.popleft() for _ in range(len(self._receipts))]
        self._cycles_without = 0
        with self._mutex:
            lost = self._lost - self._lost_committed
        try:
            spool.commit(self._drafts, lost=lost, ranges=ranges)
        except BaseException:
            self._receipts.extendleft(reversed(ranges))
            raise
        with self._mutex:
            self._committed += len(self._drafts)
            self._lost_committed += lost
            self._drafts = []
            self._committing.notify_all()
        self._told()
