"""The consumer's account of a stream: every number is received, a gap, or may still come."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.telemetry import ledger as ledger_module
from outrider.telemetry.ledger import Ledger
from outrider_runtimes.errors import TelemetryError

steps = st.lists(st.tuples(st.booleans(), st.integers(1, 60), st.integers(0, 20)), max_size=60)


@given(steps=steps)
def test_the_account_is_that_of_sets_of_numbers(steps: list[tuple[bool, int, int]]) -> None:
    ledger, received, gone, top = Ledger(5), set[int](), set[int](), 4
    for adds, drawn, length in steps:
        number = max(drawn, 5) if adds else drawn
        if adds:
            fresh = number not in received | gone
            assert ledger.seen(number) is not fresh
            assert ledger.add(number) is fresh
            received |= {number} if fresh else set()
        else:
            ledger.settle(number, number + length)
        top = max(top, number if adds else number + length)
        if not adds:
            gone |= set(range(max(number, 5), number + length + 1)) - received
        assert (ledger.since_seq, ledger.last_seq) == (5, top)
        assert (ledger.received, ledger.gaps) == (len(received), len(gone))
        assert ledger.missing == len(set(range(5, top + 1)) - received - gone)
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


@pytest.mark.parametrize("change", [{"received": 7}, {"holes": [[1]]}, {"last_seq": "x"}, {"gaps": None}])
def test_an_account_that_does_not_add_up_is_refused(change: dict[str, object]) -> None:
    ledger = Ledger(1)
    ledger.add(3)
    with pytest.raises(TelemetryError, match="account"):
        Ledger.from_json(ledger.to_json() | change)
