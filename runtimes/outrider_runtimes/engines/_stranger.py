"""An engine of somebody else's, held to the protocol: whatever it does or raises, the caller sees a typed error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from outrider_runtimes.engines import FileTensor, Session
from outrider_runtimes.engines._library import one_line
from outrider_runtimes.errors import EngineError, InferenceError, MissingExtra, ModelLoadError, NoEngine
from outrider_runtimes.nouns import dataclass
from outrider_runtimes.tensors import Array

NEEDED = ("name", "formats", "check", "prepare")


@dataclass(frozen=True, kw_only=True)
class StrangeEngine:
    """A stranger's engine behind the face of ``Engine``. ``builds`` is False and ``version`` its distribution's where
    it has none of its own.
    """

    engine: Any
    name: str
    formats: Sequence[str]
    builds: bool
    distribution: str

    def check(self) -> str | None:
        """What it says of itself, or what it raised; a reason in one line."""
        try:
            reason = self.engine.check()
            self._own_version()
        except Exception as error:
            return f"its check failed: {one_line(error)}; ask whoever made the engine {self.name!r}"
        return reason if reason is None else " ".join(str(reason).split())

    def version(self) -> str:
        """Its own, else its distribution's. Raises NoEngine."""
        try:
            return self._own_version()
        except Exception as error:
            raise NoEngine(f"engine {self.name!r} does not tell its version: {one_line(error)}") from error

    def _own_version(self) -> str:
        own = getattr(self.engine, "version", None)
        return self.distribution if own is None else str(own())

    def prepare(self, path: Path, *, threads: int, cache: Path | None = None) -> Session:
        """As ``Engine.prepare``. Raises ModelLoadError, MissingExtra."""
        try:
            session = self.engine.prepare(path, threads=threads, cache=cache)
            return StrangeSession(session, name=self.name)
        except (ModelLoadError, MissingExtra):
            raise
        except Exception as error:
            raise ModelLoadError(f"engine {self.name!r} failed to load {path.name}: {one_line(error)}") from error


class StrangeSession:
    """A stranger's session behind the face of ``Session``."""

    def __init__(self, session: Any, *, name: str) -> None:
        """Read what the file declares. Raises what the stranger raises, and TypeError where it breaks the protocol."""
        self._session, self._name = session, name
        self.inputs: Sequence[FileTensor] = tuple(session.inputs)
        self.outputs: Sequence[FileTensor] = tuple(session.outputs)
        self.input_names: Sequence[str] = tuple(session.input_names)
        self.output_names: Sequence[str] = tuple(session.output_names)
        if not callable(session.run) or not callable(session.close):
            raise TypeError("its session has no run or no close")

    def run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        """As ``Session.run``. Raises InferenceError for whatever it raises, and for answers that are no arrays."""
        try:
            outputs = list(self._session.run(inputs))
        except EngineError:
            raise
        except Exception as error:
            raise InferenceError(f"engine {self._name!r} failed: {one_line(error)}") from error
        if len(outputs) != len(self.output_names) or not all(isinstance(output, np.ndarray) for output in outputs):
            kinds = ", ".join(type(output).__name__ for output in outputs)
            raise InferenceError(
                f"engine {self._name!r} answered with {kinds or 'nothing'}, expected {len(self.output_names)} arrays"
            )
        return outputs

    def close(self) -> None:
        """As ``Session.close``; what it raises goes to the log."""
        try:
            self._session.close()
        except Exception as error:
            import logging

            log = logging.getLogger(__name__)
            log.warning("engine %r failed to close a session: %s", self._name, one_line(error))


def entries(group: str) -> list[metadata.EntryPoint]:
    """The entry points of a group, by name. Nothing is imported."""
    return sorted(metadata.entry_points(group=group), key=lambda entry: entry.name)


def stranger(entry: metadata.EntryPoint, taken: Callable[[str], bool]) -> StrangeEngine:
    """Import an entry point and hold what it gives to the protocol.

    Args:
        taken: whether an engine of ours has that name.

    Raises:
        NoEngine: it does not import, or gives what is no engine; says what is missing.
    """
    where = f"the engine {entry.name!r} of {entry.value}"
    hint = "mend it, or uninstall the distribution that has it"
    if entry.dist is not None:
        hint = f"mend it, or pip uninstall {entry.dist.name}"
    try:
        engine = entry.load()()
        missing = [name for name in NEEDED if getattr(engine, name, None) is None]
        facts: dict[str, Any] = {key: getattr(engine, key, None) for key in ("name", "formats", "builds")}
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # SystemExit too: one that is broken takes no caller down with it
        raise NoEngine(f"{where} cannot be loaded: {one_line(error) or type(error).__name__}", hint=hint) from None
    if why := _unlike_an_engine(missing, facts, taken):
        raise NoEngine(f"{where} is none: {why}", hint=hint)
    version = "0" if entry.dist is None else entry.dist.version
    return StrangeEngine(
        engine=engine,
        name=facts["name"],
        formats=tuple(facts["formats"]),
        builds=facts["builds"] is True,
        distribution=version,
    )


def _unlike_an_engine(missing: Sequence[str], facts: Mapping[str, Any], taken: Callable[[str], bool]) -> str:
    """What keeps it from being an engine; empty for nothing."""
    if missing:
        return f"it has no {', '.join(missing)}"
    name, formats = facts["name"], facts["formats"]
    if not isinstance(name, str) or not name:
        return f"its name is {name!r:.40}, expected a text"
    if taken(name):
        return f"its name {name!r} is an engine's of Outrider"
    if isinstance(formats, str) or not isinstance(formats, Sequence) or not all(isinstance(f, str) for f in formats):
        return f"its formats are {formats!r:.40}, expected a sequence of texts such as ('onnx',)"
    return ""
