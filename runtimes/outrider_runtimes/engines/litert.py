"""TFLite files by LiteRT (`ai-edge-litert`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from outrider_runtimes.engines import _interpreter
from outrider_runtimes.engines._library import Library

LIBRARY = Library(
    package="ai_edge_litert", module="ai_edge_litert.interpreter", distribution="ai-edge-litert", extra="tflite"
)


class LiteRtEngine:
    """Runs ``.tflite`` files."""

    name = "litert"
    formats: Sequence[str] = ("tflite",)

    def check(self) -> str | None:
        """None when ai-edge-litert imports here; else the reason and the way out."""
        return LIBRARY.check()

    def version(self) -> str:
        """The version of ai-edge-litert. Raises MissingExtra."""
        return LIBRARY.version()

    def prepare(self, path: Path, *, threads: int) -> _interpreter.InterpreterSession:
        """Load a TFLite file. Raises ModelLoadError, MissingExtra."""
        return _interpreter.load(LIBRARY.load().Interpreter, path, threads=threads)
