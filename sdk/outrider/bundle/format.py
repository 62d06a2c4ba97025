"""The bytes around the members: header, records, layout. Pure functions; docs/bundle-format.md is the specification."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from outrider.bundle.limits import MAX_MANIFEST_SIZE_BYTES, MAX_MEMBERS, MAX_SIGNATURES, SIGNATURE_SIZE_BYTES
from outrider_runtimes.errors import FormatError, UnsupportedBundle

# The first byte is not ASCII and the last is a line feed, so that a transfer in text mode shows at once.
MAGIC = b"\x89OUTRDR\n"
FORMAT_VERSION = 1
HEADER = struct.Struct("<8sIIQII32s")
HEADER_SIZE_BYTES = HEADER.size
ALIGNMENT = 64

ABSENT, PRESENT = 0, 1


@dataclass(frozen=True, kw_only=True)
class Header:
    """The first 64 bytes, within all caps."""

    signature_count: int
    manifest_size_bytes: int
    member_count: int
    manifest_sha256: bytes

    @property
    def presence_offset(self) -> int:
        """Where the presence bytes begin."""
        return HEADER_SIZE_BYTES

    @property
    def manifest_offset(self) -> int:
        """Where the manifest begins."""
        return self.presence_offset + self.member_count

    @property
    def signatures_offset(self) -> int:
        """Where the signature records begin."""
        return self.manifest_offset + self.manifest_size_bytes

    @property
    def prefix_size_bytes(self) -> int:
        """Everything before the padding of the first member."""
        return self.signatures_offset + self.signature_count * SIGNATURE_SIZE_BYTES


@dataclass(frozen=True, kw_only=True)
class Span:
    """A run of bytes in the file."""

    offset: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything after the prefix lies.

    Attributes:
        members: one a member in manifest order, None for an absent one.
        padding: what lies between, all zero bytes.
        end: the size of the file.
    """

    members: tuple[Span | None, ...]
    padding: tuple[Span, ...]
    end: int


def pack_header(header: Header) -> bytes:
    """The 64 bytes of a header."""
    return HEADER.pack(
        MAGIC,
        FORMAT_VERSION,
        header.signature_count,
        header.manifest_size_bytes,
        header.member_count,
        0,
        header.manifest_sha256,
    )


def unpack_header(data: bytes) -> Header:
    """The inverse of ``pack_header``.

    Raises:
        FormatError: not a bundle, or a count beyond its cap.
        UnsupportedBundle: another version of the format.
    """
    if len(data) != HEADER_SIZE_BYTES or not data.startswith(MAGIC):
        raise FormatError(
            "this is not an Outrider bundle: it does not begin with the bundle's magic and header",
            hint="`outrider package FILE --output OUT.outrider` makes a bundle of a model file",
        )
    _, version, signatures, manifest_size, members, reserved, digest = HEADER.unpack(data)
    if version != FORMAT_VERSION:
        raise UnsupportedBundle(
            f"the bundle has format version {version}, this Outrider reads version {FORMAT_VERSION}",
            hint="upgrade Outrider, or export the bundle again with this version",
        )
    if reserved:
        raise FormatError("header: the reserved bytes 28 to 31 are not zero")
    _check_count("signatures", signatures, 0, MAX_SIGNATURES)
    _check_count("bytes of manifest", manifest_size, 2, MAX_MANIFEST_SIZE_BYTES)
    _check_count("members", members, 1, MAX_MEMBERS)
    return Header(
        signature_count=signatures, manifest_size_bytes=manifest_size, member_count=members, manifest_sha256=digest
    )


def _check_count(what: str, count: int, least: int, most: int) -> None:
    if not least <= count <= most:
        raise FormatError(f"header: {count} {what}, allowed are {least} to {most}")


def unpack_presence(data: bytes) -> tuple[bool, ...]:
    """One flag a member. Raises FormatError for a byte that is neither 0 nor 1."""
    for index, value in enumerate(data):
        if value not in (ABSENT, PRESENT):
            raise FormatError(f"presence byte of member {index} is {value}, allowed are 0 and 1")
    return tuple(value == PRESENT for value in data)


def layout(prefix_size_bytes: int, sizes_bytes: Sequence[int], present: Sequence[bool]) -> Layout:
    """Where members and padding lie; all of it follows from the sizes and the presence flags."""
    members: list[Span | None] = []
    padding: list[Span] = []
    at = prefix_size_bytes
    for size, here in zip(sizes_bytes, present, strict=True):
        if not here:
            members.append(None)
            continue
        gap = -at % ALIGNMENT
        if gap:
            padding.append(Span(offset=at, size_bytes=gap))
        members.append(Span(offset=at + gap, size_bytes=size))
        at += gap + size
    return Layout(members=tuple(members), padding=tuple(padding), end=at)
