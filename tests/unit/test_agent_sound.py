"""WAV files as recorders write them: every width, float, the extensible form, pipes, and what was cut."""

from __future__ import annotations

import io
import struct
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.agent.sound import pcm, read_wave
from outrider_runtimes.errors import InputError
from support.effort import effort

TAIL = bytes.fromhex("000000001000800000aa00389b71")


def wav(samples: np.ndarray, *, width: int = 2, channels: int = 1, rate: int = 16_000) -> bytes:
    """As Python's own ``wave`` writes it."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(samples.tobytes())
    return file.getvalue()


def chunk(name: bytes, body: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(body) if size is None else size) + body + bytes(len(body) % 2)


def riff(
    kind: int, data: bytes, *, width: int, channels: int = 1, size: int | None = None, first: bytes = b""
) -> bytes:
    """A file from its parts. ``size``: what it says of its samples; ``first``: chunks before them."""
    plain = struct.pack("<HHIIHH", kind, channels, 16_000, 16_000 * width * channels, width * channels, 8 * width)
    body = chunk(b"fmt ", plain) + first + chunk(b"data", data, size)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def extensible(kind: int, data: bytes, *, width: int, valid_bits: int | None = None, tail: bytes = TAIL) -> bytes:
    form = struct.pack("<HHIIHH", 0xFFFE, 1, 16_000, 16_000 * width, width, 8 * width)
    form += struct.pack("<HHIH", 22, valid_bits or 8 * width, 4, kind) + tail
    body = chunk(b"fmt ", form) + chunk(b"fact", bytes(4)) + chunk(b"data", data)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


@pytest.mark.parametrize(("width", "dtype", "top"), [(1, np.uint8, 255), (2, "<i2", 32767), (4, "<i4", 2**31 - 1)])
def test_a_sound_is_minus_one_to_one(width: int, dtype: str, top: int) -> None:
    middle = 128 if width == 1 else 0
    bottom = 0 if width == 1 else -top - 1
    samples = read_wave(wav(np.array([bottom, middle, top], dtype), width=width))
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, [-1.0, 0.0, 1.0], atol=0.01)


def test_24_bits_and_two_channels() -> None:
    raw = b"\x00\x00\x80" + b"\xff\xff\x7f" + b"\x00\x00\x40"
    np.testing.assert_allclose(pcm(raw, 3), [-1.0, 1.0, 0.5], atol=1e-6)
    np.testing.assert_allclose(read_wave(wav(np.frombuffer(raw, np.uint8), width=3)), [-1.0, 1.0, 0.5], atol=1e-6)
    stereo = np.array([[16384, 0], [0, -16384]], "<i2")
    np.testing.assert_allclose(read_wave(wav(stereo, channels=2)), [0.25, -0.25])


def test_the_extensible_form_is_read_whatever_python_runs_it() -> None:
    raw = b"\x00\x00\x80" + b"\xff\xff\x7f" + b"\x00\x00\x40" + b"\x00\x00\xc0"
    np.testing.assert_allclose(read_wave(extensible(1, raw, width=3)), [-1.0, 1.0, 0.5, -0.5], atol=1e-6)
    padded = np.array([2**30, -(2**31)], "<i4").tobytes()
    np.testing.assert_allclose(read_wave(extensible(1, padded, width=4, valid_bits=24)), [0.5, -1.0])
    floats = np.array([0.25, -1.5], "<f4")
    np.testing.assert_array_equal(read_wave(extensible(3, floats.tobytes(), width=4)), floats)
    with pytest.raises(InputError, match="of the kind 65534"):
        read_wave(extensible(1, raw, width=3, tail=bytes(14)))


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_floats_are_taken_as_they_are(dtype: str) -> None:
    values = np.array([0.0, 1.0, -0.125, 2.5], dtype)
    samples = read_wave(riff(3, values.tobytes(), width=values.itemsize))
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, values.astype(np.float32))


def test_other_chunks_of_odd_sizes_are_passed_over() -> None:
    samples = np.array([1000, -1000], "<i2")
    notes = chunk(b"LIST", b"abc") + chunk(b"bext", bytes(602))
    np.testing.assert_allclose(read_wave(riff(1, samples.tobytes(), width=2, first=notes)) * 2**15, samples)
    sound = riff(1, samples.tobytes(), width=2)
    np.testing.assert_allclose(read_wave(sound + chunk(b"LIST", b"after")) * 2**15, samples)


@pytest.mark.parametrize("size", [0xFFFF_FFFF, 0x7FFF_FFFF, 0x7FFF_FFDA])
def test_a_pipes_recorder_does_not_know_the_size_and_what_is_there_counts(size: int) -> None:
    data = np.array([2**30, -(2**30)], "<i4").tobytes() + b"\x01"
    np.testing.assert_allclose(read_wave(riff(1, data, width=4, size=size)), [0.5, -0.5])


def test_a_file_that_was_cut_is_refused_wherever() -> None:
    whole = wav(np.arange(50).astype("<i2"))
    assert len(read_wave(whole)) == 50
    for length in range(len(whole)):
        with pytest.raises(InputError):
            read_wave(whole[:length])
    with pytest.raises(InputError, match="cut short: 98 bytes of samples, and it says 100"):
        read_wave(whole[:-2])


def test_a_sound_of_another_rate_or_kind_is_refused() -> None:
    sound = wav(np.zeros(10, "<i2"), rate=8000)
    with pytest.raises(InputError, match="8000 samples a second, expected 16000"):
        read_wave(sound, rate_hz=16_000)
    with pytest.raises(InputError, match="of the kind 7"):
        read_wave(riff(7, b"mu-law", width=1))
    assert len(read_wave(sound, rate_hz=8000)) == 10
    without = b"RIFF" + struct.pack("<I", 12) + b"WAVE" + chunk(b"data", bytes(4))
    for broken in (b"", b"RIFF", b"RIFX" + sound[4:], wav(np.zeros(0, "<i2")), without, riff(1, bytes(5), width=5)):
        with pytest.raises(InputError):
            read_wave(broken)


@settings(max_examples=effort(200), deadline=None)
@given(st.data())
def test_no_flipped_byte_breaks_it(data: st.DataObject) -> None:
    stereo = wav(np.arange(12).astype("<i2"), channels=2)
    raw = bytearray(data.draw(st.sampled_from([stereo, extensible(1, bytes(9), width=3), riff(3, bytes(8), width=8)])))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        samples = read_wave(bytes(raw))
    except InputError as error:
        assert str(error)
    else:
        assert samples.ndim == 1 and samples.dtype == np.float32 and len(samples)
