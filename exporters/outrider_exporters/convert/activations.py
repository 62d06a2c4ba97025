"""A float file's activations and their ranges over the calibration rows, by our own observers, in either engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outrider_exporters.convert.observers import Histogram, Range, find_range
from outrider_runtimes.errors import ExportError, MissingExtra
from outrider_runtimes.tensors import Array


def observe(activations: Iterator[Mapping[str, Array]], observer: str) -> dict[str, Range]:
    """The range of every tensor by name.

    Args:
        activations: of one run after the other; see ``run_onnx`` and ``run_tflite``.
        observer: see ``observers.find_range``.

    Raises:
        ExportError: a tensor is NaN on these rows.
    """
    histograms: dict[str, Histogram] = {}
    for tensors in activations:
        for name, values in tensors.items():
            if name not in histograms:
                histograms[name] = Histogram(counting=observer != "min-max")
            _watch(histograms[name], values, name)
    return {name: find_range(observer, histogram) for name, histogram in histograms.items()}


def run_onnx(model: Any, rows: Sequence[dict[str, Array]]) -> Iterator[dict[str, Array]]:
    """By name, every float tensor that an ONNX graph takes or computes, one dictionary a row.

    Args:
        model: a ModelProto with the types of its tensors inferred; left as it is.
        rows: inputs by the file's names.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", extra="export", purpose="observing ONNX activations") from error

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    given = {value.name for value in watched.graph.input} - {weight.name for weight in watched.graph.initializer}
    there = given.union(*(node.output for node in watched.graph.node))  # value_info may name what was optimized away
    floats = {v.name: v for v in (*watched.graph.input, *watched.graph.value_info, *watched.graph.output)}
    names = [n for n, v in floats.items() if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and n in there]
    shown = {value.name for value in watched.graph.output}
    watched.graph.output.extend(floats[name] for name in names if name not in given | shown)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(watched.SerializeToString(), options, providers=["CPUExecutionProvider"])
    computed = [name for name in names if name not in given]
    for row in rows:
        answers = dict(zip(computed, session.run(computed, row), strict=True)) if computed else {}
        yield {name: answers[name] if name in answers else row[name] for name in names}


def run_tflite(path: Path, rows: Sequence[dict[str, Array]]) -> Iterator[dict[str, Array]]:
    """By name, every float tensor that a TFLite graph takes or computes; see ``run_onnx``.

    Args:
        rows: inputs of N = 1 by the names of the file's one signature.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise MissingExtra("ai-edge-litert", extra="export", purpose="observing TFLite activations") from error

    interpreter = Interpreter(model_path=str(path), experimental_preserve_all_tensors=True, num_threads=1)
    runner = interpreter.get_signature_runner()
    stored = stored_tensors(path)
    tensors = {
        detail["index"]: detail["name"]
        for detail in interpreter.get_tensor_details()
        if detail["dtype"] is np.float32 and detail["name"] and detail["index"] not in stored
    }
    for row in rows:
        runner(**row)
        yield {name: _content(interpreter, at) for at, name in tensors.items()}


def _content(interpreter: Any, at: int) -> Array:
    try:
        return np.asarray(interpreter.get_tensor(at))
    except ValueError:  # a scratch tensor of a kernel, or one that was optimized away
        return np.zeros(0, np.float32)


def stored_tensors(path: Path) -> set[int]:
    """The tensors of a TFLite file's first graph whose values are in the file, by index."""
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils

    model = tfl_flatbuffer_utils.read_model(str(path))
    tensors = model.subgraphs[0].tensors
    return {at for at, tensor in enumerate(tensors) if model.buffers[tensor.buffer].data is not None}


def _watch(histogram: Histogram, values: Array, name: str) -> None:
    if np.isnan(values).any():
        raise ExportError(
            f"tensor {name!r} is NaN on a calibration row", hint="give calibration rows like those of the field"
        )
    histogram.update(values)
