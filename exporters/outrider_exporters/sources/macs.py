"""Multiply-accumulates of an ONNX file, from the shapes that its graph implies."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from outrider_exporters.convert.onnx_graphs import graphs_of

_log = logging.getLogger(__name__)

Shape = tuple[int, ...]
Count = Callable[[Any, Sequence[Shape], Shape], int]
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
# Operators of ONNX's own set that hold products which nothing here counts.
UNCOUNTED = frozenset(
    ["Einsum", "Attention", "DFT", "STFT", "DeformConv", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"]
)
HARMLESS = frozenset(["QuantizeLinear", "DequantizeLinear"])  # of other operator sets


def onnx_macs(path: Path) -> int | None:
    """Multiply-accumulates of convolutions, matrix products and recurrent layers for one row; None where that is not
    known: a product of another kind, an operator of another set, a product within a loop or a branch, or a size that
    the file does not fix (other than N, which is taken for 1).
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for value in model.graph.input:
        sizes = value.type.tensor_type.shape.dim
        if sizes and not sizes[0].dim_value:
            sizes[0].dim_value = 1
    for value in model.graph.output:  # what a file says of its outputs may hold N too
        value.type.tensor_type.ClearField("shape")
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:
        _log.debug("%s: its sizes cannot be inferred", path, exc_info=True)
        return None
    return _graph_macs(model.graph)


def _graph_macs(graph: Any) -> int | None:
    shapes = _shapes(graph)
    inner = [node for body in list(graphs_of(graph))[1:] for node in body.node]
    if any(_has_products(node) for node in inner) or any(_unknown(node) for node in (*graph.node, *inner)):
        return None
    total = 0
    for node in graph.node:
        count = COUNTS.get(node.op_type)
        if count is None:
            continue
        inputs, output = [shapes.get(name) for name in node.input if name], shapes.get(_first(node.output))
        if output is None or any(shape is None for shape in inputs[:2]):
            return None
        total += count(node, [shape or () for shape in inputs], output)
    return total


def _has_products(node: Any) -> bool:
    return node.op_type in COUNTS


def _unknown(node: Any) -> bool:
    return node.op_type in UNCOUNTED or (node.domain not in ("", "ai.onnx") and node.op_type not in HARMLESS)


def _shapes(graph: Any) -> dict[str, Shape]:
    """The tensors all of whose sizes are known."""
    found: dict[str, Shape] = {item.name: tuple(item.dims) for item in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(size.HasField("dim_value") for size in tensor.shape.dim):
            found[value.name] = tuple(size.dim_value for size in tensor.shape.dim)
    return found


def _first(names: Sequence[str]) -> str:
    return next((name for name in names if name), "")


def _conv(_: Any, inputs: Sequence[Shape], output: Shape) -> int:
    return math.prod(output) * math.prod(inputs[1][1:])  # weights: [out, in / groups, kernel...]


def _transposed(_: Any, inputs: Sequence[Shape], __: Shape) -> int:
    return math.prod(inputs[0]) * math.prod(inputs[1][1:])  # weights: [in, out / groups, kernel...]


def _matmul(_: Any, inputs: Sequence[Shape], output: Shape) -> int:
    return math.prod(output) * inputs[0][-1]


def _gemm(node: Any, inputs: Sequence[Shape], output: Shape) -> int:
    turned = any(item.name == "transA" and item.i for item in node.attribute)
    return math.prod(output) * inputs[0][0 if turned else -1]


def _recurrent(node: Any, inputs: Sequence[Shape], _: Shape) -> int:
    (steps, rows, features), (directions, gated) = inputs[0], inputs[1][:2]
    hidden = gated // GATES[node.op_type]
    return steps * rows * directions * gated * (features + hidden)


COUNTS: Mapping[str, Count] = {
    "Conv": _conv,
    "ConvTranspose": _transposed,
    "MatMul": _matmul,
    "Gemm": _gemm,
    **dict.fromkeys(GATES, _recurrent),
}
