"""A threshold on a score, certified: among the answers that it keeps, the error stays under a stated risk.

Learn-then-Test (Angelopoulos, Bates, Candes, Jordan, Lei: "Learn then Test: Calibrating Predictive Algorithms to
Achieve Risk Control", 2021) with fixed-sequence testing and exact binomial p-values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

    def to_dict(self) -> dict[str, Any]:
        """As the report and the bundle store it."""
        return {"threshold": self.threshold, "kept": self.kept, "risk": self.risk, "p_value": self.p_value}


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

    def to_dict(self) -> dict[str, Any]:
        """As the report and the bundle store it."""
        return {
            "alpha": self.alpha,
            "delta": self.delta,
            "rows": self.rows,
            "chosen": self.chosen.to_dict(),
            "curve": [point.to_dict() for point in self.curve],
        }


def certify(scores: Floats, wrong: Flags, places: Floats, *, alpha: float, delta: float) -> Certified:
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

    Raises:
        ConfigError: alpha, delta or an array is not what is expected.
        ExportError: nothing can be certified; says how many rows would do, or that no number would.
    """
    _check(scores, wrong, places, alpha, delta)
    curve = tuple(_point(scores, wrong, threshold, alpha) for threshold in thresholds(places))
    first = _first_tested(len(scores), alpha, delta)
    chosen = None
    for point in curve[first:]:
        if point.p_value > delta:
            break
        chosen = point
    if chosen is None:
        raise ExportError(
            _why(curve, first, len(scores), alpha, delta), hint="more calibration rows, or a higher alpha"
        )
    return Certified(alpha=alpha, delta=delta, rows=len(scores), chosen=chosen, curve=curve)


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
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, kept + 1)))])  # log k!
    terms = logs[kept] - logs[counts] - logs[kept - counts] + counts * math.log(alpha)
    terms += (kept - counts) * math.log1p(-alpha)
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
    if rows < least:
        return len(SHARES)
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


def _why(curve: Sequence[Point], first: int, rows: int, alpha: float, delta: float) -> str:
    asked = f"a risk of {alpha:g} with probability {1.0 - delta:g}"
    least = fewest_rows(alpha, delta)
    if first >= len(curve):
        return f"{rows} calibration rows cannot certify {asked}: it takes {least} even where every answer is right"
    needed = [n for point in curve[first:] if (n := rows_needed(point.risk, point.kept, alpha, delta)) is not None]
    if not needed:
        strict = curve[first]
        return (
            f"no threshold has {asked}: of the surest {strict.kept:.0%} of {rows} calibration rows "
            f"{strict.risk:.2%} are wrong"
        )
    return f"{rows} calibration rows cannot certify {asked}: about {min(needed)} would, by the errors among these"


def _check(scores: Floats, wrong: Flags, places: Floats, alpha: float, delta: float) -> None:
    for name, value in (("alpha", alpha), ("delta", delta)):
        if not 0.0 < value < 1.0:
            raise ConfigError(f"{name} is {value!r}, expected a number above 0 and below 1")
    if scores.shape != wrong.shape or scores.ndim != 1 or not scores.size or not places.size:
        raise ConfigError(f"scores {list(scores.shape)} and wrong {list(wrong.shape)} are not one value a row")
    if not (np.isfinite(scores).all() and np.isfinite(places).all()):
        raise ConfigError("a score is NaN or infinite", hint="what the network gives for that row is not finite")
