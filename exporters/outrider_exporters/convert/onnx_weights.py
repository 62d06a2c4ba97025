"""Smaller weights in an ONNX model whose operators go on computing in float. A ModelProto is changed in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from outrider_runtimes.tensors import Array

INT8_MAX = 127
FLOAT16_MAX = 65504.0
FEWEST_ELEMENTS = 64  # below, a scale and a node cost more than the bits that are saved
# The axis of the output channels by operator and input; see the operators' pages of ONNX. None: every row its own.
CHANNEL_AXES = {
    ("Conv", 1): 0,
    ("ConvTranspose", 1): 1,
    ("MatMul", 0): -2,
    ("MatMul", 1): -1,
    ("Gemm", 1): 1,
    ("RNN", 1): 1,
    ("RNN", 2): 1,
    ("GRU", 1): 1,
    ("GRU", 2): 1,
    ("LSTM", 1): 1,
    ("LSTM", 2): 1,
    ("Gather", 0): 0,
}
PASSED_ON = frozenset(["Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Slice", "Concat", "Split"])


def quantize_symmetric(weight: Array, axis: int | None) -> tuple[Array, Array]:
    """Weights as int8 with a scale a channel, or one for all where ``axis`` is None.

    Returns:
        int8 of the weight's shape within -127 and 127, and float32 scales: ``[weight.shape[axis]]`` or ``[]``. A
        weight is its integer times its scale, wrong by half a scale at most.
    """
    exact = weight.astype(np.float64)
    others = tuple(at for at in range(weight.ndim) if axis is not None and at != axis % weight.ndim)
    reach = np.abs(exact).max(axis=others if axis is not None else None)
    scale = np.where(reach > 0, reach / INT8_MAX, 1.0).astype(np.float32)
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    shape = [1] * weight.ndim
    if axis is not None:
        shape[axis] = -1
    rounded = np.round(exact / (scale.astype(np.float64).reshape(shape) if axis is not None else scale))
    return np.clip(rounded, -INT8_MAX, INT8_MAX).astype(np.int8), scale


def store_int8(model: Any, *, per_channel: bool, kept: Sequence[str]) -> None:
    """Every weight of an operator that has any as int8, cast and multiplied by its scale, except for ``kept`` nodes'.

    ONNX Runtime folds Cast and Mul when it loads the file, so that a run costs what it cost in float. It leaves a
    DequantizeLinear for every run, which made a dense network four times slower.
    """
    from onnx import TensorProto, helper, numpy_helper

    for weight, axis in list(_weights(model, kept)):
        name = weight.name
        stored, scale = quantize_symmetric(numpy_helper.to_array(weight), axis if per_channel else None)
        shape = [-1 if per_channel and at == axis % stored.ndim else 1 for at in range(stored.ndim)]
        parts = {f"{name}_int8": stored, f"{name}_scale": scale.reshape(shape)}
        model.graph.initializer.remove(weight)
        model.graph.initializer.extend(numpy_helper.from_array(array, part) for part, array in parts.items())
        whole = f"{name}_whole"
        cast = helper.make_node("Cast", [f"{name}_int8"], [whole], name=f"{name}_cast", to=TensorProto.FLOAT)
        model.graph.node.insert(0, helper.make_node("Mul", [whole, f"{name}_scale"], [name], name=f"{name}_scaled"))
        model.graph.node.insert(0, cast)


def store_float16(model: Any, *, kept: Sequence[str]) -> None:
    """The same with float16 and a Cast to float32; a weight beyond what float16 holds stays as it is."""
    from onnx import TensorProto, helper, numpy_helper

    for weight, _ in list(_weights(model, kept)):
        array = numpy_helper.to_array(weight)
        if np.abs(array).max() > FLOAT16_MAX:
            continue
        name = weight.name
        model.graph.initializer.remove(weight)
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float16), f"{name}_float16"))
        node = helper.make_node("Cast", [f"{name}_float16"], [name], name=f"{name}_cast", to=TensorProto.FLOAT)
        model.graph.node.insert(0, node)


def split_gemm(model: Any) -> None:
    """Every plain Gemm with a constant matrix as MatMul (which keeps its name) and Add: what the quantizers take."""
    from onnx import helper, numpy_helper

    stored = {weight.name: weight for weight in model.graph.initializer}
    used = [name for node in model.graph.node for name in node.input]
    for node in [n for n in model.graph.node if n.op_type == "Gemm"]:
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weight = stored.get(node.input[1])
        plain = options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0 and not options.get("transA", 0)
        if weight is None or not plain or used.count(weight.name) > 1:
            continue
        if options.get("transB", 0):
            turned = np.ascontiguousarray(numpy_helper.to_array(weight).T)
            weight.CopyFrom(numpy_helper.from_array(turned, weight.name))
            for value in [v for v in model.graph.value_info if v.name == weight.name]:
                model.graph.value_info.remove(value)  # it has the shape from before
        has_bias = len(node.input) == 3 and bool(node.input[2])
        product = f"{node.output[0]}_product" if has_bias else node.output[0]
        nodes = [helper.make_node("MatMul", list(node.input[:2]), [product], name=node.name)]
        if has_bias:
            nodes.append(helper.make_node("Add", [product, node.input[2]], [node.output[0]], name=f"{node.name}_bias"))
        at = list(model.graph.node).index(node)
        model.graph.node.remove(node)
        for offset, made in enumerate(nodes):
            model.graph.node.insert(at + offset, made)


def _weights(model: Any, kept: Sequence[str]) -> Iterator[tuple[Any, int]]:
    """Float32 initializers that are weights, each with the axis of its channels; not those that a kept node takes.

    A weight that reaches its operator through a change of shape counts too; its first axis stands for its channels.
    """
    from onnx import TensorProto

    shown = {value.name for value in model.graph.output}
    for weight in model.graph.initializer:
        if weight.data_type != TensorProto.FLOAT or len(weight.dims) < 2 or weight.name in shown:
            continue
        if int(np.prod(weight.dims)) < FEWEST_ELEMENTS:
            continue
        axes, names = _uses(model, weight.name)
        if axes and not names.intersection(kept):
            yield weight, axes[0]


def _uses(model: Any, name: str) -> tuple[list[int], set[str]]:
    """The channel axes under which operators take a tensor, and the names of all nodes that it comes to."""
    axes: list[int] = []
    names: set[str] = set()
    for node in model.graph.node:
        for at, taken in enumerate(node.input):
            if taken != name:
                continue
            names.add(node.name)
            if (node.op_type, at) in CHANNEL_AXES:
                axes.append(_channel_axis(node, at))
            elif node.op_type in PASSED_ON and at == 0:
                further = [_uses(model, output) for output in node.output]
                axes += [0 for found, _ in further for _ in found]
                names.update(*(more for _, more in further))
    return axes, names


def _channel_axis(node: Any, at: int) -> int:
    transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if transposed else CHANNEL_AXES[node.op_type, at]
