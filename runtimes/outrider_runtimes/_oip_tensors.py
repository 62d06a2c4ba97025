"""The tensors of an Open Inference Protocol message, and its JSON, strictly: see ``oip``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from outrider_runtimes import strictjson
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

MAX_TENSORS = 256
MAX_NAME = 256
MAX_RANK = 16
# 16 axes of nested data inside outputs[i].data, and room for the metadata of other servers.
MAX_DEPTH = 64

Bytes = bytes | bytearray
Document = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a message may cost. JSON has a bound of its own: decoding it holds the interpreter's lock."""

    body_bytes: int = 64 << 20
    json_bytes: int = 16 << 20


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    refuse: Refuse
    limits: Limits


@dataclass(frozen=True, kw_only=True, slots=True)
class Declared:
    """One tensor as the document announces it; ``count`` elements."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    count: int


def decode_json(data: Bytes, refuse: Refuse, *, max_bytes: int = Limits.json_bytes) -> Document:
    """A JSON object, bounded in size and depth, with no NaN and no key twice. Raises what ``refuse`` makes."""
    return strictjson.parse(data, refuse, max_bytes=max_bytes, max_depth=MAX_DEPTH)


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
        declared = _declaration(entry, key, rules)
        name = declared.name
        if name in tensors:
            raise refuse(f"tensor {name!r} is listed twice")
        size = mapping(entry, "parameters", refuse).get("binary_data_size")
        if size is None:
            tensors[name] = _from_list(declared, entry.get("data"), refuse)
            continue
        if "data" in entry:
            raise refuse(f"tensor {name!r} has both data and binary_data_size")
        tensors[name] = _from_bytes(declared, body, at, size, refuse)
        at += size
    if at != len(body):
        raise refuse(f"{len(body) - at} bytes follow the last tensor")
    return tensors


def _declaration(entry: Any, key: str, rules: Rules) -> Declared:
    refuse, limits = rules.refuse, rules.limits
    if not isinstance(entry, dict):
        raise refuse(f"an entry of {key!r} is not an object")
    name = entry.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise refuse(f"a tensor's name is not a string of 1 to {MAX_NAME} characters")
    datatype = entry.get("datatype")
    if not isinstance(datatype, str) or datatype not in DTYPES:
        known = ", ".join(DTYPES)
        raise refuse(f"tensor {name!r} has datatype {str(datatype)[:32]!r}, which is not served; one of {known}")
    shape = entry.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_RANK
        or not all(type(size) is int and 0 <= size < 2**31 for size in shape)
    ):
        raise refuse(f"tensor {name!r}: its shape is not a list of at most {MAX_RANK} sizes of 0 to 2^31 - 1")
    dtype = np.dtype(DTYPES[datatype])
    # Zeros count as ones here: [2147483647, 0] holds no bytes and would still be run row by row.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > limits.body_bytes:
        raise refuse(f"tensor {name!r}: shape {shape} is more than the {limits.body_bytes} bytes that are taken")
    return Declared(name=name, dtype=dtype, shape=tuple(shape), count=math.prod(shape))


def _from_bytes(declared: Declared, body: Bytes, at: int, size: Any, refuse: Refuse) -> Array:
    where, dtype = f"tensor {declared.name!r}", declared.dtype
    expected = declared.count * dtype.itemsize
    if type(size) is not int or size != expected:
        raise refuse(f"{where}: binary_data_size is {str(size)[:32]}, its shape and datatype need {expected}")
    if at + size > len(body):
        raise refuse(f"{where}: {size} bytes are declared, {len(body) - at} are there")
    stored = np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("<")
    flat = np.frombuffer(body, stored, count=declared.count, offset=at) if size else np.empty(0, stored)
    if dtype.kind == "b" and flat.size and flat.max() > 1:
        raise refuse(f"{where}: a BOOL is 0 or 1")
    return flat.astype(dtype).reshape(declared.shape)


def _from_list(declared: Declared, data: Any, refuse: Refuse) -> Array:
    where, dtype, datatype = f"tensor {declared.name!r}", declared.dtype, DATATYPES[declared.dtype.name]
    if not isinstance(data, list):
        raise refuse(f"{where} has neither a list of data nor a binary_data_size")
    flat = _flattened(declared, data, refuse)
    allowed: dict[str, set[type]] = {"b": {bool}, "f": {int, float}}
    for kind in set(map(type, flat)) - allowed.get(dtype.kind, {int}):
        raise refuse(f"{where}: a {kind.__name__} stands where {datatype} is declared")
    if dtype.kind in "iu" and flat:
        limits = np.iinfo(dtype)
        if min(flat) < limits.min or max(flat) > limits.max:
            raise refuse(f"{where} has values that do not fit {datatype}")
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype=dtype)
    except OverflowError:
        raise refuse(f"{where} has values that do not fit {datatype}") from None
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise refuse(f"{where} has values that do not fit {datatype}")
    return array.reshape(declared.shape)


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
    if len(data) != declared.count:
        raise refuse(f"{where} has {len(data)} elements, its shape {shape} needs {declared.count}")
    return data


def mapping(document: Document, key: str, refuse: Refuse) -> Document:
    value = document.get(key, {})
    if not isinstance(value, dict):
        raise refuse(f"{key!r} is not an object")
    return value
