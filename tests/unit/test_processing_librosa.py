"""Log-mel and cepstra are librosa's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from outrider_runtimes.processing import MFCC, LogMel
from support.steps import RATE, sound

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def librosa():
    import librosa  # takes seconds, and the loop collects this file

    return librosa


@pytest.mark.parametrize("scale", ["slaney", "htk"])
@pytest.mark.parametrize("norm", ["slaney", "none"])
@pytest.mark.parametrize(("window", "centred", "power"), [(None, True, 2.0), (400, False, 1.0)])
def test_log_mel_is_librosas(librosa, scale, norm, window, centred, power):
    x = sound(8000)
    step = LogMel(
        tensor="sound",
        sample_rate=RATE,
        window=window,
        f_min=50.0,
        f_max=7600.0,
        power=power,
        scale=scale,
        norm=norm,
        centred=centred,
        log="decibel",
    )
    options = {"sr": RATE, "n_fft": 512, "hop_length": 160, "win_length": window, "center": centred, "power": power}
    bank = {"n_mels": 40, "fmin": 50.0, "fmax": 7600.0, "htk": scale == "htk", "norm": None if norm == "none" else norm}
    energies = librosa.feature.melspectrogram(y=x, **options, **bank)
    wanted = librosa.power_to_db(energies, amin=1e-10, top_db=None)
    np.testing.assert_allclose(step.apply({"sound": x}, {})["sound"], wanted, atol=1e-3)  # dB


def test_cepstra_are_librosas_own_defaults(librosa):
    x = sound(8000, rows=1)
    step = LogMel(tensor="sound", sample_rate=RATE, n_fft=2048, hop=512, n_mels=128, log="decibel", below_peak=80.0)
    energies = step.apply({"sound": x}, {})
    made = MFCC(tensor="sound", n_mfcc=20).apply(energies, {})["sound"]
    np.testing.assert_allclose(made, librosa.feature.mfcc(y=x, sr=RATE, n_mfcc=20), atol=2e-3)


def test_an_odd_length_of_window_lies_where_librosas_does(librosa):
    x, step = sound(3000), LogMel(tensor="sound", sample_rate=RATE, n_fft=256, window=151, hop=80, n_mels=20)
    wanted = np.log(
        np.maximum(
            librosa.feature.melspectrogram(y=x, sr=RATE, n_fft=256, hop_length=80, win_length=151, n_mels=20), 1e-10
        )
    )
    np.testing.assert_allclose(step.apply({"sound": x}, {})["sound"], wanted, atol=1e-3)
    other = dataclasses.replace(step, window=152).apply({"sound": x}, {})["sound"]
    assert np.abs(other - wanted).max() > 0.01
