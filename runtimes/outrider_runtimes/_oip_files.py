"""Inputs that are files, as the protocol's BYTES: each file whole, one to a row.

In binary and in raw contents each file has its length before it, four little-endian bytes. JSON has strings for BYTES,
which are text, and no JPEG or PNG is: their first byte begins no character of UTF-8.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from outrider_runtimes.strictjson import Refuse
from outrider_runtimes.tensors import Array, Interface

BYTES = "BYTES"
# Each takes a few calls in Python, over HTTP in the thread that answers everybody.
MAX_FILES = 16384

_LENGTH = struct.Struct("<I")

Files = Mapping[str, "int | None"]  # by the name of such an input, the bytes of a row; None where any number is taken
File = bytes | memoryview


class Wanted(NamedTuple):
    """What is to be made: uint8 of ``shape`` files, each padded to ``row_bytes``, at most ``max_bytes`` in all."""

    where: str
    shape: tuple[int, ...]
    row_bytes: int | None
    max_bytes: int
    refuse: Refuse


def files_in(interface: Interface) -> dict[str, int | None]:
    """The inputs that are files, as ``Files`` has them."""
    return {spec.name: spec.shape[1] for spec in interface.inputs if spec.content_type}


def from_raw(raw: memoryview, wanted: Wanted) -> Array:
    """uint8 [N, T] from files with their lengths before them; rows are padded with zeros."""
    where, refuse = wanted.where, wanted.refuse
    files, at = [], 0
    for number in range(_count(wanted)):
        begin = at + _LENGTH.size
        if begin > len(raw):
            raise refuse(f"{where}: its bytes end before the length of element {number}")
        (size,) = _LENGTH.unpack_from(raw, at)
        at = begin + size
        if at > len(raw):
            raise refuse(f"{where}: element {number} is to have {size} bytes, {len(raw) - begin} are there")
        files.append(raw[begin:at])
    if at != len(raw):
        raise refuse(f"{where}: {len(raw) - at} bytes follow its last element")
    return _rows(files, wanted)


def from_elements(elements: Sequence[Any], wanted: Wanted) -> Array:
    """The same from the files themselves."""
    count = _count(wanted)
    if len(elements) != count:
        raise wanted.refuse(f"{wanted.where} has {len(elements)} elements, its shape needs {count}")
    if not all(type(element) is bytes for element in elements):
        raise wanted.refuse(f"{wanted.where} is a file, which is no text: send it in binary, not in JSON")
    return _rows(elements, wanted)


def _count(wanted: Wanted) -> int:
    shape = wanted.shape
    if len(shape) not in (1, 2) or shape[1:] not in ((), (1,)):
        raise wanted.refuse(f"{wanted.where} has shape {list(shape)}, expected a file a row: [N] or [N, 1]")
    if shape[0] > MAX_FILES:
        raise wanted.refuse(f"{wanted.where} has {shape[0]} elements, at most {MAX_FILES} are taken")
    return shape[0]


def _rows(files: Sequence[File], wanted: Wanted) -> Array:
    from outrider_runtimes.processing.rows import padded

    longest = max(map(len, files), default=0)
    row_bytes = max(1, longest) if wanted.row_bytes is None else wanted.row_bytes
    if longest > row_bytes:
        raise wanted.refuse(f"{wanted.where}: an element has {longest} bytes, at most {row_bytes} are taken")
    if len(files) * row_bytes > wanted.max_bytes:
        text = f"{len(files)} rows of {row_bytes} bytes are more than the {wanted.max_bytes} that are taken"
        raise wanted.refuse(f"{wanted.where}: {text}")
    return padded(files, row_bytes)
