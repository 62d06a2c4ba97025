"""Made-up candidates of an export, whose figures a test chooses."""

from __future__ import annotations

from outrider_exporters.choose import Candidate


def candidate(
    name: str,
    *,
    ms: float | None = None,
    accuracy: float = 0.95,
    size: int = 1000,
    missed: str = "",
    noise: float = 0.0,
) -> Candidate:
    """``onnx-float32``, ``tflite-static``, ``onnx-qdq-u8s8``: the scheme is in the name."""
    kind, _, scheme = name.partition("-")
    return Candidate(
        name=name,
        format=kind,
        precision="float32" if scheme == "float32" else "int8",
        scheme=scheme,
        accuracy=accuracy,
        size_bytes=size,
        latency_ms=ms,
        parity=0.0,
        missed=missed,
        latency_noise=noise,
    )
