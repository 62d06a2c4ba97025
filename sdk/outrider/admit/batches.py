"""The batch curve of what serves here, measured in the child that admits a bundle: several rows in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from outrider.admit.curve import ROWS, BatchCurve, Point, unbatchable
from outrider.bundle import GoldenArrays, Manifest, Variant
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.engines import Session
from outrider_runtimes.errors import OutriderError
from outrider_runtimes.golden import DecisionCheck, compare
from outrider_runtimes.tensors import Array, Tensors, TensorSpec

Clock = Callable[[], float]

ROUNDS = 3
BLOCK_S = 0.003
BUDGET_S = 2.0
LOUD = 100.0  # times the largest golden value: what a neighbour without a declared range may bring

INFLUENCED = "a row's answer depends on the rows beside it"


def measure_batches(
    manifest: Manifest,
    golden: GoldenArrays,
    variant: Variant,
    session: Session,
    *,
    engine: str,
    threads: int,
    one_s: Sequence[float],
    room: Callable[[], bool],
    clock: Clock = time.perf_counter,
) -> BatchCurve:
    """Time one variant in calls of 1, 2, 4, 8, 16 and 32 golden rows, for two seconds at most.

    Where rows cannot be put together, or where what a row gets beside rows of extreme values is not what it gets alone
    (an int8 whose scales are those of the whole call), there are no points, and the reason says so.

    Args:
        session: of that variant; it stays open.
        engine, threads: what it runs on.
        one_s: what calls of one row took, where that was measured before.
        room: asked before each larger call: whether there is memory for it.
        clock: seconds.
    """

    def curve(reason: str, points: tuple[Point, ...] = ()) -> BatchCurve:
        return BatchCurve(variant=variant.name, engine=engine, threads=threads, points=points, reason=reason)

    if why := unbatchable(manifest.interface) or _fixed(manifest, variant):
        return curve(why)
    try:
        if influenced(manifest, golden, variant, session):
            return curve(INFLUENCED)
        bound = BoundSession(session, manifest.interface, variant.binding)
        taken_s, why = time_rows(
            lambda rows: bound.run(golden_rows(golden.inputs, rows)), one_s=one_s, room=room, clock=clock
        )
    except OutriderError as error:
        return curve(f"several rows in one call failed: {error}")
    points = (Point(rows=n, best_ms=min(s) * 1e3, runs=len(s)) for n, s in taken_s.items())
    return curve(why, tuple(points))


def time_rows(
    call: Callable[[int], object],
    *,
    one_s: Sequence[float] = (),
    room: Callable[[], bool],
    clock: Clock,
    budget_s: float = BUDGET_S,
) -> tuple[dict[int, list[float]], str]:
    """How long calls take, in seconds, by their number of rows; and why not all numbers were tried.

    Three rounds, each from few rows to many, so that what a board does meanwhile falls on all of them alike. A number
    of rows is not tried where the time that is left would not do for all of its rounds.

    Raises:
        OutriderError: a call failed.
    """
    taken_s: dict[int, list[float]] = {}
    ends_at = clock() + budget_s
    why = ""
    for rows in ROWS:
        rest_s = (ROUNDS - 1) * sum(map(min, taken_s.values()))
        needed_s = rest_s + (ROUNDS + 1) * rows * min((min(s) / n for n, s in taken_s.items()), default=0.0)
        if clock() + needed_s > ends_at:
            why = f"{rows} rows at once take more time than there was"
        elif not room():
            why = f"{rows} rows at once take more memory than there was"
        if why:
            break
        call(rows)  # memory is taken, caches are filled
        taken_s[rows] = _block(call, rows, clock)
    taken_s[1] += one_s
    for _ in range(ROUNDS - 1):
        if clock() + sum(map(min, taken_s.values())) > ends_at:
            break
        for rows in taken_s:
            taken_s[rows] += _block(call, rows, clock)
    return taken_s, why


def influenced(manifest: Manifest, golden: GoldenArrays, variant: Variant, session: Session) -> bool:
    """Whether the first golden row gets another answer beside rows of extreme values than alone.

    Raises:
        OutriderError: the session failed.
    """
    judged = manifest.interface.judged
    bound = BoundSession(session, judged, variant.binding)
    alone = bound.run(golden_rows(golden.inputs, 1)).outputs
    crowd = {spec.name: _beside_extremes(spec, golden.inputs[spec.name]) for spec in judged.inputs}
    beside = bound.run(crowd).outputs
    found = compare(
        {name: array[:1] for name, array in beside.items()},
        stored=alone,
        reference=alone,
        tolerance=manifest.golden.tolerance[variant.name],
        decision=DecisionCheck(),
    )
    return not found.passed


def golden_rows(inputs: Tensors, rows: int) -> dict[str, Array]:
    """So many rows of the golden inputs, again from the first where there are not as many."""
    return {name: array.take(range(rows), axis=0, mode="wrap") for name, array in inputs.items()}


def _beside_extremes(spec: TensorSpec, array: Array) -> Array:
    """array: [rows, ...] -> [4, ...]: its first row, and three that hold the largest values that may be expected."""
    crowd = array.take(range(4), axis=0, mode="wrap").copy()
    if array.dtype.kind == "f":
        loudest = LOUD * (1.0 + np.abs(array).max(initial=0.0))
        bound = min(loudest, float(np.finfo(array.dtype).max)) if spec.range is None else spec.range[1]
        crowd[1:] = bound
    return crowd


def _fixed(manifest: Manifest, variant: Variant) -> str:
    """Why the file takes no free number of rows; empty where it does."""
    for spec, bound in zip(manifest.interface.network.inputs, variant.binding.inputs, strict=True):
        axis = bound.permutation.index(0) if bound.permutation else 0
        if spec.batched and (rows := bound.shape[axis]) is not None:
            return f"the file takes {rows} {'row' if rows == 1 else 'rows'} at a time"
    return ""


def _block(call: Callable[[int], object], rows: int, clock: Clock) -> list[float]:
    taken_s: list[float] = []
    ends_at = clock() + BLOCK_S
    while not taken_s or clock() < ends_at:
        begun = clock()
        call(rows)
        taken_s.append(clock() - begun)
    return taken_s
