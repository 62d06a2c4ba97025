"""What is not shown of an engine, by case, with the reason. A case that is listed is skipped with it."""

from __future__ import annotations

_TFLITE = {
    "dtype-float64": "litert-torch writes float32 where torch had float64",
    "dtype-int64": "litert-torch writes int32 where torch had int64",
    "dtype-uint16": "litert-torch takes no uint16",
    "dtype-uint32": "litert-torch takes no uint32",
    "dtype-uint64": "litert-torch takes no uint64",
    "free-batch": "litert-torch writes a fixed batch",
}
KNOWN_GAPS: dict[str, dict[str, str]] = {
    "onnxruntime": {},
    "litert": _TFLITE,
    "tflite_runtime": _TFLITE,
}
