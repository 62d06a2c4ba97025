"""Whether an ONNX file keeps tensors in other files, found by walking its bytes; no onnx package, no parse of it all.

ONNX Runtime opens what an ONNX file names (and has followed links out of the model's folder), so such a file is
refused before the engine sees it.
"""

from __future__ import annotations

from collections.abc import Iterator

from outrider_runtimes.errors import ModelLoadError

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5

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
_MAX_DEPTH = 64  # graphs nest through attributes; protobuf's own parser stops at 100 messages


def refuse_external_data(data: bytes, *, where: str) -> None:
    """Raise ModelLoadError when a tensor of the ONNX file in ``data`` lies in another file, or it is no protobuf."""
    try:
        external = _has_external(memoryview(data), "Model", 0)
    except _Malformed:
        raise ModelLoadError(
            f"{where}: not an ONNX file, or one that was cut short",
            hint="export it again, or compare its sha256 with the original's",
        ) from None
    if external:
        raise ModelLoadError(
            f"{where}: keeps tensors in other files (external data), which are never read",
            hint="save it as one file: onnx.save(model, path, save_as_external_data=False)",
        )


class _Malformed(Exception):
    """The bytes are not a protobuf message."""


def _has_external(data: memoryview, message: str, depth: int) -> bool:
    if depth > _MAX_DEPTH:
        raise _Malformed
    children = _MESSAGES[message]
    for number, wire, value in _fields(data):
        if message == "Tensor":
            if (number == _TENSOR_EXTERNAL_DATA) or (number == _TENSOR_DATA_LOCATION and value != 0):
                return True
        elif (
            number in children
            and wire == LENGTH
            and isinstance(value, memoryview)
            and _has_external(value, children[number], depth + 1)
        ):
            return True
    return False


def _fields(data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Field number, wire type and value: an int of a varint, the bytes of anything else."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise _Malformed
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, wire, value
            continue
        if wire == LENGTH:
            size, at = _varint(data, at)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise _Malformed  # groups, which proto3 does not have
        if size > end - at:
            raise _Malformed
        yield number, wire, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _Malformed
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _Malformed
