"""Sound as samples: WAV files, and raw PCM. Pure.

Of WAV (Microsoft and IBM, "Multimedia Programming Interface and Data Specifications 1.0", and WAVEFORMATEXTENSIBLE of
Microsoft's documentation) what recorders write: PCM and IEEE float, in the plain and in the extensible form. Python's
``wave`` knows the extensible form, which is how most programs write 24 bits, from 3.12 on and float not at all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from outrider_runtimes.errors import InputError
from outrider_runtimes.tensors import Array

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_GUID_TAIL: Final = bytes.fromhex("000000001000800000aa00389b71")
_WIDTHS: Final = {_PCM: (1, 2, 3, 4), _FLOAT: (4, 8)}
# A recorder that writes to a pipe does not know how long it will be, and says so with a size near the largest.
_UNKNOWN_SIZE: Final = 0x7FFF_0000


@dataclass(frozen=True, kw_only=True)
class _Format:
    kind: int
    channels: int
    rate_hz: int
    width: int  # bytes of one sample of one channel


def read_wave(raw: bytes, *, rate_hz: int | None = None) -> Array:
    """A WAV file's samples, float32 [T], for PCM from -1 to 1; several channels are averaged.

    Args:
        rate_hz: what its rate must be; None for any.

    Raises:
        InputError: it is not PCM of 8, 16, 24 or 32 bits or float of 32 or 64, is cut short, or has another rate.
    """
    if raw[:4] != b"RIFF" or raw[8:12] != b"WAVE":
        raise _not_wave("it does not begin as one")
    form: _Format | None = None
    for name, size, body in _chunks(raw):
        if name == b"fmt ":
            form = _format(body)
        elif name == b"data":
            if form is None:
                raise _not_wave("its samples come before what they are")
            if rate_hz is not None and form.rate_hz != rate_hz:
                raise InputError(
                    f"it has {form.rate_hz} samples a second, expected {rate_hz}", hint="source.rate_hz says so"
                )
            return _samples(form, size, body)
    raise _not_wave("it has no samples")


def pcm(data: bytes, width: int) -> Array:
    """Little-endian PCM as float32 from -1 to 1. ``width``: bytes a sample; one is unsigned, as WAV has it."""
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    if width == 3:
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return padded.view("<i4")[:, 0].astype(np.float32) / 2.0**31
    whole = np.frombuffer(data, "<i2" if width == 2 else "<i4")
    return (whole / 2.0 ** (8 * width - 1)).astype(np.float32)


def mono(samples: Array, channels: int) -> Array:
    """Interleaved channels, averaged: float32 [T]."""
    return samples if channels == 1 else samples.reshape(-1, channels).mean(axis=1, dtype=np.float32)


def _chunks(raw: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """Name, the size that is said, and what is there of each."""
    at = 12
    while at + 8 <= len(raw):
        name, size = struct.unpack_from("<4sI", raw, at)
        yield name, size, raw[at + 8 : at + 8 + size]
        at += 8 + size + size % 2


def _format(body: bytes) -> _Format:
    if len(body) < 16:
        raise _not_wave("what its samples are is cut short")
    kind, channels, rate_hz, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", body)
    if kind == _EXTENSIBLE and len(body) >= 40 and body[26:40] == _GUID_TAIL:
        (kind,) = struct.unpack_from("<H", body, 24)
    if kind not in _WIDTHS:
        raise _not_wave(f"its samples are of the kind {kind}")
    if not channels or not rate_hz or frame_bytes % channels:
        raise _not_wave("its numbers of channels, samples a second and bytes do not agree")
    width = frame_bytes // channels
    if width not in _WIDTHS[kind] or (bits + 7) // 8 != width:
        raise _not_wave(f"it has {bits} bits a sample in {width} bytes")
    return _Format(kind=kind, channels=channels, rate_hz=rate_hz, width=width)


def _samples(form: _Format, size: int, body: bytes) -> Array:
    frame_bytes = form.width * form.channels
    if size >= _UNKNOWN_SIZE:
        body = body[: len(body) - len(body) % frame_bytes]
    elif size != len(body) or size % frame_bytes:
        raise InputError(f"it is cut short: {len(body)} bytes of samples, and it says {size}")
    if not body:
        raise InputError("it has no samples")
    if form.kind == _PCM:
        return mono(pcm(body, form.width), form.channels)
    with np.errstate(over="ignore"):  # a number that float32 cannot hold is infinite, and refused as such
        return mono(np.frombuffer(body, f"<f{form.width}").astype(np.float32), form.channels)


def _not_wave(problem: str) -> InputError:
    return InputError(f"it is not a WAV file of PCM or float: {problem}")
