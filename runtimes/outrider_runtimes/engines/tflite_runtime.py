"""TFLite files by tflite-runtime (`tflite-runtime`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from outrider_runtimes.engines import _interpreter
from outrider_runtimes.engines._library import Library

LIBRARY = Library(
    package="tflite_runtime", module="tflite_runtime.interpreter", distribution="tflite-runtime", extra="tflite-legacy"
)


class TfliteRuntimeEngine:
    """Runs ``.tflite`` files where LiteRT has no wheel: 32-bit ARM, Python 3.11 or older, numpy 1."""

    name = "tflite_runtime"
    formats: Sequence[str] = ("tflite",)

    def check(self) -> str | None:
        """None when tflite-runtime imports here; else the reason and the way out."""
        return LIBRARY.check()

    def version(self) -> str:
        """The version of tflite-runtime. Raises MissingExtra."""
        return LIBRARY.version()

    def prepare(self, path: Path, *, threads: int) -> _interpreter.InterpreterSession:
        """Load a TFLite file. Raises ModelLoadError, MissingExtra."""
        return _interpreter.load(LIBRARY.load().Interpreter, path, threads=threads)
