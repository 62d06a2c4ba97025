"""What can run a model file on this machine. Engines are found by import, never by what was asked to be installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from outrider_runtimes.errors import NoEngine
from outrider_runtimes.tensors import Array, Shape


@dataclass(frozen=True, kw_only=True)
class FileTensor:
    """One input or output as a model file declares it.

    Attributes:
        name: the file's name for it; for a ``.tflite`` see ``engines._interpreter``.
        dtype: a numpy name.
        shape: sizes; None where the file allows any.
        scale, zero_point: ``real = (stored - zero_point) * scale`` where the file says so; scale is None where it
            does not (an ONNX file never does).
    """

    name: str
    dtype: str
    shape: Shape
    scale: float | None = None
    zero_point: int = 0


class Session(Protocol):
    """One loaded model file. Not safe from several threads at once."""

    @property
    def inputs(self) -> Sequence[FileTensor]:
        """The inputs as the file declares them."""
        ...

    @property
    def outputs(self) -> Sequence[FileTensor]:
        """The outputs as the file declares them."""
        ...

    @property
    def input_names(self) -> Sequence[str]:
        """The names of ``inputs``."""
        ...

    @property
    def output_names(self) -> Sequence[str]:
        """The names of ``outputs``."""
        ...

    def run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        """Run once.

        Args:
            inputs: one C-contiguous array an input, in the order of ``input_names``, of the file's dtype and shape.

        Returns:
            One array an output, in the order of ``output_names``; the caller's to keep.

        Raises:
            InferenceError: the engine failed, or the session was closed.
        """
        ...

    def close(self) -> None:
        """Free it. A second call does nothing."""
        ...


class Engine(Protocol):
    """Something that can run model files of certain formats here."""

    @property
    def name(self) -> str:
        """What ``engine=`` calls it."""
        ...

    @property
    def formats(self) -> Sequence[str]:
        """The formats that it runs: ``"onnx"``, ``"tflite"``."""
        ...

    def check(self) -> str | None:
        """None when it can be used here; else the reason and the way out, in one line."""
        ...

    def version(self) -> str:
        """The version of the library behind it. Raises MissingExtra."""
        ...

    def prepare(self, path: Path, *, threads: int) -> Session:
        """Load a model file, by path: an engine may map it.

        Raises:
            ModelLoadError: the engine refused the file.
            MissingExtra: the library behind it is not installed.
        """
        ...


def find_engines() -> tuple[Engine, ...]:
    """Every engine that Outrider knows, best first for each format, usable here or not. Imports no engine library."""
    from outrider_runtimes.engines.litert import LiteRtEngine
    from outrider_runtimes.engines.onnxruntime import OnnxRuntimeEngine
    from outrider_runtimes.engines.tflite_runtime import TfliteRuntimeEngine

    return (OnnxRuntimeEngine(), LiteRtEngine(), TfliteRuntimeEngine())


def engine_named(name: str) -> Engine:
    """The engine of that name, usable here or not. Raises NoEngine for a name that no engine has."""
    engines = find_engines()
    for engine in engines:
        if engine.name == name:
            return engine
    raise NoEngine(f"there is no engine {name!r}", hint=f"the engines are {', '.join(e.name for e in engines)}")


def engines_for(format: str) -> tuple[Engine, ...]:
    """The engines that can run files of that format (``"onnx"``, ``"tflite"``) here, best first; may be empty."""
    return tuple(engine for engine in find_engines() if format in engine.formats and engine.check() is None)


def require_engines(format: str) -> tuple[Engine, ...]:
    """As ``engines_for``, at least one. Raises NoEngine that says of each engine why it cannot be used."""
    usable = engines_for(format)
    if usable:
        return usable
    reasons = [f"{e.name}: {e.check()}" for e in find_engines() if format in e.formats]
    if not reasons:
        raise NoEngine(f"no engine runs files of format {format!r}", hint="the formats are onnx and tflite")
    raise NoEngine(
        f"no engine here runs {format} files ({'; '.join(reasons)})",
        hint=f"pip install 'outrider[{format}]'",
    )
