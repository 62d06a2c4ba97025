"""What an engine cannot do of what the suite asks, by case, with the reason. A case that is listed must fail
unless it is unsteady."""

from __future__ import annotations

KNOWN_GAPS: dict[str, dict[str, str]] = {
    "onnxruntime": {},
    "onnxruntime-cuda": {},
    "onnxruntime-tensorrt": {},
    "litert": {},
    "tflite_runtime": {
        "same-uint16": "2.14 loads such a file and takes no array of that dtype",
        "truncated": "2.14 reads beyond the end of some files that were cut short, and crashes: admission's child does",
    },
}
# Gaps that depend on what lies in memory: a case of these may work.
UNSTEADY = frozenset([("tflite_runtime", "truncated")])

# Not a case of the suite, but of tests/unit/test_footprint.py, which says how much it is.
KEEPS_MEMORY = {
    "litert": "2.3 keeps what its largest calls took until the session is closed; ONNX Runtime gives it back",
}


def gap_of(engine: str, case: str) -> str | None:
    """Why an engine cannot do a case; None where it has to. A stranger's engine has no gaps that are known here."""
    return KNOWN_GAPS.get(engine, {}).get(case)
