"""Which numbers of a stream a consumer has, which are missing, and which of those will never come. Pure."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Final

from outrider_runtimes.errors import TelemetryError

# A consumer that misses every other message would grow the list for ever: past this, the lowest holes are given up.
MAX_HOLES: Final = 10_000


class Ledger:
    """The account of one stream at its consumer: ``last_seq - since_seq + 1 == received + gaps + missing``.

    No number that never came is taken for one that did. Past 10,000 holes the lowest are given up: they count as gaps,
    and which of the numbers up to there they were is forgotten: what comes of those is taken, be it for a second time.

    Attributes:
        since_seq, last_seq: the numbers that it is about; a lower one that comes later lowers ``since_seq``.
        received: how many of them are here.
        gaps: how many of them will never come, as far as is known.
    """

    __slots__ = ("_given_up", "_given_up_to", "_holes", "gaps", "last_seq", "received", "since_seq")

    def __init__(self, since_seq: int) -> None:
        self.since_seq = since_seq
        self.last_seq = since_seq - 1
        self.received = 0
        self.gaps = 0
        self._given_up = 0  # so many of the gaps, none above _given_up_to
        self._given_up_to = 0
        self._holes: list[tuple[int, int]] = []  # what is missing: disjoint, rising, both ends included

    @property
    def missing(self) -> int:
        """How many numbers are not here and may still come."""
        return sum(last - first + 1 for first, last in self._holes)

    def seen(self, seq: int) -> bool:
        """Whether a record of this number is not to be taken: it is here, or the device said that it never comes."""
        if seq > self.last_seq or seq < self.since_seq or self._find(seq) is not None:
            return False
        return seq > self._given_up_to

    def add(self, seq: int) -> bool:
        """Take note of a number; False when it was seen before."""
        if seq == self.last_seq + 1:  # nearly always
            self.last_seq = seq
            self.received += 1
            return True
        if self.seen(seq):
            return False
        self._reach(seq)
        if self._remove(seq, seq):
            self.received += 1
        elif self._given_up:  # one of those, as far as is known
            self._given_up -= 1
            self.gaps -= 1
            self.received += 1
        self._bound()
        return True

    def settle(self, first_seq: int, last_seq: int) -> None:
        """What is missing from ``first_seq`` to ``last_seq`` will never come; nothing, where that is no span."""
        if first_seq > last_seq:
            return
        if last_seq > self.last_seq:
            self._reach(last_seq)
        self.gaps += self._remove(first_seq, last_seq)
        self._bound()

    def to_json(self) -> dict[str, Any]:
        """What from_json takes."""
        return {
            "since_seq": self.since_seq,
            "last_seq": self.last_seq,
            "received": self.received,
            "gaps": self.gaps,
            "holes": self._holes,
            "given_up": [self._given_up, self._given_up_to],
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Ledger:
        """Raises TelemetryError where the account does not add up."""
        try:
            ledger = cls(int(fields["since_seq"]))
            ledger.last_seq = int(fields["last_seq"])
            ledger.received = int(fields["received"])
            ledger.gaps = int(fields["gaps"])
            ledger._holes = [(int(first), int(last)) for first, last in fields["holes"]]
            # An account of before this was noted has none.
            given_up, given_up_to = fields.get("given_up", (0, 0))
            ledger._given_up, ledger._given_up_to = int(given_up), int(given_up_to)
        except (KeyError, TypeError, ValueError) as error:
            raise TelemetryError(f"a consumer's account that cannot be read: {error!r}") from error
        adds_up = ledger.last_seq - ledger.since_seq + 1 == ledger.received + ledger.gaps + ledger.missing
        if not adds_up or not 0 <= ledger._given_up <= ledger.gaps:
            raise TelemetryError(f"a consumer's account that does not add up: {fields}")
        return ledger

    def _find(self, seq: int) -> int | None:
        at = bisect_right(self._holes, (seq, self.last_seq)) - 1
        return at if at >= 0 and self._holes[at][0] <= seq <= self._holes[at][1] else None

    def _reach(self, seq: int) -> None:
        """All numbers down or up to ``seq`` are missing, where nothing is known of them."""
        if seq > self.last_seq:
            self._holes.append((self.last_seq + 1, seq))
            self.last_seq = seq
        elif seq < self.since_seq:
            self._holes.insert(0, (seq, self.since_seq - 1))
            self.since_seq = seq

    def _bound(self) -> None:
        while len(self._holes) > MAX_HOLES:
            first, last = self._holes.pop(0)
            self.gaps += last - first + 1
            self._given_up += last - first + 1
            self._given_up_to = max(self._given_up_to, last)

    def _remove(self, first_seq: int, last_seq: int) -> int:
        """Take a span out of the holes. Gives how many numbers that were."""
        start = max(0, bisect_right(self._holes, (first_seq, self.last_seq)) - 1)
        stop = start
        kept: list[tuple[int, int]] = []
        removed = 0
        while stop < len(self._holes) and self._holes[stop][0] <= last_seq:
            first, last = self._holes[stop]
            kept += [
                part
                for part in ((first, min(last, first_seq - 1)), (max(first, last_seq + 1), last))
                if part[0] <= part[1]
            ]
            removed += max(0, min(last, last_seq) - max(first, first_seq) + 1)
            stop += 1
        self._holes[start:stop] = kept
        return removed
