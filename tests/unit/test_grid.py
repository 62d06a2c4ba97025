"""Timing cells against each other, on a clock that only the cells move."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.admit.grid import CONTENDS, Cell, contenders, time_block, time_cells


class Bench:
    """Cells whose calls take what the test says; ``drift`` slows everything down as time passes."""

    def __init__(self, *, drift: float = 0.0) -> None:
        self.now_s = 0.0
        self.drift = drift
        self.opened: list[str] = []
        self.open_now: set[str] = set()
        self.most_open = 0
        self.blocks: list[str] = []

    def cell(self, name: str, call_s: float) -> Cell:
        bench = self

        class Session:
            def __init__(self) -> None:
                bench.opened.append(name)
                bench.open_now.add(name)
                bench.most_open = max(bench.most_open, len(bench.open_now))

            def run(self, inputs: Any) -> None:
                bench.now_s += call_s * (1.0 + bench.drift * bench.now_s)

            def close(self) -> None:
                bench.open_now.discard(name)

        return Cell(name=(name, "e", 1), open=Session, inputs={})  # type: ignore[arg-type]

    def time(self, cells: list[Cell], *, keep_open: bool = True, seed: int = 1, **options: Any) -> None:
        time_cells(
            cells,
            keep_open=lambda: keep_open,
            rng=random.Random(seed),
            clock=lambda: self.now_s,
            on_block=lambda cell: self.blocks.append(cell.name[0]),
            **options,
        )


def test_every_round_has_every_cell_once_in_orders_that_differ() -> None:
    bench = Bench()
    bench.time([bench.cell(name, 0.001) for name in "abcd"])
    rounds = [bench.blocks[at : at + 4] for at in range(0, len(bench.blocks), 4)]
    assert len(rounds) == 7
    assert all(sorted(each) == list("abcd") for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def test_what_cannot_win_leaves_after_three_rounds() -> None:
    bench = Bench()
    bench.time([bench.cell("fast", 0.001), bench.cell("close", 0.0012), bench.cell("slow", 0.002)])
    assert {name: bench.blocks.count(name) for name in ("fast", "close", "slow")} == {"fast": 7, "close": 7, "slow": 3}


def test_the_median_is_of_the_timed_calls_and_the_first_are_warm_up() -> None:
    bench = Bench()
    cell = bench.cell("a", 0.011)
    bench.time([cell])
    assert cell.p50_ms == pytest.approx(11.0)
    assert len(cell.taken_s) == 7 * 6  # 60 ms a block
    assert bench.now_s == pytest.approx(0.011 * (7 * 6 + 5 + 6 * 1))  # 50 ms, then 10 ms a block, to warm up


@pytest.mark.parametrize(("call_s", "calls"), [(1e-5, 7000), (0.01, 42), (2.0, 7)])
def test_a_slow_model_is_called_less_often(call_s: float, calls: int) -> None:
    bench = Bench()
    cell = bench.cell("a", call_s)
    bench.time([cell], budget_s=1e6)
    assert len(cell.taken_s) == pytest.approx(calls, abs=7)


def test_no_round_is_begun_that_would_outlast_the_budget_but_the_first_always_is() -> None:
    bench = Bench()
    cells = [bench.cell("a", 4.0), bench.cell("b", 5.0)]
    bench.time(cells, budget_s=30.0)
    assert [len(cell.taken_s) for cell in cells] == [1, 1]  # a round is 4 + 4 + 5 + 5 s
    assert all(cell.p50_ms > 0 for cell in cells)


def test_without_memory_one_session_is_open_at_a_time() -> None:
    bench = Bench()
    cells = [bench.cell(name, 0.001) for name in "abc"]
    bench.time(cells, keep_open=False)
    assert bench.most_open == 1
    assert len(bench.opened) == 21
    rich = Bench()
    rich.time([rich.cell(name, 0.001) for name in "abc"])
    assert (rich.most_open, len(rich.opened)) == (3, 3)


@given(st.integers(0, 2**32))
def test_a_board_that_slows_down_does_not_turn_the_order(seed: int) -> None:
    bench = Bench(drift=0.3)
    slow, fast = bench.cell("slow", 0.00105), bench.cell("fast", 0.001)
    bench.time([slow, fast], seed=seed)
    assert fast.p50_ms < slow.p50_ms


def test_cell_after_cell_the_same_drift_would_turn_it() -> None:
    bench = Bench(drift=0.3)
    slow, fast = bench.cell("slow", 0.00105), bench.cell("fast", 0.001)
    for cell in (slow, fast):
        for _ in range(7):
            time_block(cell, clock=lambda: bench.now_s)
    assert fast.p50_ms > slow.p50_ms


def test_contenders_are_those_within_the_bound_of_the_best() -> None:
    bench = Bench()
    cells = [bench.cell(str(ms), 1.0) for ms in (1.0, CONTENDS, CONTENDS + 0.01)]
    for cell in cells:
        cell.taken_s.append(float(cell.name[0]) / 1e3)
    assert contenders(cells) == cells[:2]
