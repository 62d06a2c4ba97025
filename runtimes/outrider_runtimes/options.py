"""What a caller passes as an option."""

from __future__ import annotations

from outrider_runtimes.errors import ConfigError


def require_kind(name: str, given: object, kinds: tuple[type, ...], expected: str) -> None:
    """Raises ConfigError for what is of none of these kinds, before it is used as one of them."""
    if not isinstance(given, kinds):
        raise ConfigError(f"{name} is {given!r:.40}, expected {expected}")
