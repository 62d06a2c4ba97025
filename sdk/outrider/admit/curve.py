"""What several rows in one call gain on this board, and whether batching pays. Pure rules over what was measured."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from outrider.admit.admission import MAX_THREADS, require_text, require_time, require_whole
from outrider_runtimes.errors import StoreError
from outrider_runtimes.nouns import dataclass
from outrider_runtimes.tensors import BATCH_AXIS, Interface, TensorSpec

ROWS = (1, 2, 4, 8, 16, 32)  # that are timed in one call

# What batching costs itself, for each row: a queue, a copy into the batch, two threads that wake each other.
COST_MS = 0.1
GAIN = 1.5  # in rows/s, at least: a queue has to be worth it, and the best of a short run is off by some
NEAR = 0.9  # the fewest rows that come so near the best rows/s are enough: more would only make the first one wait
MAX_DELAY_MS = 5.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """One call of so many rows. ``best_ms`` is the shortest of ``runs`` calls.

    What else a machine does at an install only adds to a call's time, and the fewer calls there were, the more of it is
    left in the shortest: calls of many rows are few, so that noise speaks against batching and never for it.
    """

    rows: int
    best_ms: float
    runs: int

    @property
    def rows_per_s(self) -> float:
        """How many rows a second such calls answer."""
        return self.rows / self.best_ms * 1e3


@dataclass(frozen=True, kw_only=True)
class BatchCurve:
    """How long calls of more and more rows take, of one variant on one engine with so many threads.

    Attributes:
        points: by rising rows, the first of one row; empty where several rows in one call mean nothing.
        reason: why there are no points, or why there are no more of them; empty where all were timed.
    """

    variant: str
    engine: str
    threads: int
    points: tuple[Point, ...]
    reason: str = ""

    def cost_ms(self, rows: int) -> float:
        """How long a call of so many rows takes: between two points on the line, beyond the last by its rows/s."""
        if not self.points:
            return 0.0
        counts = [point.rows for point in self.points]
        at = bisect_left(counts, rows)
        if at == len(counts):
            last = self.points[-1]
            return last.best_ms * rows / last.rows
        after = self.points[at]
        if at == 0 or after.rows == rows:
            return after.best_ms
        before = self.points[at - 1]
        share = (rows - before.rows) / (after.rows - before.rows)
        return before.best_ms + share * (after.best_ms - before.best_ms)

    def to_dict(self) -> dict[str, Any]:
        """As the store keeps it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BatchCurve:
        """The inverse of ``to_dict``. Raises StoreError."""
        try:
            curve = cls(
                variant=data["variant"],
                engine=data["engine"],
                threads=data["threads"],
                points=tuple(Point(**point) for point in data["points"]),
                reason=data["reason"],
            )
            require_text(curve.variant, curve.engine, curve.reason)
            require_whole(curve.threads, 1, MAX_THREADS)
            before = 0
            for point in curve.points:
                require_whole(point.rows, before + 1)
                require_whole(point.runs, 1)
                require_time(point.best_ms)
                before = point.rows
            return curve
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"what the store kept of batches is malformed: {error!r}", hint="install again") from None


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """What batching does for one model.

    Attributes:
        rows: the most that go into one call.
        delay_ms: how long the first one waits for others: never longer than its own call would take.
        gain: rows/s of such calls over those of one row each.
        curve: what it follows from.
    """

    rows: int
    delay_ms: float
    gain: float
    curve: BatchCurve


def plan_batches(curve: BatchCurve | None) -> BatchPlan | str:
    """How to batch, or in words why batching stays off.

    It pays where a row in a batch takes at most 1/1.5 of the time of a row alone and saves more than 0.1 ms, which is
    what batching costs by itself. Then a batch has the fewest rows that reach 0.9 of the best rows/s.
    """
    if curve is None:
        return "batches were not measured when it was installed; install it again"
    if len(curve.points) < 2 or curve.points[0].rows != 1:
        return curve.reason or "nothing was measured"
    one = curve.points[0]
    best = max(curve.points, key=lambda point: point.rows_per_s)
    gain = best.rows_per_s / one.rows_per_s
    saved_ms = one.best_ms - best.best_ms / best.rows
    if gain < GAIN or saved_ms <= COST_MS:
        return f"{best.rows} rows at once give {gain:.2f} times the rows/s and save {max(saved_ms, 0.0):.3f} ms a row"
    enough = next(point for point in curve.points if point.rows_per_s >= NEAR * best.rows_per_s)
    return BatchPlan(
        rows=enough.rows,
        delay_ms=min(MAX_DELAY_MS, one.best_ms),
        gain=enough.rows_per_s / one.rows_per_s,
        curve=curve,
    )


def unbatchable(interface: Interface) -> str:
    """Why requests at this interface cannot be put together along N; empty where they can."""
    for spec in (*interface.inputs, *interface.outputs):
        if not spec.batched or spec.shape[0] is not None:
            return f"tensor {spec.name!r} has no free axis {BATCH_AXIS}"
        if spec.content_type:
            return f"tensor {spec.name!r} is {spec.content_type}, whose length differs from request to request"
    given = _free(interface.inputs)
    for spec in interface.outputs:
        if strange := _free([spec]) - given:
            return f"output {spec.name!r} has an axis {min(strange)!r} whose size its rows decide"
    return ""


def _free(specs: Sequence[TensorSpec]) -> set[str]:
    pairs = [pair for spec in specs for pair in zip(spec.axes[1:], spec.shape[1:], strict=True)]
    return {letter for letter, size in pairs if size is None}
