"""JSON from a stranger: bounded before it is parsed, and nothing in it that two parsers could read in two ways."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from typing import Any

from outrider_runtimes.errors import FormatError

MAX_DEPTH = 32
# A parsed value costs up to 100 bytes, so that this keeps the parse of a 4 MiB text under 50 MB.
MAX_VALUES = 200_000
MAX_INTEGER = 2**63 - 1

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(raw: bytes, what: str) -> dict[str, Any]:
    """The object in ``raw``.

    Refused: what is not UTF-8 or not one object, nesting beyond 32, more than 200,000 values, duplicate keys, NaN
    and infinities (spelled out or by overflow), integers beyond 64 bits, strings that are not Unicode text.

    Args:
        raw: at most as many bytes as the caller allows; checked by the caller.
        what: names the text in errors.

    Raises:
        FormatError: saying which of these it was.
    """
    try:
        text = raw.decode("utf-8")
        _bound(raw, what)
        value = json.loads(
            text,
            object_pairs_hook=lambda pairs: _object(pairs, what),
            parse_int=lambda digits: _integer(digits, what),
            parse_float=lambda digits: _float(digits, what),
            parse_constant=lambda name: _constant(name, what),
        )
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise FormatError(f"{what}: not valid UTF-8 text: {error}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{what}: expected a JSON object, not {type(value).__name__}")
    return value


def _bound(raw: bytes, what: str) -> None:
    """Refuse depth and number of values by counting marks, before a single value is made."""
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if bare.count(b'"') > 4 * MAX_VALUES:
        raise FormatError(f"{what}: more than {MAX_VALUES} values")
    marks = b"".join(bare.split(b'"')[::2]).translate(None, _NOT_MARKS)
    if len(marks) - marks.count(b"]") - marks.count(b"}") > MAX_VALUES:
        raise FormatError(f"{what}: more than {MAX_VALUES} values")
    depth = 0
    for mark in marks:
        depth += _STEP[mark]
        if depth > MAX_DEPTH:
            raise FormatError(f"{what}: nested deeper than {MAX_DEPTH}")


_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1, ord(","): 0}
_NOT_MARKS = bytes(value for value in range(256) if value not in _STEP)


def _object(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        twice = _first_repeated([key for key, _ in pairs])
        raise FormatError(f"{what}: the key {twice[:64]!r} stands twice in one object")
    return out


def _first_repeated(keys: list[str]) -> str:
    ranked = sorted(keys)
    return next(a for a, b in pairwise(ranked) if a == b)


def _integer(digits: str, what: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > MAX_INTEGER:
        raise FormatError(f"{what}: the integer {digits[:24]}... is beyond 64 bits")
    return int(digits)


def _float(digits: str, what: str) -> float:
    value = float(digits) if len(digits) <= 1024 else math.inf
    if not math.isfinite(value):
        raise FormatError(f"{what}: the number {digits[:24]} is beyond a 64-bit float")
    return value


def _constant(name: str, what: str) -> float:
    raise FormatError(f"{what}: {name} is not a JSON number")
