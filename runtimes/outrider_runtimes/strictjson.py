"""JSON from a stranger: bounded before it is parsed, and nothing in it that two parsers could read in two ways."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from outrider_runtimes.errors import OutriderError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Refuse = Callable[[str], OutriderError]

MAX_INTEGER = 2**63 - 1

_QUOTE = ord('"')
_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1
_BEGINS_VALUE = np.zeros(256, np.bool_)
_BEGINS_VALUE[list(b"[{,")] = True
_NOT_NESTING = bytes(value for value in range(256) if value not in b'"[]{}')
_NOT_MARKS = bytes(value for value in range(256) if value not in b'"[]{},')
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")


def parse(
    raw: bytes | bytearray,
    refuse: Refuse,
    *,
    max_bytes: int,
    max_depth: int,
    max_values: int | None = None,
    parse_int: Callable[[str], int] | None = None,
    parse_float: Callable[[str], float] | None = None,
) -> dict[str, Any]:
    """The object in ``raw``.

    Refused: more than ``max_bytes``, nesting beyond ``max_depth``, more than ``max_values`` values where that is given,
    what is not UTF-8 or not one object, a key twice in an object, NaN and infinities by name, strings that are not
    Unicode text.

    Args:
        refuse: makes the error to raise from what is wrong.
        parse_int, parse_float: ``integer_64`` and ``finite_float``, where numbers that other parsers may read
            otherwise are to be refused as well. They cost a call for each number.
    """
    if len(raw) > max_bytes:
        raise refuse(f"the JSON has {len(raw)} bytes, at most {max_bytes} are taken")
    if max_values is not None and _begun_values(raw) > max_values:
        raise refuse(f"more than {max_values} values")
    if deeper_than(raw, max_depth):
        raise refuse(f"nested deeper than {max_depth}")
    if has_lone_surrogate(raw):
        raise refuse("a string holds half of a surrogate pair, which has no UTF-8 form")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_distinct,
            parse_constant=_no_constant,
            parse_int=parse_int,
            parse_float=parse_float,
        )
    except UnicodeDecodeError as error:
        raise refuse(f"not valid UTF-8 text: {error}") from None
    except (ValueError, RecursionError) as error:
        raise refuse(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise refuse(f"expected a JSON object, not {type(value).__name__}")
    return value


def integer_64(digits: str) -> int:
    """For ``parse_int``: an integer of at most 64 bits with its sign."""
    if len(digits) > 20 or abs(int(digits)) > MAX_INTEGER:
        raise ValueError(f"the integer {digits[:24]}... is beyond 64 bits")
    return int(digits)


def finite_float(digits: str) -> float:
    """For ``parse_float``: a number that does not overflow a 64-bit float."""
    value = float(digits) if len(digits) <= 1024 else math.inf
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:24]} is beyond a 64-bit float")
    return value


def deeper_than(raw: bytes | bytearray, limit: int) -> bool:
    """Whether the brackets outside strings nest deeper; a few linear passes in little memory, whatever the bytes."""
    if raw.count(b"[") + raw.count(b"{") <= limit:
        return False
    return int(np.cumsum(_STEP[_outside_strings(raw, _NOT_NESTING)], dtype=np.int32).max(initial=0)) > limit


def has_lone_surrogate(raw: bytes | bytearray) -> bool:
    """Whether an escape in JSON text is half of a surrogate pair whose other half is not beside it."""
    if _SURROGATE.search(raw) is None:
        return False
    return _SURROGATE.search(_SURROGATE_PAIR.sub(b"", raw.replace(b"\\\\", b"."))) is not None


def _begun_values(raw: bytes | bytearray) -> int:
    """Brackets that open and commas, outside strings: as many values as there can be, within one."""
    return int(np.count_nonzero(_BEGINS_VALUE[_outside_strings(raw, _NOT_MARKS)]))


def _outside_strings(raw: bytes | bytearray, dropped: bytes) -> NDArray[np.uint8]:
    """The bytes outside strings, without those to be dropped, which may not be quotes."""
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, dropped)
    marks = np.frombuffer(bare, np.uint8)
    outside: NDArray[np.bool_] = np.cumsum(marks == _QUOTE, dtype=np.uint8) & 1 == 0
    return marks[outside]


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        ranked = sorted(key for key, _ in pairs)
        twice = next(a for a, b in pairwise(ranked) if a == b)
        raise ValueError(f"the key {twice[:64]!r} stands twice in one object")
    return out


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
