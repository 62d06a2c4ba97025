"""Values out of a manifest's JSON, each by its key and of its kind; anything else is a FormatError that names the key.

``at`` is where the object stands that holds the key, for messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from outrider_runtimes.errors import FormatError, OutriderError, UnsupportedBundle

Json = Mapping[str, Any]
T = TypeVar("T")

MAX_WORDS = 600  # of an error that quotes what it found


def wrapped(at: str, make: Callable[[], T]) -> T:
    """What other rooms parse, with every way in which odd JSON can break them turned into one error."""
    try:
        return make()
    except UnsupportedBundle as error:
        raise UnsupportedBundle(f"manifest: {at}: {_cut(error)}", hint=error.hint) from None
    except FormatError as error:
        raise FormatError(f"manifest: {at}: {_cut(error)}", hint=error.hint) from None
    except (OutriderError, KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise FormatError(f"manifest: {at}: malformed: {_cut(repr(error))}") from None


def _cut(text: object) -> str:
    """An error's words without a whole manifest in them."""
    words = str(text)
    return words if len(words) <= MAX_WORDS else f"{words[:MAX_WORDS]}..."


def keyed(owner: Json, key: str, names: Sequence[str], at: str) -> Json:
    """The object under ``key``, which has these keys and no other."""
    entries = get_mapping(owner, key, at)
    if set(entries) != set(names):
        odd = sorted(set(entries) ^ set(names))[0]
        raise FormatError(
            f"manifest: {at}.{key}: {odd[:64]!r} is {'not expected' if odd in entries else 'missing'} there"
        )
    return entries


def check_distinct(values: Sequence[str], what: str) -> None:
    """Raises FormatError for a value that stands twice."""
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise FormatError(f"manifest: {what} {value[:64]!r} stands twice")
        seen.add(value)


def as_object(value: Any, at: str) -> Json:
    """The value, if it is an object."""
    if not isinstance(value, dict):
        raise FormatError(f"manifest: {at}: expected an object, not {_kind(value)}")
    return value


def _get(data: Json, key: str, at: str) -> tuple[Any, str]:
    where = f"{at}.{key}" if at else key
    if key not in data:
        raise FormatError(f"manifest: {where}: is missing")
    return data[key], where


def get_mapping(data: Json, key: str, at: str = "") -> Json:
    """The object under ``key``."""
    return as_object(*_get(data, key, at))


def get_list(data: Json, key: str, *, at: str = "", least: int = 0, most: int = 1024) -> list[Any]:
    """The list under ``key``, of so many entries."""
    value, where = _get(data, key, at)
    if not isinstance(value, list):
        raise FormatError(f"manifest: {where}: expected a list, not {_kind(value)}")
    if not least <= len(value) <= most:
        raise FormatError(f"manifest: {where}: has {len(value)} entries, allowed are {least} to {most}")
    return value


def get_string(data: Json, key: str, at: str = "") -> str:
    """The string under ``key``."""
    value, where = _get(data, key, at)
    if not isinstance(value, str):
        raise FormatError(f"manifest: {where}: expected a string, not {_kind(value)}")
    return value


def get_match(data: Json, key: str, pattern: re.Pattern[str], at: str = "") -> str:
    """The string under ``key``, which ``pattern`` matches."""
    value = get_string(data, key, at)
    if not pattern.match(value):
        where = f"{at}.{key}" if at else key
        raise FormatError(
            f"manifest: {where}: {value[:64]!r} does not match {pattern.pattern.removesuffix(chr(92) + 'Z')}"
        )
    return value


def get_integer(data: Json, key: str, least: int, most: int, at: str = "") -> int:
    """The integer under ``key``, from ``least`` to ``most``."""
    value, where = _get(data, key, at)
    if type(value) is not int:
        raise FormatError(f"manifest: {where}: expected an integer, not {_kind(value)}")
    if not least <= value <= most:
        raise FormatError(f"manifest: {where}: {value} is not within {least} to {most}")
    return value


def get_flag(data: Json, key: str) -> bool:
    """True or false under ``key``; false where it is missing."""
    value = data.get(key, False)
    if type(value) is not bool:
        raise FormatError(f"manifest: {key}: expected true or false, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
