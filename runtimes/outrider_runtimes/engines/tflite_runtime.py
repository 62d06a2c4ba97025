"""TFLite files by tflite-runtime (`tflite-runtime`)."""

from __future__ import annotations

from outrider_runtimes.engines._interpreter import InterpreterEngine
from outrider_runtimes.engines._library import Library


class TfliteRuntimeEngine(InterpreterEngine):
    """Runs ``.tflite`` files where LiteRT has no wheel: 32-bit ARM, Python 3.11 or older, numpy 1."""

    name = "tflite_runtime"
    library = Library(
        package="tflite_runtime",
        module="tflite_runtime.interpreter",
        distribution="tflite-runtime",
        extra="tflite-legacy",
    )
