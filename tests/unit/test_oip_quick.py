"""Numbers of replies as orjson writes them: each reads back as what it was, through a float64 too."""

from __future__ import annotations

import json

import numpy as np
import orjson
import pytest

from outrider_runtimes import oip
from outrider_runtimes.tensors import Array

SHARE = 1 << 18  # of the 2^32 bit patterns; ``make trials`` tries every one


def read_back(array: Array) -> Array:
    """What strangers' parsers make of it, which read a float64 first."""
    message = oip.encode_request({"x": array}, binary=False)
    (entry,) = json.loads(message.body)["inputs"]
    assert orjson.loads(message.body)["inputs"] == [entry]
    np.testing.assert_array_equal(oip.decode_request(message.body, None).inputs["x"], array)
    return np.array(entry["data"], dtype=np.float64 if array.dtype.kind == "f" else None).astype(array.dtype)


def as_bits(array: Array) -> Array:
    return array.view(f"u{array.itemsize}")


def test_a_seeded_share_of_all_float32() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, SHARE, dtype=np.uint32)
    bits[:2] = [0x15AE43FD, 0x95AE43FD]  # of all of them the two whose shortest digits lead a float64 astray
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    np.testing.assert_array_equal(as_bits(read_back(values)), as_bits(values))


def test_all_float16() -> None:
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    np.testing.assert_array_equal(as_bits(read_back(values)), as_bits(values))


def test_what_has_not_that_one_is_written_in_the_shortest_digits() -> None:
    shortest = np.full(48, 0.1, np.float32)
    assert b"0.1,0.1" in oip.encode_request({"x": shortest}, binary=False).body


@pytest.mark.parametrize("dtype", sorted(oip.DATATYPES))
def test_every_dtype_in_any_memory(dtype: str) -> None:
    rng = np.random.default_rng(1)
    if dtype == "bool":
        array = rng.random((6, 8)) < 0.5
    elif dtype.startswith("float"):
        array = rng.standard_normal((6, 8)).astype(dtype)
        array[0, :2] = [-0.0, 0.0]
    else:
        limits = np.iinfo(dtype)
        array = rng.integers(limits.min, limits.max, (6, 8), dtype=dtype, endpoint=True)
        array[0, :2] = [limits.min, limits.max]
    swapped = array.astype(array.dtype.newbyteorder())
    for each in (array, np.asfortranarray(array), array[::-1, ::2], swapped):
        message = oip.encode_request({"x": each}, binary=False)
        back = oip.decode_request(message.body, None).inputs["x"]
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, each)
        assert back.dtype.kind != "f" or (np.signbit(back) == np.signbit(each)).all()
