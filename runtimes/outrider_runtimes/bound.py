"""A loaded model file behind its interface: conversion in, the engine's run, conversion out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from outrider_runtimes.engines import Session
from outrider_runtimes.errors import InferenceError
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
        self.interface = interface
        self._session = session
        self._lock = threading.Lock()
        self._encode = [input_converter(s, b) for s, b in zip(interface.inputs, binding.inputs, strict=True)]
        self._decode = [output_converter(s, b) for s, b in zip(interface.outputs, binding.outputs, strict=True)]
        self._names = tuple(spec.name for spec in interface.outputs)
        self._in_order = [session.input_names.index(b.file_name) for b in binding.inputs]
        self._out_order = [session.output_names.index(b.file_name) for b in binding.outputs]
        self._fixed_rows = _fixed_rows(interface, binding)
        self._batched_in = [spec.batched for spec in interface.inputs]
        self._batched_out = [spec.batched for spec in interface.outputs]

    def run(self, inputs: Tensors) -> Answer:
        """Check, convert, run, convert back.

        Args:
            inputs: every input of the interface by name.

        Raises:
            InputError: an input is not what the interface says; nothing was run.
            InferenceError: the engine failed.
        """
        start = time.perf_counter_ns()
        arrays = check_inputs(self.interface, inputs)
        encoded = [convert(array) for convert, array in zip(self._encode, arrays, strict=True)]
        waiting = time.perf_counter_ns()
        with self._lock:
            begun = time.perf_counter_ns()
            raw = self._run_rows(encoded)
        ran = time.perf_counter_ns()
        outputs = {
            name: convert(raw[position])
            for name, convert, position in zip(self._names, self._decode, self._out_order, strict=True)
        }
        done = time.perf_counter_ns()
        timing = Timing(
            queue=(begun - waiting) / 1e6,
            pre=(waiting - start) / 1e6,
            infer=(ran - begun) / 1e6,
            post=(done - ran) / 1e6,
            total=(done - start) / 1e6,
        )
        return Answer(outputs=outputs, timing_ms=timing)

    def close(self) -> None:
        """Free the session. A call that is running ends first."""
        with self._lock:
            self._session.close()

    def _run_rows(self, encoded: list[Array]) -> Sequence[Array]:
        fixed = self._fixed_rows
        rows = next((a.shape[0] for a, batched in zip(encoded, self._batched_in, strict=True) if batched), None)
        if fixed is None or rows is None or rows == fixed:
            return self._session.run(self._arranged(encoded))
        if rows % fixed:
            raise InferenceError(f"N = {rows} is not a multiple of the file's fixed batch of {fixed}")
        parts = [self._session.run(self._arranged(self._slice(encoded, at, fixed))) for at in range(0, rows, fixed)]
        if not parts:
            return self._empty(encoded, fixed)
        return [self._joined(position, [part[position] for part in parts]) for position in range(len(parts[0]))]

    def _arranged(self, encoded: list[Array]) -> list[Array]:
        arranged = list(encoded)
        for position, array in zip(self._in_order, encoded, strict=True):
            arranged[position] = array
        return arranged

    def _slice(self, encoded: list[Array], at: int, rows: int) -> list[Array]:
        return [a[at : at + rows] if batched else a for a, batched in zip(encoded, self._batched_in, strict=True)]

    def _joined(self, position: int, parts: list[Array]) -> Array:
        batched = self._batched_out[self._out_order.index(position)]
        return np.concatenate(parts) if batched else parts[-1]

    def _empty(self, encoded: list[Array], fixed: int) -> list[Array]:
        """N = 0: the shapes of a run on zeros, with no rows."""
        zeros = [
            np.zeros((fixed, *a.shape[1:]), a.dtype) if batched else a
            for a, batched in zip(encoded, self._batched_in, strict=True)
        ]
        return [output[:0] for output in self._session.run(self._arranged(zeros))]


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
        return lambda x: x
    if len(steps) == 1:
        return steps[0]

    def apply(x: Array) -> Array:
        for step in steps:
            x = step(x)
        return x

    return apply


def _quantizer(binding: TensorBinding) -> Convert:
    """Round half to even, clip, cast: a cast out of range is undefined, so the clip comes first."""
    limits = np.iinfo(binding.dtype)
    inverse = np.float32(1.0 / (binding.scale or 1.0))
    zero_point = np.float32(binding.zero_point)

    def quantize(x: Array) -> Array:
        scaled = np.rint(x * inverse) + zero_point
        return np.clip(scaled, limits.min, limits.max).astype(binding.dtype)

    return quantize


def _caster(spec: TensorSpec, binding: TensorBinding) -> Convert:
    """To the file's dtype; integers that do not fit are refused, not wrapped."""
    target = np.dtype(binding.dtype)
    if np.can_cast(np.dtype(spec.dtype), target) or target.kind not in "iu":
        return lambda x: x.astype(target)
    limits = np.iinfo(target)

    def cast(x: Array) -> Array:
        if x.size and (x.min() < limits.min or x.max() > limits.max):
            raise InferenceError(f"input {spec.name!r} has values beyond {target}, which this variant's file takes")
        return x.astype(target)

    return cast


def _fixed_rows(interface: Interface, binding: Binding) -> int | None:
    for spec, item in zip(interface.inputs, binding.inputs, strict=True):
        if spec.batched:
            position = item.permutation.index(0) if item.permutation else 0
            return item.shape[position]
    return None
