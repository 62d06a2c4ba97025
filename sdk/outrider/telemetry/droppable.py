"""Which records of a spool go first when it is full, or when they waited too long."""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Collection, Iterable, Sequence

from outrider.telemetry.spoolfile import count_dropped, delete_dropped


class Droppable:
    """The numbers of records in the order in which they are dropped: the lowest class first, in it the oldest."""

    def __init__(self, rows: Iterable[tuple[int, int]]) -> None:
        self._classes: dict[int, deque[int]] = {}
        self.extend(rows)

    def __len__(self) -> int:
        return sum(len(seqs) for seqs in self._classes.values())

    def extend(self, rows: Iterable[tuple[int, int]]) -> None:
        """Number and priority, in rising order of the numbers."""
        for seq, priority in rows:
            self._classes.setdefault(priority, deque()).append(seq)

    def pop(self) -> tuple[int, int] | None:
        """The next, out of it; it may have left the spool before."""
        for priority in sorted(self._classes):
            if self._classes[priority]:
                return self._classes[priority].popleft(), priority
        return None

    def put_back(self, entries: Sequence[tuple[int, int]]) -> None:
        """What was popped and stays, in the order in which it came."""
        for seq, priority in reversed(entries):
            self._classes[priority].appendleft(seq)


class Cap:
    """The bound on the bytes of what is pending. What is in flight (``held``) stays, however full the spool is."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._droppable: Droppable | None = None  # made when the cap is reached first

    def forget(self) -> None:
        """What was told may have been undone."""
        self._droppable = None

    def is_reached(self, most_bytes: int, *, kept_bytes: int) -> bool:
        """Whether ``evict`` has anything to do."""
        return self._droppable is not None or most_bytes + kept_bytes > self._max_bytes

    def evict(
        self,
        db: sqlite3.Connection,
        most_bytes: int,
        committed: Iterable[tuple[int, int]],
        *,
        held: Collection[int],
        kept_bytes: int,
    ) -> int:
        """Within a transaction: drop what does not fit, in the stated order.

        Args:
            most_bytes: of what is pending, no less than there is: it saves a look at the account.
            committed: number and priority of the new rows.
            kept_bytes: of a quarantined file.

        Returns:
            ``most_bytes`` afterwards.
        """
        if not self.is_reached(most_bytes, kept_bytes=kept_bytes):
            return most_bytes
        pending, pending_bytes = db.execute("SELECT pending, pending_bytes FROM account").fetchone()
        excess = pending_bytes + kept_bytes - self._max_bytes
        if self._droppable is None or len(self._droppable) > 2 * pending + 4096:
            self._droppable = Droppable(db.execute("SELECT seq, priority FROM rows ORDER BY seq"))
        else:
            self._droppable.extend(committed)
        count, freed_bytes, kept = 0, 0, []
        while freed_bytes < excess and (entry := self._droppable.pop()) is not None:
            if entry[0] in held:
                kept.append(entry)
                continue
            # None of what was delivered or dropped meanwhile.
            for (size,) in db.execute("DELETE FROM rows WHERE seq=? RETURNING size_bytes", entry[:1]).fetchall():
                count, freed_bytes = count + 1, freed_bytes + size
        self._droppable.put_back(kept)
        if count:
            count_dropped(db, count, freed_bytes)
        return int(pending_bytes) - freed_bytes


def expire(db: sqlite3.Connection, oldest_ms: int, *, held: Collection[int]) -> int:
    """Within a transaction: drop what came before ``oldest_ms`` and is not in flight. Gives how many."""
    victims: list[int] = []
    # Numbers and times rise together.
    for seq, lived_ms in db.execute("SELECT seq, lived_ms FROM rows ORDER BY seq"):
        if lived_ms >= oldest_ms:
            break
        if seq not in held:
            victims.append(seq)
    if victims:
        delete_dropped(db, victims, why="expired")
    return len(victims)
