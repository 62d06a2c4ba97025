"""The one strict parser of JSON: what it refuses, and that it gives what json.loads gives for all the rest."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_runtimes.errors import FormatError
from outrider_runtimes.strictjson import (
    _NOT_NESTING,
    _outside_strings,
    deeper_than,
    finite_float,
    has_lone_surrogate,
    integer_64,
    parse,
)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


def read(raw: bytes | bytearray, **options: Any) -> dict[str, Any]:
    return parse(raw, FormatError, **{"max_bytes": 1 << 20, "max_depth": 8, **options})


def nesting(value: object) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(nesting, value.values() if isinstance(value, dict) else value), default=0)


def encode(value: object, *, ascii_only: bool) -> bytes:
    return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


@given(value=st.dictionaries(st.text(max_size=4), values, max_size=4), ascii_only=st.booleans())
def test_what_is_strict_comes_out_as_json_reads_it(value: dict[str, Any], ascii_only: bool) -> None:
    raw = encode(value, ascii_only=ascii_only)
    assert read(raw, max_depth=100) == read(bytearray(raw), max_depth=100) == json.loads(raw)


@given(value=values)
def test_the_depth_is_that_of_the_value_whatever_its_strings_hold(value: object) -> None:
    raw = encode({"[{\\": [value, '"[[{', "\\"]}, ascii_only=True)
    found = nesting(value) + 2
    assert deeper_than(raw, found - 1)
    assert not deeper_than(raw, found)


def outside_byte_by_byte(raw: bytes) -> bytes:
    """What stands outside strings, as the grammar says it."""
    out, inside, escaped = bytearray(), False, False
    for value in raw:
        if inside:
            inside, escaped = escaped or value != ord('"'), not escaped and value == ord("\\")
        elif value == ord('"'):
            inside = True
        else:
            out.append(value)
    return bytes(out)


@given(
    value=st.recursive(
        st.text('[]{}",:\\ x', max_size=6), lambda inner: st.lists(inner) | st.dictionaries(st.text('"[\\'), inner)
    ),
    ascii_only=st.booleans(),
)
def test_the_marks_outside_strings_are_those_that_are_found_byte_by_byte(value: object, ascii_only: bool) -> None:
    raw = encode(value, ascii_only=ascii_only)
    found = bytes(_outside_strings(raw, _NOT_NESTING)).replace(b'"', b"")
    assert found == outside_byte_by_byte(raw).translate(None, _NOT_NESTING)


@given(
    digits=st.from_regex(r"-?(0|[1-9][0-9]{0,320})(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,4})?", fullmatch=True)
    | st.sampled_from(["1e308", "1.8e308", "-1e309", "1." + "0" * 1022, "1." + "0" * 1023, "0e9999"])
)
def test_a_float_is_refused_exactly_where_it_overflows_or_is_endless(digits: str) -> None:
    if len(digits) <= 1024 and math.isfinite(float(digits)):
        assert finite_float(digits) == float(digits)
    else:
        with pytest.raises(ValueError, match="beyond a 64-bit float"):
            finite_float(digits)


@given(raw=st.binary(max_size=60) | st.text('{}[]",:\\u1d8c0 ', max_size=60).map(str.encode))
def test_nothing_else_is_raised(raw: bytes) -> None:
    try:
        assert isinstance(read(raw, max_values=50), dict)
    except FormatError:
        return


@given(text=st.text(st.characters() | st.sampled_from("\ud800\udbff\udc00\udfff\\"), max_size=8))
def test_a_string_is_refused_exactly_when_it_is_not_unicode_text(text: str) -> None:
    raw = encode(text, ascii_only=True)
    try:
        json.loads(raw).encode()
        whole = True
    except UnicodeEncodeError:
        whole = False
    assert has_lone_surrogate(raw) is not whole


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"\xff": 1}', "not valid UTF-8 text"),
        (b"[]", "expected a JSON object, not list"),
        (b"null", "expected a JSON object, not NoneType"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' stands twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": ' + b"[" * 8 + b"]" * 8 + b"}", "nested deeper than 8"),
        (b'{"a": ' + b"[" * 100_000, "nested deeper than 8"),
        (b'{"a": "\\ud83d"}', "surrogate"),
        (b'{"a": "\\ude00\\ud83d"}', "surrogate"),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "at most 1048576"),
    ],
)
def test_what_is_refused_says_why(raw: bytes, problem: str) -> None:
    with pytest.raises(FormatError, match=problem):
        read(raw)


def test_values_are_counted_outside_strings() -> None:
    assert read(b'{"a": [1, 2, 3], "b": ",,,,[[[["}', max_values=5)
    with pytest.raises(FormatError, match="more than 4 values"):
        read(b'{"a": [1, 2, 3], "b": ",,,,[[[["}', max_values=4)


@pytest.mark.parametrize("digits", ["9223372036854775808", "-9223372036854775808", "1" * 5000])
def test_integers_beyond_64_bits_are_refused_on_demand(digits: str) -> None:
    with pytest.raises(FormatError, match="beyond 64 bits"):
        read(f'{{"a": {digits}}}'.encode(), parse_int=integer_64)
    assert read(b'{"a": -9223372036854775807}', parse_int=integer_64) == {"a": -(2**63) + 1}


@pytest.mark.parametrize("digits", ["1e999", "-1e999", "1." + "0" * 1100])
def test_floats_that_overflow_are_refused_on_demand(digits: str) -> None:
    with pytest.raises(FormatError, match="beyond a 64-bit float"):
        read(f'{{"a": {digits}}}'.encode(), parse_float=finite_float)
    assert read(b'{"a": 1e308}', parse_float=finite_float) == {"a": 1e308}


LONG = b'"' + b"3b1c5e0d9f6a47b2803c6f5d2e100e9999a5b4c3" * 200 + b'"'


@pytest.mark.parametrize(
    "digits",
    [
        "1e309",
        "-2E+308",
        "1e0400",
        "9" * 309 + ".0",
        "1" * 250 + "e100",
        "0." + "0" * 1500 + "1",
        "1e-" + "0" * 1100 + "1",
    ],
)
def test_a_float_that_overflows_is_found_in_a_long_text_too(digits: str) -> None:
    for text in (b'{"a": %b, "b": [1.5, %b]}', b'{"a": %b, "b":\t%b\n}', b'{"a": %b, "b": [%b,1]}'):
        with pytest.raises(FormatError, match="beyond a 64-bit float"):
            read(text % (LONG, digits.encode()), parse_float=finite_float, max_bytes=10**6)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=30), st.text())
def test_a_long_text_is_read_as_a_short_one(numbers: list[float], text: str) -> None:
    raw = json.dumps({"a": LONG.decode(), "b": numbers, "c": text}).encode()
    assert read(raw, parse_float=finite_float, max_bytes=10**6) == json.loads(raw)


def test_many_words_that_look_like_exponents_cost_no_number() -> None:
    raw = b'{"a": ["%b", 1.5]}' % (b"1e111}" * 5000)
    assert read(raw, parse_float=finite_float, max_bytes=10**6)["a"][1] == 1.5
