"""Small ``.tflite`` files written by hand, with the schema that ships in ai-edge-litert: no converter, any dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.models import INT8_X, INT8_Y, LINEAR_B, LINEAR_W


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """``dtype``: a numpy name, or the schema's in capitals. ``shape``: None where the file allows any size."""

    name: str
    dtype: str = "float32"
    shape: tuple[int | None, ...]
    data: np.ndarray | None = None
    scale: float | None = None
    zero_point: int = 0


@dataclass(frozen=True, kw_only=True)
class Operator:
    """``kind``: the schema's name of a builtin operator; ``inputs`` and ``outputs`` by tensor name."""

    kind: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    options: str = ""


def write_tflite(
    path: Path,
    tensors: Sequence[Tensor],
    operators: Sequence[Operator],
    *,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    signature: bool = True,
) -> Path:
    """One graph.

    Args:
        inputs, outputs: tensor name by the name that the signature gives it.
        signature: whether there is one.
    """
    from ai_edge_litert import schema_py_generated as schema

    at = {tensor.name: position for position, tensor in enumerate(tensors)}
    model = schema.ModelT()
    model.version, model.description, model.buffers = 3, "", [schema.BufferT()]
    graph = schema.SubGraphT()
    graph.name = "main"
    graph.tensors = [_tensor(schema, model, tensor) for tensor in tensors]
    graph.inputs, graph.outputs = [at[name] for name in inputs.values()], [at[name] for name in outputs.values()]
    kinds = list(dict.fromkeys(operator.kind for operator in operators))
    graph.operators = [_operator(schema, kinds.index(each.kind), each, at) for each in operators]
    model.operatorCodes, model.subgraphs = [_code(schema, kind) for kind in kinds], [graph]
    if signature:
        model.signatureDefs = [_signature(schema, inputs, outputs, at)]
    path.write_bytes(packed_tflite(model))
    return path


def packed_tflite(model: Any) -> bytes:
    """The file of a model in the schema's own objects."""
    import flatbuffers

    builder = flatbuffers.Builder(4096)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def parsed_tflite(content: bytes) -> Any:
    """A file as the schema's own objects: a ``ModelT``."""
    from ai_edge_litert import schema_py_generated as schema

    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))


def _tensor(schema: Any, model: Any, tensor: Tensor) -> Any:
    made = schema.TensorT()
    made.name, made.type = tensor.name, getattr(schema.TensorType, tensor.dtype.upper())
    made.shape = [1 if size is None else size for size in tensor.shape]
    if None in tensor.shape:
        made.shapeSignature = [-1 if size is None else size for size in tensor.shape]
    made.buffer = 0
    if tensor.data is not None:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(tensor.data).tobytes(), np.uint8)
        made.buffer = len(model.buffers)
        model.buffers.append(buffer)
    if tensor.scale is not None:
        made.quantization = schema.QuantizationParametersT()
        made.quantization.scale, made.quantization.zeroPoint = [tensor.scale], [tensor.zero_point]
    return made


def _operator(schema: Any, code: int, operator: Operator, at: Mapping[str, int]) -> Any:
    made = schema.OperatorT()
    made.opcodeIndex = code
    made.inputs, made.outputs = [at[name] for name in operator.inputs], [at[name] for name in operator.outputs]
    if operator.options:
        made.builtinOptionsType = getattr(schema.BuiltinOptions, operator.options)
        made.builtinOptions = getattr(schema, f"{operator.options}T")()
    return made


def _code(schema: Any, kind: str) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, kind)
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    code.version = 1
    return code


def _signature(schema: Any, inputs: Mapping[str, str], outputs: Mapping[str, str], at: Mapping[str, int]) -> Any:
    made = schema.SignatureDefT()
    made.signatureKey, made.subgraphIndex = "serving_default", 0
    made.inputs, made.outputs = (
        [_named(schema, key, at[name]) for key, name in side.items()] for side in (inputs, outputs)
    )
    return made


def _named(schema: Any, name: str, index: int) -> Any:
    made = schema.TensorMapT()
    made.name, made.tensorIndex = name, index
    return made


def tflite_linear(path: Path, *, rows: int | None = None, signature: bool = True) -> Path:
    """y = x @ LINEAR_W + LINEAR_B; float32 x [rows, 4], y [rows, 3]."""
    tensors = [
        Tensor(name="serving_x", shape=(rows, 4)),
        Tensor(name="w", shape=(3, 4), data=LINEAR_W.T),
        Tensor(name="b", shape=(3,), data=LINEAR_B),
        Tensor(name="serving_y", shape=(rows, 3)),
    ]
    operator = Operator(
        kind="FULLY_CONNECTED", inputs=["serving_x", "w", "b"], outputs=["serving_y"], options="FullyConnectedOptions"
    )
    return write_tflite(
        path, tensors, [operator], inputs={"x": "serving_x"}, outputs={"y": "serving_y"}, signature=signature
    )


def tflite_int8(path: Path) -> Path:
    """As ``tflite_linear`` for one row with int8 weights, activations, input and output; x from -4 to 4."""
    (scale_x, zero_x), (scale_y, zero_y) = INT8_X, INT8_Y
    scale_w = float(np.abs(LINEAR_W).max()) / 127
    bias = np.rint(LINEAR_B / (scale_x * scale_w)).astype(np.int32)
    tensors = [
        Tensor(name="qx", dtype="int8", shape=(1, 4), scale=scale_x, zero_point=zero_x),
        Tensor(name="w", dtype="int8", shape=(3, 4), data=np.rint(LINEAR_W.T / scale_w).astype(np.int8), scale=scale_w),
        Tensor(name="b", dtype="int32", shape=(3,), data=bias, scale=scale_x * scale_w),
        Tensor(name="qy", dtype="int8", shape=(1, 3), scale=scale_y, zero_point=zero_y),
    ]
    operator = Operator(
        kind="FULLY_CONNECTED", inputs=["qx", "w", "b"], outputs=["qy"], options="FullyConnectedOptions"
    )
    return write_tflite(path, tensors, [operator], inputs={"x": "qx"}, outputs={"y": "qy"})


def tflite_several(path: Path) -> Path:
    """sum = a + b, difference = a - b, echo = i; float32 a, b [N, 2]; int64 i [N]."""
    tensors = [
        *(Tensor(name=name, shape=(None, 2)) for name in ("a", "b", "sum", "difference")),
        *(Tensor(name=name, dtype="int64", shape=(None,)) for name in ("i", "echo")),
        Tensor(name="any", dtype="int32", shape=(1,), data=np.array([-1], np.int32)),
    ]
    operators = [
        Operator(kind="ADD", inputs=["a", "b"], outputs=["sum"], options="AddOptions"),
        Operator(kind="SUB", inputs=["a", "b"], outputs=["difference"], options="SubOptions"),
        Operator(kind="RESHAPE", inputs=["i", "any"], outputs=["echo"]),
    ]
    return write_tflite(
        path,
        tensors,
        operators,
        inputs={name: name for name in ("a", "b", "i")},
        outputs={name: name for name in ("sum", "difference", "echo")},
    )


def tflite_same(path: Path, dtype: str) -> Path:
    """y = x, [1, 3]. ``dtype`` as in ``Tensor``."""
    shape = Tensor(name="shape", dtype="int32", shape=(2,), data=np.array([1, 3], np.int32))
    ends = [Tensor(name=name, dtype=dtype, shape=(1, 3)) for name in ("x", "y")]
    operator = Operator(kind="RESHAPE", inputs=["x", "shape"], outputs=["y"])
    return write_tflite(path, [*ends, shape], [operator], inputs={"x": "x"}, outputs={"y": "y"})


def tflite_doubled(path: Path) -> Path:
    """y = x + x, float32 [N, T, 2]; N and T are free."""
    ends = [Tensor(name=name, shape=(None, None, 2)) for name in ("x", "y")]
    operator = Operator(kind="ADD", inputs=["x", "x"], outputs=["y"], options="AddOptions")
    return write_tflite(path, ends, [operator], inputs={"x": "x"}, outputs={"y": "y"})
