"""The library behind an engine: whether it is here, and getting it. Nothing is imported before it is used."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from outrider_runtimes.errors import MissingExtra, NoEngine
from outrider_runtimes.nouns import dataclass


@dataclass(frozen=True, kw_only=True)
class Library:
    """An import package and where it comes from.

    Attributes:
        package: the top-level import package; looked for first, because that costs no import.
        module: what is imported of it.
        distribution: what pip calls it.
        extra: the extra of ``outrider`` that installs it.
    """

    package: str
    module: str
    distribution: str
    extra: str

    def check(self) -> str | None:
        """None when it imports; else why not and the way out, in one line."""
        if not self._present():
            return f"{self.distribution} is not installed; pip install 'outrider[{self.extra}]'"
        try:
            self.load()
        except NoEngine as error:
            return f"{error}; {error.hint}"
        return None

    def load(self) -> Any:
        """The module. Raises MissingExtra when it is not installed, NoEngine when it is and does not import."""
        if not self._present():
            raise MissingExtra(self.distribution, extra=self.extra, purpose=f"running {self.extra.split('-')[0]} files")
        try:
            return importlib.import_module(self.module)
        except Exception as error:
            # A wheel for another numpy ABI or C library raises whatever it likes, not only ImportError.
            raise NoEngine(
                f"{self.distribution} is installed but does not import: {type(error).__name__}: {one_line(error)}",
                hint=f"pip install --force-reinstall 'outrider[{self.extra}]'",
            ) from error

    def version(self) -> str:
        """The version that the package states."""
        self.load()
        return str(getattr(importlib.import_module(self.package), "__version__", "unknown"))

    def _present(self) -> bool:
        try:
            return importlib.util.find_spec(self.package) is not None
        except (ImportError, ValueError):
            return False


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's text on one line, cut to ``limit`` characters: libraries put whole pages into theirs."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
