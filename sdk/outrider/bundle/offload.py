"""Which answers are uncertain: the key ``offload`` of a manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outrider_runtimes.errors import FormatError
from outrider_runtimes.scores import Score
from outrider_runtimes.tensors import Interface


@dataclass(frozen=True, kw_only=True)
class OffloadRule:
    """An answer whose score is below its variant's threshold is uncertain.

    Attributes:
        alpha, delta: with probability 1 - delta over the rows that certified them, at most alpha of the answers that a
            threshold keeps are wrong.
        rows: how many those were.
        thresholds: by variant.
        measured: what the export measured of each threshold, free JSON.
    """

    score: Score
    alpha: float
    delta: float
    rows: int
    thresholds: Mapping[str, float]
    measured: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As the manifest stores it."""
        return {
            "score": self.score.to_dict(),
            "alpha": self.alpha,
            "delta": self.delta,
            "rows": self.rows,
            "thresholds": dict(self.thresholds),
            "measured": dict(self.measured),
        }


def parse_offload(data: Mapping[str, Any], interface: Interface, variants: Sequence[str]) -> OffloadRule:
    """The inverse of ``OffloadRule.to_dict``, checked against the bundle that it is of. Raises FormatError."""
    score = Score.from_dict(_mapping(data, "score"))
    score.check(interface)
    thresholds = _mapping(data, "thresholds")
    if sorted(thresholds) != sorted(variants):
        raise FormatError(f"thresholds are of {sorted(thresholds)}, the variants are {sorted(variants)}")
    rows = data.get("rows")
    if type(rows) is not int or rows < 1:
        raise FormatError(f"rows is {rows!r}, expected an integer of 1 or more")
    return OffloadRule(
        score=score,
        alpha=_share(data, "alpha"),
        delta=_share(data, "delta"),
        rows=rows,
        thresholds={name: _number(thresholds, name) for name in variants},
        measured=_mapping(data, "measured") if "measured" in data else {},
    )


def _mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key)
    if not isinstance(value, Mapping):
        raise FormatError(f"{key}: expected an object")
    return value


def _share(data: Mapping[str, Any], key: str) -> float:
    value = _number(data, key)
    if not 0.0 < value < 1.0:
        raise FormatError(f"{key} is {value}, expected a number above 0 and below 1")
    return value


def _number(data: Mapping[str, Any], key: str) -> float:
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FormatError(f"{key} is {value!r}, expected a number")
    return float(value)
