"""A tiny classifier with seeded weights, as numpy, as ONNX bytes and as TFLite bytes; and files that misbehave.

The classifier is `image: float32 [N, 1, 8, 8] -> logits float32 [N, 10]`: a 3x3 convolution to 4 channels, ReLU, dense.
The TFLite file is written by hand with the schema that ships in ai-edge-litert: a converter would take half a minute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from support.tflitefiles import packed_tflite

ROWS, SIDE, CHANNELS, CLASSES = 16, 8, 4, 10


@dataclass(frozen=True, kw_only=True)
class Weights:
    """conv: [4, 1, 3, 3], conv_bias: [4], dense: [4*8*8 in NCHW order, 10], dense_bias: [10]; all float32."""

    conv: np.ndarray
    conv_bias: np.ndarray
    dense: np.ndarray
    dense_bias: np.ndarray


def weights(seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.3).astype(np.float32)

    return Weights(
        conv=draw(CHANNELS, 1, 3, 3),
        conv_bias=draw(CHANNELS),
        dense=draw(CHANNELS * SIDE * SIDE, CLASSES),
        dense_bias=draw(CLASSES),
    )


def images(rows: int = ROWS, seed: int = 1) -> np.ndarray:
    """float32 [rows, 1, 8, 8] in 0..1."""
    return np.random.default_rng(seed).random((rows, 1, SIDE, SIDE), dtype=np.float32)


def reference(w: Weights, x: np.ndarray) -> np.ndarray:
    """Logits float32 [N, 10] by numpy."""
    padded = np.pad(x[:, 0], ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    hidden = np.einsum("nhwij,cij->nchw", windows, w.conv[:, 0]) + w.conv_bias[None, :, None, None]
    flat = np.maximum(hidden, 0.0).reshape(len(x), -1)
    return (flat @ w.dense + w.dense_bias).astype(np.float32)


def onnx_model(nodes: list[Any], initializers: list[Any], *, output_shape: list[Any]) -> bytes:
    """An ONNX file from `x: float32 [N, 1, 8, 8]` to `y: float32`."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output_shape)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def classifier_onnx(
    w: Weights, *, extra: list[Any] | None = None, extra_initializers: list[Any] | None = None
) -> bytes:
    """The classifier; `extra` nodes turn its `logits` into `y`."""
    nodes = [
        helper.make_node("Conv", ["x", "conv", "conv_bias"], ["hidden"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Flatten", ["active"], ["flat"]),
        helper.make_node("Gemm", ["flat", "dense", "dense_bias"], ["logits" if extra else "y"]),
        *(extra or []),
    ]
    tensors = {"conv": w.conv, "conv_bias": w.conv_bias, "dense": w.dense, "dense_bias": w.dense_bias}
    initializers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    return onnx_model(nodes, initializers + (extra_initializers or []), output_shape=["N", CLASSES])


def nan_onnx(w: Weights) -> bytes:
    """Answers NaN: log of a negative number."""
    return classifier_onnx(
        w,
        extra=[helper.make_node("Log", ["minus"], ["nan"]), helper.make_node("Add", ["logits", "nan"], ["y"])],
        extra_initializers=[numpy_helper.from_array(np.float32([-1.0]), "minus")],
    )


def hungry_onnx(w: Weights, elements: int) -> bytes:
    """Fills a tensor of that many ones, and adds its largest value minus one, which is nothing, to the logits."""
    size = numpy_helper.from_array(np.array([elements], np.int64), "size")
    one = helper.make_tensor("value", TensorProto.FLOAT, [1], [1.0])
    return classifier_onnx(
        w,
        extra=[
            # A sum with the input keeps the optimizer from folding the constant when the file is loaded.
            helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
            helper.make_node("ConstantOfShape", ["size"], ["ones"], value=one),
            helper.make_node("Add", ["ones", "top"], ["many"]),
            helper.make_node("ReduceMax", ["many"], ["most"], keepdims=0),
            helper.make_node("Sub", ["most", "most"], ["nothing"]),
            helper.make_node("Add", ["logits", "nothing"], ["y"]),
        ],
        extra_initializers=[size],
    )


def endless_loop(start: str, result: str) -> Any:
    """The node that adds ``start`` to itself ``trips`` times, where ``true`` is true: 2^62 of them never end."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["sum", "sum"], ["sum_next"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_next", TensorProto.FLOAT, None),
        ],
    )
    return helper.make_node("Loop", ["trips", "true", start], [result], body=body)


def endless_onnx(w: Weights, *, above: float | None = None) -> bytes:
    """Counts to 2^62 before it answers; with ``above``, only where an input has a larger value than that."""
    trips = numpy_helper.from_array(np.array(2**62, np.int64), "many")
    always = [helper.make_node("Identity", ["many"], ["trips"])]
    sometimes = [
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Greater", ["top", "above"], ["is_above"]),
        helper.make_node("Cast", ["is_above"], ["one_if_above"], to=TensorProto.INT64),
        helper.make_node("Mul", ["one_if_above", "many"], ["trips"]),
    ]
    limit = numpy_helper.from_array(np.float32(above or 0.0), "above")
    true = numpy_helper.from_array(np.array(True), "true")
    return classifier_onnx(
        w,
        extra=[
            *(always if above is None else sometimes),
            endless_loop("logits", "y"),
        ],
        extra_initializers=[trips, true, limit],
    )


def moody_onnx(w: Weights, mood: str, *, above: float) -> bytes:
    """Right answers; where an input has a larger value than ``above`` NaN (mood "nan"), or a failure ("error")."""
    top = [
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Greater", ["top", "above"], ["is_above"]),
    ]
    if mood == "nan":
        moody = [
            helper.make_node("Cast", ["is_above"], ["minus_if_above"], to=TensorProto.FLOAT),
            helper.make_node("Neg", ["minus_if_above"], ["negative"]),
            helper.make_node("Sqrt", ["negative"], ["nothing"]),
            helper.make_node("Add", ["logits", "nothing"], ["y"]),
        ]
    else:
        moody = [
            helper.make_node("Cast", ["is_above"], ["one_if_above"], to=TensorProto.INT64),
            helper.make_node("Mul", ["one_if_above", "far"], ["index"]),
            helper.make_node("Gather", ["zeros", "index"], ["zero"]),
            helper.make_node("Add", ["logits", "zero"], ["y"]),
        ]
    constants = {"above": np.float32(above), "far": np.array(1000, np.int64), "zeros": np.zeros(10, np.float32)}
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    return classifier_onnx(w, extra=top + moody, extra_initializers=initializers)


def classifier_tflite(w: Weights) -> bytes:
    """The classifier, `x: float32 [1, 8, 8, 1] -> y: float32 [1, 10]`, without a signature."""
    from ai_edge_litert import schema_py_generated as schema

    return packed_tflite(_tflite_model(schema, w))


def _tflite_model(schema: Any, w: Weights) -> Any:
    dense = w.dense.reshape(CHANNELS, SIDE, SIDE, CLASSES).transpose(1, 2, 0, 3).reshape(-1, CLASSES)
    model = schema.ModelT()
    model.version, model.description = 3, "tiny"
    model.buffers = [schema.BufferT()]
    graph = schema.SubGraphT()
    graph.tensors = [
        _tensor(schema, model, "x", [1, SIDE, SIDE, 1]),
        _tensor(schema, model, "conv", [CHANNELS, 3, 3, 1], w.conv.transpose(0, 2, 3, 1)),
        _tensor(schema, model, "conv_bias", [CHANNELS], w.conv_bias),
        _tensor(schema, model, "active", [1, SIDE, SIDE, CHANNELS]),
        _tensor(schema, model, "dense", [CLASSES, len(dense)], dense.T),
        _tensor(schema, model, "dense_bias", [CLASSES], w.dense_bias),
        _tensor(schema, model, "y", [1, CLASSES]),
    ]
    conv = schema.Conv2DOptionsT()
    conv.padding, conv.strideW, conv.strideH = schema.Padding.SAME, 1, 1
    conv.dilationWFactor = conv.dilationHFactor = 1
    conv.fusedActivationFunction = schema.ActivationFunctionType.RELU
    options = schema.BuiltinOptions
    operators = schema.BuiltinOperator
    graph.operators = [
        _operator(schema, 0, [0, 1, 2], [3], options.Conv2DOptions, conv),
        _operator(schema, 1, [3, 4, 5], [6], options.FullyConnectedOptions, schema.FullyConnectedOptionsT()),
    ]
    graph.inputs, graph.outputs, graph.name = [0], [6], "main"
    model.operatorCodes = [_code(schema, operators.CONV_2D), _code(schema, operators.FULLY_CONNECTED)]
    model.subgraphs = [graph]
    return model


def _tensor(schema: Any, model: Any, name: str, shape: list[int], data: np.ndarray | None = None) -> Any:
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type = name, shape, schema.TensorType.FLOAT32
    tensor.buffer = 0
    if data is not None:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(data, "<f4").tobytes(), np.uint8)
        tensor.buffer = len(model.buffers)
        model.buffers.append(buffer)
    return tensor


def _operator(schema: Any, code: int, inputs: list[int], outputs: list[int], kind: int, options: Any) -> Any:
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = code, inputs, outputs
    operator.builtinOptionsType, operator.builtinOptions = kind, options
    return operator


def _code(schema: Any, builtin: int) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = builtin
    code.version = 1
    return code
