"""Quick reading by orjson, which an endpoint installs: the same outcome as the strict parser's own."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_runtimes.errors import FormatError
from outrider_runtimes.strictjson import finite_float, parse

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


PADDING = b" " * 600  # orjson reads what is worth it


def read(raw: bytes | bytearray, **options: Any) -> dict[str, Any]:
    return parse(raw, FormatError, **{"max_bytes": 1 << 20, "max_depth": 8, **options})


def encode(value: object, *, ascii_only: bool) -> bytes:
    return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


def integer_or_float(digits: str) -> float:
    value = int(digits)
    return value if -(2**63) <= value < 2**64 else float(digits)


def outcome(raw: bytes, **options: Any) -> dict[str, Any] | None:
    try:
        return read(raw, **options)
    except FormatError:
        return None


@given(value=st.dictionaries(st.text(max_size=4), values, max_size=4), ascii_only=st.booleans())
def test_read_quickly_it_is_the_same_but_for_integers_beyond_64_bits(value: dict[str, Any], ascii_only: bool) -> None:
    raw = encode(value, ascii_only=ascii_only) + PADDING
    expected = json.loads(raw, parse_int=integer_or_float)
    assert read(raw, max_depth=100, quickly=True) == read(bytearray(raw), max_depth=100, quickly=True) == expected


@given(
    value=st.dictionaries(st.text(max_size=4), values, min_size=1, max_size=4),
    places=st.lists(st.integers(0, 10**6), min_size=1, max_size=3),
    text=st.binary(min_size=1, max_size=4) | st.sampled_from([b'"', b"{", b"]", b":", b",", b"\\", b"e9", b"\\ud83d"]),
)
def test_read_quickly_what_was_changed_is_refused_where_it_is_otherwise(
    value: dict[str, Any], places: list[int], text: bytes
) -> None:
    raw = encode(value, ascii_only=True)
    for place in places:
        at = place % len(raw)
        raw = raw[:at] + text + raw[at + place % 3 :]
    expected = outcome(raw + PADDING, max_depth=100, parse_int=integer_or_float, parse_float=finite_float)
    assert outcome(raw + PADDING, max_depth=100, quickly=True) == expected


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1,"a":2}',
        '{"a":1,"\\u0061":2}',
        '{"a":{"x":1},"a":{"x":2}}',
        '{"a":{"b":[{"c":[1.5,{"d":1,"d":2}]}]}}',
        '{"a":[[[]],{"":0,"":0}],"b":{}}',
        '{"a":"{:","b":{"c":":","c":"}"}}',
        '{"a":1e999}',
        '{"a":NaN}',
        "[]",
        '{"a":1}{',
    ],
)
def test_read_quickly_what_has_two_meanings_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        read(text.encode() + PADDING, quickly=True)
    with pytest.raises(FormatError):
        read(text.encode() + PADDING, parse_float=finite_float)


def test_read_quickly_long_data_is_seen_into_where_an_object_may_be_in_it() -> None:
    data = [0.5] * 500
    assert read(encode({"data": data, "b": {}}, ascii_only=True), quickly=True) == {"data": data, "b": {}}
    assert orjson.loads(b'{"a":1,"a":2}') == {"a": 2}, "which is why keys are counted"
    doubled = b'{"data":[' + b"0.5," * 500 + b'{"a":1,"a":2}],"b":{}}'
    with pytest.raises(FormatError, match="twice"):
        read(doubled, quickly=True)
