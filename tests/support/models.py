"""Small model files for tests. ONNX by onnx.helper, at once; TFLite by litert-torch, a second or two each."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
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
        return helper.make_tensor_value_info(name, getattr(TensorProto, ONNX_TYPES[dtype]), list(shape))

    graph = helper.make_graph(list(nodes), "g", [info(i) for i in inputs], [info(o) for o in outputs], list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def write_onnx(path: Path, *args: Any, **kwargs: Any) -> Path:
    """``onnx_model`` as a file."""
    path.write_bytes(onnx_model(*args, **kwargs).SerializeToString())
    return path


def onnx_identity(path: Path, dtype: str) -> Path:
    """y = x, [N, 3]."""
    from onnx import helper

    return write_onnx(
        path, [helper.make_node("Identity", ["x"], ["y"])], [("x", dtype, ["N", 3])], [("y", dtype, ["N", 3])]
    )


def onnx_linear(path: Path, *, rows: int | str = "N") -> Path:
    """y = x @ LINEAR_W + LINEAR_B; float32 x [rows, 4], y [rows, 3]."""
    from onnx import helper, numpy_helper

    tensors = [numpy_helper.from_array(LINEAR_W, "w"), numpy_helper.from_array(LINEAR_B, "b")]
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"])
    return write_onnx(path, [node], [("x", "float32", [rows, 4])], [("y", "float32", [rows, 3])], tensors)


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


def convert_to_tflite(path: Path, module: Any, example: tuple[Any, ...]) -> Path:
    """A torch module as a ``.tflite`` with one signature, ``serving_default``."""
    os.environ.setdefault("LITERT_TORCH_SHOW_PROGRESS", "n")
    import litert_torch

    logging.getLogger("litert_torch").setLevel(logging.ERROR)
    litert_torch.convert(module.eval(), example).export(str(path))
    return path


def tflite_linear(path: Path) -> Path:
    """As ``onnx_linear`` with one row: float32 args_0 [1, 4], output_0 [1, 3]."""
    import torch

    layer = torch.nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(LINEAR_W.T))
        layer.bias.copy_(torch.from_numpy(LINEAR_B))
    return convert_to_tflite(path, layer, (torch.zeros(1, 4),))


def tflite_several(path: Path) -> Path:
    """As ``onnx_several`` with one row and int32 i: args_0, args_1 [1, 2], args_2 [1]; output_0, _1, _2."""
    import torch

    return convert_to_tflite(
        path,
        _module(lambda a, b, i: (a + b, a - b, i + 0)),
        (
            torch.zeros(1, 2),
            torch.zeros(1, 2),
            torch.zeros(1, dtype=torch.int32),
        ),
    )


def tflite_add_one(path: Path, dtype: str) -> Path:
    """y = x + 1, or not x of a bool; args_0 and output_0 [1, 3]."""
    import torch

    function: Callable[..., Any] = torch.logical_not if dtype == "bool" else (lambda x: x + 1)
    return convert_to_tflite(path, _module(function), (torch.zeros(1, 3, dtype=getattr(torch, dtype)),))


def tflite_int8(path: Path, float_path: Path) -> Path:
    """``float_path`` (``tflite_linear``) with int8 weights, activations, inputs and outputs."""
    from ai_edge_quantizer import quantizer, recipe

    rng = np.random.default_rng(7)
    quantize = quantizer.Quantizer(str(float_path))
    quantize.load_quantization_recipe(recipe.static_wi8_ai8())
    samples = [{"args_0": rng.uniform(-1, 1, (1, 4)).astype(np.float32)} for _ in range(64)]
    ranges = quantize.calibrate({"serving_default": samples})
    for bounds in ranges.values():  # a moving average, which clips
        reach = 3 * np.maximum(np.abs(bounds["min"]), np.abs(bounds["max"]))
        bounds["min"], bounds["max"] = -reach, reach
    quantize.quantize(ranges).export_model(str(path), overwrite=True)
    return path


def _module(function: Callable[..., Any]) -> Any:
    import torch

    class Module(torch.nn.Module):
        def forward(self, *args: Any) -> Any:
            return function(*args)

    return Module()
