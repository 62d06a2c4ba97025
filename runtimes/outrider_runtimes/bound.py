"""A loaded model file behind its interface: conversion in, the engine's run, conversion out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from outrider_runtimes.engines import Session
from outrider_runtimes.errors import InferenceError, ModelLoadError, ShapeError
from outrider_runtimes.nouns import filled
from outrider_runtimes.quantized import dequantizer, quantizer
from outrider_runtimes.runner import Answer, Timing
from outrider_runtimes.tensors import (
    Array,
    Binding,
    Finite,
    Interface,
    TensorBinding,
    Tensors,
    TensorSpec,
    compile_check,
)

if TYPE_CHECKING:
    from outrider_runtimes.processing import Processing

Convert = Callable[[Array], Array]
CHANNEL_LAST = (0, 2, 3, 1)  # of an image whose channels come first
FEW_CHANNELS = 4  # with more, copying channel by channel is no faster than numpy's own way


class BoundSession:
    """One session behind its interface, safe from several threads; calls run one after the other.

    A file whose batch size is fixed is run as often as the caller's N asks for, so that N is free at the interface
    whatever the file allows.
    """

    def __init__(self, session: Session, interface: Interface, binding: Binding, *, finite: Finite = "reject") -> None:
        """Bind.

        Args:
            finite: what becomes of inputs that are not finite; see ``tensors.check_inputs``.

        Raises:
            ModelLoadError: the binding names a tensor that the file does not have.
        """
        self.interface = interface
        self._finite: Finite = finite
        self._check = compile_check(interface, finite=finite)
        network = interface.network
        self._processing = interface.processing
        self._session = session
        self._lock = threading.Lock()
        self._encode = _unless_plain(
            [input_converter(s, b) for s, b in zip(network.inputs, binding.inputs, strict=True)]
        )
        self._decode = _unless_plain(
            [output_converter(s, b) for s, b in zip(network.outputs, binding.outputs, strict=True)]
        )
        self._names = tuple(spec.name for spec in network.outputs)
        self._in_order = _positions("input", session.input_names, binding.inputs)
        self._out_order = _positions("output", session.output_names, binding.outputs)
        every_output = list(range(len(session.output_names)))
        in_file_order = self._in_order == sorted(self._in_order) and self._out_order == every_output
        self._batch_in = [_batch_axis(s, b) for s, b in zip(network.inputs, binding.inputs, strict=True)]
        self._batch_out = [_batch_axis(s, b) for s, b in zip(network.outputs, binding.outputs, strict=True)]
        self._fixed_rows = _fixed_rows(binding, self._batch_in)
        self._signatures = _Signatures(network, binding, self._batch_in) if binding.signatures else None
        plain = interface.processing is None
        self._plain_in = plain and self._encode is None and self._signatures is None
        self._plain_out = plain and self._decode is None
        self._run: Callable[[list[Array]], Sequence[Array]] = session.run if in_file_order else self._run_arranged

    def run(self, inputs: Tensors) -> Answer:
        """Check, convert, run, convert back.

        Args:
            inputs: every input of the interface by name.

        Raises:
            InputError: an input is not what the interface says; nothing was run.
            InferenceError: the engine failed.
        """
        start = perf_counter_ns()
        return self._answer(self._check(inputs), start)

    def check(self, inputs: Tensors) -> list[Array]:
        """The first half of ``run``: the inputs in the interface's order, for ``execute``; nothing is run or locked.

        They may share memory with what was passed. Raises InputError.
        """
        return self._check(inputs)

    def execute(self, arrays: list[Array], *, check_ms: float = 0.0) -> Answer:
        """The second half of ``run``: preprocessing, convert, run, convert back, postprocessing.

        Args:
            arrays: what ``check`` returned.
            check_ms: how long that took; it counts in the answer's timing.

        Raises:
            InputError: preprocessing cannot work on these values, or the file was made for other sizes of an axis that
                the interface leaves free; nothing was run.
            InferenceError: the engine or the postprocessing failed.
        """
        return self._answer(arrays, perf_counter_ns() - int(check_ms * 1e6))

    def _answer(self, arrays: list[Array], start: int) -> Answer:
        """``start``: when the check was begun, in nanoseconds."""
        encoded = arrays if self._plain_in else self._encoded(arrays)
        waiting = perf_counter_ns()
        with self._lock:
            begun = perf_counter_ns()
            raw = self._run(encoded) if self._fixed_rows is None else self._run_rows(encoded, self._fixed_rows)
        ran = perf_counter_ns()
        outputs = dict(zip(self._names, raw)) if self._plain_out else self._decoded(raw, arrays)  # noqa: B905
        done = perf_counter_ns()
        timing = filled(Timing, (
            (begun - waiting) * 1e-6, (waiting - start) * 1e-6, (ran - begun) * 1e-6, (done - ran) * 1e-6,
            0.0, (done - start) * 1e-6,
        ))  # fmt: skip
        return filled(Answer, (outputs, timing, None))

    def close(self) -> None:
        """Free the session. A call that is running ends first."""
        with self._lock:
            self._session.close()

    def _encoded(self, arrays: list[Array]) -> list[Array]:
        """The file's inputs from the caller's."""
        prepared = arrays if self._processing is None else self._prepared(self._processing, arrays)
        if self._signatures is not None:
            self._signatures.check(prepared)
        return prepared if self._encode is None else _converted(self._encode, prepared)

    def _decoded(self, raw: Sequence[Array], arrays: list[Array]) -> dict[str, Array]:
        """The caller's outputs from the file's."""
        outputs = dict(zip(self._names, raw if self._decode is None else _converted(self._decode, raw)))  # noqa: B905
        if self._processing is None:
            return outputs
        return self._processing.finish(outputs, self._by_name(arrays))

    def _prepared(self, processing: Processing, arrays: list[Array]) -> list[Array]:
        """The network's inputs, in its order, from the caller's."""
        return list(processing.prepare(self.interface, self._by_name(arrays), finite=self._finite).values())

    def _by_name(self, arrays: list[Array]) -> dict[str, Array]:
        return {spec.name: array for spec, array in zip(self.interface.inputs, arrays, strict=True)}

    def _run_rows(self, encoded: list[Array], fixed: _FixedRows) -> Sequence[Array]:
        """The file's outputs in the interface's order, for as many rows as ``encoded`` has."""
        rows = encoded[fixed.at].shape[fixed.axis]
        if rows == fixed.rows:
            return self._run(encoded)
        if rows == 0:
            return self._run_empty(encoded, fixed.rows)
        if rows % fixed.rows:
            raise InferenceError(f"N = {rows} is not a multiple of the file's fixed batch of {fixed.rows}")
        parts = [self._run(self._slice(encoded, at, fixed.rows)) for at in range(0, rows, fixed.rows)]
        return [
            parts[-1][position] if axis is None else np.concatenate([part[position] for part in parts], axis)
            for position, axis in enumerate(self._batch_out)
        ]

    def _run_arranged(self, encoded: list[Array]) -> Sequence[Array]:
        """Run a file whose tensors are in another order than the interface's."""
        arranged = list(encoded)
        for position, array in zip(self._in_order, encoded, strict=True):
            arranged[position] = array
        raw = self._session.run(arranged)
        return [raw[position] for position in self._out_order]

    def _slice(self, encoded: list[Array], at: int, rows: int) -> list[Array]:
        return [
            a if axis is None else np.ascontiguousarray(_rows_of(a, axis, slice(at, at + rows)))
            for a, axis in zip(encoded, self._batch_in, strict=True)
        ]

    def _run_empty(self, encoded: list[Array], fixed: int) -> list[Array]:
        """N = 0: the shapes of a run on zeros, with no rows."""
        zeros = [
            a if axis is None else np.zeros((*a.shape[:axis], fixed, *a.shape[axis + 1 :]), a.dtype)
            for a, axis in zip(encoded, self._batch_in, strict=True)
        ]
        outputs = self._run(zeros)
        return [
            a if axis is None else _rows_of(a, axis, slice(0, 0))
            for a, axis in zip(outputs, self._batch_out, strict=True)
        ]


def _positions(side: str, names: Sequence[str], bound: Sequence[TensorBinding]) -> list[int]:
    for item in bound:
        if item.file_name not in names:
            raise ModelLoadError(f"{side} {item.name!r} is bound to {item.file_name!r}; the file has {list(names)}")
    if side == "input" and len(bound) != len(names):
        raise ModelLoadError(f"{len(bound)} inputs are bound; the file has {list(names)}")
    return [names.index(item.file_name) for item in bound]


def _batch_axis(spec: TensorSpec, binding: TensorBinding) -> int | None:
    """Which axis of the file's tensor is the batch; None when it has none."""
    if not spec.batched:
        return None
    return binding.permutation.index(0) if binding.permutation else 0


class _FixedRows(NamedTuple):
    """How many rows a file takes at once, and where a call's N is seen: in input ``at``, along ``axis``."""

    rows: int
    at: int
    axis: int


def _fixed_rows(binding: Binding, batch_axes: Sequence[int | None]) -> _FixedRows | None:
    for at, (item, axis) in enumerate(zip(binding.inputs, batch_axes, strict=True)):
        if axis is not None and (rows := item.shape[axis]) is not None:
            return _FixedRows(rows=rows, at=at, axis=axis)
    return None


class _Signatures:
    """The shapes that a file was made for, and the refusal of any other."""

    def __init__(self, network: Interface, binding: Binding, batch_axes: Sequence[int | None]) -> None:
        self._specs = network.inputs
        self._shapes = [
            tuple(
                _callers_shape(item[bound.name], bound, batch_axis)
                for bound, batch_axis in zip(binding.inputs, batch_axes, strict=True)
            )
            for item in binding.signatures
        ]
        self._known = frozenset(self._shapes)

    def check(self, arrays: Sequence[Array]) -> None:
        """Raises ShapeError that names the sizes there are. N may be any."""
        given = tuple(a.shape[1:] if s.batched else a.shape for a, s in zip(arrays, self._specs, strict=True))
        if given in self._known:
            return
        differing = [at for at, shape in enumerate(given) if any(shape != known[at] for known in self._shapes)]
        at = next((at for at in differing if all(given[at] != known[at] for known in self._shapes)), differing[0])
        raise ShapeError(
            f"this variant was made for some sizes only, and {self._readable(differing, given)} is none of them",
            tensor=self._specs[at].name,
            hint=f"it takes {'; '.join(self._readable(differing, shapes) for shapes in self._shapes)}; "
            "an ONNX variant, where the bundle has one, takes any",
        )

    def _readable(self, differing: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> str:
        parts = []
        for at in differing:
            sizes = [*(["N"] if self._specs[at].batched else []), *map(str, shapes[at])]
            parts.append(f"{self._specs[at].name!r} [{', '.join(sizes)}]")
        return " with ".join(parts)


def _callers_shape(shape: tuple[int, ...], bound: TensorBinding, batch_axis: int | None) -> tuple[int, ...]:
    """A file's shape in the interface's order of axes, without N."""
    ordered = shape
    if bound.permutation:
        ordered = tuple(shape[bound.permutation.index(axis)] for axis in range(len(shape)))
    return ordered if batch_axis is None else ordered[1:]


def _rows_of(array: Array, axis: int, rows: slice) -> Array:
    return array[(slice(None),) * axis + (rows,)]


def input_converter(spec: TensorSpec, binding: TensorBinding) -> Convert:
    """The function from the interface's array to the file's; the identity where they are the same."""
    steps: list[Convert] = []
    if binding.scale is not None:
        steps.append(quantizer(binding.scale, binding.zero_point, binding.dtype))
    elif binding.dtype != spec.dtype:
        steps.append(_caster(spec, binding))
    if binding.permutation and binding.permutation != tuple(range(len(binding.permutation))):
        steps.append(_turner(binding.permutation))
    return _chain(steps)


def _turner(permutation: tuple[int, ...]) -> Convert:
    """The function that moves axes. Of an image it copies channel by channel: a quarter of the time of numpy's way."""

    def turn(x: Array) -> Array:
        if permutation != CHANNEL_LAST or x.shape[1] > FEW_CHANNELS:
            return np.ascontiguousarray(x.transpose(permutation))
        turned = np.empty((x.shape[0], *x.shape[2:], x.shape[1]), x.dtype)
        for channel in range(x.shape[1]):
            turned[..., channel] = x[:, channel]
        return turned

    return turn


def output_converter(spec: TensorSpec, binding: TensorBinding) -> Convert:
    """The function from the file's array to the interface's; the identity where they are the same."""
    steps: list[Convert] = []
    if binding.scale is not None:
        steps.append(dequantizer(binding.scale, binding.zero_point, spec.dtype))
    elif binding.dtype != spec.dtype:
        steps.append(lambda y: y.astype(spec.dtype))
    if binding.permutation and binding.permutation != tuple(range(len(binding.permutation))):
        inverse = tuple(int(axis) for axis in np.argsort(binding.permutation))
        steps.append(lambda y: np.ascontiguousarray(y.transpose(inverse)))
    return _chain(steps)


def _chain(steps: list[Convert]) -> Convert:
    if not steps:
        return _identity
    if len(steps) == 1:
        return steps[0]

    def apply(x: Array) -> Array:
        for step in steps:
            x = step(x)
        return x

    return apply


def _identity(x: Array) -> Array:
    return x


def _unless_plain(converters: list[Convert]) -> list[Convert] | None:
    """None where no tensor is converted: then a call need not look at them one by one."""
    return None if all(convert is _identity for convert in converters) else converters


def _converted(converters: list[Convert], arrays: Sequence[Array]) -> list[Array]:
    return [convert(array) for convert, array in zip(converters, arrays, strict=True)]


def _caster(spec: TensorSpec, binding: TensorBinding) -> Convert:
    """To the file's dtype; integers that do not fit are refused, not wrapped."""
    target = np.dtype(binding.dtype)
    if np.can_cast(np.dtype(spec.dtype), target) or target.kind not in "iu":
        return lambda x: x.astype(target)
    limits = np.iinfo(target)

    def cast(x: Array) -> Array:
        if x.size and (x.min() < limits.min or x.max() > limits.max):
            raise InferenceError(
                f"input {spec.name!r} has values beyond {target}, which this variant's file takes",
                hint=f"values from {limits.min} to {limits.max}, or another variant",
            )
        return x.astype(target)

    return cast
