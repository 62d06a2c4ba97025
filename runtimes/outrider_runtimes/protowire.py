"""The protobuf wire format: the fields of a message as bytes, for the few messages that are read or written by hand.

https://protobuf.dev/programming-guides/encoding. A board needs no protobuf package for what stands here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


class Malformed(ValueError):
    """The bytes are not a protobuf message."""


def fields(data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Field number, wire type and value: an int of a varint, the bytes of anything else. Raises Malformed."""
    at, end = 0, len(data)
    while at < end:
        key, at = _read_varint(data, at)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise Malformed
        if wire == VARINT:
            value, at = _read_varint(data, at)
            yield number, wire, value
            continue
        if wire == LENGTH:
            size, at = _read_varint(data, at)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise Malformed  # groups, which proto3 does not have
        if size > end - at:
            raise Malformed
        yield number, wire, data[at : at + size]
        at += size


def uint_field(number: int, value: int) -> bytes:
    """A field of an unsigned integer or a bool; a negative ``value`` as its 64 bits of two's complement."""
    return _varint(number << 3 | VARINT) + _varint(value & 0xFFFF_FFFF_FFFF_FFFF)


def double_field(number: int, value: float) -> bytes:
    """A field of a double."""
    return _varint(number << 3 | FIXED64) + struct.pack("<d", value)


def bytes_field(number: int, value: bytes) -> bytes:
    """A field of bytes, of a string in UTF-8, or of a message."""
    return bytes_head(number, len(value)) + value


def bytes_head(number: int, size: int) -> bytes:
    """What stands before the ``size`` bytes of such a field."""
    return _varint(number << 3 | LENGTH) + _varint(size)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise Malformed
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise Malformed
