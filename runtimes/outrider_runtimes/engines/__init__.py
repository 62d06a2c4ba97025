"""What can run a model file on this machine. Engines are found by import, never by what was asked to be installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from outrider_runtimes.tensors import Array


class Session(Protocol):
    """One loaded model file. Not safe from several threads at once."""

    input_names: Sequence[str]
    output_names: Sequence[str]

    def run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        """Run once.

        Args:
            inputs: one C-contiguous array an input, in the order of ``input_names``, of the file's dtype and shape.

        Returns:
            One array an output, in the order of ``output_names``; the caller's to keep.

        Raises:
            InferenceError: the engine failed.
        """
        ...

    def close(self) -> None:
        """Free it."""
        ...


class Engine(Protocol):
    """Something that can run model files of certain formats here."""

    name: str
    formats: Sequence[str]

    def check(self) -> str | None:
        """None when it can be used here; else the reason and the way out, in one line."""
        ...

    def version(self) -> str:
        """The version of the library behind it."""
        ...

    def prepare(self, path: Path, *, threads: int) -> Session:
        """Load a model file, by path: an engine may map it.

        Raises:
            ModelLoadError: the engine refused the file.
            MissingExtra: the library behind it is not installed.
        """
        ...
