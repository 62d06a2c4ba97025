"""What a caller passes and gets (Interface), and how one model file spells it (Binding).

The caller speaks the interface: tensors by name, in one dtype and one layout. A model file has names, layouts and
dtypes of its own; its binding says how each of its tensors is made from the interface's, and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from outrider_runtimes._inputs import (
    Check,
    Finite,
    by_name,
    check_inputs,
    check_named,
    compile_check,
    fits,
    readable_shape,
)
from outrider_runtimes.errors import FormatError, InputError
from outrider_runtimes.nouns import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from outrider_runtimes.processing import Processing

__all__ = [
    "BATCH_AXIS",
    "DTYPES",
    "MALFORMED",
    "MAX_SIGNATURES",
    "PROCESSING_KEYS",
    "Array",
    "Binding",
    "Check",
    "Finite",
    "Interface",
    "Shape",
    "StatePair",
    "TensorBinding",
    "TensorSpec",
    "Tensors",
    "by_name",
    "check_inputs",
    "check_named",
    "compile_check",
]

Array: TypeAlias = "NDArray[Any]"
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
MAX_SIGNATURES = 64  # of one model file
PROCESSING_KEYS = frozenset(["preprocessing", "postprocessing", "network"])
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
            when the tensor has no batch axis and its axes have no names. A letter whose size is None in several
            inputs is one size in all of them.
        range: the finite bounds within which values are expected, or None.
        meaning: for people: unit, colour order, what 1.0 stands for.
        content_type: where the values are the bytes of a file, what kind of file: ``image/jpeg``; such a tensor is
            uint8 [N, T], each row padded with zeros.
    """

    name: str
    dtype: str
    shape: Shape
    axes: str = ""
    range: tuple[float, float] | None = None
    meaning: str = ""
    content_type: str = ""

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
        if self.content_type and (self.dtype, self.axes) != ("uint8", "NT"):
            raise FormatError(f"{where}: {self.content_type} is in uint8 with axes NT, not {self.dtype} {self.axes!r}")
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
        if self.content_type:
            out["content_type"] = self.content_type
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
                content_type=_text(data.get("content_type", "")),
            )
        except MALFORMED as error:
            raise FormatError(f"interface: a tensor is malformed: {error!r}") from None


@dataclass(frozen=True, kw_only=True)
class StatePair:
    """Two tensors of one dtype and shape: what a recurrent model gives as ``output`` is the next call's ``input``."""

    input: str
    output: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON stores it."""
        return {"input": self.input, "output": self.output}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StatePair:
        """The inverse of ``to_dict``. Raises FormatError."""
        try:
            return cls(input=_text(data["input"]), output=_text(data["output"]))
        except MALFORMED as error:
            raise FormatError(f"interface: state is malformed: {error!r}") from None


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What a model takes and gives, whatever file, precision or machine serves it.

    Two bundles with equal ``digest`` may stand in for each other.

    Attributes:
        inputs, outputs: what a caller passes and gets.
        labels: what the classes are called.
        state: pairs of an input and an output; the others are what changes from call to call.
        processing: what is done between the caller's tensors and the network's; None where they are the same. It is
            no part of the digest: a bigger network behind another resize gives the caller the same.
        extra: keys of newer versions; they are kept and count in the digest.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...] = ()
    state: tuple[StatePair, ...] = ()
    processing: Processing | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for side in (self.inputs, self.outputs):
            names = [spec.name for spec in side]
            if not names or len(set(names)) != len(names):
                raise FormatError(f"interface: names must be given and distinct, not {names}")
        _check_state(self)

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of all but the processing, in hex."""
        import hashlib
        import json

        text = json.dumps(self.offered(), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def shared_axes(self) -> tuple[tuple[str, tuple[tuple[int, int], ...]], ...]:
        """Letters of any size, N aside, that stand in several inputs: each with its (input, axis) places."""
        places: dict[str, list[tuple[int, int]]] = {}
        for at, spec in enumerate(self.inputs):
            for axis, letter in enumerate(spec.axes):
                if letter != BATCH_AXIS and spec.shape[axis] is None:
                    places.setdefault(letter, []).append((at, axis))
        return tuple((letter, tuple(found)) for letter, found in places.items() if len(found) > 1)

    @cached_property
    def network(self) -> Interface:
        """What model files are bound to: the tensors inside the processing."""
        if self.processing is None:
            return self
        return replace(self, inputs=self.processing.inputs, outputs=self.processing.outputs, processing=None)

    @property
    def judged(self) -> Interface:
        """What a golden stores: the caller's inputs, and the network's outputs before any postprocessing.

        Suppression and top-k jump where two candidates are level, so that no bound on their values would mean much.
        """
        if self.processing is None:
            return self
        return replace(self, outputs=self.processing.outputs, processing=replace(self.processing, after=()))

    def named(self, classes: Array) -> Array:
        """What classes are called.

        Args:
            classes: numbers of classes, integers of any shape, as ``argmax``, ``top_k`` and ``suppression`` give them;
                -1 is no class.

        Returns:
            str, of the same shape; empty for no class.

        Raises:
            InputError: there is no label of such a number.
        """
        numbers = np.asarray(classes)
        if numbers.dtype.kind not in "iu" or (
            numbers.size and not -1 <= numbers.min() <= numbers.max() < len(self.labels)
        ):
            raise InputError(
                f"{numbers.dtype} {list(numbers.shape)} are not numbers of the {len(self.labels)} labels",
                hint="pass what argmax, top_k or suppression gave" if self.labels else "the bundle has no labels",
            )
        called: Array = np.array([*self.labels, ""])[numbers]
        return called

    def to_dict(self) -> dict[str, Any]:
        """As the manifest stores it."""
        return {**self.offered(), **({} if self.processing is None else self.processing.to_dict())}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Interface:
        """The inverse of ``to_dict``. Raises FormatError, or UnsupportedBundle for a step that is unknown here."""
        known = {"inputs", "outputs", "labels", "state", *PROCESSING_KEYS}
        try:
            interface = cls(
                inputs=tuple(TensorSpec.from_dict(item) for item in data["inputs"]),
                outputs=tuple(TensorSpec.from_dict(item) for item in data["outputs"]),
                labels=tuple(_text(label) for label in data.get("labels", ())),
                state=tuple(StatePair.from_dict(item) for item in data.get("state", ())),
                extra={key: value for key, value in data.items() if key not in known},
            )
            if not PROCESSING_KEYS.intersection(data):
                return interface
            from outrider_runtimes.processing import processing_from_dict  # only where there are steps

            return replace(interface, processing=processing_from_dict(data, interface))
        except MALFORMED as error:
            raise FormatError(f"interface: malformed: {error!r}") from None

    def offered(self) -> dict[str, Any]:
        """What callers see of it, as JSON stores it: all but the processing."""
        out: dict[str, Any] = {
            **self.extra,
            "inputs": [spec.to_dict() for spec in self.inputs],
            "outputs": [spec.to_dict() for spec in self.outputs],
        }
        if self.labels:
            out["labels"] = list(self.labels)
        if self.state:
            out["state"] = [pair.to_dict() for pair in self.state]
        return out


def _check_state(interface: Interface) -> None:
    inputs = {spec.name: spec for spec in interface.inputs}
    outputs = {spec.name: spec for spec in interface.outputs}
    for pair in interface.state:
        for side, name, specs in (("input", pair.input, inputs), ("output", pair.output, outputs)):
            if name not in specs:
                raise FormatError(f"interface: state: there is no {side} {name!r}", hint=f"there are {sorted(specs)}")
        before, after = inputs[pair.input], outputs[pair.output]
        if (before.dtype, before.shape, before.axes) != (after.dtype, after.shape, after.axes):
            raise FormatError(
                f"interface: state {pair.input!r} is {before.dtype} {readable_shape(before)}, "
                f"{pair.output!r} is {after.dtype} {readable_shape(after)}; they must be alike"
            )
    for names in ([pair.input for pair in interface.state], [pair.output for pair in interface.state]):
        if len(set(names)) != len(names):
            raise FormatError(f"interface: state: a tensor is in one pair only, not {names}")


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
                permutation=tuple(map(_whole, data.get("permutation", ()))),
                scale=None if scale is None else float(scale),
                zero_point=_whole(data.get("zero_point", 0)),
            )
        except MALFORMED as error:
            raise FormatError(f"binding: malformed: {error!r}") from None


@dataclass(frozen=True, kw_only=True)
class Binding:
    """One variant's tensors, in the interface's order.

    Attributes:
        inputs, outputs: tensor by tensor.
        signatures: the shapes that the file was made for, where it was made for some only: by input of the interface,
            the file's shape. Its tensors' shapes are None where the signatures differ. Empty for any other file.
    """

    inputs: tuple[TensorBinding, ...]
    outputs: tuple[TensorBinding, ...]
    signatures: tuple[Mapping[str, tuple[int, ...]], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As the manifest stores it; what is empty is left out."""
        out: dict[str, Any] = {
            "inputs": [b.to_dict() for b in self.inputs],
            "outputs": [b.to_dict() for b in self.outputs],
        }
        if self.signatures:
            out["signatures"] = [{name: list(shape) for name, shape in item.items()} for item in self.signatures]
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], interface: Interface) -> Binding:
        """The inverse of ``to_dict``, checked against the interface it binds. Raises FormatError."""
        try:
            binding = cls(
                inputs=tuple(TensorBinding.from_dict(item) for item in data["inputs"]),
                outputs=tuple(TensorBinding.from_dict(item) for item in data["outputs"]),
                signatures=tuple(
                    {_text(name): _sizes(shape) for name, shape in item.items()} for item in data.get("signatures", ())
                ),
            )
        except MALFORMED as error:
            raise FormatError(f"binding: malformed: {error!r}") from None
        for specs, bound in ((interface.inputs, binding.inputs), (interface.outputs, binding.outputs)):
            _match(specs, bound)
        _check_signatures(binding)
        return binding


def _match(specs: tuple[TensorSpec, ...], bound: tuple[TensorBinding, ...]) -> None:
    if [spec.name for spec in specs] != [item.name for item in bound]:
        raise FormatError(f"binding: names {[b.name for b in bound]} are not the interface's {[s.name for s in specs]}")
    for spec, item in zip(specs, bound, strict=True):
        if len(spec.shape) != len(item.shape):
            raise FormatError(f"binding of {spec.name!r}: {len(item.shape)} axes, the interface has {len(spec.shape)}")


def _check_signatures(binding: Binding) -> None:
    if len(binding.signatures) > MAX_SIGNATURES:
        raise FormatError(f"binding: {len(binding.signatures)} signatures, at most {MAX_SIGNATURES} are allowed")
    for position, item in enumerate(binding.signatures):
        where = f"binding: signatures[{position}]"
        if set(item) != {bound.name for bound in binding.inputs}:
            raise FormatError(f"{where}: names {sorted(item)}, the inputs are {[b.name for b in binding.inputs]}")
        for bound in binding.inputs:
            if not fits(item[bound.name], bound.shape):
                raise FormatError(f"{where}: {bound.name!r} has {list(item[bound.name])}, the file {list(bound.shape)}")
        if item in binding.signatures[:position]:
            raise FormatError(f"{where}: stands there twice")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, not {value!r}")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"expected a whole number, not {value!r:.40}")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    if any(type(size) is not int or not 0 <= size < 2**31 for size in value):
        raise ValueError(f"{value!r:.80} is not made of sizes")
    return tuple(value)


def _shape(value: Any) -> Shape:
    for size in value:
        if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
            raise TypeError(f"expected sizes or null, not {size!r}")
    return tuple(value)
