"""A recurrent model call by call: the state that one call gave goes into the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from outrider.prediction import Prediction
from outrider_runtimes.errors import ConfigError, ShapeError, UnknownTensor
from outrider_runtimes.tensors import Array, Interface, Tensors, TensorSpec


class Answers(Protocol):
    """What a Stream is over: a Model, a Hybrid, or whatever else has an interface and answers at it."""

    @property
    def interface(self) -> Interface:
        """What it takes and gives."""
        ...

    def infer(self, inputs: Tensors | Array, *, deadline_ms: float | None = None, private: bool = False) -> Prediction:
        """Answer one request."""
        ...


class Stream:
    """One sequence: it holds the state of a recurrent model between calls. Not for several threads at once.

    Many streams may share one model; each has its own state. Over a Hybrid both sides must be the same network, in
    whatever precision: the state of another network of the same shape means nothing to this one.
    """

    def __init__(self, model: Answers, *, initial: Tensors | None = None) -> None:
        """Begin with zeros, or with ``initial``.

        Args:
            initial: arrays for inputs of the state by name; the others begin as zeros. They are copied, and checked
                with the first call.

        Raises:
            ConfigError: the model has no state, or one with a size that is free and not given.
            UnknownTensor: ``initial`` names what is no state.
        """
        self._model = model
        self._pairs = {pair.input: pair.output for pair in model.interface.state}
        if not self._pairs:
            raise ConfigError("the model has no state to hold", hint="infer() is all that it needs")
        self._initial = {name: np.array(array) for name, array in (initial or {}).items()}
        for name in self._initial:
            if name not in self._pairs:
                raise UnknownTensor(f"{name!r} is no state", tensor=name, hint=f"the state is {sorted(self._pairs)}")
        self._held = [spec for spec in model.interface.inputs if spec.name in self._pairs]
        self._passed = [spec for spec in model.interface.inputs if spec.name not in self._pairs]
        for spec in self._held:
            if spec.name not in self._initial and None in spec.shape[spec.batched :]:
                raise ConfigError(f"the state {spec.name!r} has no size of its own", hint="pass initial= with an array")
        self._state: dict[str, Array] | None = None
        self._private = False

    @property
    def state(self) -> dict[str, Array]:
        """A copy of what goes into the next call, which ``initial`` takes back; before the first, what was given."""
        return {name: array.copy() for name, array in (self._initial if self._state is None else self._state).items()}

    def infer(self, inputs: Tensors | Array, *, deadline_ms: float | None = None, private: bool = False) -> Prediction:
        """Answer the next call of the sequence.

        Args:
            inputs: every input but the state's by name; where there is one, its array alone will do.
            deadline_ms: see ``Model.infer``.
            private: see ``Hybrid.infer``. The state tells of such a call: what follows is private too, up to ``reset``.

        Returns:
            A Prediction without the outputs of the state.

        Raises:
            InputError: an input is not what the interface says, or N is another than in the calls before.
            OutriderError: see ``Model.infer``. After any error the state is what it was before the call.
        """
        passed, stays = self._passed_with_state(inputs), bool(private) or self._private
        if stays:
            prediction = self._model.infer(passed, deadline_ms=deadline_ms, private=True)
        else:
            prediction = self._model.infer(passed, deadline_ms=deadline_ms)
        outputs = dict(prediction.outputs)
        self._state = {name: outputs.pop(output) for name, output in self._pairs.items()}
        self._private = stays
        return prediction._replace(outputs=outputs)

    def reset(self) -> None:
        """Begin anew: the next call starts from the initial state, and may have another N."""
        self._state = None
        self._private = False

    def _passed_with_state(self, inputs: Tensors | Array) -> Tensors:
        """What goes to the model. A call that it never sees failed all the same, and those who watch it are told."""
        try:
            named = self._by_name(inputs)
            return {**named, **self._next_state(named)}
        except Exception as error:
            tell = getattr(self._model, "tell_failure", None)
            if tell is not None:
                tell(error, inputs)
            raise

    def _by_name(self, inputs: Tensors | Array) -> Tensors:
        names = [spec.name for spec in self._passed]
        if not isinstance(inputs, Mapping):
            if len(names) != 1:
                raise UnknownTensor(
                    f"there are {len(names)} inputs beside the state", hint=f"pass a mapping with {names}"
                )
            return {names[0]: inputs}
        for name in inputs:
            if name in self._pairs:
                raise UnknownTensor(
                    f"input {name!r} is state, which the stream holds", tensor=name, hint="stream(initial=...) sets it"
                )
        return inputs

    def _next_state(self, inputs: Tensors) -> dict[str, Array]:
        """For as many rows as the inputs have. Raises ShapeError where the held state has another number of them."""
        arrays = [inputs.get(spec.name) for spec in self._passed if spec.batched]
        rows = next((len(a) for a in arrays if isinstance(a, np.ndarray) and a.ndim), 1)
        if self._state is None:
            return {s.name: self._initial.get(s.name, _zeros(s, rows)) for s in self._held}
        held = next((len(self._state[spec.name]) for spec in self._held if spec.batched), rows)
        if arrays and held != rows:
            raise ShapeError(
                f"the inputs have N = {rows}, the stream holds the state of {held}", hint="reset() begins anew"
            )
        return self._state


def _zeros(spec: TensorSpec, rows: int) -> Array:
    sizes = (rows, *spec.shape[1:]) if spec.batched else spec.shape
    return np.zeros([size or 0 for size in sizes], spec.dtype)
