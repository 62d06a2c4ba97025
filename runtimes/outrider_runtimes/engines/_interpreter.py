"""TFLite files by an ``Interpreter``: the class that LiteRT and the older tflite-runtime have in common.

Names: a file with exactly one signature, which covers every input and output of its main graph, is known by that
signature's names. So is a file whose signatures are one function at several shapes: they have the same tensors (names,
dtypes, scales) and differ in the shapes of their inputs; it is run by the signature that has the shapes of the call.
Any other file is known by its tensors' names as they stand, and only its main graph is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from outrider_runtimes.engines import FileTensor, Session
from outrider_runtimes.engines._library import Library, one_line
from outrider_runtimes.errors import InferenceError, ModelLoadError
from outrider_runtimes.nouns import dataclass
from outrider_runtimes.tensors import DTYPES, Array, Shape

_IDENTIFIER = b"TFL3"


class InterpreterEngine:
    """Runs ``.tflite`` files by the ``Interpreter`` of ``library``; each engine gives its own."""

    name: str
    library: Library
    formats: Sequence[str] = ("tflite",)
    builds = False

    def check(self) -> str | None:
        """None when the library imports here; else the reason and the way out."""
        return self.library.check()

    def version(self) -> str:
        """The version of the library. Raises MissingExtra."""
        return self.library.version()

    def prepare(self, path: Path, *, threads: int, cache: Path | None = None) -> Session:
        """Load a TFLite file; nothing is built, so ``cache`` stays empty. Raises ModelLoadError, MissingExtra."""
        return load(self.library.load().Interpreter, path, threads=threads)


def load(interpreter_class: Any, path: Path, *, threads: int) -> Session:
    """Load a TFLite file, mapped from its path: from bytes the library would keep a second copy of it.

    Raises:
        ModelLoadError: unreadable, or refused by the interpreter.
    """
    _refuse_other_formats(path)
    try:
        interpreter = interpreter_class(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
        signatures = _signatures(interpreter)
        return SignatureSession(interpreter, signatures) if signatures else InterpreterSession(interpreter)
    except ModelLoadError as error:
        raise ModelLoadError(f"{path.name}: {error}", hint=error.hint) from None
    except Exception as error:
        raise ModelLoadError(f"{path.name}: the interpreter refused it: {one_line(error)}") from error


def _refuse_other_formats(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise ModelLoadError(f"{path.name}: cannot be read: {error.strerror or error}") from error
    if head[4:8] != _IDENTIFIER:
        raise ModelLoadError(
            f"{path.name}: not a TFLite file, or one that was cut short",
            hint="export it again, or compare its sha256 with the original's",
        )


class InterpreterSession:
    """One loaded TFLite file. Not safe from several threads at once."""

    def __init__(self, interpreter: Any) -> None:
        named_inputs, named_outputs = _named_tensors(interpreter)
        self.inputs = tuple(_file_tensor(name, details) for name, details in named_inputs)
        self.outputs = tuple(_file_tensor(name, details) for name, details in named_outputs)
        self.input_names = tuple(tensor.name for tensor in self.inputs)
        self.output_names = tuple(tensor.name for tensor in self.outputs)
        self._inputs_at = tuple(int(details["index"]) for _, details in named_inputs)
        self._outputs_at = tuple(int(details["index"]) for _, details in named_outputs)
        self._one_to_one = len(self._inputs_at) == len(self._outputs_at) == 1
        self._resizable = any(None in tensor.shape for tensor in self.inputs)
        self._shapes = [tuple(int(size) for size in details["shape"]) for _, details in named_inputs]
        self._interpreter: Any = interpreter

    def run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        """Run once; see ``engines.Session``. Raises InferenceError."""
        interpreter = self._interpreter
        if interpreter is None:
            raise InferenceError("the session was closed")
        try:
            if self._resizable:
                self._resize(inputs)
            # The native interpreter under the Python one, held no longer than the call: else the latter refuses to
            # allocate. What it adds, and the loops, cost as much as a small model.
            native = interpreter._interpreter
            if self._one_to_one and len(inputs) == 1:
                native.SetTensor(self._inputs_at[0], inputs[0])
                native.Invoke()
                return [native.GetTensor(self._outputs_at[0], 0)]
            for at, array in zip(self._inputs_at, inputs, strict=True):
                native.SetTensor(at, array)
            native.Invoke()
            return [native.GetTensor(at, 0) for at in self._outputs_at]
        except Exception as error:
            raise InferenceError(f"the interpreter failed: {one_line(error)}") from error

    def close(self) -> None:
        """Free it. A second call does nothing."""
        self._interpreter = None

    def _resize(self, inputs: Sequence[Array]) -> None:
        shapes = [array.shape for array in inputs]
        if shapes == self._shapes:
            return
        self._shapes = []  # what the interpreter holds is unknown until all of it succeeded
        for at, shape in zip(self._inputs_at, shapes, strict=True):
            self._interpreter.resize_tensor_input(at, shape, strict=True)
        self._interpreter.allocate_tensors()
        self._shapes = shapes


@dataclass(frozen=True, kw_only=True)
class Signature:
    """One of several in a file: its tensors, and what runs it."""

    inputs: tuple[FileTensor, ...]
    outputs: tuple[FileTensor, ...]
    run: Callable[..., Mapping[str, Array]]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(size for size in tensor.shape if size is not None) for tensor in self.inputs)


class SignatureSession:
    """One loaded TFLite file whose signatures are one function at several shapes. Not safe from several threads at
    once.

    Attributes:
        signatures: the shapes of the inputs of each, by name.
    """

    def __init__(self, interpreter: Any, signatures: Sequence[Signature]) -> None:
        self.inputs = _common([signature.inputs for signature in signatures])
        self.outputs = _common([signature.outputs for signature in signatures])
        self.input_names = tuple(tensor.name for tensor in self.inputs)
        self.output_names = tuple(tensor.name for tensor in self.outputs)
        self.signatures = tuple(dict(zip(self.input_names, item.shapes, strict=True)) for item in signatures)
        self._by_shapes: dict[tuple[tuple[int, ...], ...], Signature] | None = {
            item.shapes: item for item in signatures
        }
        self._interpreter: Any = interpreter

    def run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        """Run the signature that has the shapes of ``inputs``; see ``engines.Session``. Raises InferenceError."""
        if self._by_shapes is None:
            raise InferenceError("the session was closed")
        signature = self._by_shapes.get(tuple(array.shape for array in inputs))
        if signature is None:
            given, known = _listed(array.shape for array in inputs), "; ".join(map(_listed, self._by_shapes))
            raise InferenceError(f"the file has no signature for inputs of {given}, it has {known}")
        try:
            outputs = signature.run(**dict(zip(self.input_names, inputs, strict=True)))
            return [outputs[name] for name in self.output_names]
        except Exception as error:
            raise InferenceError(f"the interpreter failed: {one_line(error)}") from error

    def close(self) -> None:
        """Free it. A second call does nothing."""
        self._by_shapes = self._interpreter = None


def _listed(shapes: Iterable[Shape]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def _signatures(interpreter: Any) -> list[Signature]:
    """The signatures where they are one function at several shapes; else nothing."""
    keys = interpreter._get_full_signature_list()
    if len(keys) < 2:
        return []
    signatures = [_signature(interpreter.get_signature_runner(key)) for key in keys]
    shapeless = {tuple(_shapeless(item.inputs) + _shapeless(item.outputs)) for item in signatures}
    distinct = {item.shapes for item in signatures}
    fixed = all(None not in tensor.shape for item in signatures for tensor in item.inputs)
    return signatures if len(shapeless) == 1 and len(distinct) == len(signatures) and fixed else []


def _signature(runner: Any) -> Signature:
    return Signature(
        inputs=tuple(_file_tensor(name, details) for name, details in sorted(runner.get_input_details().items())),
        outputs=tuple(_file_tensor(name, details) for name, details in sorted(runner.get_output_details().items())),
        run=runner,
    )


def _shapeless(tensors: Sequence[FileTensor]) -> list[FileTensor]:
    """The tensors with their number of axes alone."""
    return [replace(tensor, shape=(None,) * len(tensor.shape)) for tensor in tensors]


def _common(tensors: Sequence[Sequence[FileTensor]]) -> tuple[FileTensor, ...]:
    """Of the same tensors in several signatures: None for a size in which they differ."""
    return tuple(
        replace(
            same[0],
            shape=tuple(
                sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*(t.shape for t in same), strict=True)
            ),
        )
        for same in zip(*tensors, strict=True)
    )


Named = list[tuple[str, Any]]


def _named_tensors(interpreter: Any) -> tuple[Named, Named]:
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    signatures = interpreter._get_full_signature_list()
    if len(signatures) == 1:
        (signature,) = signatures.values()
        named = _by_signature(signature["inputs"], inputs), _by_signature(signature["outputs"], outputs)
        if named[0] is not None and named[1] is not None:
            return named[0], named[1]
    return [(str(d["name"]), d) for d in inputs], [(str(d["name"]), d) for d in outputs]


def _by_signature(index_by_name: dict[str, int], details: list[Any]) -> Named | None:
    """The details in the file's order under the signature's names; None when it does not cover them all."""
    by_index = {int(item["index"]): item for item in details}
    if set(index_by_name.values()) != set(by_index):
        return None
    order = {index: position for position, index in enumerate(by_index)}
    ordered = sorted(index_by_name.items(), key=lambda item: (order[item[1]], item[0]))
    return [(name, by_index[index]) for name, index in ordered]


def _file_tensor(name: str, details: Any) -> FileTensor:
    dtype = np.dtype(details["dtype"]).name
    if dtype not in DTYPES:
        raise ModelLoadError(f"tensor {name!r} has dtype {dtype}, which no engine here takes or gives")
    scale, zero_point = details["quantization"]
    quantized = scale != 0 and np.dtype(dtype).kind in "iu"
    return FileTensor(
        name=name,
        dtype=dtype,
        shape=_shape(details),
        scale=float(scale) if quantized else None,
        zero_point=int(zero_point) if quantized else 0,
    )


def _shape(details: Any) -> Shape:
    declared = details.get("shape_signature")
    sizes = details["shape"] if declared is None or len(declared) != len(details["shape"]) else declared
    return tuple(None if size < 0 else int(size) for size in sizes)
