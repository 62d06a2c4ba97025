"""Sound to log-mel spectrograms and cepstra, by the formulas that librosa and Slaney's Auditory Toolbox share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Annotated, ClassVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from outrider_runtimes.errors import FormatError, ShapeError
from outrider_runtimes.processing.base import CallerShapes, Shapes, Specs
from outrider_runtimes.processing.fields import Axes, Choice, Flag, Name, Number, StoredStep, Whole
from outrider_runtimes.processing.specs import laid_out, need_dtype, need_letters, resized, sizes_at
from outrider_runtimes.tensors import Array, TensorSpec

MAX_FFT = 16_384
MAX_BANDS = 256
CHUNK_VALUES = 2**19  # samples in windows at once: what lies between is bounded whatever the overlap
INT16_FULL_SCALE = 32_768.0


@dataclass(frozen=True, kw_only=True)
class LogMel(StoredStep):
    """The logarithm of a mel spectrogram.

    Windows of ``n_fft`` samples (Hann, periodic) every ``hop`` samples; magnitudes of their Fourier transform to the
    power of ``power``; triangles of the mel scale over them; then the logarithm of ``max(value, floor) + offset``.

    Attributes:
        tensor: float32 [N, T] in -1 to 1, or int16 [N, T], which is divided by 32768. Becomes float32 with axes as
            below: F are the bands, T the windows.
        sample_rate: in Hz.
        n_fft: samples of the Fourier transform.
        hop: samples from window to window; at least a 64th of ``n_fft``.
        window: samples of the window, in the middle of the ``n_fft``; None for as many.
        n_mels: bands.
        f_min, f_max: in Hz; None for half the sample rate.
        power: 1 for magnitude, 2 for energy.
        scale: ``slaney`` (a line up to 1 kHz, then a logarithm) or ``htk`` (``2595 log10(1 + f / 700)``).
        norm: ``slaney`` divides each triangle by half its width in Hz; ``none`` leaves its top at 1.
        centred: whether the sound is padded with ``n_fft // 2`` zeros at both ends.
        log: ``ln``, ``log10`` or ``decibel`` (``10 log10``).
        floor, offset: see above.
        below_peak: what lies further than this below a row's greatest value, in units of the logarithm, is raised to
            there; None for no bound.
        axes: ``NFT`` or ``NTF``, of what comes out.
    """

    kind: ClassVar[str] = "log_mel"
    tensor: Name
    sample_rate: Annotated[int, Whole(1000, 384_000)]
    n_fft: Annotated[int, Whole(16, MAX_FFT)] = 512
    hop: Annotated[int, Whole(1, 4 * MAX_FFT)] = 160
    window: Annotated[int | None, Whole(2, MAX_FFT, optional=True)] = None
    n_mels: Annotated[int, Whole(1, MAX_BANDS)] = 40
    f_min: Annotated[float, Number(0.0, 192_000.0)] = 0.0
    f_max: Annotated[float | None, Number(1.0, 192_000.0, optional=True)] = None
    power: Annotated[float, Number(0.5, 4.0)] = 2.0
    scale: Annotated[str, Choice(("slaney", "htk"))] = "slaney"
    norm: Annotated[str, Choice(("slaney", "none"))] = "slaney"
    centred: Flag = True
    log: Annotated[str, Choice(("ln", "log10", "decibel"))] = "ln"
    floor: Annotated[float, Number(0.0, 1e6)] = 1e-10
    offset: Annotated[float, Number(0.0, 1e6)] = 0.0
    below_peak: Annotated[float | None, Number(0.0, 1e6, optional=True)] = None
    axes: Annotated[str, Choice(("NFT", "NTF"))] = "NFT"

    def check(self) -> None:
        """See ``StoredStep``."""
        if self.hop * 64 < self.n_fft:
            raise FormatError(f"hop: {self.hop} is less than a 64th of n_fft, {self.n_fft}")
        if self.window is not None and self.window > self.n_fft:
            raise FormatError(f"window: {self.window} is more than n_fft, {self.n_fft}")
        if not self.f_min < self._highest <= self.sample_rate / 2:
            raise FormatError(f"f_min and f_max: {self.f_min:g} to {self._highest:g} Hz of {self.sample_rate / 2:g}")
        if self.floor + self.offset <= 0:
            raise FormatError("floor and offset: one must be above 0, or the logarithm has no bound")

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = laid_out(specs, self.tensor, "NT")
        need_dtype(spec, "float32", "int16")
        rows, samples = spec.shape
        sizes = {"N": rows, "F": self.n_mels, "T": None if samples is None else self._windows(samples)}
        if sizes["T"] == 0:
            raise FormatError(f"{self.tensor!r} has {samples} samples, less than the {self.n_fft} of a window")
        shape = tuple(sizes[letter] for letter in self.axes)
        return {**specs, self.tensor: replace(spec, dtype="float32", shape=shape, axes=self.axes, range=None)}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        sound = tensors[self.tensor]
        windows = self._windows(sound.shape[1])
        if windows == 0:
            raise ShapeError(
                f"{self.tensor!r} has {sound.shape[1]} samples, less than the {self.n_fft} of a window",
                tensor=self.tensor,
            )
        made = np.empty((len(sound), windows, self.n_mels), np.float32)
        for row, samples in zip(made, sound, strict=True):
            self._energies(samples, row)
        self._to_log(made)
        return {**tensors, self.tensor: made if self.axes == "NTF" else made.transpose(0, 2, 1)}

    def _windows(self, samples: int) -> int:
        """How many windows lie in so many samples."""
        padded = samples + 2 * (self.n_fft // 2) if self.centred else samples
        return 0 if samples == 0 else max(0, 1 + (padded - self.n_fft) // self.hop)

    def _energies(self, samples: Array, out: Array) -> None:
        """One row's bands before the logarithm. ``out``: float32 [windows, n_mels]."""
        if samples.dtype == np.int16:
            samples = samples * np.float32(1.0 / INT16_FULL_SCALE)
        if self.centred:
            samples = np.pad(samples, self.n_fft // 2)
        frames = sliding_window_view(samples, self.n_fft)[:: self.hop]
        count = max(1, CHUNK_VALUES // self.n_fft)
        for start in range(0, len(out), count):
            spectrum = np.fft.rfft(frames[start : start + count] * self._hann)
            magnitudes = spectrum.real**2 + spectrum.imag**2
            if self.power != 2.0:
                magnitudes **= 0.5 * self.power
            out[start : start + count] = magnitudes.astype(np.float32, copy=False) @ self._bank

    def _to_log(self, energies: Array) -> None:
        """In place."""
        np.maximum(energies, np.float32(self.floor), out=energies)
        energies += np.float32(self.offset)
        (np.log if self.log == "ln" else np.log10)(energies, out=energies)
        if self.log == "decibel":
            energies *= np.float32(10.0)
        if self.below_peak is not None and energies.size:
            least = energies.max(axis=(1, 2), keepdims=True) - np.float32(self.below_peak)
            np.maximum(energies, least, out=energies)

    @property
    def _highest(self) -> float:
        return self.sample_rate / 2 if self.f_max is None else self.f_max

    @cached_property
    def _hann(self) -> Array:
        """float32 [n_fft]: the window in the middle, zeros around it."""
        size = self.window or self.n_fft
        hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(size) / size)
        before = (self.n_fft - size) // 2
        return np.pad(hann, (before, self.n_fft - size - before)).astype(np.float32)

    @cached_property
    def _bank(self) -> Array:
        """float32 [n_fft // 2 + 1, n_mels]: the weight of each frequency in each band."""
        edges = _to_hertz(
            np.linspace(_to_mel(self.f_min, self.scale), _to_mel(self._highest, self.scale), self.n_mels + 2),
            self.scale,
        )
        frequencies = np.linspace(0.0, self.sample_rate / 2, self.n_fft // 2 + 1)[:, np.newaxis]
        low, top, high = edges[:-2], edges[1:-1], edges[2:]
        weights = np.clip(np.minimum((frequencies - low) / (top - low), (high - frequencies) / (high - top)), 0.0, None)
        if self.norm == "slaney":
            weights *= 2.0 / (high - low)
        bank: Array = weights.astype(np.float32)
        return bank


# Slaney's scale: 200/3 Hz a mel up to 1000 Hz, then 27 mels for each factor of 6.4.
_HERTZ_A_MEL = 200.0 / 3.0
_BREAK_HERTZ = 1000.0
_BREAK_MEL = _BREAK_HERTZ / _HERTZ_A_MEL
_LOG_STEP = math.log(6.4) / 27.0


def _to_mel(hertz: float, scale: str) -> float:
    if scale == "htk":
        return 2595.0 * math.log10(1.0 + hertz / 700.0)
    if hertz < _BREAK_HERTZ:
        return hertz / _HERTZ_A_MEL
    return _BREAK_MEL + math.log(hertz / _BREAK_HERTZ) / _LOG_STEP


def _to_hertz(mels: Array, scale: str) -> Array:
    if scale == "htk":
        return 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    above = _BREAK_HERTZ * np.exp(_LOG_STEP * (np.maximum(mels, _BREAK_MEL) - _BREAK_MEL))
    return np.where(mels < _BREAK_MEL, mels * _HERTZ_A_MEL, above)


@dataclass(frozen=True, kw_only=True)
class MFCC(StoredStep):
    """Cepstral coefficients: the first ones of the orthonormal DCT-II over the bands of a log-mel spectrogram.

    Attributes:
        tensor: float32 with axes N, F and T in any order; F becomes the coefficients.
        n_mfcc: how many; at most as many as there are bands.
        axes: the tensor's.
    """

    kind: ClassVar[str] = "mfcc"
    tensor: Name
    n_mfcc: Annotated[int, Whole(1, MAX_BANDS)] = 13
    axes: Axes = "NFT"

    def check(self) -> None:
        """See ``StoredStep``."""
        need_letters(self.axes, "F")

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """See ``Step``."""
        spec = laid_out(specs, self.tensor, self.axes)
        need_dtype(spec, "float32")
        (bands,) = sizes_at(spec.shape, self.axes, "F")
        if bands is None or not self.n_mfcc <= bands <= MAX_BANDS:
            raise FormatError(f"{self.tensor!r} has {bands} bands, expected {self.n_mfcc} to {MAX_BANDS}")
        return {**specs, self.tensor: replace(resized(spec, F=self.n_mfcc), range=None)}

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """See ``Step``."""
        energies = tensors[self.tensor]
        axis = self.axes.index("F")
        turned = np.moveaxis(energies, axis, -1) @ _dct(energies.shape[axis], self.n_mfcc)
        return {**tensors, self.tensor: np.moveaxis(turned, -1, axis)}


@lru_cache(maxsize=8)
def _dct(bands: int, coefficients: int) -> Array:
    """float32 [bands, coefficients]: the orthonormal DCT-II."""
    angles = np.pi / bands * (np.arange(bands)[:, np.newaxis] + 0.5) * np.arange(coefficients)
    made = math.sqrt(2.0 / bands) * np.cos(angles)
    made[:, 0] = math.sqrt(1.0 / bands)
    table: Array = made.astype(np.float32)
    return table
