"""What was sent to the cloud in this hour and this day, kept on disk: after a crash too much, never too little."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from outrider.bundle.files import atomic_file
from outrider.policy import Budget, Spent
from outrider.store.state import system_errors
from outrider_runtimes import strictjson
from outrider_runtimes.errors import StoreError
from outrider_runtimes.tensors import Tensors

log = logging.getLogger(__name__)

FORMAT = 1
HOUR_S, DAY_S = 3600, 86_400
AHEAD_REQUESTS, AHEAD_BYTES = 64, 2**20  # written down before they are spent: one write to a card for so many
MAX_FILE_BYTES = 4096


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
    """An account in one file, for one process. Safe from several threads."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Open it.

        Args:
            path: the file; made with its folder when something is spent.
            clock: seconds since the epoch.

        Raises:
            StoreError: the file is there and cannot be read, or is none of ours.
        """
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._account = _read(path)
        self._written = self._account

    def spent(self) -> Spent:
        """Up to now."""
        with self._lock:
            self._account = self._account.at(self._clock())
            return self._account.spent

    def add(self, requests: int, size_bytes: int) -> None:
        """Spend. It is on disk before this returns. Raises StoreError where the file cannot be written."""
        with self._lock:
            self._account = self._account.at(self._clock()).plus(requests, size_bytes)
            if not _covers(self._written, self._account):
                self._write(self._account.plus(AHEAD_REQUESTS, AHEAD_BYTES))

    def close(self) -> None:
        """Write down what was really spent. Raises StoreError."""
        with self._lock:
            if self._written != self._account:
                self._write(self._account)

    def _write(self, account: _Account) -> None:
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
        with system_errors(self._path.parent):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_file(self._path, mode=0o600) as file:
                file.write(json.dumps(data).encode())
        self._written = account


class Meter:
    """A budget and what was spent of it."""

    def __init__(self, budget: Budget, spending: Spending) -> None:
        self._budget = budget
        self._spending = spending

    def covers(self, inputs: Tensors) -> bool:
        """Whether these inputs may be sent now."""
        return self._budget.covers(self._spending.spent(), size_of(inputs))

    def sent(self, inputs: Tensors) -> None:
        """One request leaves. Raises StoreError: then it must not."""
        self._spending.add(1, size_of(inputs))

    def received(self, outputs: Tensors) -> None:
        """Its answer came. That it cannot be written down is logged: it has been paid for."""
        try:
            self._spending.add(0, size_of(outputs))
        except StoreError as error:
            log.warning("what an answer of the cloud cost is not on disk: %s", error)

    def close(self) -> None:
        """Write down what was really spent."""
        try:
            self._spending.close()
        except StoreError as error:
            log.warning("what the cloud cost is on disk with a reserve: %s", error)


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
