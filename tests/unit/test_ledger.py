"""The consumer's account of a stream: every number is received, a gap, or may still come."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.telemetry import ledger as ledger_module
from outrider.telemetry.ledger import Ledger
from outrider_runtimes.errors import TelemetryError

steps = st.lists(st.tuples(st.booleans(), st.integers(1, 60), st.integers(-20, 20)), max_size=60)


@given(steps=steps)
def test_the_account_is_that_of_sets_of_numbers(steps: list[tuple[bool, int, int]]) -> None:
    ledger, received, gone, since, top = Ledger(5), set[int](), set[int](), 5, 4
    for adds, drawn, length in steps:
        number = drawn
        if adds:
            since = min(since, number)  # a number from before the first one that came is as new as any
            fresh = number not in received | gone
            assert ledger.seen(number) is not fresh
            assert ledger.add(number) is fresh
            received |= {number} if fresh else set()
        else:
            ledger.settle(number, number + length)
        if adds or length >= 0:
            top = max(top, number if adds else number + length)
        if not adds:
            gone |= set(range(max(number, since), number + length + 1)) - received
        assert (ledger.since_seq, ledger.last_seq) == (since, top)
        assert (ledger.received, ledger.gaps) == (len(received), len(gone))
        assert ledger.missing == len(set(range(since, top + 1)) - received - gone)
    copy = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert copy.to_json() == ledger.to_json()


def test_a_hole_may_be_filled_until_the_device_says_that_nothing_waits_there() -> None:
    ledger = Ledger(1)
    ledger.add(1)
    ledger.add(5)
    assert (ledger.gaps, ledger.missing) == (0, 3)
    ledger.add(3)
    ledger.settle(1, 3)
    assert (ledger.gaps, ledger.missing) == (1, 1)
    assert ledger.seen(2), "what was given up is not taken any more"


def test_a_number_from_before_the_first_one_is_new() -> None:
    ledger = Ledger(251)
    assert all(ledger.add(seq) for seq in range(251, 261))
    assert not ledger.seen(5)
    assert ledger.add(5)
    assert (ledger.since_seq, ledger.last_seq, ledger.received, ledger.missing) == (5, 260, 11, 245)
    assert not ledger.add(5)
    assert ledger.add(6)


def test_a_jump_costs_nothing() -> None:
    ledger = Ledger(1)
    ledger.add(2**62)
    assert ledger.missing == 2**62 - 1


def test_holes_without_end_become_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_HOLES", 3)
    ledger = Ledger(1)
    for seq in range(2, 22, 2):
        ledger.add(seq)
    assert (ledger.received, ledger.gaps, ledger.missing) == (10, 7, 3)
    assert Ledger.from_json(ledger.to_json()).gaps == 7


def test_what_was_given_up_and_still_comes_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_HOLES", 3)
    ledger = Ledger(1)
    for seq in range(2, 22, 2):
        ledger.add(seq)
    assert ledger.add(2), "that it came is forgotten: it is taken again, and not for the last time in place of 1"
    ledger = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert all(ledger.add(seq) for seq in range(1, 21, 2))
    assert (ledger.received, ledger.gaps, ledger.missing) == (20, 0, 0)
    assert ledger.seen(20)


@given(numbers=st.lists(st.integers(1, 80), max_size=120))
def test_beyond_the_holes_the_account_still_adds_up_and_nothing_is_taken_that_did_not_come(numbers: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "MAX_HOLES", 2)
        ledger, came = Ledger(40), set[int]()
        for number in numbers:
            assert number in came or not ledger.seen(number)
            ledger.add(number)
            came.add(number)
            assert ledger.last_seq - ledger.since_seq + 1 == ledger.received + ledger.gaps + ledger.missing
            assert min(ledger.received, ledger.gaps, ledger.missing) >= 0
            Ledger.from_json(ledger.to_json())


@pytest.mark.parametrize(
    "change",
    [{"received": 7}, {"holes": [[1]]}, {"last_seq": "x"}, {"gaps": None}, {"given_up": [1, 3]}, {"given_up": 1}],
)
def test_an_account_that_does_not_add_up_is_refused(change: dict[str, object]) -> None:
    ledger = Ledger(1)
    ledger.add(3)
    with pytest.raises(TelemetryError, match="account"):
        Ledger.from_json(ledger.to_json() | change)
