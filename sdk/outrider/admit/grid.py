"""The cells of variant, engine and threads, timed against each other.

They are timed in rounds, in each round in another order, so that whatever a board does meanwhile (a clock that falls,
another program) falls on all of them alike: cell after cell, the last one would pay for the heat of the first.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from outrider_runtimes.bound import BoundSession
from outrider_runtimes.tensors import Tensors

Clock = Callable[[], float]

ROUNDS = 7
ROUNDS_FOR_ALL = 3  # then only what may still turn out the fastest
CONTENDS = 1.25  # times the fastest so far
BLOCK_S = 0.06
MAX_BLOCK_CALLS = 1000  # of a 20 us model, else one interruption by the system would decide
WARM_UP_S = 0.05  # of a session that was just opened
REWARM_S = 0.01  # of one that was open: another cell's weights are in the caches, and its threads still spin
MAX_WARM_UPS = 500
BUDGET_S = 30.0  # a round that would end later than this is not begun; the first always is


@dataclass(kw_only=True, eq=False)
class Cell:
    """One combination to time.

    Attributes:
        name: ``(variant, engine, threads)``.
        open: loads it.
        inputs: what each call gets.
        taken_s: how long each timed call took.
    """

    name: tuple[str, str, int]
    open: Callable[[], BoundSession]
    inputs: Tensors
    session: BoundSession | None = None
    taken_s: list[float] = field(default_factory=list)

    @property
    def p50_ms(self) -> float:
        """The median of all timed calls."""
        return statistics.median(self.taken_s) * 1e3

    def close(self) -> None:
        """Free the session, if it is open."""
        if self.session is not None:
            self.session.close()
            self.session = None


def time_cells(
    cells: Sequence[Cell],
    *,
    keep_open: Callable[[], bool],
    rng: random.Random,
    clock: Clock = time.perf_counter,
    on_block: Callable[[Cell], None] = lambda _: None,
    budget_s: float = BUDGET_S,
) -> None:
    """Fill ``taken_s`` of every cell: three rounds of all, then four of those within 1.25 of the fastest.

    Args:
        cells: what to time; each gets at least one call.
        keep_open: asked after a block: whether there is memory to keep its session for the next round.
        rng: shuffles the rounds.
        clock: seconds.
        on_block: told before the calls of a cell in a round.
        budget_s: see ``BUDGET_S``.

    Raises:
        OutriderError: a call failed.
    """
    begun = clock()
    slowest_s = 0.0
    for number in range(ROUNDS):
        entered = clock()
        if number and entered - begun + slowest_s > budget_s:
            return
        racing = list(cells) if number < ROUNDS_FOR_ALL else contenders(cells)
        for cell in rng.sample(racing, len(racing)):
            on_block(cell)
            time_block(cell, clock=clock)
            if not keep_open():
                cell.close()
        slowest_s = max(slowest_s, clock() - entered)


def contenders(cells: Sequence[Cell]) -> list[Cell]:
    """Those that may be the fastest by what is known so far."""
    best = min((cell.p50_ms for cell in cells), default=0.0)
    return [cell for cell in cells if cell.p50_ms <= best * CONTENDS]


def time_block(cell: Cell, *, clock: Clock) -> None:
    """Warm one cell up and time some calls of it. It is open afterwards."""
    if cell.session is None:
        cell.session = cell.open()
        _repeat(cell, clock, budget_s=WARM_UP_S, most=MAX_WARM_UPS)
    else:
        _repeat(cell, clock, budget_s=REWARM_S, most=MAX_WARM_UPS)
    cell.taken_s += _repeat(cell, clock, budget_s=BLOCK_S, most=MAX_BLOCK_CALLS)


def _repeat(cell: Cell, clock: Clock, *, budget_s: float, most: int) -> list[float]:
    """Call at least once, until the budget is spent; how long each took."""
    assert cell.session is not None
    taken_s: list[float] = []
    ends_at = clock() + budget_s
    while not taken_s or (len(taken_s) < most and clock() < ends_at):
        begun = clock()
        cell.session.run(cell.inputs)
        taken_s.append(clock() - begun)
    return taken_s
