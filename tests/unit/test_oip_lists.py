"""Lists of numbers in JSON become the array that one gets number by number, or are refused; however they are read."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outrider_runtimes import oip
from outrider_runtimes.errors import InputError
from support.effort import effort

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
NARROW = st.integers(-(2**31) - 2, 2**31 + 1)
ANY = st.one_of(FLOATS, NARROW, st.integers(-(2**70), 2**70), st.booleans(), st.none(), st.text(max_size=2))
LISTS = st.one_of(*(st.lists(each, max_size=48) for each in (FLOATS, NARROW, st.integers(0, 255), st.booleans(), ANY)))


def decoded(values: list[Any], dtype: str) -> np.ndarray:
    tensor = {"name": "x", "shape": [len(values)], "datatype": oip.DATATYPES[dtype], "data": values}
    return oip.decode_request(json.dumps({"inputs": [tensor]}).encode(), None).inputs["x"]


def expected(values: list[Any], dtype: str) -> np.ndarray | None:
    """By Python's own arithmetic; None where a value may not stand there or does not fit."""
    kind = np.dtype(dtype).kind
    if kind == "b":
        return np.array(values, dtype) if all(type(value) is bool for value in values) else None
    if kind == "f":
        if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
            return None
        with np.errstate(over="ignore"):
            array = np.array([float(value) for value in values]).astype(dtype)
        return array if np.isfinite(array).all() else None
    limits = np.iinfo(dtype)
    if not all(type(value) is int and limits.min <= value <= limits.max for value in values):
        return None
    return np.array([np.dtype(dtype).type(value) for value in values], dtype)


@settings(max_examples=effort(400), deadline=None)
@given(LISTS, st.sampled_from(sorted(oip.DATATYPES)))
@example([1.0] * 20, "float32")
@example([1e39] + [1.0] * 20, "float32")
@example([70000.0] * 20, "float16")
@example([1] + [1.0] * 20, "float64")
@example([True] + [1.0] * 20, "float64")
@example([0] * 20, "bool")
@example([255] * 20, "uint8")
@example([256] * 20, "uint8")
@example([-1] * 20, "uint64")
@example([2**31] * 20, "int64")
@example([2**31 - 1] * 20, "int32")
@example([-(2**31)] * 20, "int32")
@example([True] * 20, "int32")
@example(["AAAAAAAA"] * 20, "float32")
def test_a_list_is_its_numbers_or_is_refused(values, dtype):
    wanted = expected(values, dtype)
    if wanted is None:
        with pytest.raises(InputError, match="tensor 'x'"):
            decoded(values, dtype)
        return
    found = decoded(values, dtype)
    assert found.dtype == wanted.dtype
    assert found.tobytes() == wanted.tobytes()
    found[:] = 0  # the receiver's own memory


def test_a_key_twice_is_seen_whatever_the_strings_hold():
    """Colons and braces in strings are as many as would hide a key that was dropped."""
    numbers = ", ".join(["1.5"] * 200)
    tensor = f'{{"name": "x", "shape": [200], "datatype": "FP32", "data": [{numbers}]}}'
    whole = '{"id": "%s", "inputs": [%s]%s}'
    assert oip.decode_request((whole % ("a:{b}", tensor, "")).encode(), None).id == "a:{b}"
    for name in ("a", ":", "::", "{:}", '\\":\\"'):
        with pytest.raises(InputError, match="stands twice"):
            oip.decode_request((whole % (name, tensor, ', "id": "b"')).encode(), None)
