"""Small ONNX files for tests, by onnx.helper. Their twins in TFLite are in ``tflitefiles``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ONNX_TYPES = {
    "bool": "BOOL",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "float16": "FLOAT16",
    "float32": "FLOAT",
    "float64": "DOUBLE",
}
Info = tuple[str, str, Sequence[Any]]  # name, dtype, shape: a number, or a name where it is free


def onnx_model(
    nodes: Sequence[Any], inputs: Sequence[Info], outputs: Sequence[Info], tensors: Sequence[Any] = ()
) -> Any:
    """A ModelProto of opset 17."""
    from onnx import TensorProto, helper

    def info(item: Info) -> Any:
        name, dtype, shape = item
        return helper.make_tensor_value_info(name, getattr(TensorProto, ONNX_TYPES.get(dtype, dtype)), list(shape))

    graph = helper.make_graph(list(nodes), "g", [info(i) for i in inputs], [info(o) for o in outputs], list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def write_onnx(path: Path, *args: Any, **kwargs: Any) -> Path:
    """``onnx_model`` as a file."""
    path.write_bytes(onnx_model(*args, **kwargs).SerializeToString())
    return path


def onnx_same(path: Path, dtype: str) -> Path:
    """y = x, [1, 3]. ``dtype``: a numpy name, or onnx's in capitals."""
    from onnx import helper

    return write_onnx(
        path, [helper.make_node("Identity", ["x"], ["y"])], [("x", dtype, [1, 3])], [("y", dtype, [1, 3])]
    )


def onnx_linear(path: Path, *, rows: int | str = "N") -> Path:
    """y = x @ LINEAR_W + LINEAR_B; float32 x [rows, 4], y [rows, 3]."""
    from onnx import helper, numpy_helper

    tensors = [numpy_helper.from_array(LINEAR_W, "w"), numpy_helper.from_array(LINEAR_B, "b")]
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"])
    return write_onnx(path, [node], [("x", "float32", [rows, 4])], [("y", "float32", [rows, 3])], tensors)


# What an int8 file with int8 ends has at them: (scale, zero point) of x and of y.
INT8_X, INT8_Y = (4 / 127, 3), (16 / 127, -2)


def onnx_int8(path: Path) -> Path:
    """As ``onnx_linear`` for one row with int8 ends, whose scales no reader of the file can ask for; x from -4 to 4."""
    from onnx import helper, numpy_helper

    nodes = [
        helper.make_node("DequantizeLinear", ["x", "x_scale", "x_zero"], ["wide"]),
        helper.make_node("Gemm", ["wide", "w", "b"], ["made"]),
        helper.make_node("QuantizeLinear", ["made", "y_scale", "y_zero"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(LINEAR_W, "w"), numpy_helper.from_array(LINEAR_B, "b")]
    for end, (scale, zero_point) in (("x", INT8_X), ("y", INT8_Y)):
        tensors.append(numpy_helper.from_array(np.float32(scale), f"{end}_scale"))
        tensors.append(numpy_helper.from_array(np.int8(zero_point), f"{end}_zero"))
    return write_onnx(path, nodes, [("x", "int8", [1, 4])], [("y", "int8", [1, 3])], tensors)


def onnx_doubled(path: Path) -> Path:
    """y = x + x, float32 [N, T, 2]; N and T are free."""
    from onnx import helper

    ends: list[Info] = [(name, "float32", ["N", "T", 2]) for name in ("x", "y")]
    return write_onnx(path, [helper.make_node("Add", ["x", "x"], ["y"])], ends[:1], ends[1:])


def onnx_several(path: Path) -> Path:
    """sum = a + b, difference = a - b, echo = i; float32 a, b [N, 2]; int64 i [N]."""
    from onnx import helper

    nodes = [
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Sub", ["a", "b"], ["difference"]),
        helper.make_node("Identity", ["i"], ["echo"]),
    ]
    inputs: list[Info] = [("a", "float32", ["N", 2]), ("b", "float32", ["N", 2]), ("i", "int64", ["N"])]
    outputs: list[Info] = [("sum", "float32", ["N", 2]), ("difference", "float32", ["N", 2]), ("echo", "int64", ["N"])]
    return write_onnx(path, nodes, inputs, outputs)


_rng = np.random.default_rng(20)
LINEAR_W = _rng.standard_normal((4, 3)).astype(np.float32)
LINEAR_B = _rng.standard_normal(3).astype(np.float32)
