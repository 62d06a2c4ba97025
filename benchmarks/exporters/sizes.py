"""How much of a model file its weights are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from outrider_exporters.convert.quiet import quiet


def weight_bytes(path: Path) -> int:
    """The bytes of the tensors with two axes or more that an ``.onnx`` or ``.tflite`` file stores.

    Biases, scales, zero points, names and the graph itself are the rest.
    """
    return _onnx(path) if path.suffix == ".onnx" else _tflite(path)


def _onnx(path: Path) -> int:
    import onnx

    stored = onnx.load(str(path)).graph.initializer
    return sum(onnx.numpy_helper.to_array(item).nbytes for item in stored if len(item.dims) >= 2)


def _tflite(path: Path) -> int:
    with quiet():
        from ai_edge_quantizer.utils import tfl_flatbuffer_utils

        model = tfl_flatbuffer_utils.read_model(str(path))
    stored = {
        tensor.buffer: len(np.asarray(model.buffers[tensor.buffer].data, np.uint8))
        for graph in model.subgraphs
        for tensor in graph.tensors
        if tensor.shape is not None and len(tensor.shape) >= 2 and model.buffers[tensor.buffer].data is not None
    }
    return sum(stored.values())
