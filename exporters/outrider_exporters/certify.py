"""A threshold on a score, certified: among the answers that it keeps, the error stays under a stated risk.

Learn-then-Test (Angelopoulos, Bates, Candes, Jordan, Lei: "Learn then Test: Calibrating Predictive Algorithms to
Achieve Risk Control", 2021) with fixed-sequence testing and exact binomial p-values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outrider_runtimes.errors import ConfigError, ExportError

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

# Of the answers, from the strictest on: finer steps certify no more, coarser ones keep visibly less.
SHARES = tuple(round(0.02 * step, 2) for step in range(1, 51))
ROOM = 2.0  # times the fewest rows; lets one answer be wrong at alpha 1 %, delta 10 %
MOST_ROWS = 10_000_000  # beyond, "how many rows" is no answer any more


@dataclass(frozen=True, kw_only=True)
class Point:
    """One threshold on the calibration rows.

    Attributes:
        threshold: answers whose score is at least this are kept.
        kept: share of the rows, 0 to 1.
        risk: share of wrong answers among the kept; 0 where nothing is kept.
        p_value: of "the risk is above alpha".
    """

    threshold: float
    kept: float
    risk: float
    p_value: float


@dataclass(frozen=True, kw_only=True)
class Certified:
    """What was chosen.

    Attributes:
        alpha, delta: with probability 1 - delta over the calibration rows, the risk among kept answers is at most
            alpha.
        rows: how many calibration rows there were.
        chosen: keeps the most of those that are certified.
        curve: every threshold that was looked at, the strictest first.
    """

    alpha: float
    delta: float
    rows: int
    chosen: Point
    curve: tuple[Point, ...]


def certify(
    scores: Floats, wrong: Flags, places: Floats, *, alpha: float, delta: float, least: float = -math.inf
) -> Certified:
    """The threshold that keeps most of the answers and whose risk is certified.

    The thresholds that are tried, and their order, come from ``places`` and the number of rows alone, so that testing
    them in order and stopping at the first that fails costs nothing of delta. The strictest ones, which cannot be
    certified by so many rows even without an error, are not tried.

    Args:
        scores: float [N], of the calibration rows; higher is surer.
        wrong: bool [N], whether the answer is.
        places: float [M], scores of other rows, for which no label is needed.
        alpha: the risk, above 0 and below 1.
        delta: the probability that the certificate does not hold, above 0 and below 1.
        least: no threshold is below it.

    Raises:
        ConfigError: alpha, delta or an array is not what is expected.
        ExportError: nothing can be certified; says how many rows would do, or that no number would.
    """
    _check(scores, wrong, places, alpha, delta)
    check_enough(len(scores), alpha, delta)
    tried = thresholds(np.maximum(places, least))
    curve = tuple(_point(scores, wrong, threshold, alpha) for threshold in tried)
    first = _first_tested(len(scores), alpha, delta)
    chosen = None
    for point in curve[first:]:
        if point.p_value > delta:
            break
        chosen = point
    if chosen is None:
        raise ExportError(_why(curve, len(scores), alpha, delta), hint="more calibration rows, or a higher alpha")
    return Certified(alpha=alpha, delta=delta, rows=len(scores), chosen=chosen, curve=curve)


def check_levels(alpha: float, delta: float) -> None:
    """Raise ConfigError unless both are above 0 and below 1."""
    for name, value in (("alpha", alpha), ("delta", delta)):
        if not 0.0 < value < 1.0:
            raise ConfigError(f"{name} is {value!r}, expected a number above 0 and below 1", hint="such as 0.01")


def check_enough(rows: int, alpha: float, delta: float) -> None:
    """Raise ExportError where so many rows certify nothing, whatever the answers to them are."""
    least = fewest_rows(alpha, delta)
    if rows < least:
        raise ExportError(
            f"{rows} calibration rows cannot certify {_asked(alpha, delta)}: it takes {least} even where every answer "
            "is right",
            hint="more calibration rows, or a higher alpha",
        )


def thresholds(places: Floats) -> list[float]:
    """The score that each of ``SHARES`` of these rows reaches; the strictest first."""
    return [float(np.quantile(places, 1.0 - share, method="lower")) for share in SHARES]


def fewest_rows(alpha: float, delta: float) -> int:
    """How many kept rows certify a risk of alpha where none of them is wrong."""
    return math.ceil(math.log(delta) / math.log1p(-alpha))


def p_value(wrong: int, kept: int, alpha: float) -> float:
    """The probability of at most so many wrong answers of so many kept, were the risk alpha: a binomial tail."""
    if wrong >= kept:
        return 1.0
    counts = np.arange(wrong + 1)
    choices = np.cumsum(np.log((kept - counts[:-1]) / counts[1:]))  # log of "kept over k", k from 1
    terms = np.concatenate([[0.0], choices]) + counts * math.log(alpha) + (kept - counts) * math.log1p(-alpha)
    return float(min(1.0, np.exp(terms).sum()))


def rows_needed(risk: float, kept: float, alpha: float, delta: float) -> int | None:
    """How many calibration rows would certify a threshold that shows this risk and keeps this share.

    Returns:
        None where the risk is too near alpha, or above it.
    """
    if kept <= 0.0 or risk >= alpha:
        return None
    low, high = 1, fewest_rows(alpha, delta)
    while not _certifies(high, risk, alpha, delta):
        low, high = high, 2 * high
        if high > MOST_ROWS:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _certifies(middle, risk, alpha, delta) else (middle + 1, high)
    return math.ceil(high / kept)


def _certifies(kept: int, risk: float, alpha: float, delta: float) -> bool:
    return p_value(math.ceil(kept * risk), kept, alpha) <= delta


def _first_tested(rows: int, alpha: float, delta: float) -> int:
    """Where the order begins: a test that one wrong answer, or a threshold that keeps a little less than it was placed
    for, would fail is no place to begin, because the first failure ends it."""
    least = fewest_rows(alpha, delta)
    return next((at for at, share in enumerate(SHARES) if share * rows >= ROOM * least), len(SHARES) - 1)


def _point(scores: Floats, wrong: Flags, threshold: float, alpha: float) -> Point:
    keeps = scores >= threshold
    kept, errors = int(keeps.sum()), int(wrong[keeps].sum())
    return Point(
        threshold=threshold,
        kept=kept / len(scores),
        risk=errors / kept if kept else 0.0,
        p_value=p_value(errors, kept, alpha) if kept else 1.0,
    )


def _asked(alpha: float, delta: float) -> str:
    return f"a risk of {alpha:g} with probability {1.0 - delta:g}"


def _why(curve: Sequence[Point], rows: int, alpha: float, delta: float) -> str:
    asked = _asked(alpha, delta)
    telling = [point for point in curve if point.kept * rows * alpha >= 1.0]  # fewer rows show no risk of alpha
    needed = [n for point in telling if (n := _rows_to_begin_at(point, alpha, delta)) is not None and n > rows]
    if needed:
        return f"{rows} calibration rows cannot certify {asked}: about {min(needed)} would, by the errors among these"
    best = min(telling or curve[-1:], key=lambda point: point.risk)
    return (
        f"{rows} calibration rows show no threshold with {asked}: the lowest risk among them is {best.risk:.2%}, of "
        f"the surest {best.kept:.0%}"
    )


def _rows_to_begin_at(point: Point, alpha: float, delta: float) -> int | None:
    """How many rows would have this threshold tested first, and pass; None where no number would."""
    needed = rows_needed(point.risk, point.kept, alpha, delta)
    return None if needed is None else max(needed, math.ceil(ROOM * fewest_rows(alpha, delta) / point.kept))


def _check(scores: Floats, wrong: Flags, places: Floats, alpha: float, delta: float) -> None:
    check_levels(alpha, delta)
    if scores.shape != wrong.shape or scores.ndim != 1 or not scores.size or not places.size:
        raise ConfigError(f"scores {list(scores.shape)} and wrong {list(wrong.shape)} are not one value a row")
    if not (np.isfinite(scores).all() and np.isfinite(places).all()):
        raise ConfigError("a score is NaN or infinite", hint="what the network gives for that row is not finite")
