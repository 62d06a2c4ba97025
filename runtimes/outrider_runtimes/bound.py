"""A loaded model file behind its interface: conversion in, the engine's run, conversion out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from outrider_runtimes.engines import Session
from outrider_runtimes.errors import InferenceError, ModelLoadError
from outrider_runtimes.runner import Answer, Timing
from outrider_runtimes.tensors import (
    Array,
    Binding,
    Interface,
    TensorBinding,
    Tensors,
    TensorSpec,
    check_inputs,
)

Convert = Callable[[Array], Array]


class BoundSession:
    """One session behind its interface, safe from several threads; calls run one after the other.

    A file whose batch size is fixed is run as often as the caller's N asks for, so that N is free at the interface
    whatever the file allows.
    """

    def __init__(self, session: Session, interface: Interface, binding: Binding) -> None:
        """Bind. Raises ModelLoadError when the binding names a tensor that the file does not have."""
        self.interface = interface
        self._session = session
        self._lock = threading.Lock()
        self._encode = _unless_plain(
            [input_converter(s, b) for s, b in zip(interface.inputs, binding.inputs, strict=True)]
        )
        self._decode = _unless_plain(
            [output_converter(s, b) for s, b in zip(interface.outputs, binding.outputs, strict=True)]
        )
        self._names = tuple(spec.name for spec in interface.outputs)
        self._in_order = _positions("input", session.input_names, binding.inputs)
        self._out_order = _positions("output", session.output_names, binding.outputs)
        every_output = list(range(len(session.output_names)))
        self._in_file_order = self._in_order == sorted(self._in_order) and self._out_order == every_output
        self._batch_in = [_batch_axis(s, b) for s, b in zip(interface.inputs, binding.inputs, strict=True)]
        self._batch_out = [_batch_axis(s, b) for s, b in zip(interface.outputs, binding.outputs, strict=True)]
        self._fixed_rows = _fixed_rows(binding, self._batch_in)

    def run(self, inputs: Tensors) -> Answer:
        """Check, convert, run, convert back.

        Args:
            inputs: every input of the interface by name.

        Raises:
            InputError: an input is not what the interface says; nothing was run.
            InferenceError: the engine failed.
        """
        start = time.perf_counter_ns()
        arrays = self.check(inputs)
        return self.execute(arrays, check_ms=(time.perf_counter_ns() - start) / 1e6)

    def check(self, inputs: Tensors) -> list[Array]:
        """The first half of ``run``: the inputs in the interface's order, for ``execute``; nothing is run or locked.

        They may share memory with what was passed. Raises InputError.
        """
        return check_inputs(self.interface, inputs)

    def execute(self, arrays: list[Array], *, check_ms: float = 0.0) -> Answer:
        """The second half of ``run``: convert, run, convert back.

        Args:
            arrays: what ``check`` returned.
            check_ms: how long that took; it counts in the answer's timing.

        Raises:
            InferenceError: the engine failed.
        """
        start = time.perf_counter_ns()
        encoded = arrays if self._encode is None else _converted(self._encode, arrays)
        waiting = time.perf_counter_ns()
        with self._lock:
            begun = time.perf_counter_ns()
            raw = self._run_rows(encoded)
        ran = time.perf_counter_ns()
        outputs = dict(zip(self._names, raw if self._decode is None else _converted(self._decode, raw)))  # noqa: B905
        done = time.perf_counter_ns()
        timing = Timing(
            queue=(begun - waiting) / 1e6,
            pre=check_ms + (waiting - start) / 1e6,
            infer=(ran - begun) / 1e6,
            post=(done - ran) / 1e6,
            total=check_ms + (done - start) / 1e6,
        )
        return Answer(outputs=outputs, timing_ms=timing)

    def close(self) -> None:
        """Free the session. A call that is running ends first."""
        with self._lock:
            self._session.close()

    def _run_rows(self, encoded: list[Array]) -> Sequence[Array]:
        """The file's outputs in the interface's order, for as many rows as ``encoded`` has."""
        fixed = self._fixed_rows
        if fixed is None:
            return self._run_once(encoded)
        rows = self._rows(encoded)
        if rows is None or rows == fixed:
            return self._run_once(encoded)
        if rows == 0:
            return self._run_empty(encoded, fixed)
        if rows % fixed:
            raise InferenceError(f"N = {rows} is not a multiple of the file's fixed batch of {fixed}")
        parts = [self._run_once(self._slice(encoded, at, fixed)) for at in range(0, rows, fixed)]
        return [
            parts[-1][position] if axis is None else np.concatenate([part[position] for part in parts], axis)
            for position, axis in enumerate(self._batch_out)
        ]

    def _run_once(self, encoded: list[Array]) -> Sequence[Array]:
        if self._in_file_order:
            return self._session.run(encoded)
        arranged = list(encoded)
        for position, array in zip(self._in_order, encoded, strict=True):
            arranged[position] = array
        raw = self._session.run(arranged)
        return [raw[position] for position in self._out_order]

    def _rows(self, encoded: list[Array]) -> int | None:
        for array, axis in zip(encoded, self._batch_in, strict=True):
            if axis is not None:
                return int(array.shape[axis])
        return None

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
        outputs = self._run_once(zeros)
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


def _fixed_rows(binding: Binding, batch_axes: Sequence[int | None]) -> int | None:
    sizes = [item.shape[axis] for item, axis in zip(binding.inputs, batch_axes, strict=True) if axis is not None]
    return next((size for size in sizes if size is not None), None)


def _rows_of(array: Array, axis: int, rows: slice) -> Array:
    return array[(slice(None),) * axis + (rows,)]


def input_converter(spec: TensorSpec, binding: TensorBinding) -> Convert:
    """The function from the interface's array to the file's; the identity where they are the same."""
    steps: list[Convert] = []
    if binding.scale is not None:
        steps.append(_quantizer(binding))
    elif binding.dtype != spec.dtype:
        steps.append(_caster(spec, binding))
    if binding.permutation and binding.permutation != tuple(range(len(binding.permutation))):
        steps.append(lambda x: np.ascontiguousarray(x.transpose(binding.permutation)))
    return _chain(steps)


def output_converter(spec: TensorSpec, binding: TensorBinding) -> Convert:
    """The function from the file's array to the interface's; the identity where they are the same."""
    steps: list[Convert] = []
    if binding.scale is not None:
        scale, zero_point = np.float32(binding.scale), np.int32(binding.zero_point)
        steps.append(lambda y: ((y.astype(np.int32) - zero_point) * scale).astype(spec.dtype, copy=False))
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


def _quantizer(binding: TensorBinding) -> Convert:
    """Round half to even, clip, cast: a cast out of range is undefined, so the clip comes first."""
    limits = np.iinfo(binding.dtype)
    work = np.float32 if limits.bits <= 16 else np.float64  # what holds every value of the file's dtype exactly
    inverse, zero_point = work(1.0 / (binding.scale or 1.0)), work(binding.zero_point)

    def quantize(x: Array) -> Array:
        with np.errstate(over="ignore"):  # infinity is clipped like any large value
            scaled = np.multiply(x, inverse, dtype=work)
        np.rint(scaled, out=scaled)
        scaled += zero_point
        return np.clip(scaled, limits.min, limits.max, out=scaled).astype(binding.dtype)

    return quantize


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
