"""TFLite files by an ``Interpreter``: the class that LiteRT and the older tflite-runtime have in common.

Names: a file with exactly one signature, which covers every input and output of its main graph, is known by that
signature's names; any other by its tensors' names as they stand. Only the main graph is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outrider_runtimes.engines import FileTensor
from outrider_runtimes.engines._library import Library, one_line
from outrider_runtimes.errors import InferenceError, ModelLoadError
from outrider_runtimes.tensors import DTYPES, Array, Shape

_IDENTIFIER = b"TFL3"


class InterpreterEngine:
    """Runs ``.tflite`` files by the ``Interpreter`` of ``library``; each engine gives its own."""

    name: str
    library: Library
    formats: Sequence[str] = ("tflite",)

    def check(self) -> str | None:
        """None when the library imports here; else the reason and the way out."""
        return self.library.check()

    def version(self) -> str:
        """The version of the library. Raises MissingExtra."""
        return self.library.version()

    def prepare(self, path: Path, *, threads: int) -> InterpreterSession:
        """Load a TFLite file. Raises ModelLoadError, MissingExtra."""
        return load(self.library.load().Interpreter, path, threads=threads)


def load(interpreter_class: Any, path: Path, *, threads: int) -> InterpreterSession:
    """Load a TFLite file, mapped from its path: from bytes the library would keep a second copy of it.

    Raises:
        ModelLoadError: unreadable, or refused by the interpreter.
    """
    _refuse_other_formats(path)
    try:
        interpreter = interpreter_class(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
        return InterpreterSession(interpreter)
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
            for at, array in zip(self._inputs_at, inputs, strict=True):
                interpreter.set_tensor(at, array)
            interpreter.invoke()
            return [interpreter.get_tensor(at) for at in self._outputs_at]
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
