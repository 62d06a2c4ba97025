"""What an engine cannot do of what the suite asks, by case, with the reason. A case that is listed must fail."""

from __future__ import annotations

import platform
import struct

KNOWN_GAPS: dict[str, dict[str, str]] = {
    "onnxruntime": {},
    "onnxruntime-cuda": {},
    "onnxruntime-tensorrt": {},
    "litert": {},
    "tflite_runtime": {
        "same-uint16": "2.14 loads such a file and takes no array of that dtype",
    },
}
# What lies beyond the end of a file that was cut short is another thing elsewhere: on 32-bit ARM nothing crashed.
if platform.machine() == "x86_64" and struct.calcsize("P") == 8:
    KNOWN_GAPS["tflite_runtime"]["truncated"] = (
        "2.14 reads beyond the end of some files that were cut short, and crashes: admission's child does"
    )
