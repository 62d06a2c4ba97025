"""Log-mel and cepstra against the formulas written out; librosa is in test_processing_librosa.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider_runtimes.errors import FormatError, ShapeError
from outrider_runtimes.processing import MFCC, LogMel
from support.effort import effort
from support.steps import RATE, run, sound, spec_of


def slow_log_mel(step, samples):
    """One row by the formulas, window by window and band by band: float64 [windows, bands]."""
    window = step.window or step.n_fft
    before = (step.n_fft - window) // 2
    hann = np.zeros(step.n_fft)
    hann[before : before + window] = [0.5 - 0.5 * np.cos(2 * np.pi * k / window) for k in range(window)]
    padded = np.pad(samples.astype(np.float64), step.n_fft // 2 if step.centred else 0)
    bands = triangles(step)
    out = []
    for start in range(0, len(padded) - step.n_fft + 1, step.hop):
        spectrum = np.abs(np.fft.rfft(padded[start : start + step.n_fft] * hann)) ** step.power
        out.append([spectrum @ band for band in bands])
    values = np.maximum(np.array(out), step.floor) + step.offset
    logged = {"ln": np.log(values), "log10": np.log10(values), "decibel": 10 * np.log10(values)}[step.log]
    return logged if step.below_peak is None else np.maximum(logged, logged.max() - step.below_peak)


def triangles(step):
    highest = step.f_max or step.sample_rate / 2
    low, high = to_mel(step.f_min, step.scale), to_mel(highest, step.scale)
    edges = [to_hertz(low + (high - low) * k / (step.n_mels + 1), step.scale) for k in range(step.n_mels + 2)]
    bands = []
    for left, top, right in zip(edges, edges[1:], edges[2:], strict=False):
        heights = []
        for k in range(step.n_fft // 2 + 1):
            f = k * step.sample_rate / step.n_fft
            rising, falling = (f - left) / (top - left), (right - f) / (right - top)
            heights.append(max(0.0, min(rising, falling)) * (2 / (right - left) if step.norm == "slaney" else 1.0))
        bands.append(np.array(heights))
    return bands


def to_mel(hertz, scale):
    if scale == "htk":
        return 2595 * np.log10(1 + hertz / 700)
    return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * np.log(hertz / 1000) / np.log(6.4)


def to_hertz(mel, scale):
    if scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


@settings(max_examples=effort(30), deadline=None)
@given(
    n_fft=st.sampled_from([64, 100, 256]),
    hop=st.integers(10, 300),
    window=st.sampled_from([None, 50, 64]),
    n_mels=st.integers(1, 30),
    band=st.sampled_from([(0.0, None), (60.0, 7000.0), (1200.0, 8000.0)]),
    power=st.sampled_from([1.0, 2.0]),
    words=st.tuples(
        st.sampled_from(["slaney", "htk"]),
        st.sampled_from(["slaney", "none"]),
        st.sampled_from(["ln", "log10", "decibel"]),
    ),
    centred=st.booleans(),
    offset=st.sampled_from([0.0, 1e-3]),
    below_peak=st.sampled_from([None, 2.0]),
    axes=st.sampled_from(["NFT", "NTF"]),
    samples=st.integers(300, 900),
)
def test_log_mel_is_its_formula(
    n_fft, hop, window, n_mels, band, power, words, centred, offset, below_peak, axes, samples
):
    step = LogMel(
        tensor="sound",
        sample_rate=RATE,
        n_fft=n_fft,
        hop=hop,
        window=window,
        n_mels=n_mels,
        f_min=band[0],
        f_max=band[1],
        power=power,
        scale=words[0],
        norm=words[1],
        log=words[2],
        centred=centred,
        floor=1e-7,
        offset=offset,
        below_peak=below_peak,
        axes=axes,
    )
    x = sound(samples)
    made = run(step, {"sound": x}, {"sound": "NT"})["sound"]
    made = made if axes == "NTF" else made.transpose(0, 2, 1)
    for row, samples_of_row in zip(made, x, strict=True):
        np.testing.assert_allclose(row, slow_log_mel(step, samples_of_row), atol=2e-3)


def test_int16_is_its_share_of_full_scale():
    whole = (sound() * 20_000).astype(np.int16)
    step = LogMel(tensor="sound", sample_rate=RATE)
    made = run(step, {"sound": whole}, {"sound": "NT"}, free="T")["sound"]
    parts = (whole / 32_768.0).astype(np.float32)
    np.testing.assert_allclose(made, step.apply({"sound": parts}, {})["sound"], atol=1e-4)


def test_chunks_of_windows_give_the_same(monkeypatch):
    from outrider_runtimes.processing import sound as module

    x, step = sound(), LogMel(tensor="sound", sample_rate=RATE)
    whole = step.apply({"sound": x}, {})["sound"]
    monkeypatch.setattr(module, "CHUNK_VALUES", 3 * step.n_fft)
    np.testing.assert_allclose(step.apply({"sound": x}, {})["sound"], whole, atol=1e-5)


def test_no_rows_and_too_few_samples():
    step = LogMel(tensor="sound", sample_rate=RATE, centred=False, n_mels=7)
    assert run(step, {"sound": sound()[:0]}, {"sound": "NT"})["sound"].shape == (0, 7, 22)
    short = sound(511)
    with pytest.raises(FormatError, match="'sound' has 511 samples, less than the 512 of a window"):
        step.specs({"sound": spec_of("sound", short, "NT")}, {})
    with pytest.raises(ShapeError, match="'sound' has 511 samples") as caught:
        step.apply({"sound": short}, {})
    assert caught.value.tensor == "sound"


def test_silence_is_the_floor():
    step = LogMel(tensor="sound", sample_rate=RATE, log="decibel", floor=1e-8)
    made = step.apply({"sound": np.zeros((1, 2000), np.float32)}, {})["sound"]
    np.testing.assert_allclose(made, -80.0, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"n_fft": 16_385}, "n_fft: expected"),
        ({"n_fft": 4096, "hop": 63}, "hop: 63 is less than a 64th of n_fft, 4096"),
        ({"window": 513}, "window: 513 is more than n_fft, 512"),
        ({"window": True}, "window: expected"),
        ({"n_mels": 257}, "n_mels: expected"),
        ({"f_max": 8001.0}, "f_min and f_max: 0 to 8001 Hz of 8000"),
        ({"f_min": 4000.0, "f_max": 4000.0}, "f_min and f_max"),
        ({"floor": 0.0}, "floor and offset: one must be above 0"),
        ({"log": "log2"}, "log: expected one of"),
        ({"axes": "NCT"}, "axes: expected one of NFT, NTF"),
        ({"centred": 1}, "centred: expected true or false"),
        ({"power": float("nan")}, "power: expected a number"),
    ],
)
def test_log_mel_refuses_what_has_no_meaning(keys, match):
    with pytest.raises(FormatError, match=match):
        LogMel(**{"tensor": "sound", "sample_rate": RATE, **keys})


@settings(max_examples=effort(30), deadline=None)
@given(
    bands=st.integers(1, 60), windows=st.integers(1, 9), data=st.data(), axes=st.sampled_from(["NFT", "NTF", "NCFT"])
)
def test_cepstra_are_the_orthonormal_dct(bands, windows, data, axes):
    count = data.draw(st.integers(1, bands))
    sizes = {"N": 2, "F": bands, "T": windows, "C": 1}
    x = np.random.default_rng(bands).standard_normal([sizes[letter] for letter in axes]).astype(np.float32)
    made = run(MFCC(tensor="x", n_mfcc=count, axes=axes), {"x": x}, {"x": axes}, free="T")["x"]
    axis = axes.index("F")
    last = np.moveaxis(x.astype(np.float64), axis, -1)
    for k in range(count):
        waves = np.array([np.cos(np.pi * k * (2 * n + 1) / (2 * bands)) for n in range(bands)])
        wanted = (last * waves).sum(-1) * np.sqrt((1 if k == 0 else 2) / bands)
        np.testing.assert_allclose(made.take(k, axis=axis), wanted, atol=1e-5)


def test_more_cepstra_than_bands_are_refused():
    x = np.zeros((1, 12, 5), np.float32)
    with pytest.raises(FormatError, match="'x' has 12 bands, expected 13 to 256"):
        MFCC(tensor="x", n_mfcc=13).specs({"x": spec_of("x", x, "NFT")}, {})
    with pytest.raises(FormatError, match="axes: NCT has no F"):
        MFCC(tensor="x", axes="NCT")
