"""How much a test tries: a fifth in the loop, the whole in every other run."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import effort

MAKEFILE = Path(__file__).parents[2] / "Makefile"


@pytest.mark.parametrize(
    ("count", "in_the_loop"), [(1, 1), (9, 9), (10, 10), (30, 10), (50, 10), (51, 10), (100, 20), (400, 80)]
)
def test_the_loop_does_a_fifth_and_ten_at_the_least(monkeypatch, count, in_the_loop):
    monkeypatch.setattr(effort, "LOOP", True)
    assert effort.effort(count) == in_the_loop
    monkeypatch.setattr(effort, "LOOP", False)
    assert effort.effort(count) == count


def test_every_fifth_case_is_spread_over_all(monkeypatch):
    monkeypatch.setattr(effort, "LOOP", True)
    assert list(effort.some(range(12))) == [0, 5, 10]
    assert effort.some([7]) == [7]
    monkeypatch.setattr(effort, "LOOP", False)
    assert effort.some(range(12)) == range(12)


def test_only_make_check_asks_for_less():
    asking = [line for line in MAKEFILE.read_text().splitlines() if "OUTRIDER_LOOP" in line]
    assert len(asking) == 1
    assert '-m "not slow" tests/unit' in asking[0]
