"""What a bundle's first run on a board showed, as the store keeps it, and the choice that follows from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from outrider_runtimes.errors import StoreError
from outrider_runtimes.nouns import dataclass

TIE = 1.01  # medians of some hundred runs that are closer than this are not told apart
MEMORY_SHARE = 0.05  # of the RAM that two looks at one board may differ in
MAX_THREADS = 1024  # an engine starts each of them at once; far more take minutes and the machine's memory
MAX_MS = 1e9  # eleven days
MAX_WHOLE = 2**63 - 1  # bytes of memory, too: a 32-bit Python's sys.maxsize is less than many a board has
KEPT = 4  # admissions of one bundle; a board has a service, a shell and little else


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What serves here, and why.

    ``p50_ms``: the median of one call at install, one row or one of the file's fixed batches.
    """

    variant: str
    engine: str
    threads: int
    p50_ms: float
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One cell of the grid of variant, engine and threads. ``p50_ms`` is the median of ``runs`` calls."""

    variant: str
    engine: str
    threads: int
    p50_ms: float
    runs: int


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """What was left out, and why. ``variant`` is empty where a whole engine was, ``engine`` where a variant was."""

    variant: str
    engine: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What a bundle's first run on this board showed.

    Attributes:
        choice: the fastest cell; of those within 1 % of it, the one with the fewest threads.
        measured: the grid.
        skipped: engines and pairs that could not be tried.
        engines: version by name of the engines that were tried.
        board: what the board was.
        peak_rss_bytes: the most memory that the child was seen to hold.
        bound_ms: what the median call may take, where the caller set a bound.
        batches: what several rows in one call of the choice take, a ``BatchCurve`` as JSON has it, which only an
            endpoint asks for; None where an earlier version installed it.
    """

    choice: Choice
    measured: tuple[Measured, ...]
    skipped: tuple[Skipped, ...]
    engines: Mapping[str, str]
    board: Mapping[str, Any]
    peak_rss_bytes: int
    bound_ms: float | None = None
    batches: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As the store keeps it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Admission:
        """The inverse of ``to_dict``. Raises StoreError for what no install would have kept."""
        try:
            admission = cls(
                choice=Choice(**data["choice"]),
                measured=tuple(Measured(**row) for row in data["measured"]),
                skipped=tuple(Skipped(**row) for row in data["skipped"]),
                engines=dict(data["engines"]),
                board=dict(data["board"]),
                peak_rss_bytes=data["peak_rss_bytes"],
                bound_ms=data.get("bound_ms"),
                batches=None if data.get("batches") is None else dict(data["batches"]),
            )
            _require_sound(admission)
            return admission
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"what the store kept of an install is malformed: {error!r}", hint="install again"
            ) from None


def _require_sound(admission: Admission) -> None:
    """Types and ranges, for a record is a file that anything may have written. Raises ValueError."""
    choice, measured, memory = admission.choice, admission.measured, admission.board.get("memory_bytes", 0)
    rows: tuple[Choice | Measured, ...] = (choice, *measured)
    for row in rows:
        require_text(row.variant, row.engine)
        require_whole(row.threads, 1, MAX_THREADS)
        require_time(row.p50_ms)
    for each in measured:
        require_whole(each.runs, 1)
    for left_out in admission.skipped:
        require_text(left_out.variant, left_out.engine, left_out.reason)
    require_text(choice.reason, *admission.engines, *admission.engines.values())
    require_whole(admission.peak_rss_bytes, 0)
    require_whole(memory, 0)
    if admission.bound_ms is not None:
        require_time(admission.bound_ms)
    if _cell(choice) not in map(_cell, measured):
        raise ValueError(f"the choice {_cell(choice)} was not measured")


def _cell(row: Choice | Measured) -> tuple[str, str, int]:
    return row.variant, row.engine, row.threads


def require_text(*values: object) -> None:
    """Raises ValueError for what is no string."""
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{value!r:.40} is no text")


def require_whole(value: object, least: int, most: int = MAX_WHOLE) -> None:
    """Raises ValueError for what is no whole number of that range."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r:.40} is no whole number from {least} to {most}")


def require_time(value: object) -> None:
    """Raises ValueError for what is no number of milliseconds that a call may take."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= MAX_MS:
        raise ValueError(f"{value!r:.40} is no time above 0")


def batches_of(admission: Admission, choice: Choice) -> Mapping[str, Any] | None:
    """What was measured of batches, if it was measured of this choice."""
    found, keys = admission.batches, ("variant", "engine", "threads")
    return found if found and all(found.get(key) == getattr(choice, key) for key in keys) else None


def remember(admission: Admission, earlier: Sequence[Admission] = ()) -> dict[str, Any]:
    """What the store keeps of a bundle: this admission, and the latest that were made elsewhere.

    Elsewhere is with other engine versions or on another board: a process in a control group sees another board than
    one outside, and the two should not undo each other's choice.
    """
    here = (admission.engines, admission.board)
    others = [each for each in earlier if (each.engines, each.board) != here]
    return {"admissions": [each.to_dict() for each in (admission, *others)][:KEPT]}


def remembered(choice: Mapping[str, Any]) -> tuple[Admission, ...]:
    """The inverse of ``remember``, the latest first. Raises StoreError."""
    found = choice.get("admissions")
    if not isinstance(found, list) or not found:
        raise StoreError("what the store kept of an install is malformed", hint="install again")
    return tuple(Admission.from_dict(each) for each in found)


def same_board(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a choice that was made on one holds on the other: they differ in a little memory at most.

    What a kernel leaves of the RAM changes with each of its versions.
    """
    memory = sorted(board.get("memory_bytes", 0) for board in (one, other))
    alike = {**one, "memory_bytes": 0} == {**other, "memory_bytes": 0}
    return alike and memory[1] - memory[0] <= memory[1] * MEMORY_SHARE


def choose(measured: Sequence[Measured]) -> Choice:
    """The fastest; of those that cannot be told from it, the one with the fewest threads.

    Every variant of a bundle passed the export's gates, so that speed alone decides.
    """
    best = min(measured, key=lambda row: row.p50_ms)
    row = min((row for row in measured if row.p50_ms <= best.p50_ms * TIE), key=lambda row: (row.threads, row.p50_ms))
    reason = f"the fastest of {len(measured)} measured" if len(measured) > 1 else "nothing else runs here"
    if row is not best:
        reason = (
            f"within {TIE - 1:.0%} of the fastest ({best.variant} on {best.engine}, {best.threads} threads, "
            f"{best.p50_ms:.3f} ms), with fewer threads"
        )
    return Choice(variant=row.variant, engine=row.engine, threads=row.threads, p50_ms=row.p50_ms, reason=reason)
