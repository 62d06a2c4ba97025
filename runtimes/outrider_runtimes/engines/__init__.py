"""What can run a model file on this machine. Engines are found by import, never by what was asked to be installed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from outrider_runtimes.errors import NoEngine
from outrider_runtimes.nouns import dataclass
from outrider_runtimes.tensors import Array, Shape

ENTRY_POINTS = "outrider.engines"


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

    @property
    def builds(self) -> bool:
        """Whether ``prepare`` compiles the file for this device, which takes minutes the first time."""
        ...

    def prepare(self, path: Path, *, threads: int, cache: Path | None = None) -> Session:
        """Load a model file, by path: an engine may map it.

        Args:
            path: the file.
            threads: how many it may use.
            cache: a folder of this file's own, which may not be there yet, for what an engine builds from it; it is
                kept as long as the file is installed. None: nothing is kept.

        Raises:
            ModelLoadError: the engine refused the file.
            MissingExtra: the library behind it is not installed.
        """
        ...


def find_engines(root: Path = Path("/"), *, left_out: Collection[str] = ()) -> tuple[Engine, ...]:
    """Every engine that there is for this machine, best first for each format, usable here or not.

    Those that Outrider has, and those of installed distributions with an entry point in the group ``outrider.engines``
    that names a class or function without arguments which gives an Engine (``builds`` and ``version`` may be absent).
    No library of an engine of Outrider's is imported. Those for NVIDIA's GPUs are among them only where ``root`` has
    such a device, or the onnxruntime that is installed is made for one.

    Args:
        root: where ``dev`` is.
        left_out: names of entry points that are not to be imported here.
    """
    from outrider_runtimes.engines.onnxruntime import accelerated

    own = (make() for make in _OWN.values())
    return (*accelerated(root), *own, *_strangers(left_out))


def engine_named(name: str) -> Engine:
    """The engine of that name, usable here or not. Raises NoEngine for a name that no engine has."""
    if name in _OWN:
        return _OWN[name]()
    from outrider_runtimes.engines.onnxruntime import ACCELERATED

    for way in ACCELERATED:
        if way.name == name:
            return way
    strangers = strange_names()  # last: that reads the metadata of all that is installed
    if name in strangers:  # the usual case, in which no other stranger is imported
        engine = strange_engine(name)
        if engine.name == name:
            return engine
    others = [*ACCELERATED, *_strangers()]
    for engine in others:
        if engine.name == name:
            return engine
    names = ", ".join([*_OWN, *(engine.name for engine in others)])
    raise NoEngine(f"there is no engine {name!r}", hint=f"the engines are {names}")


def _onnxruntime() -> Engine:
    from outrider_runtimes.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine()


def _litert() -> Engine:
    from outrider_runtimes.engines.litert import LiteRtEngine

    return LiteRtEngine()


def _tflite_runtime() -> Engine:
    from outrider_runtimes.engines.tflite_runtime import TfliteRuntimeEngine

    return TfliteRuntimeEngine()


# By name, best first for each format. Each is imported by itself: a start that needs one does not pay for the others.
_OWN: Mapping[str, Callable[[], Engine]] = {
    "onnxruntime": _onnxruntime,
    "litert": _litert,
    "tflite_runtime": _tflite_runtime,
}


def strange_names() -> tuple[str, ...]:
    """The names of the entry points of strangers' engines, sorted. Nothing is imported."""
    from outrider_runtimes.engines._stranger import entries

    return tuple(dict.fromkeys(entry.name for entry in entries(ENTRY_POINTS)))


def strange_engine(name: str) -> Engine:
    """The engine that a stranger's entry point gives. Imports it, which may be fatal.

    Raises:
        NoEngine: there is none of that name, it does not import, or gives what is no engine.
    """
    from outrider_runtimes.engines._stranger import entries, stranger

    for entry in entries(ENTRY_POINTS):
        if entry.name == name:
            return stranger(entry, _is_ours)
    raise NoEngine(f"no installed distribution has an engine {name!r}", hint="pip install the one that has it")


def _is_ours(name: str) -> bool:
    from outrider_runtimes.engines.onnxruntime import ACCELERATED

    return name in _OWN or name in [engine.name for engine in ACCELERATED]


def _strangers(left_out: Collection[str] = ()) -> tuple[Engine, ...]:
    found: list[Engine] = []
    for name in strange_names():
        if name in left_out:
            continue
        try:
            found.append(strange_engine(name))
        except NoEngine as error:  # one that is broken takes no other down with it
            import logging  # here, and in all that a load imports: most loads have nothing to say

            log = logging.getLogger(__name__)
            log.warning("%s", error)
    return tuple(found)


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
