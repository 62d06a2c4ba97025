"""What is under way between a spool and its receipts, and which record of it does not come through. Pure.

A record is poison where it does not come through while others do:

- ``max_tries`` times a connection broke while it was the only one that the broker had not confirmed, after the broker
  had confirmed something else in that connection; or
- ``max_tries`` times its receipt did not come, while one for what was sent later did.

Which record of a batch that is, is found by halves; from its third failure on a batch waits behind the others, so that
they flow. Otherwise records arrive in order: after a new connection, and whenever no receipt comes, one batch is sent
and its receipt waited for before the others follow, because a broker confirms what no consumer listens to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from outrider.telemetry.record import Range, Row

# A broker that is killed twice in a row is no reason for anything.
DOUBTS: Final = 3
# After so many batches that the broker confirmed, larger ones are tried again.
_CONFIRMED_TO_GROW: Final = 256


@dataclass(kw_only=True, slots=True, eq=False)
class Flight:
    """One batch between the spool and its receipt.

    Attributes:
        rows: what has no receipt yet, in order.
        after_seq: see ``record.Batch``.
        mid: the number of its message in this connection; None before it is sent there.
        confirmed: the broker confirmed it once.
        refused: the broker answered in this connection that it did not take it.
        doubted: a connection broke before it was confirmed.
        losses: how often, in a row, it alone was to blame for that.
        late: how often, in a row, it alone got no receipt.
        suspect: it waits behind the others.
    """

    rows: list[Row]
    after_seq: int
    mid: int | None = None
    sent_at_s: float = 0.0
    order: int = 0
    confirmed: bool = False
    refused: bool = False
    doubted: bool = False
    losses: int = 0
    late: int = 0
    suspect: bool = False


@dataclass(frozen=True, slots=True)
class Poison:
    """A record that was given up."""

    seq: int
    tries: int


@dataclass(kw_only=True, slots=True, eq=False)
class Window:
    """The flights of one stream.

    Attributes:
        size: how many at most, before any is taken apart.
        max_tries: see the module.
        poisoned: what was given up and not yet taken note of.
        most_bytes: of the bodies of a batch that is added: what broke a connection was larger. None without a bound.
    """

    size: int
    max_tries: int
    poisoned: list[Poison] = field(default_factory=list)
    most_bytes: int | None = None
    _flights: list[Flight] = field(default_factory=list)
    _heard: bool = False  # the broker has confirmed something in this connection
    _answered: bool = False  # a consumer listens
    _silent: int = 0  # how often receipts were late since one came
    _loaded: int = 0  # in this connection
    _since_halved: int = 0  # batches that were confirmed since ``most_bytes`` was set
    _sent: int = 0
    _taken_order: int = 0

    def __bool__(self) -> bool:
        return bool(self._flights)

    @property
    def first_seq(self) -> int | None:
        """The lowest number that has no receipt; None where there is none."""
        return min((flight.rows[0].seq for flight in self._flights), default=None)

    @property
    def first_unconfirmed_seq(self) -> int | None:
        """The lowest number that the broker has never confirmed; None where there is none."""
        return min((flight.rows[0].seq for flight in self._flights if not flight.confirmed), default=None)

    def up(self) -> None:
        """A new connection: everything is to be sent again."""
        self._heard, self._answered, self._loaded = False, False, 0
        for flight in self._flights:
            flight.mid = None

    def lost(self) -> None:
        """The connection broke."""
        unsure = [
            flight for flight in self._flights if flight.mid is not None and not (flight.confirmed or flight.refused)
        ]
        for flight in unsure:
            flight.doubted = True
        if len(unsure) == 1 and self._heard:
            self._blame(unsure[0])

    def has_room(self) -> bool:
        """Whether another batch may be loaded now."""
        if any(flight.doubted and not flight.suspect for flight in self._flights):
            return False
        if any(flight.suspect for flight in self._flights):
            # One after the other, so that it is known which one broke the connection; a window full at most, then
            # the suspects have their turn.
            certain = all(flight.confirmed for flight in self._flights if not flight.suspect)
            return certain and self._loaded < self.size
        return len(self._flights) < self._allowed()

    def add(self, rows: Sequence[Row], *, after_seq: int) -> None:
        """A batch, in rising order of seq."""
        self._flights.append(Flight(rows=list(rows), after_seq=after_seq))
        self._loaded += 1

    def to_send(self, *, more: bool) -> Iterator[Flight]:
        """What is to be sent now, in this order; ``more``: the spool has more to load.

        Each is to be sent before the next is asked for.
        """
        careful = any(flight.doubted for flight in self._flights)
        in_order = sorted(self._flights, key=lambda flight: flight.suspect)
        for flight in in_order[: self._allowed()] if not self._answered else in_order:
            if flight.suspect and more and self.has_room():
                return  # what is behind it goes first
            if careful and not flight.confirmed and not self._heard:
                return  # only in a connection that is known to work
            if flight.mid is None:
                yield flight
            if careful and not flight.confirmed:
                return

    def sent(self, flight: Flight, mid: int | None, now_s: float) -> None:
        """It was published, or not: ``mid`` is None."""
        self._sent += 1
        flight.mid, flight.sent_at_s, flight.order, flight.refused = mid, now_s, self._sent, False

    def confirmed(self, mid: int) -> bool:
        """A PUBACK, of a flight or of something else. Gives whether it was of a flight."""
        self._heard = True
        for flight in self._flights:
            if flight.mid == mid:
                flight.confirmed, flight.doubted, flight.suspect, flight.losses = True, False, False, 0
                self._grow()
                return True
        return False

    def refused(self, mid: int) -> bool:
        """The broker did not take it: it is sent again when a receipt would be late. Gives whether it was of a flight.

        It broke nothing: no connection is held against it.
        """
        self._heard = True
        for flight in self._flights:
            if flight.mid == mid:
                flight.refused, flight.doubted = True, False
                return True
        return False

    def overdue(self, now_s: float, patience_s: float) -> bool:
        """Mark those whose receipt did not come in time to be sent again. Gives whether there are any.

        Within one connection TCP loses nothing: only what the broker confirmed, or refused, can lack its receipt for
        good.
        """
        found = silent = False
        for flight in list(self._flights):
            answered = flight.confirmed or flight.refused
            if answered and flight.mid is not None and now_s - flight.sent_at_s >= patience_s:
                found, flight.mid = True, None
                if self._taken_order > flight.order:  # a consumer takes what comes in the order in which it comes
                    flight.late += 1
                    self._judge(flight, flight.late)
                else:
                    silent = True
        if silent:
            self._answered, self._silent = False, self._silent + 1
        return found

    def take(self, ranges: Sequence[Range]) -> list[int]:
        """A receipt. Gives which of the numbers were under way, rising."""
        taken: list[int] = []
        for flight in list(self._flights):
            before = len(flight.rows)
            gone, flight.rows = _split_off(flight.rows, ranges)
            if len(flight.rows) < before:
                taken += gone
                flight.late = 0
                self._answered, self._silent = True, 0
                self._taken_order = max(self._taken_order, flight.order)
            if not flight.rows:
                self._flights.remove(flight)
        return sorted(taken)

    def _allowed(self) -> int:
        """How many flights: where no consumer answers, one; more after a while, in case that one is the trouble."""
        return self.size if self._answered else min(self.size, 1 + self._silent // DOUBTS)

    def _blame(self, flight: Flight) -> None:
        flight.losses += 1
        flight.suspect = flight.suspect or flight.losses >= DOUBTS
        halves = flight.losses >= DOUBTS and len(flight.rows) > 1
        if halves:  # it may have been the size
            half = (sum(len(row.body) for row in flight.rows) + 1) // 2
            self.most_bytes, self._since_halved = min(half, self.most_bytes or half), 0
        poisoned = len(self.poisoned)
        self._judge(flight, flight.losses)
        if len(self.poisoned) > poisoned:  # it was the record
            self.most_bytes = None

    def _grow(self) -> None:
        """A batch was confirmed: after many of them, larger ones are tried again."""
        self._since_halved += 1
        if self.most_bytes is not None and self._since_halved >= _CONFIRMED_TO_GROW:
            self.most_bytes, self._since_halved = 2 * self.most_bytes, 0

    def _judge(self, flight: Flight, failures: int) -> None:
        """After so many failures in a row: in halves, or given up."""
        if failures >= DOUBTS and len(flight.rows) > 1:
            self._halve(flight)
        elif failures >= self.max_tries and len(flight.rows) == 1:
            self.poisoned.append(Poison(flight.rows[0].seq, failures))
            self._flights.remove(flight)

    def _halve(self, flight: Flight) -> None:
        at, middle = self._flights.index(flight), len(flight.rows) // 2
        halves = []
        for rows, after_seq in (
            (flight.rows[:middle], flight.after_seq),
            (flight.rows[middle:], flight.rows[middle - 1].seq),
        ):
            half = replace(flight, rows=rows, after_seq=after_seq, mid=None)
            # The next failure is enough to halve it again.
            half.losses, half.late = min(flight.losses, DOUBTS - 1), min(flight.late, DOUBTS - 1)
            halves.append(half)
        self._flights[at : at + 1] = halves


class Rate:
    """A bound on bytes a second, over some seconds: what is sent may go beyond it once and is then waited for."""

    def __init__(self, bytes_per_s: float | None, *, clock: Callable[[], float]) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._refilled_s = clock()
        self._left = bytes_per_s or 0.0

    def allows(self) -> bool:
        """Whether something may be sent now."""
        if self._bytes_per_s is None:
            return True
        now_s = self._clock()
        earned = max(0.0, now_s - self._refilled_s) * self._bytes_per_s
        self._left, self._refilled_s = min(self._bytes_per_s, self._left + earned), now_s
        return self._left > 0.0

    def spend(self, size_bytes: int) -> None:
        """So much was sent."""
        self._left -= size_bytes


def _split_off(rows: list[Row], ranges: Sequence[Range]) -> tuple[list[int], list[Row]]:
    """The numbers that the ranges cover, and the rows that they do not."""
    low, high = rows[0].seq, rows[-1].seq
    near = [span for span in ranges if span.first <= high and span.last >= low]
    if not near:
        return [], rows
    if any(first <= low and high <= last for first, last in near):
        return [row.seq for row in rows], []
    gone = {row.seq for row in rows if any(first <= row.seq <= last for first, last in near)}
    return sorted(gone), [row for row in rows if row.seq not in gone]
