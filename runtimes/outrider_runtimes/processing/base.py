"""What a step is, and a chain of them around a network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

from outrider_runtimes.errors import FormatError, InferenceError, InputError
from outrider_runtimes.tensors import Array, Finite, Interface, Shape, Tensors, TensorSpec, check_named

MAX_DECODED_PIXELS = 2**27  # of all images of a call: 400 MB with three channels

Specs = Mapping[str, TensorSpec]
Shapes = Mapping[str, tuple[int, ...]]  # of the caller's inputs, by name; of an encoded image, the image's
CallerShapes = Mapping[str, Shape]  # the same as far as an interface fixes them


class Step(Protocol):
    """One operation on named tensors: a frozen dataclass, so that it can be stored, compared and shown.

    Every tensor keeps its batch axis N; a step works on each row alone.
    """

    kind: ClassVar[str]

    def specs(self, specs: Specs, callers: CallerShapes) -> dict[str, TensorSpec]:
        """What comes out where ``specs`` go in, by name and in order; tensors that it does not touch stay.

        Args:
            specs: by name, in order.
            callers: the shapes of the caller's inputs, None where any size is allowed.

        Raises:
            FormatError: a tensor is missing, or is not what the step works on.
        """
        ...

    def apply(self, tensors: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """The same with values. It never writes into what it was given.

        Args:
            tensors: by name; of the dtypes and shapes that ``specs`` allowed.
            shapes: of the caller's inputs, for a step that undoes what another did to an image.

        Raises:
            InputError: values that the step cannot work on.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """As the manifest stores it: ``{"step": kind, ...}``."""
        ...


@runtime_checkable
class Decoder(Step, Protocol):
    """A step that takes a caller's files apart: what a later step undoes was done to what is in them."""

    tensor: str

    def image_shape(self, shape: Shape) -> Shape:
        """What is in the file, from the shape of its bytes, as far as it is known before a call."""
        ...

    def sizes(self, rows: Array) -> tuple[int, ...]:
        """The shape of what is in the files of a call. Raises InputError."""
        ...


@dataclass(frozen=True, kw_only=True)
class Processing:
    """What is done to the caller's inputs before the network, and to its outputs after it.

    Attributes:
        before, after: steps in their order.
        inputs, outputs: the network's tensors, between the two.
    """

    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def prepare(self, interface: Interface, inputs: Tensors, *, finite: Finite = "reject") -> dict[str, Array]:
        """The network's inputs, by name, from the caller's, which were checked.

        Args:
            finite: what becomes of values that the steps made and that are not finite; see ``tensors.check_inputs``.

        Raises:
            InputError: a step cannot work on these values, the files of the call hold more than is decoded at once, or
                what was made is not what the network takes.
        """
        if not self.before:
            return dict(inputs)
        shapes = self.shapes_of(inputs)
        for step in self._decoders:
            _check_decoded(step.tensor, shapes[step.tensor])
        tensors = run_steps(self.before, inputs, shapes)
        try:
            return check_named(interface.network, tensors, finite=finite)
        except InputError as error:
            raise InputError(f"after preprocessing: {error}", tensor=error.tensor) from None

    def finish(self, outputs: Tensors, inputs: Tensors) -> dict[str, Array]:
        """The caller's outputs, by name, from the network's and the caller's inputs. Raises InferenceError."""
        if not self.after:
            return dict(outputs)
        try:
            return run_steps(self.after, outputs, self.shapes_of(inputs))
        except InputError as error:
            raise InferenceError(f"postprocessing: {error}", hint=error.hint) from None

    def shapes_of(self, inputs: Tensors) -> Shapes:
        """The shapes of the caller's inputs, by name; of an encoded image, the image's. Raises InputError."""
        shapes = shapes_of(inputs)
        for step in self._decoders:
            shapes[step.tensor] = step.sizes(inputs[step.tensor])
        return shapes

    @cached_property
    def _decoders(self) -> tuple[Decoder, ...]:
        return tuple(step for step in self.before if isinstance(step, Decoder))

    def to_dict(self) -> dict[str, Any]:
        """As the manifest stores it, among the keys of ``interface``."""
        return {
            "preprocessing": [step.to_dict() for step in self.before],
            "postprocessing": [step.to_dict() for step in self.after],
            "network": {
                "inputs": [spec.to_dict() for spec in self.inputs],
                "outputs": [spec.to_dict() for spec in self.outputs],
            },
        }


def around(
    network: Interface,
    inputs: Sequence[TensorSpec],
    before: Sequence[Step],
    after: Sequence[Step],
) -> Interface:
    """The interface of a network with steps around it.

    Args:
        network: what the network itself takes and gives.
        inputs: what the caller passes.

    Raises:
        FormatError: the steps do not lead from ``inputs`` to the network's, or cannot work on its outputs.
    """
    if not before and not after:
        return network
    callers = callers_of(before, inputs)
    made = infer_specs(before, inputs, callers)
    _compare("preprocessing gives", made, network.inputs)
    processing = Processing(before=tuple(before), after=tuple(after), inputs=network.inputs, outputs=network.outputs)
    outputs = infer_specs(after, network.outputs, callers)
    return dataclasses.replace(network, inputs=tuple(inputs), outputs=tuple(outputs), processing=processing)


def check_processing(interface: Interface, processing: Processing) -> None:
    """Whether the steps lead from the interface's inputs to the network's, and from its outputs to the interface's.

    Ranges and meanings are for people and are not compared.

    Raises:
        FormatError: they do not.
    """
    callers = callers_of(processing.before, interface.inputs)
    _compare("preprocessing gives", infer_specs(processing.before, interface.inputs, callers), processing.inputs)
    _compare("postprocessing gives", infer_specs(processing.after, processing.outputs, callers), interface.outputs)


def callers_of(before: Iterable[Step], inputs: Iterable[TensorSpec]) -> CallerShapes:
    """The shapes of the caller's inputs as steps see them: of an encoded image, the image's."""
    shapes = {spec.name: spec.shape for spec in inputs}
    for step in before:
        if isinstance(step, Decoder) and step.tensor in shapes:
            shapes[step.tensor] = step.image_shape(shapes[step.tensor])
    return shapes


def infer_specs(steps: Iterable[Step], specs: Iterable[TensorSpec], callers: CallerShapes) -> list[TensorSpec]:
    """What comes out of a chain of steps. Raises FormatError that names the step by its place."""
    current: dict[str, TensorSpec] = {spec.name: spec for spec in specs}
    for position, step in enumerate(steps):
        try:
            current = step.specs(current, callers)
        except FormatError as error:
            raise FormatError(f"step {position} ({step.kind}): {error}", hint=error.hint) from None
    return list(current.values())


def run_steps(steps: Iterable[Step], tensors: Tensors, shapes: Shapes) -> dict[str, Array]:
    """The values after a chain of steps.

    Raises:
        InputError: names the step by its place.
    """
    current = dict(tensors)
    for position, step in enumerate(steps):
        try:
            current = step.apply(current, shapes)
        except InputError as error:
            raise InputError(f"step {position} ({step.kind}): {error}", tensor=error.tensor, hint=error.hint) from None
    return current


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """The shapes by name."""
    return {name: array.shape for name, array in tensors.items()}


def _check_decoded(name: str, shape: tuple[int, ...]) -> None:
    """The heads of files say what is in them; a few kB may be an image of 50 MB."""
    pixels = math.prod(shape[:-1])
    if pixels > MAX_DECODED_PIXELS:
        raise InputError(
            f"{name!r}: {shape[0]} images of {shape[1]} x {shape[2]} pixels, at most {MAX_DECODED_PIXELS} pixels are "
            "decoded in a call",
            tensor=name,
            hint="fewer images in a call",
        )


def _compare(what: str, given: Sequence[TensorSpec], wanted: Sequence[TensorSpec]) -> None:
    if [spec.name for spec in given] != [spec.name for spec in wanted]:
        raise FormatError(f"{what} {[spec.name for spec in given]}, expected {[spec.name for spec in wanted]}")
    for one, other in zip(given, wanted, strict=True):
        for key in ("dtype", "shape", "axes", "content_type"):
            mine, theirs = getattr(one, key), getattr(other, key)
            if mine != theirs:
                raise FormatError(f"{what} {one.name!r} with {key} {_shown(mine)}, expected {_shown(theirs)}")


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else repr(value)


def spec_named(specs: Specs, name: str) -> TensorSpec:
    """The tensor of that name. Raises FormatError that lists the names there are."""
    if name not in specs:
        raise FormatError(f"there is no tensor {name!r}", hint=f"at this step there are {sorted(specs)}")
    return specs[name]
