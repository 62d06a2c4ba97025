"""A model file in its engine with nothing around it: what a caller would write who has only the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Call
from outrider_runtimes.tensors import Array


@dataclass(frozen=True, kw_only=True)
class Raw:
    """One file with one image input and one output, on one thread.

    Attributes:
        call: of an image, float32 [1, C, H, W]: a function of nothing that hands the file's own form of it to the
            engine, runs, and takes the output. The form (int8 where the file wants it) is made before.
        call_float: the same, but int8 is made of float32 within the call, where the file wants it; else None.
        answer: of an image: the output as float32 [1, classes].
    """

    call: Callable[[Array], Call]
    answer: Callable[[Array], Array]
    call_float: Callable[[Array], Call] | None = None


def open_raw(path: Path) -> Raw:
    """An ``.onnx`` file in ONNX Runtime, a ``.tflite`` file in LiteRT."""
    return _onnxruntime(path) if path.suffix == ".onnx" else _litert(path)


def _onnxruntime(path: Path) -> Raw:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def call(image: Array) -> Call:
        feeds = {name: image}
        return lambda: session.run(None, feeds)

    def answer(image: Array) -> Array:
        output: Array = session.run(None, {name: image})[0]
        return output

    return Raw(call=call, answer=answer)


def _litert(path: Path) -> Raw:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    entry, exit_ = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def run(data: Array) -> object:
        interpreter.set_tensor(entry["index"], data)
        interpreter.invoke()
        return interpreter.get_tensor(exit_["index"])

    def call(image: Array) -> Call:
        data = _stored(_turned(image, entry), entry)
        return lambda: run(data)

    def call_float(image: Array) -> Call:
        data = _turned(image, entry)
        return lambda: run(_stored(data, entry))

    def answer(image: Array) -> Array:
        stored = np.asarray(call(image)())
        scale, zero = exit_["quantization"]
        return ((stored.astype(np.float32) - zero) * scale).astype(np.float32) if scale else stored

    takes_float = not entry["quantization"][0]
    return Raw(call=call, answer=answer, call_float=None if takes_float else call_float)


def _turned(image: Array, entry: dict[str, Any]) -> Array:
    """The image with the layout of a TFLite input."""
    turned = image if image.shape == tuple(entry["shape"]) else image.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(turned.reshape(entry["shape"]))


def _stored(turned: Array, entry: dict[str, Any]) -> Array:
    """What a TFLite input takes: int8 of the file's scale where it has one."""
    scale, zero = entry["quantization"]
    if not scale:
        return turned.astype(entry["dtype"], copy=False)
    bounds = np.iinfo(entry["dtype"])
    stored = np.multiply(turned, np.float32(1.0 / scale))
    np.rint(stored, out=stored)
    stored += np.float32(zero)
    return np.clip(stored, bounds.min, bounds.max, out=stored).astype(entry["dtype"])
