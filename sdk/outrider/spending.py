"""What was sent to the cloud in this hour and this day, kept on disk: after a crash too much, never too little."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from outrider.bundle.files import atomic_file
from outrider.policy import Budget, Spent
from outrider.store import find_state_dir
from outrider.store.state import system_errors
from outrider_runtimes import strictjson
from outrider_runtimes.clock import clock_is_synchronised
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import StoreError
from outrider_runtimes.runner import first_ended
from outrider_runtimes.tensors import Tensors

log = logging.getLogger(__name__)

FORMAT = 1
HOUR_S, DAY_S = 3600, 86_400
AHEAD_REQUESTS, AHEAD_BYTES = 64, 2**20  # written down before they are spent: one write to a card for half as many
MAX_FILE_BYTES = 4096
CLOSE_MS = 5000.0  # a card that takes longer has failed; what is on it is too much, not too little
NEVER = Deadline(math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Account:
    """Amounts of one hour and one day, by their numbers since the epoch."""

    hour: int = 0
    day: int = 0
    spent: Spent = field(default_factory=Spent)

    def at(self, now_s: float) -> _Account:
        """The same at another time. A clock that goes back opens no new hour."""
        hour, day = max(self.hour, int(now_s // HOUR_S)), max(self.day, int(now_s // DAY_S))
        spent = self.spent
        return _Account(
            hour=hour,
            day=day,
            spent=Spent(
                hour_requests=spent.hour_requests if hour == self.hour else 0,
                hour_bytes=spent.hour_bytes if hour == self.hour else 0,
                day_requests=spent.day_requests if day == self.day else 0,
                day_bytes=spent.day_bytes if day == self.day else 0,
            ),
        )

    def moved_to(self, now_s: float) -> _Account:
        """The same as of another time, all of it spent in that hour and day."""
        return replace(self, hour=int(now_s // HOUR_S), day=int(now_s // DAY_S))

    def plus(self, requests: int, size_bytes: int) -> _Account:
        spent = self.spent
        return _Account(
            hour=self.hour,
            day=self.day,
            spent=Spent(
                hour_requests=spent.hour_requests + requests,
                hour_bytes=spent.hour_bytes + size_bytes,
                day_requests=spent.day_requests + requests,
                day_bytes=spent.day_bytes + size_bytes,
            ),
        )


class Spending:
    """An account in one file, for one process. Safe from several threads.

    A thread of its own writes, one write at a time, and mostly before what it reserves is needed: a call waits for the
    card only where what is on it does not cover the call, and only as long as its deadline allows.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.time,
        synchronised: Callable[[], bool | None] | None = None,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open it.

        While nothing keeps the clock right, an hour and a day last from where they are known to have begun by the
        monotonic clock of this process. A clock that is right again takes back days that a wrong one was ahead.

        Args:
            path: the file; made with its folder when something is spent.
            clock: seconds since the epoch.
            synchronised: whether something keeps it right, None where nobody knows; without it the kernel is asked,
                where it is the kernel's clock.
            steady: seconds, monotonic.

        Raises:
            StoreError: the file is there and cannot be read, or is none of ours.
        """
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()  # never held while something is written
        self._synchronised = synchronised or (clock_is_synchronised if clock is time.time else lambda: True)
        self._steady = steady
        self._account = _read(path)
        self._known = (float(self._account.hour * HOUR_S), steady())  # a time that was believed, and when that was
        self._written = self._account
        self._writing: Future[None] | None = None

    def spent(self) -> Spent:
        """Up to now."""
        with self._lock:
            self._account = self._account_now()
            return self._account.spent

    def add(
        self,
        requests: int,
        size_bytes: int,
        *,
        unless: Callable[[Spent], bool] = lambda _: False,
        deadline: Deadline = NEVER,
        beside: Future[Any] | None = None,
    ) -> bool:
        """Spend, ``unless`` what was spent so far says no. It is on disk before this returns.

        Args:
            beside: what else the caller waits for: when it ends, the card is not waited for any longer.

        Returns:
            Whether it was spent: False where it may not be, or could not be written down by the deadline.

        Raises:
            StoreError: the file cannot be written.
        """
        while True:
            with self._lock:
                self._account = self._account_now()
                if unless(self._account.spent):
                    return False
                wanted = self._account.plus(requests, size_bytes)
                if _covers(self._written, wanted):
                    self._account = wanted
                    if not _covers(self._written, wanted.plus(AHEAD_REQUESTS // 2, AHEAD_BYTES // 2)):
                        self._begin(wanted.plus(AHEAD_REQUESTS, AHEAD_BYTES))
                    return True
                writing = self._begin(wanted.plus(AHEAD_REQUESTS, AHEAD_BYTES))
            awaited = [writing] if beside is None else [writing, beside]
            first_ended(awaited, deadline.remaining_s())
            if not writing.done():
                return False
            writing.result()

    def owe(self, size_bytes: int) -> None:
        """Spend what was received already, though it is not on disk yet."""
        with self._lock:
            self._account = self._account_now().plus(0, size_bytes)
            self._begin(self._account.plus(AHEAD_REQUESTS, AHEAD_BYTES))

    def close(self) -> None:
        """Write down what was really spent. Raises StoreError, also where that takes more than some seconds."""
        deadline = Deadline.after_ms(CLOSE_MS)
        try:
            while True:
                with self._lock:
                    if self._written == self._account and self._writing is None:
                        return
                    writing = self._begin(self._account)
                writing.result(deadline.remaining_s())
        except (FutureTimeout, TimeoutError):
            raise StoreError(f"{self._path} cannot be written in time") from None

    def _account_now(self) -> _Account:
        """Under the lock: as of now. The kernel is asked about its clock only where another hour would begin."""
        account, now_s = self._account, self._clock()
        if int(now_s // HOUR_S) == account.hour and int(now_s // DAY_S) == account.day:
            return account
        synchronised = self._synchronised()
        if synchronised is False:
            known_s, then_s = self._known
            return account.at(known_s + self._steady() - then_s)
        self._known = (now_s, self._steady())
        if synchronised and now_s // DAY_S < account.day - 1:
            log.warning("%s: its day was ahead of the clock, which is right now", self._path)
            return account.moved_to(now_s)
        return account.at(now_s)

    def _begin(self, account: _Account) -> Future[None]:
        """Under the lock: the write that is under way, else one that begins now."""
        if self._writing is None:
            self._writing = Future()
            target, name = self._write, "outrider-spending"
            threading.Thread(target=target, args=(account, self._writing), name=name, daemon=True).start()
        return self._writing

    def _write(self, account: _Account, writing: Future[None]) -> None:
        spent = account.spent
        data = {
            "format": FORMAT,
            "hour": account.hour,
            "day": account.day,
            "hour_requests": spent.hour_requests,
            "hour_bytes": spent.hour_bytes,
            "day_requests": spent.day_requests,
            "day_bytes": spent.day_bytes,
        }
        failure: Exception | None = None
        try:
            with system_errors(self._path.parent):
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with atomic_file(self._path, mode=0o600) as file:
                    file.write(json.dumps(data).encode())
        except Exception as error:
            failure = error
        with self._lock:
            self._writing = None
            if failure is None:
                self._written = account
        if failure is None:
            writing.set_result(None)
        else:
            writing.set_exception(failure)


class Meter:
    """A budget and what was spent of it."""

    def __init__(self, budget: Budget, spending: Spending) -> None:
        self._budget = budget
        self._bytes = replace(budget, requests_per_hour=None, requests_per_day=None)
        self._spending = spending

    @property
    def most_bytes(self) -> int | None:
        """What an hour or a day may cost at all, whichever is less; None for any number of bytes."""
        bounds = (self._budget.bytes_per_hour, self._budget.bytes_per_day)
        return min((bound for bound in bounds if bound is not None), default=None)

    def covers(self, inputs: Tensors) -> bool:
        """Whether these inputs may be sent now."""
        return self._budget.covers(self._spending.spent(), size_of(inputs))

    def take(self, inputs: Tensors, deadline: Deadline = NEVER, *, beside: Future[Any] | None = None) -> bool:
        """One request leaves, where the budget still covers it; callers at the same time share what is left.

        Args:
            beside: what ends the wait for the card when it ends.

        Returns:
            Whether it may leave: not either where what it costs could not be written down by the deadline.

        Raises:
            StoreError: it cannot be written down: then it must not leave.
        """
        size_bytes = size_of(inputs)
        return self._spending.add(
            1,
            size_bytes,
            unless=lambda spent: not self._budget.covers(spent, size_bytes),
            deadline=deadline,
            beside=beside,
        )

    def take_bytes(self, size_bytes: int) -> bool:
        """So many bytes leave that are no request, where the budget still covers them; whether they may.

        Raises:
            StoreError: as ``take``.
        """
        return self._spending.add(0, size_bytes, unless=lambda spent: not self._bytes.covers(spent, size_bytes))

    def received(self, outputs: Tensors, deadline: Deadline = NEVER) -> None:
        """Its answer came. That it cannot be written down is logged: it has been paid for."""
        size_bytes = size_of(outputs)
        try:
            if not self._spending.add(0, size_bytes, deadline=deadline):
                self._spending.owe(size_bytes)
        except StoreError as error:
            log.warning("what an answer of the cloud cost is not on disk: %s", error)

    def close(self) -> None:
        """Write down what was really spent."""
        try:
            self._spending.close()
        except StoreError as error:
            log.warning("what the cloud cost is on disk with a reserve: %s", error)


def open_meter(
    budget: Budget, *, state: str | Path | None = None, name: str = "link", wall: Callable[[], float] = time.time
) -> Meter:
    """A budget whose account is ``<name>.json`` under the state directory; one process at a time has it.

    Args:
        state: the state directory; see ``outrider.install``.
        wall: seconds since the epoch.

    Raises:
        StoreError: what was spent cannot be read.
    """
    return Meter(budget, Spending(find_state_dir(state) / f"{name}.json", clock=wall))


def size_of(tensors: Tensors) -> int:
    """Their bytes."""
    return sum(array.nbytes for array in tensors.values())


def _covers(written: _Account, account: _Account) -> bool:
    """Whether what is on disk is at least what was spent."""
    if (written.hour, written.day) != (account.hour, account.day):
        return False
    have, need = written.spent, account.spent
    return (
        have.hour_requests >= need.hour_requests
        and have.hour_bytes >= need.hour_bytes
        and have.day_requests >= need.day_requests
        and have.day_bytes >= need.day_bytes
    )


def _read(path: Path) -> _Account:
    with system_errors(path.parent):
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return _Account()

    def refuse(problem: str) -> StoreError:
        return StoreError(
            f"{path} is not an account of what was spent: {problem}",
            hint="move it away; the hour and the day then begin at 0",
        )

    data = strictjson.parse(raw, refuse, max_bytes=MAX_FILE_BYTES, max_depth=2)
    keys = ("hour", "day", "hour_requests", "hour_bytes", "day_requests", "day_bytes")
    if data.get("format") != FORMAT or any(type(data.get(key)) is not int or data[key] < 0 for key in keys):
        raise refuse(f"expected format {FORMAT} and counts of 0 or more")
    return _Account(hour=data["hour"], day=data["day"], spent=Spent(**{key: data[key] for key in keys[2:]}))
