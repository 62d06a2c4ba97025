"""The numbers that a user may give: each is itself, or a ConfigError that names it."""

from __future__ import annotations

import math

from outrider_runtimes.errors import ConfigError


def check_number(name: str, value: object, *, most: float = math.inf) -> float:
    """A number above 0, at most ``most``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(f"{name} is {value!r:.40}, expected a number above 0")
    if value > most:
        raise ConfigError(f"{name} is {value}, expected at most {most:g}")
    return value


def check_whole(name: str, value: object) -> int:
    """A whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r:.40}, expected a whole number of 1 or more")
    return value


def check_share(name: str, value: object) -> float:
    """From 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} is {value!r:.40}, expected a share from 0 to 1")
    return value
