"""What a caller passes and gets (Interface), and how one model file spells it (Binding).

The caller speaks the interface: tensors by name, in one dtype and one layout. A model file has names, layouts and
dtypes of its own; its binding says how each of its tensors is made from the interface's, and back.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outrider_runtimes.errors import DtypeError, FormatError, NotFiniteError, ShapeError, UnknownTensor

Array = NDArray[Any]
Tensors = Mapping[str, Array]
Shape = tuple[int | None, ...]

DTYPES = frozenset(
    [
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
    ]
)
BATCH_AXIS = "N"
_NATIVE = {name: np.dtype(name) for name in DTYPES}
# What taking apart JSON of another form raises: a list for a dict, a word for a number, 1e400.
MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of an interface.

    Attributes:
        name: what the caller calls it.
        dtype: a numpy name out of ``DTYPES``.
        shape: sizes; None where any size is allowed.
        axes: one letter a dimension (``"NCHW"``); ``N`` is what batching acts on and is always the first; empty
            when the tensor has no batch axis and its axes have no names.
        range: the finite bounds within which values are expected, or None.
        meaning: for people: unit, colour order, what 1.0 stands for.
    """

    name: str
    dtype: str
    shape: Shape
    axes: str = ""
    range: tuple[float, float] | None = None
    meaning: str = ""

    def __post_init__(self) -> None:
        where = f"tensor {self.name!r}"
        if not self.name or len(self.name) > 256:
            raise FormatError(f"{where}: a name has 1 to 256 characters")
        if self.dtype not in DTYPES:
            raise FormatError(f"{where}: unknown dtype {self.dtype!r}", hint=f"one of {', '.join(sorted(DTYPES))}")
        if len(self.shape) > 16 or any(d is not None and not 0 <= d < 2**31 for d in self.shape):
            raise FormatError(f"{where}: shape {self.shape} is not at most 16 sizes of 0 to 2^31 - 1")
        if self.axes and len(self.axes) != len(self.shape):
            raise FormatError(f"{where}: axes {self.axes!r} do not name {len(self.shape)} dimensions")
        if self.range is not None and not (np.isfinite(self.range).all() and self.range[0] <= self.range[1]):
            raise FormatError(f"{where}: range {list(self.range)} is not two finite bounds, the lower first")
        if BATCH_AXIS in self.axes[1:]:
            raise FormatError(f"{where}: axis {BATCH_AXIS} must be the first, not in {self.axes!r}")

    @property
    def batched(self) -> bool:
        """Whether the first axis is the batch."""
        return self.axes[:1] == BATCH_AXIS

    def to_dict(self) -> dict[str, Any]:
        """As JSON stores it; what is empty is left out."""
        out: dict[str, Any] = {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}
        if self.axes:
            out["axes"] = self.axes
        if self.range is not None:
            out["range"] = list(self.range)
        if self.meaning:
            out["meaning"] = self.meaning
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorSpec:
        """The inverse of ``to_dict``. Raises FormatError."""
        try:
            bounds = data.get("range")
            return cls(
                name=_text(data["name"]),
                dtype=_text(data["dtype"]),
                shape=_shape(data["shape"]),
                axes=_text(data.get("axes", "")),
                range=None if bounds is None else (float(bounds[0]), float(bounds[1])),
                meaning=_text(data.get("meaning", "")),
            )
        except MALFORMED as error:
            raise FormatError(f"interface: a tensor is malformed: {error!r}") from None


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What a model takes and gives, whatever file, precision or machine serves it.

    Two bundles with equal ``digest`` may stand in for each other. ``extra`` holds keys of newer versions; they are
    kept and count in the digest.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for side in (self.inputs, self.outputs):
            names = [spec.name for spec in side]
            if not names or len(set(names)) != len(names):
                raise FormatError(f"interface: names must be given and distinct, not {names}")

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON, in hex."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """As the manifest stores it."""
        out: dict[str, Any] = {
            **self.extra,
            "inputs": [spec.to_dict() for spec in self.inputs],
            "outputs": [spec.to_dict() for spec in self.outputs],
        }
        if self.labels:
            out["labels"] = list(self.labels)
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Interface:
        """The inverse of ``to_dict``. Raises FormatError."""
        known = {"inputs", "outputs", "labels"}
        try:
            return cls(
                inputs=tuple(TensorSpec.from_dict(item) for item in data["inputs"]),
                outputs=tuple(TensorSpec.from_dict(item) for item in data["outputs"]),
                labels=tuple(_text(label) for label in data.get("labels", ())),
                extra={key: value for key, value in data.items() if key not in known},
            )
        except MALFORMED as error:
            raise FormatError(f"interface: malformed: {error!r}") from None


@dataclass(frozen=True, kw_only=True)
class TensorBinding:
    """How one tensor of a model file is made from one of the interface, and back.

    Attributes:
        name: the interface's name.
        file_name: the model file's.
        dtype: the model file's.
        shape: the model file's; None where the file allows any size.
        permutation: file axis ``i`` is interface axis ``permutation[i]``; empty for the same order.
        scale, zero_point: ``real = (stored - zero_point) * scale`` where the file's tensor is quantized; scale is
            None where it is not.
    """

    name: str
    file_name: str
    dtype: str
    shape: Shape
    permutation: tuple[int, ...] = ()
    scale: float | None = None
    zero_point: int = 0

    def __post_init__(self) -> None:
        where = f"binding of {self.name!r}"
        if self.dtype not in DTYPES:
            raise FormatError(f"{where}: unknown dtype {self.dtype!r}")
        if self.permutation and sorted(self.permutation) != list(range(len(self.shape))):
            raise FormatError(f"{where}: {self.permutation} is no permutation of {len(self.shape)} axes")
        if self.scale is not None and not (np.isfinite(self.scale) and self.scale > 0):
            raise FormatError(f"{where}: scale {self.scale} is not a positive number")

    def to_dict(self) -> dict[str, Any]:
        """As JSON stores it; what is empty is left out."""
        out: dict[str, Any] = {
            "name": self.name,
            "file_name": self.file_name,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }
        if self.permutation:
            out["permutation"] = list(self.permutation)
        if self.scale is not None:
            out["scale"] = self.scale
            out["zero_point"] = self.zero_point
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorBinding:
        """The inverse of ``to_dict``. Raises FormatError."""
        try:
            scale = data.get("scale")
            return cls(
                name=_text(data["name"]),
                file_name=_text(data["file_name"]),
                dtype=_text(data["dtype"]),
                shape=_shape(data["shape"]),
                permutation=tuple(int(axis) for axis in data.get("permutation", ())),
                scale=None if scale is None else float(scale),
                zero_point=int(data.get("zero_point", 0)),
            )
        except MALFORMED as error:
            raise FormatError(f"binding: malformed: {error!r}") from None


@dataclass(frozen=True, kw_only=True)
class Binding:
    """One variant's tensors, in the interface's order."""

    inputs: tuple[TensorBinding, ...]
    outputs: tuple[TensorBinding, ...]

    def to_dict(self) -> dict[str, Any]:
        """As the manifest stores it."""
        return {"inputs": [b.to_dict() for b in self.inputs], "outputs": [b.to_dict() for b in self.outputs]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], interface: Interface) -> Binding:
        """The inverse of ``to_dict``, checked against the interface it binds. Raises FormatError."""
        try:
            binding = cls(
                inputs=tuple(TensorBinding.from_dict(item) for item in data["inputs"]),
                outputs=tuple(TensorBinding.from_dict(item) for item in data["outputs"]),
            )
        except MALFORMED as error:
            raise FormatError(f"binding: malformed: {error!r}") from None
        for specs, bound in ((interface.inputs, binding.inputs), (interface.outputs, binding.outputs)):
            _match(specs, bound)
        return binding


def _match(specs: tuple[TensorSpec, ...], bound: tuple[TensorBinding, ...]) -> None:
    if [spec.name for spec in specs] != [item.name for item in bound]:
        raise FormatError(f"binding: names {[b.name for b in bound]} are not the interface's {[s.name for s in specs]}")
    for spec, item in zip(specs, bound, strict=True):
        if len(spec.shape) != len(item.shape):
            raise FormatError(f"binding of {spec.name!r}: {len(item.shape)} axes, the interface has {len(spec.shape)}")


def check_inputs(interface: Interface, inputs: Tensors) -> list[Array]:
    """The inputs in the interface's order: C-contiguous, native byte order, of the interface's dtype and shape.

    Only what loses nothing is converted (memory order, byte order); anything else is refused. All batched inputs
    must agree on N.

    Raises:
        UnknownTensor, DtypeError, ShapeError, NotFiniteError: naming the tensor and what was expected.
    """
    if type(inputs) is not dict and not isinstance(inputs, Mapping):
        raise UnknownTensor(
            f"the inputs are a {type(inputs).__name__}, not arrays by name",
            hint=f"pass a mapping with {[spec.name for spec in interface.inputs]}",
        )
    if len(inputs) != len(interface.inputs) or any(spec.name not in inputs for spec in interface.inputs):
        _raise_names(interface, inputs)
    arrays = []
    rows: int | None = None
    for spec in interface.inputs:
        array = _checked(spec, inputs[spec.name])
        if array.dtype.kind == "f" and not _all_finite(array):
            raise NotFiniteError(
                f"input {spec.name!r} has NaN or infinite values",
                tensor=spec.name,
                hint="clean the input before the call; np.isfinite finds the values",
            )
        if spec.batched:
            if rows is not None and array.shape[0] != rows:
                raise ShapeError(
                    f"input {spec.name!r} has N = {array.shape[0]}, another input {rows}", tensor=spec.name
                )
            rows = array.shape[0]
        arrays.append(array)
    return arrays


def check_named(interface: Interface, inputs: Tensors) -> dict[str, Array]:
    """As ``check_inputs``, by name in the interface's order."""
    arrays = check_inputs(interface, inputs)
    return {spec.name: array for spec, array in zip(interface.inputs, arrays, strict=True)}


def by_name(interface: Interface, inputs: Tensors | Array) -> Tensors:
    """Inputs by name, unchecked; where there is one input, its array alone will do. Raises UnknownTensor."""
    if isinstance(inputs, Mapping):
        return inputs
    names = [spec.name for spec in interface.inputs]
    if len(names) != 1:
        raise UnknownTensor(f"there are {len(names)} inputs", hint=f"pass a mapping with {names}")
    return {names[0]: inputs}


def _raise_names(interface: Interface, inputs: Tensors) -> None:
    wanted = [spec.name for spec in interface.inputs]
    for name in wanted:
        if name not in inputs:
            raise UnknownTensor(
                f"input {name!r} is missing",
                tensor=name,
                hint=f"pass {wanted}; got {sorted(map(str, inputs))}",
            )
    stray = next(name for name in inputs if name not in wanted)
    raise UnknownTensor(f"there is no input {stray!r}", tensor=str(stray), hint=f"the inputs are {wanted}")


def _checked(spec: TensorSpec, value: Any) -> Array:
    if not isinstance(value, np.ndarray):
        raise DtypeError(
            f"input {spec.name!r} is a {type(value).__name__}, not a numpy array",
            tensor=spec.name,
            hint=f"np.asarray(x, dtype={spec.dtype!r})",
        )
    native = _NATIVE[spec.dtype]
    # dtype.name costs 4 us, so it is asked only where the dtype is not numpy's own object of that name.
    if value.dtype is not native and value.dtype.newbyteorder("=").name != spec.dtype:
        raise DtypeError(
            f"input {spec.name!r} has dtype {value.dtype}, expected {spec.dtype}",
            tensor=spec.name,
            hint=f"x.astype({spec.dtype!r}), if that keeps its meaning",
        )
    if not _fits(value.shape, spec.shape):
        raise ShapeError(
            f"input {spec.name!r} has shape {list(value.shape)}, expected {_readable(spec)}", tensor=spec.name
        )
    if value.flags.c_contiguous and value.dtype.isnative:
        return value
    return np.ascontiguousarray(value, dtype=native)


def _fits(shape: tuple[int, ...], wanted: Shape) -> bool:
    if len(shape) != len(wanted):
        return False
    if wanted and wanted[0] is None and shape[1:] == wanted[1:]:  # the usual case, in a tenth of the time
        return True
    return all(w is None or s == w for s, w in zip(shape, wanted, strict=True))


def _readable(spec: TensorSpec) -> str:
    letters = spec.axes or "?" * len(spec.shape)
    return "[" + ", ".join(f"{a}" if s is None else str(s) for a, s in zip(letters, spec.shape, strict=True)) + "]"


def _all_finite(array: Array) -> bool:
    """Whether all values are finite. A finite dot product with itself proves it in one pass; else look closer."""
    flat = array.reshape(-1)
    # vdot, because dot looks at the processor's error flags and warns of an overflow.
    if flat.dtype != np.float16 and math.isfinite(np.vdot(flat, flat)):
        return True
    return bool(np.isfinite(flat).all())


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, not {value!r}")
    return value


def _shape(value: Any) -> Shape:
    for size in value:
        if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
            raise TypeError(f"expected sizes or null, not {size!r}")
    return tuple(value)
