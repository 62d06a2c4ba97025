"""What ``install`` chose, beside every cell of variant, engine and threads, measured anew and at length.

The promise: the choice takes at most 1.02 of the best cell's time.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import outrider
from benchmarks.handmade import Network, dense, write_handmade
from benchmarks.measure import TWIN, Call, compare_calls, say
from benchmarks.stats import TWIN_LIMIT, ratio
from outrider.admit.admission import Measured
from outrider.model import Model

SUBJECTS = (dense("tiny", 64, 1), dense("small", 384, 3), dense("middle", 1024, 4), dense("large", 2048, 5))
BLOCKS, BLOCK_US, MOST_CALLS = 30, 20_000, 200
ALLOWED_RATIO = 1.02
FIRST_CALLS = 200


def run(folder: Path) -> dict[str, Any]:
    """Install and measure each subject. Returns what is stored as ``results/grid.json``."""
    return {
        "allowed_ratio": ALLOWED_RATIO,
        "blocks": BLOCKS,
        "subjects": {n.name: _subject(n, folder) for n in SUBJECTS},
    }


def _subject(network: Network, folder: Path) -> dict[str, Any]:
    say(f"grid: {network.name}")
    state = folder / "state"
    report = outrider.install(write_handmade(network, folder), state=state)
    inputs = {"x": network.input()}
    with outrider.load(network.name, state=state) as model:
        for _ in range(FIRST_CALLS):
            model.infer(inputs)
    chosen = _name(report.choice.variant, report.choice.engine, report.choice.threads)

    def call(model: Model) -> Call:
        return lambda: model.infer(inputs)

    with ExitStack() as stack:
        cells = {_named(row): stack.enter_context(_load(network, row, state)) for row in report.measured}
        twin = stack.enter_context(outrider.load(network.name, state=state))
        slowest_ms = max(row.p50_ms for row in report.measured)
        calls_a_block = max(5, min(MOST_CALLS, int(BLOCK_US / 1e3 / slowest_ms)))
        found, times = compare_calls(
            {name: call(model) for name, model in cells.items()},
            base=chosen,
            blocks=BLOCKS,
            calls_a_block=calls_a_block,
            twin=call(twin),
        )
    best = min(found.p50_us, key=lambda name: found.p50_us[name])
    against = ratio(times[chosen], times[best], np.random.default_rng(1))
    same = ratio(times[chosen + TWIN], times[chosen], np.random.default_rng(1))
    valid = bool(abs(same.value - 1.0) <= TWIN_LIMIT)
    return {
        "chosen": chosen,
        "reason": report.choice.reason,
        "best": best,
        "p50_us": found.p50_us,
        "ratio_to_best": vars(against),
        "twin": vars(same),
        "valid": valid,
        "kept": bool(valid and against.value <= ALLOWED_RATIO),
    }


def _load(network: Network, row: Measured, state: Path) -> Model:
    return outrider.load(network.name, variant=row.variant, engine=row.engine, threads=row.threads, state=state)


def _named(row: Measured) -> str:
    return _name(row.variant, row.engine, row.threads)


def _name(variant: str, engine: str, threads: int) -> str:
    return f"{variant} on {engine}, {threads} thread{'s' if threads > 1 else ''}"
