"""JSON from a stranger: bounded before it is parsed, and nothing in it that two parsers could read in two ways."""

from __future__ import annotations

import functools
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

_SPACE = " \t\n\r"
_QUOTE = ord('"')
_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1
_BEGINS_VALUE = np.zeros(256, np.bool_)
_BEGINS_VALUE[list(b"[{,")] = True
_NOT_NESTING = bytes(value for value in range(256) if value not in b'"[]{}')
_NOT_MARKS = bytes(value for value in range(256) if value not in b'"[]{},')
_NOT_PAIRS = bytes(value for value in range(256) if value not in b'":{')
_NESTING = (dict, list)
# A number below this many digits in a row, with an exponent below three, is no more than 10^(199 + 99).
_LONG_RUN, _STRIDE = 200, 16
_DIGITS_TO_0 = bytes(ord("0") if chr(value).isdigit() and value < 128 else ord("x") for value in range(256))
_LONG_RUN_SEEN = b"0" * (_LONG_RUN // _STRIDE)
_LONG_EXPONENT = re.compile(rb"[0-9][eE]\+?[0-9]{3,}[ \t\n\r,}\]]")
_MOST_EXPONENTS = 1024
# Below this a call for each number is cheaper.
_LOOKED_AT_FIRST = 4096
# Below this a mark is counted as soon as it is looked for; with more of them than that, sooner.
_SOUGHT_BYTES, _FEW_MARKS = 4096, 32
# Below this counting what orjson does not tell takes longer than it saves.
_QUICK_BYTES = 512
_SURROGATE = rb"\\u[dD][89a-fA-F]"
_SURROGATE_PAIR = rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"


def parse(
    raw: bytes | bytearray,
    refuse: Refuse,
    *,
    max_bytes: int,
    max_depth: int,
    max_values: int | None = None,
    parse_int: Callable[[str], int] | None = None,
    parse_float: Callable[[str], float] | None = None,
    quickly: bool = False,
) -> dict[str, Any]:
    """The object in ``raw``.

    Refused: more than ``max_bytes``, nesting beyond ``max_depth``, more than ``max_values`` values where that is given,
    what is not UTF-8 or not one object, a key twice in an object, NaN and infinities by name, strings that are not
    Unicode text.

    Args:
        refuse: makes the error to raise from what is wrong.
        parse_int, parse_float: ``integer_64`` and ``finite_float``, where numbers that other parsers may read
            otherwise are to be refused as well. They cost a call for each number.
        quickly: by orjson where it is installed, which reads numbers in a tenth of the time, refuses those beyond a
            64-bit float, and makes floats of integers beyond 64 bits. Not together with the two above.
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
        if quickly and len(raw) >= _QUICK_BYTES and (quick := orjson_if_installed()) is not None:
            return _loaded(quick.loads, raw, refuse)
        if parse_float is finite_float and len(raw) >= _LOOKED_AT_FIRST and not _may_overflow(raw):
            parse_float = None
        decoder = _decoder(parse_int, parse_float) if parse_int or parse_float else _PLAIN
        text = raw.decode("utf-8").strip(_SPACE)
        value, end = decoder.raw_decode(text)  # decode() looks for white space at both ends in a slower way
        if end != len(text):
            raise ValueError(f"more follows at character {end} of the value")
    except UnicodeDecodeError as error:
        raise refuse(f"not valid UTF-8 text: {error}") from None
    except (ValueError, RecursionError) as error:
        raise refuse(f"not valid JSON: {error}") from None
    return _object(value, refuse)


@functools.cache
def orjson_if_installed() -> Any:
    """The module, which an endpoint installs and a device need not; None where it is not there."""
    try:
        import orjson
    except ImportError:
        return None
    return orjson


def integer_64(digits: str) -> int:
    """For ``parse_int``: an integer of at most 64 bits with its sign."""
    if len(digits) > 20 or abs(int(digits)) > MAX_INTEGER:
        raise ValueError(f"the integer {digits[:24]}... is beyond 64 bits")
    return int(digits)


def finite_float(digits: str) -> float:
    """For ``parse_float``: a number that does not overflow a 64-bit float."""
    if len(digits) <= 1024 and -math.inf < (value := float(digits)) < math.inf:
        return value
    raise ValueError(f"the number {digits[:24]} is beyond a 64-bit float")


def count(raw: bytes | bytearray, mark: bytes) -> int:
    """How often a byte is there. To look for one is many times as fast as to count it, and mostly there are few."""
    if len(raw) >= _SOUGHT_BYTES:
        at = -1
        for found in range(_FEW_MARKS):
            if (at := raw.find(mark, at + 1)) < 0:
                return found
    return raw.count(mark)


def deeper_than(raw: bytes | bytearray, limit: int) -> bool:
    """Whether the brackets outside strings nest deeper; a few linear passes in little memory, whatever the bytes."""
    if count(raw, b"[") + count(raw, b"{") <= limit:
        return False
    return int(np.cumsum(_STEP[_outside_strings(raw, _NOT_NESTING)], dtype=np.int32).max(initial=0)) > limit


def has_lone_surrogate(raw: bytes | bytearray) -> bool:
    """Whether an escape in JSON text is half of a surrogate pair whose other half is not beside it."""
    if b"\\" not in raw or re.search(_SURROGATE, raw) is None:
        return False
    return re.search(_SURROGATE, re.sub(_SURROGATE_PAIR, b"", raw.replace(b"\\\\", b"."))) is not None


def _may_overflow(raw: bytes | bytearray) -> bool:
    """Whether a number of JSON text could be beyond a 64-bit float, or have more digits than are taken."""
    if _LONG_RUN_SEEN in raw[::_STRIDE].translate(_DIGITS_TO_0):
        return True
    text = np.frombuffer(raw, np.uint8)
    digit = (text - np.uint8(48)) < 10
    # A digit, the e, a sign or a digit, two digits.
    exponents = ((text[1:-3] | 0x20) == ord("e")) & digit[:-4] & digit[3:-1] & digit[4:]
    found = np.flatnonzero(exponents)
    return len(found) > _MOST_EXPONENTS or any(_LONG_EXPONENT.match(raw, at) is not None for at in found.tolist())


def _begun_values(raw: bytes | bytearray) -> int:
    """Brackets that open and commas, outside strings: as many values as there can be, within one."""
    return int(np.count_nonzero(_BEGINS_VALUE[_outside_strings(raw, _NOT_MARKS)]))


def _outside_strings(raw: bytes | bytearray, dropped: bytes) -> NDArray[np.uint8]:
    """The bytes outside strings, without those to be dropped, which may not be quotes."""
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw
    # Two quotes side by side are a string's ends, or one's end and the next one's beginning: without them all that is
    # inside a string still is, and most of the text is gone.
    bare = bare.translate(None, dropped).replace(b'""', b"")
    marks = np.frombuffer(bare, np.uint8)
    if b'"' not in bare:
        return marks
    outside: NDArray[np.bool_] = np.cumsum(marks == _QUOTE, dtype=np.uint8) & 1 == 0
    return marks[outside]


def _loaded(loads: Callable[[bytes | bytearray], Any], raw: bytes | bytearray, refuse: Refuse) -> dict[str, Any]:
    """The object, by a parser that takes the last of two equal keys without a word. Raises ValueError too."""
    value = _object(loads(raw), refuse)
    if _count_keys(value, objects=count(raw, b"{")) == count(raw, b":"):
        return value
    # Not all of them stand outside strings, or not all keys are there.
    marks = _outside_strings(raw, _NOT_PAIRS)
    keys = _count_keys(value, objects=int(np.count_nonzero(marks == ord("{"))))
    if keys != np.count_nonzero(marks == ord(":")):
        raise ValueError("a key stands twice in one object")
    return value


def _count_keys(value: dict[str, Any], *, objects: int) -> int:
    """The keys of all objects, which are so many at most: when all are found, nobody looks into the lists of data."""
    keys = 0
    level: list[Any] = [value]
    while level and objects:
        below: list[Any] = []
        for each in sorted(level, key=len):
            if type(each) is dict:
                objects -= 1
                keys += len(each)
                below += [inner for inner in each.values() if type(inner) in _NESTING]
            elif objects:
                below += [inner for inner in each if type(inner) in _NESTING]
        level = below
    return keys


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        ranked = sorted(key for key, _ in pairs)
        twice = next(a for a, b in pairwise(ranked) if a == b)
        raise ValueError(f"the key {twice[:64]!r} stands twice in one object")
    return out


def _object(value: Any, refuse: Refuse) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refuse(f"expected a JSON object, not {type(value).__name__}")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _decoder(
    parse_int: Callable[[str], int] | None = None, parse_float: Callable[[str], float] | None = None
) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_distinct, parse_constant=_no_constant, parse_int=parse_int, parse_float=parse_float
    )


_PLAIN = _decoder()  # made once: making one takes as long as a small message
