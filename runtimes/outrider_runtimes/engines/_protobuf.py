"""Whether an ONNX file leads to other files, found by walking its bytes; no onnx package, no parse of it all.

ONNX Runtime opens what an ONNX file names (and has followed links out of the model's folder), so such a file is
refused before the engine sees it.
"""

from __future__ import annotations

from outrider_runtimes.errors import ModelLoadError
from outrider_runtimes.protowire import LENGTH, Malformed, fields

# onnx.proto3: message -> field number -> message of the field. Only what can lead to a TensorProto.
_MESSAGES: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}
_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 13, 14
_NODE_OPERATOR = 4
_MAX_DEPTH = 64  # graphs nest through attributes; protobuf's own parser stops at 100 messages
_EXTERNAL = "keeps tensors in other files (external data)"
_CONTEXT = "has an EPContext operator, which may name other files"
_HINTS = {
    _EXTERNAL: "save it as one file: onnx.save(model, path, save_as_external_data=False)",
    _CONTEXT: "give the model from which that one was compiled",
}


def refuse_external_data(data: bytes, *, where: str) -> None:
    """Raise ModelLoadError when the ONNX file in ``data`` leads to other files, or it is no protobuf.

    A tensor may lie in another file, and an ``EPContext`` operator, a graph that was compiled for some accelerator, may
    name one.
    """
    try:
        fault = _fault(memoryview(data), "Model", 0)
    except Malformed:
        raise ModelLoadError(
            f"{where}: not an ONNX file, or one that was cut short",
            hint="export it again, or compare its sha256 with the original's",
        ) from None
    if fault:
        raise ModelLoadError(f"{where}: {fault}, which are never read", hint=_HINTS[fault])


def _fault(data: memoryview, message: str, depth: int) -> str:
    """How a message leads to another file; empty where it does not."""
    if depth > _MAX_DEPTH:
        raise Malformed
    children = _MESSAGES[message]
    for number, wire, value in fields(data):
        if message == "Tensor":
            if (number == _TENSOR_EXTERNAL_DATA) or (number == _TENSOR_DATA_LOCATION and value != 0):
                return _EXTERNAL
        elif wire == LENGTH and isinstance(value, memoryview):
            if message == "Node" and number == _NODE_OPERATOR and bytes(value) == b"EPContext":
                return _CONTEXT
            if number in children and (fault := _fault(value, children[number], depth + 1)):
                return fault
    return ""
