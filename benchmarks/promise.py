"""A promise beside what was measured, as the results store it: a missed one is a line like the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def at_most(promise: str, measured: float, asked: float, *, note: str = "") -> dict[str, Any]:
    """A promise that a figure is at most ``asked``."""
    return _line(promise, measured, asked, measured <= asked, note)


def at_least(promise: str, measured: float, asked: float, *, note: str = "") -> dict[str, Any]:
    """A promise that a figure is at least ``asked``; NaN misses it."""
    return _line(promise, measured, asked, measured >= asked, note)


def _line(promise: str, measured: float, asked: float, met: bool, note: str) -> dict[str, Any]:
    return {"promise": promise, "asked": asked, "measured": measured, "met": bool(met), "note": note}


def missed_lines(promises: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those that were missed, as lines of Markdown after an empty one; nothing where all were kept."""
    missed = [line for line in promises if not line["met"]]
    lines = [f"- missed: {each['promise']}: {each['measured']:.4g}, {each['asked']:g} was asked" for each in missed]
    return ["", *lines] if lines else []


def verdict(found: Mapping[str, Any]) -> str:
    """What stands behind a figure whose twin was too far from it."""
    return "" if found["valid"] else " **INVALID**: the machine was too noisy."
