"""TFLite files by LiteRT (`ai-edge-litert`)."""

from __future__ import annotations

from outrider_runtimes.engines._interpreter import InterpreterEngine
from outrider_runtimes.engines._library import Library


class LiteRtEngine(InterpreterEngine):
    """Runs ``.tflite`` files.

    Where a shape is free the library keeps the memory of the largest calls that it has had, until the session is
    closed: some times the bytes of their tensors, and no more with every further call.
    """

    name = "litert"
    library = Library(
        package="ai_edge_litert", module="ai_edge_litert.interpreter", distribution="ai-edge-litert", extra="tflite"
    )
