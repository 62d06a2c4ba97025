"""What an Open Inference Protocol message holds, strictly, whether it came as JSON or over gRPC: see ``oip``."""

from __future__ import annotations

import json
import marshal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from outrider_runtimes import _oip_files, strictjson
from outrider_runtimes._inputs import all_finite
from outrider_runtimes._oip_files import BYTES, Files
from outrider_runtimes.errors import InputError
from outrider_runtimes.strictjson import Refuse
from outrider_runtimes.tensors import Array

LENGTH_HEADER = "Inference-Header-Content-Length"

DATATYPES: Mapping[str, str] = {
    "bool": "BOOL",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}
DTYPES: Mapping[str, str] = {datatype: dtype for dtype, datatype in DATATYPES.items()}
_DATATYPES: Mapping[np.dtype[Any], str] = {np.dtype(dtype): datatype for dtype, datatype in DATATYPES.items()}
_FILES = np.dtype(object)  # of what is BYTES, until its rows are made
_NUMPY: Mapping[str, np.dtype[Any]] = {datatype: dtype for dtype, datatype in _DATATYPES.items()} | {BYTES: _FILES}
# As they travel.
_STORED: Mapping[np.dtype[Any], np.dtype[Any]] = {
    dtype: np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("<") for dtype in _DATATYPES
}

_LITTLE = sys.byteorder == "little"
# Fewer bytes are copied sooner than looked at; see ``_wire.JOINED_BYTES``.
COPIED_BYTES = 16 << 10
# Fewer are read and written sooner in the plain way, where the caches hold something else at first.
_QUICK_READ = 512
_QUICK_WRITTEN = 48
_MISREAD = np.uint32(0x15AE43FD).view(np.float32)  # its shortest digits are 7.038531e-26; see ``numbers``

# What JSON holds of a kind of dtype.
_NUMBERS: Mapping[str, frozenset[type]] = {"b": frozenset({bool}), "f": frozenset({int, float})}
_INTEGERS: frozenset[type] = frozenset({int})
# How ``marshal`` lays out a list: a byte that says so and its length, then a byte and a value for each number.
_LIST_HEAD_BYTES = 5
_INTEGER = (ord("i"), np.dtype([("type", "u1"), ("value", "<i4")]))
_LAID_OUT = {"f": (ord("g"), np.dtype([("type", "u1"), ("value", "<f8")])), "i": _INTEGER, "u": _INTEGER}

MAX_TENSORS = 256
MAX_NAME = 256
MAX_RANK = 16
# 16 axes of nested data inside outputs[i].data, and room for the metadata of other servers.
MAX_DEPTH = 64
MAX_TIMEOUT_US = 2**53
# A list of three bytes takes 64 when it is parsed, a short key some 200: no tensor needs so many of them.
MAX_BRACKETS = 1 << 20
MAX_QUOTES = 1 << 18

JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False)

Bytes = bytes | bytearray
Document = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a message may cost. JSON has a bound of its own: decoding it holds the interpreter's lock."""

    body_bytes: int = 64 << 20
    json_bytes: int = 16 << 20


DEFAULT_LIMITS = Limits()


class Rules(NamedTuple):
    refuse: Refuse
    limits: Limits
    files: Files = MappingProxyType({})


class Declared(NamedTuple):
    """One tensor as the document announces it, with so many elements."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    elements: int


def decode_json(data: Bytes, refuse: Refuse, *, max_bytes: int = Limits.json_bytes) -> Document:
    """A JSON object, bounded in size, depth, lists and strings, with no NaN and no key twice.

    Parsed it takes at most some ten times its bytes. Raises what ``refuse`` makes.
    """
    if len(data) > MAX_QUOTES:
        if strictjson.count(data, b'"') > MAX_QUOTES:
            raise refuse(f"more than {MAX_QUOTES // 2} strings and keys")
        if strictjson.count(data, b"[") + strictjson.count(data, b"{") > MAX_BRACKETS:
            raise refuse(f"more than {MAX_BRACKETS} lists and objects")
    return strictjson.parse(data, refuse, max_bytes=max_bytes, max_depth=MAX_DEPTH, quickly=True)


def open_body(body: Bytes, json_bytes: int | None, rules: Rules) -> tuple[Document, int]:
    """The document, and where the tensors begin."""
    refuse, limits = rules.refuse, rules.limits
    if len(body) > limits.body_bytes:
        raise refuse(f"the body has {len(body)} bytes, at most {limits.body_bytes} are taken")
    if json_bytes is None:
        return decode_json(body, refuse, max_bytes=limits.json_bytes), len(body)
    if json_bytes == 0:
        raise refuse(f"{LENGTH_HEADER} is 0: raw binary requests are not taken, only tensors with a JSON header")
    if not 0 < json_bytes <= len(body):
        raise refuse(f"{LENGTH_HEADER} is {json_bytes}, the body has {len(body)} bytes")
    return decode_json(body[:json_bytes], refuse, max_bytes=limits.json_bytes), json_bytes


def read_tensors(document: Document, key: str, body: Bytes, start: int, rules: Rules) -> dict[str, Array]:
    refuse = rules.refuse
    entries = document.get(key)
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_TENSORS:
        raise refuse(f"{key!r} is not a list of 1 to {MAX_TENSORS} tensors")
    tensors: dict[str, Array] = {}
    at = start
    for entry in entries:
        declared = declaration(entry, key, rules)
        name = declared.name
        if name in tensors:
            raise refuse(f"tensor {name!r} is listed twice")
        parameters = mapping(entry, "parameters", refuse)
        if "shared_memory_region" in parameters:
            raise refuse(f"tensor {name!r}: shared memory is not served")
        size = parameters.get("binary_data_size")
        if size is None:
            tensors[name] = from_list(declared, entry.get("data"), rules)
            continue
        if "data" in entry:
            raise refuse(f"tensor {name!r} has both data and binary_data_size")
        tensors[name] = from_bytes(declared, body, at, size, rules)
        at += size
    if at != len(body):
        raise refuse(f"{len(body) - at} bytes follow the last tensor")
    return tensors


def declaration(entry: Any, key: str, rules: Rules) -> Declared:
    refuse, limits = rules.refuse, rules.limits
    if not isinstance(entry, dict):
        raise refuse(f"an entry of {key!r} is not an object")
    name = entry.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise refuse(f"a tensor's name is not a string of 1 to {MAX_NAME} characters")
    datatype = entry.get("datatype")
    known = (*DTYPES, BYTES) if name in rules.files else DTYPES
    if not isinstance(datatype, str) or datatype not in known:
        text = f"tensor {name!r} has datatype {str(datatype)[:32]!r}, which is not served; one of {', '.join(known)}"
        raise refuse(text)
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        raise refuse(f"tensor {name!r}: its shape is not a list of at most {MAX_RANK} sizes")
    dtype, count, rows = _NUMPY[datatype], 1, 1
    for size in shape:
        if type(size) is not int or not 0 <= size < 2**31:
            raise refuse(f"tensor {name!r}: a size of its shape is not a number of 0 to 2^31 - 1")
        count *= size
        rows *= size or 1
    # Zeros count as ones here: [2147483647, 0] holds no bytes and would still be run row by row.
    if rows * dtype.itemsize > limits.body_bytes:
        raise refuse(f"tensor {name!r}: shape {shape} is more than the {limits.body_bytes} bytes that are taken")
    return Declared(name, dtype, tuple(shape), count)


def from_bytes(declared: Declared, body: Bytes, at: int, size: Any, rules: Rules) -> Array:
    (name, dtype, shape, elements), refuse = declared, rules.refuse
    files = dtype is _FILES
    expected = "0 or more" if files else elements * dtype.itemsize
    if type(size) is not int or size < 0 or not (files or size == expected):
        raise refuse(f"tensor {name!r}: binary_data_size is {str(size)[:32]}, its shape and datatype need {expected}")
    if at + size > len(body):
        raise refuse(f"tensor {name!r}: {size} bytes are declared, {len(body) - at} are there")
    if files:
        return _oip_files.from_raw(memoryview(body)[at : at + size], _wanted_files(declared, rules))
    stored = _STORED[dtype]
    if _LITTLE and size <= COPIED_BYTES and dtype.kind != "b":
        # numpy would let go of the interpreter's lock over the copy: to have it back takes many times as long.
        return np.ndarray(shape, dtype, bytearray(memoryview(body)[at : at + size]))
    flat = np.frombuffer(body, stored, elements, at) if size else np.empty(0, stored)
    if dtype.kind == "b" and flat.size and flat.max() > 1:
        raise refuse(f"tensor {name!r}: a BOOL is 0 or 1")
    return flat.astype(dtype).reshape(shape)


def from_list(declared: Declared, data: Any, rules: Rules) -> Array:
    where, dtype, refuse = f"tensor {declared.name!r}", declared.dtype, rules.refuse
    if not isinstance(data, list):
        raise refuse(f"{where} has neither a list of data nor a binary_data_size")
    if dtype is _FILES:
        return _oip_files.from_elements(data, _wanted_files(declared, rules))
    flat = _flattened(declared, data, refuse)
    numbers = _of_one_type(flat, dtype.kind)
    array = _of_allowed_types(flat, dtype, where, refuse) if numbers is None else _fitting(numbers, dtype)
    if array is None or (dtype.kind == "f" and not all_finite(array)):
        raise refuse(f"{where} has values that do not fit {_DATATYPES[dtype]}")
    return array.reshape(declared.shape)


def _of_one_type(flat: list[Any], kind: str) -> Array | None:
    """The numbers where all are floats, or all integers of 32 bits, as the dtype's kind asks; None else.

    ``marshal`` lays a number out as a byte that says its type, and its value. A list that is as long as so many of one
    type are, with that byte wherever one begins, holds nothing else; to look at the type of each takes twice as long.
    """
    if kind not in _LAID_OUT or len(flat) < _QUICK_READ:
        return None
    code, stored = _LAID_OUT[kind]
    data = marshal.dumps(flat, 2)  # of later versions equal numbers may be laid out once
    if len(data) != _LIST_HEAD_BYTES + len(flat) * stored.itemsize:
        return None
    laid_out = np.frombuffer(data, stored, offset=_LIST_HEAD_BYTES)
    values: Array = laid_out["value"]
    return values if (laid_out["type"] == code).all() else None


def _of_allowed_types(flat: list[Any], dtype: np.dtype[Any], where: str, refuse: Refuse) -> Array | None:
    """The numbers, after a look at the type of each; None where one does not fit."""
    for kind in set(map(type, flat)) - _NUMBERS.get(dtype.kind, _INTEGERS):
        raise refuse(f"{where}: a {kind.__name__} stands where {_DATATYPES[dtype]} is declared")
    if dtype.kind in "iu" and flat:
        limits = np.iinfo(dtype)
        if min(flat) < limits.min or max(flat) > limits.max:
            return None
    try:
        with np.errstate(over="ignore"):
            return np.array(flat, dtype=dtype)
    except OverflowError:
        return None


def _fitting(numbers: Array, dtype: np.dtype[Any]) -> Array | None:
    """The numbers in that dtype; None where they are integers and one does not fit."""
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if int(numbers.min()) < limits.min or int(numbers.max()) > limits.max:
            return None
    with np.errstate(over="ignore"):
        return numbers.astype(dtype)


def _wanted_files(declared: Declared, rules: Rules) -> _oip_files.Wanted:
    name, row_bytes = declared.name, rules.files[declared.name]
    return _oip_files.Wanted(f"tensor {name!r}", declared.shape, row_bytes, rules.limits.body_bytes, rules.refuse)


def _flattened(declared: Declared, data: list[Any], refuse: Refuse) -> list[Any]:
    """Row-major data, given flat or nested as the shape says."""
    where, shape = f"tensor {declared.name!r}", list(declared.shape)
    if data and isinstance(data[0], list):
        level: list[Any] = [data]
        for size in shape:
            if not all(type(item) is list and len(item) == size for item in level):
                raise refuse(f"{where}: its data is not nested as its shape {shape} says")
            level = list(chain.from_iterable(level))
        data = level
    if len(data) != declared.elements:
        raise refuse(f"{where} has {len(data)} elements, its shape {shape} needs {declared.elements}")
    return data


def little_endian(array: Array) -> bytes | memoryview:
    """The array's bytes as they travel; where they are many, copied only if its memory is in another order."""
    if _LITTLE and array.nbytes <= COPIED_BYTES and array.dtype.isnative:
        return array.tobytes()
    ordered = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return ordered.reshape(-1).view(np.uint8).data


def datatype_of(array: Array) -> str:
    """The protocol's name of the array's dtype, in whatever byte order."""
    return _DATATYPES.get(array.dtype) or DATATYPES[array.dtype.name]


def numbers(array: Array) -> str:
    """The elements as JSON lists them, row by row, without brackets. array: finite.

    A float32 has as many digits as tell it from its neighbours. What they say is read back as it was even where it is
    read as a float64 first: nine digits differ from the number by less than a fifth of what would round it to another,
    and the shortest ones, which orjson writes, were tried for every float32: one of them becomes its neighbour.
    """
    if array.size >= _QUICK_WRITTEN and (quick := strictjson.orjson_if_installed()) is not None:
        plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).reshape(-1)
        if array.dtype.kind != "f" or not (np.abs(plain) == _MISREAD).any():
            listed: bytes = quick.dumps(plain, option=quick.OPT_SERIALIZE_NUMPY)
            return listed[1:-1].decode()
    values = array.reshape(-1).tolist()
    if array.dtype.kind == "f" and array.itemsize <= 4:
        # "-0" alone would be read as an integer, which has no sign.
        return ("%.9g," * len(values) % tuple(values)).replace("-0,", "-0.0,")[:-1]
    return JSON.encode(values)[1:-1]


def mapping(document: Document, key: str, refuse: Refuse) -> Document:
    value = document.get(key, {})
    if not isinstance(value, dict):
        raise refuse(f"{key!r} is not an object")
    return value


def text(document: Document, key: str, refuse: Refuse) -> str:
    value = document.get(key, "")
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise refuse(f"{key!r} is not a string of at most {MAX_NAME} characters")
    return value


def flag(parameters: Document, key: str, *, default: bool = False) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise InputError(f"parameter {key!r} is not true or false")
    return value


def timeout_us_of(parameters: Document) -> int | None:
    """Microseconds; absent and 0 both mean that the caller set none."""
    value = parameters.get("timeout", 0)
    if type(value) is not int or not 0 <= value <= MAX_TIMEOUT_US:
        raise InputError("parameter 'timeout' is not a number of microseconds")
    return value or None


def wanted_outputs(document: Document, default: bool) -> dict[str, bool] | None:
    entries = document.get("outputs")
    if entries is None:
        return None
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_TENSORS:
        raise InputError(f"'outputs' is not a list of 1 to {MAX_TENSORS} names")
    wanted: dict[str, bool] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or name in wanted:
            raise InputError("an entry of 'outputs' has no name, or one that is listed twice")
        parameters = mapping(entry, "parameters", InputError)
        for key in ("classification", "shared_memory_region"):
            if key in parameters:
                raise InputError(f"output {name!r}: {key} is not served", tensor=name)
        wanted[name] = flag(parameters, "binary_data", default=default)
    return wanted
