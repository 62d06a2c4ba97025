"""What is under way, and which record does not come through: simulated links, brokers and consumers, no clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.telemetry.publisher import Limits
from outrider.telemetry.record import Range, Row, to_ranges
from outrider.telemetry.window import DOUBTS, Rate, Window
from outrider_runtimes.errors import ConfigError
from support.effort import effort

BATCH = 10


@dataclass
class World:
    """A device with records waiting, a broker, and a consumer.

    Attributes:
        waiting: numbers in the spool that were not loaded yet.
        breaks: whether the broker drops the connection when it is sent these.
        refuses: records that the consumer never takes; it stops in a message at the first of them.
        new_a_turn: how many records the device makes meanwhile.
        works: whether a connection comes up and its greeting is confirmed.
    """

    waiting: list[int]
    breaks: Callable[[list[int]], bool] = lambda _: False
    refuses: frozenset[int] = frozenset()
    works: Callable[[], bool] = lambda: True
    max_tries: int = 8
    new_a_turn: int = 0
    window: Window = field(init=False)
    arrived: list[int] = field(default_factory=list)
    now_s: float = 0.0
    mids: int = 0

    def __post_init__(self) -> None:
        self.window = Window(size=4, max_tries=self.max_tries)
        self.cursor = 0
        self.last = max(self.waiting, default=0)

    def connection(self, *, turns: int = 50) -> None:
        """One connection until it breaks, or for so many turns."""
        self.window.up()
        if not self.works():
            self.window.lost()
            return
        self.window.confirmed(-1)  # the greeting's
        for _ in range(turns):
            self.now_s += 1.0
            self.waiting += range(self.last + 1, self.last + 1 + self.new_a_turn)
            self.last += self.new_a_turn
            self.window.overdue(self.now_s, 5.0)
            if not self.turn():
                self.window.lost()
                return

    def turn(self) -> bool:
        """Send and load as a publisher does, then the broker and the consumer do their part. False: it broke."""
        while True:
            for flight in self.window.to_send(more=bool(self.waiting)):
                self.mids += 1
                seqs = [row.seq for row in flight.rows]
                self.window.sent(flight, self.mids, self.now_s)
                if self.breaks(seqs):
                    return False
                self.window.confirmed(self.mids)
                self.take(seqs)
            if not self.waiting or not self.window.has_room():
                return True
            rows = [Row(seq, b"{}") for seq in self.waiting[:BATCH]]
            del self.waiting[:BATCH]
            self.window.add(rows, after_seq=self.cursor)
            self.cursor = rows[-1].seq

    def take(self, seqs: list[int]) -> None:
        taken = []
        for seq in seqs:
            if seq in self.refuses:
                break
            taken.append(seq)
        self.arrived += [seq for seq in taken if seq not in self.arrived]
        self.window.take(to_ranges(taken))

    def poisoned(self) -> list[int]:
        return [poison.seq for poison in self.window.poisoned]


def test_without_failures_all_goes_in_order_in_one_connection() -> None:
    world = World(waiting=list(range(1, 501)))
    world.connection()
    assert world.arrived == list(range(1, 501))
    assert not world.window


@pytest.mark.parametrize("poison", [{1}, {57}, {200}, {57, 58}, {3, 90, 177}])
def test_what_breaks_the_connection_is_found_and_all_others_arrive(poison: set[int]) -> None:
    world = World(waiting=list(range(1, 201)), breaks=lambda seqs: bool(poison & set(seqs)))
    connections = 0
    while (world.waiting or world.window) and connections < 200:
        connections += 1
        world.connection()
    assert sorted(world.arrived) == sorted(set(range(1, 201)) - poison)
    assert sorted(world.poisoned()) == sorted(poison)
    assert connections <= len(poison) * (DOUBTS + 4 + world.max_tries) + 1


def test_what_is_behind_a_poisoned_record_flows_before_that_is_given_up() -> None:
    world = World(waiting=list(range(1, 201)), breaks=lambda seqs: 1 in seqs)
    for _ in range(DOUBTS + 1):
        world.connection()
    assert not world.poisoned()
    assert set(world.arrived) >= set(range(11, 41)), "a window of batches"


@pytest.mark.parametrize("refused", [{1}, {57}, {57, 58, 59}, {10, 20, 200}])
def test_what_the_consumer_never_takes_is_found_and_all_others_arrive(refused: set[int]) -> None:
    world = World(waiting=list(range(1, 201)), refuses=frozenset(refused), new_a_turn=3)
    world.connection(turns=400)
    world.new_a_turn = 0
    world.connection(turns=100)
    assert sorted(world.poisoned()) == sorted(refused)
    assert sorted(world.arrived) == sorted(set(range(1, world.last + 1)) - refused)


def test_a_consumer_that_is_not_there_poisons_nothing() -> None:
    world = World(waiting=list(range(1, 201)), refuses=frozenset(range(1, 201)))
    for _ in range(50):
        world.connection(turns=100)
    assert world.poisoned() == []
    world.refuses = frozenset()
    world.connection(turns=200)
    assert sorted(world.arrived) == list(range(1, 201))


def test_a_link_that_never_comes_up_poisons_nothing() -> None:
    world = World(waiting=list(range(1, 51)), breaks=lambda _: True, works=lambda: False)
    for _ in range(200):
        world.connection()
    assert world.poisoned() == []


@pytest.mark.parametrize("seed", range(20))
def test_a_broker_that_is_killed_now_and_then_disturbs_no_order(seed: int) -> None:
    """Killed with a whole window under way, and again at the first message after it: still everything in order."""
    rng = random.Random(seed)
    world = World(waiting=list(range(1, 2001)))
    kills = {rng.randrange(1, 400) for _ in range(30)}
    kills -= {kill + 1 for kill in kills} | {kill + 2 for kill in kills}
    sends = 0

    def breaks(_: list[int]) -> bool:
        nonlocal sends
        sends += 1
        return sends in kills

    world.breaks = breaks
    for _ in range(100):
        world.connection(turns=3)
    assert world.arrived == list(range(1, 2001))
    assert world.poisoned() == []


@settings(max_examples=effort(60), deadline=None)
@given(seed=st.integers(0, 10**6), losing=st.floats(0.0, 0.4), waiting=st.integers(1, 120))
def test_a_bad_link_loses_nothing(seed: int, losing: float, waiting: int) -> None:
    rng = random.Random(seed)
    world = World(waiting=list(range(1, waiting + 1)), breaks=lambda _: rng.random() < losing, max_tries=30)
    for _ in range(3000):
        world.connection()
        if not world.waiting and not world.window:
            break
    assert sorted(world.arrived) == list(range(1, waiting + 1))
    assert world.poisoned() == []


def breaking(window: Window, rows: list[Row]) -> None:
    """Connections that break at what is sent, until the window takes it apart."""
    window.add(rows, after_seq=0)
    for _ in range(DOUBTS):
        window.up()
        window.confirmed(-1)
        for number, flight in enumerate(window.to_send(more=False)):
            window.sent(flight, number, 0.0)
        window.lost()


def test_later_batches_are_as_small_as_the_halves_of_what_broke_connections_and_grow_again() -> None:
    window = Window(size=4, max_tries=8)
    breaking(window, [Row(seq, b"x" * 100) for seq in range(1, 11)])
    assert window.most_bytes == 500
    window.up()
    window.confirmed(-1)
    sizes = []
    for mid in range(1000, 1254):
        window.add([Row(mid, b"x" * 100)], after_seq=0)
        for flight in window.to_send(more=False):
            assert window.most_bytes == 500
            sizes.append(len(flight.rows))
            window.sent(flight, mid, 0.0)
            assert window.confirmed(mid)
            window.take([Range(flight.rows[0].seq, flight.rows[-1].seq)])
    assert sorted(sizes) == [1] * 254 + [5, 5], "the two halves, and what came after"
    assert window.most_bytes == 1000


def test_where_it_was_a_record_and_not_the_size_the_bound_is_lifted() -> None:
    world = World(waiting=list(range(1, 101)), breaks=lambda seqs: 7 in seqs)
    for _ in range(200):
        world.connection()
        if world.poisoned():
            break
    assert world.poisoned() == [7]
    assert world.window.most_bytes is None


def test_what_the_broker_refuses_is_not_confirmed_breaks_nothing_and_is_sent_again() -> None:
    window = Window(size=4, max_tries=8)
    window.add([Row(1, b"{}"), Row(2, b"{}")], after_seq=0)
    for turn in range(10):
        window.up()
        (flight,) = window.to_send(more=False)
        window.sent(flight, 5, float(turn))
        assert not window.refused(4)
        assert window.refused(5)
        assert window.first_unconfirmed_seq == 1
        assert not window.overdue(turn + 1.0, 5.0)
        assert window.overdue(turn + 5.0, 5.0)
        assert [each is flight for each in window.to_send(more=False)] == [True]
        window.lost()
    assert not window.poisoned and len(flight.rows) == 2


def test_the_numbers_of_a_receipt_are_those_that_were_under_way() -> None:
    window = Window(size=4, max_tries=8)
    window.add([Row(seq, b"{}") for seq in (1, 2, 3)], after_seq=0)
    window.add([Row(seq, b"{}") for seq in (7, 9)], after_seq=3)
    assert window.first_unconfirmed_seq == 1
    assert window.take([Range(2, 2), Range(8, 100)]) == [2, 9]
    assert window.take([Range(1, 2**63 - 1)]) == [1, 3, 7]
    assert window.take([Range(1, 2**63 - 1)]) == []
    assert not window
    assert window.first_unconfirmed_seq is None


def test_a_rate_is_kept_over_time_and_one_message_may_go_beyond_it() -> None:
    now_s = [0.0]
    rate = Rate(1000.0, clock=lambda: now_s[0])
    sent_bytes, at_s = 0, []
    while now_s[0] < 100.0:
        if rate.allows():
            rate.spend(2500)
            sent_bytes += 2500
            at_s.append(now_s[0])
        now_s[0] += 0.25
    assert 100_000 <= sent_bytes <= 100_000 + 2500 + 1000
    assert min(b - a for a, b in pairwise(at_s)) >= 1.5
    free = Rate(None, clock=lambda: 0.0)
    free.spend(10**12)
    assert free.allows()


@pytest.mark.parametrize(
    "wrong",
    [
        *({"window_batches": 0}, {"window_batches": 21}, {"batch_records": 1001}, {"batch_bytes": 0}),
        *({"receipt_timeout_s": 0.0}, {"bytes_per_s": 0}, {"max_tries": 2}, {"max_tries": None}, {"max_tries": 8.5}),
        *({"receipt_timeout_s": "x"}, {"receipt_timeout_s": float("nan")}, {"bytes_per_s": True}),
    ],
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)  # type: ignore[arg-type]
