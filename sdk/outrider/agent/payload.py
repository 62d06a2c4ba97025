"""What a source brings, as bytes or as samples, and how it becomes the model's inputs. Pure.

Arrays by name are what the interface says, or refused. Pictures, sounds and readings carry the letters of their axes:
these are brought into the order that the interface has, and their numbers to its dtype, by rules that lose nothing
but the last bits of a float.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from outrider_runtimes import strictjson
from outrider_runtimes.errors import DtypeError, InputError, MissingExtra, ShapeError, UnknownTensor
from outrider_runtimes.processing.fields import MAX_PIXELS
from outrider_runtimes.tensors import Array, Interface, TensorSpec

MAX_INPUT_BYTES: Final = 64 * 1024 * 1024  # of one input, packed or not: a board has 512 MB
MAX_JSON_DEPTH: Final = 16
# Rows that come one by one are put together by so many: each alone takes more room than its numbers.
MAX_PIECES: Final = 1024
PICTURES: Final = (".png", ".jpg", ".jpeg")
_NPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"


@dataclass(frozen=True, kw_only=True)
class Named:
    """Arrays by the names of the model's inputs."""

    arrays: Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class Values:
    """Numbers in nested lists: of one input, or of several by name."""

    value: Any


@dataclass(frozen=True, kw_only=True)
class Signal:
    """Samples whose axes have letters: a picture ``HWC`` or ``HW``, a sound ``T``, readings ``TC``."""

    array: Array
    axes: str


Payload = Named | Values | Signal


def read_payload(raw: bytes, kind: str = "", *, colour: str = "rgb") -> Payload:
    """What bytes hold.

    Args:
        kind: the ending of the file's name; empty for a message, which is told by its first bytes.
        colour: what pictures are read as, ``rgb`` or ``grey``.

    Raises:
        InputError: they are not what they should be.
        MissingExtra: a picture, and pillow is not installed.
    """
    _bounded(raw)
    if kind in PICTURES:
        return Signal(array=_picture(raw, colour), axes="HW" if colour == "grey" else "HWC")
    if kind == ".npy" or (not kind and raw.startswith(_NPY)):
        return Named(arrays={"": _npy(io.BytesIO(raw), len(raw))})
    if kind == ".npz" or (not kind and raw.startswith(_ZIP)):
        return Named(arrays=_npz(raw))
    return Values(value=read_json(raw))


def read_json(raw: bytes) -> Any:
    """Nested lists of numbers, or an object of them. Raises InputError."""
    _bounded(raw)
    text = raw.strip()
    if text.startswith(b"{"):
        return strictjson.parse(text, _not_json, max_bytes=MAX_INPUT_BYTES, max_depth=MAX_JSON_DEPTH)
    if strictjson.deeper_than(text, MAX_JSON_DEPTH):
        raise _not_json(f"nested deeper than {MAX_JSON_DEPTH}")
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _not_json(str(error)) from None


class Windows:
    """Rows that come in pieces of any length, as windows of one length that begin every ``hop`` rows."""

    def __init__(self, size: int, hop: int | None = None) -> None:
        self._size = size
        self._hop = hop if hop is not None else size
        self._pieces: list[Array] = []
        self._length = 0
        self._skip = 0

    def add(self, rows: Array) -> Iterator[Array]:
        """Take rows ``[n, ...]``; give each window ``[size, ...]`` that is full now."""
        self._pieces.append(rows)
        self._length += len(rows)
        if self._length <= self._skip:  # all of it is between two windows
            self._pieces, self._skip, self._length = [], self._skip - self._length, 0
            return
        if self._length < self._skip + self._size:
            if len(self._pieces) >= MAX_PIECES:
                self._pieces = [np.concatenate(self._pieces)]
            return
        kept = np.concatenate(self._pieces) if len(self._pieces) > 1 else rows
        while True:
            dropped = min(self._skip, len(kept))
            kept, self._skip = kept[dropped:], self._skip - dropped
            self._pieces, self._length = [kept], len(kept)
            if self._skip or len(kept) < self._size:
                return
            yield kept[: self._size].copy()
            self._skip = self._hop


def fit(
    interface: Interface, payload: Payload, *, name: str | None = None, scale: float = 1.0, offset: float = 0.0
) -> dict[str, Array]:
    """The model's inputs; what they must be is checked by the model itself.

    Args:
        name: the input that one unnamed array is for; None where the model has one input beside its state.
        scale, offset: what a Signal's numbers are multiplied by, and what is added then.

    Raises:
        InputError: a name that is missing, or numbers that the input's dtype cannot hold.
    """
    if isinstance(payload, Named):
        arrays = {key or _only_input(interface, name).name: array for key, array in payload.arrays.items()}
        return {key: _batched(_spec(interface, key), array) for key, array in arrays.items()}
    if isinstance(payload, Values):
        value = payload.value
        found = value if isinstance(value, dict) else {_only_input(interface, name).name: value}
        return {key: _of_values(_spec(interface, key), each) for key, each in found.items()}
    spec = _only_input(interface, name)
    array = payload.array
    if (scale, offset) != (1.0, 0.0):
        array = array * scale + offset
    return {spec.name: to_dtype(_batched(spec, _arranged(spec, array, payload.axes)), spec)}


def to_dtype(array: Array, spec: TensorSpec) -> Array:
    """The numbers in the input's dtype. Raises DtypeError where a whole number is asked for and it is none."""
    dtype = np.dtype(spec.dtype)
    if array.dtype == dtype:
        return array
    if dtype.kind == "f":
        return array.astype(dtype)
    with np.errstate(invalid="ignore"):
        cast = array.astype(dtype)
    if array.dtype.kind not in "biuf" or not np.array_equal(cast, array):
        raise DtypeError(f"{spec.name!r} is {spec.dtype}, which cannot hold the numbers that came", tensor=spec.name)
    return cast


def _only_input(interface: Interface, name: str | None) -> TensorSpec:
    if name is not None:
        return _spec(interface, name)
    states = {pair.input for pair in interface.state}
    inputs = [spec for spec in interface.inputs if spec.name not in states]
    if len(inputs) != 1:
        raise UnknownTensor(
            f"the model has the inputs {[spec.name for spec in inputs]}, and one without a name came",
            hint="say which by source.input, or send them by name",
        )
    return inputs[0]


def _spec(interface: Interface, name: str) -> TensorSpec:
    for spec in interface.inputs:
        if spec.name == name:
            return spec
    raise UnknownTensor(f"the model has no input {name[:64]!r}", hint=f"it has {[s.name for s in interface.inputs]}")


def _arranged(spec: TensorSpec, array: Array, axes: str) -> Array:
    """In the order of the input's letters; an axis of size 1 comes or goes as the input has it."""
    wanted = spec.axes[1:] if spec.batched else spec.axes
    if not wanted:
        return array
    stray = tuple(at for at, letter in enumerate(axes) if letter not in wanted and array.shape[at] == 1)
    array, axes = array.squeeze(stray), "".join(letter for at, letter in enumerate(axes) if at not in stray)
    for letter in wanted:
        if letter not in axes and array.ndim < len(wanted):
            array, axes = array[..., None], axes + letter
    if sorted(axes) == sorted(wanted):
        return np.ascontiguousarray(array.transpose([axes.index(letter) for letter in wanted]))
    return array


def _batched(spec: TensorSpec, array: Array) -> Array:
    return array[None] if spec.batched and array.ndim == len(spec.shape) - 1 else array


def _of_values(spec: TensorSpec, value: Any) -> Array:
    try:
        array = np.asarray(value)
    except ValueError:
        raise ShapeError(f"{spec.name!r}: lists of different lengths", tensor=spec.name) from None
    if array.dtype.kind not in "biuf":
        raise DtypeError(f"{spec.name!r}: expected numbers in lists", tensor=spec.name)
    return _batched(spec, to_dtype(array, spec))


def _npy(file: Any, size_bytes: int) -> Array:
    """The array in a .npy file of that size, whose header is believed when it and the size agree."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject or dtype.kind not in "biuf":
            raise InputError(f"it holds {dtype}, expected numbers")
        if math.prod(shape) * dtype.itemsize != size_bytes - file.tell():
            raise InputError("its header and its size do not agree")
        array = np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C")
        return array.astype(dtype.newbyteorder("="), copy=False)
    except InputError:
        raise
    except Exception as error:  # numpy raises several kinds for a header that is not sound
        raise InputError(f"it is not a .npy file: {str(error)[:200]}") from None


def _npz(raw: bytes) -> dict[str, Array]:
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > MAX_INPUT_BYTES:
                raise InputError(f"unpacked it has more than {MAX_INPUT_BYTES} bytes")
            # The size that the archive names bounds what is read, whatever it unpacks to.
            parts = {member.filename: archive.open(member).read(member.file_size) for member in members}
    except InputError:
        raise
    except Exception as error:  # zipfile and zlib raise a dozen kinds
        raise InputError(f"it is not an .npz file: {str(error)[:200]}") from None
    return {name.removesuffix(".npy"): _npy(io.BytesIO(part), len(part)) for name, part in parts.items()}


def _picture(raw: bytes, colour: str) -> Array:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingExtra("pillow", extra="images", purpose="reading pictures") from None
    try:
        with Image.open(io.BytesIO(raw), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright.convert("L" if colour == "grey" else "RGB"))
    except InputError:
        raise
    except Exception as error:  # what a decoder makes of broken bytes
        raise InputError(f"it is not a picture that can be read: {str(error)[:200]}") from None


def _bounded(raw: bytes) -> None:
    if len(raw) > MAX_INPUT_BYTES:
        raise InputError(f"it has more than {MAX_INPUT_BYTES} bytes")


def _not_json(problem: str) -> InputError:
    return InputError(f"it is not JSON of numbers: {problem}")
