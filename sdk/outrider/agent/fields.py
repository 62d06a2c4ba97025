"""A table of a TOML file as a frozen dataclass; every problem is a ConfigError that names the key and what it expects.

A field is ``Annotated[type, rule, "what it is"]``. What it is becomes the hint of an error and a row of docs/agent.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from outrider_runtimes.errors import ConfigError

T = TypeVar("T")

MAX_PATH = 4096


def flag(value: Any) -> bool:
    """A rule: true or false."""
    if type(value) is not bool:
        raise ValueError(f"expected true or false, not {reprlib.repr(value)}")
    return value


@dataclasses.dataclass(frozen=True)
class Location:
    """A rule: a path; a relative one is seen from the folder of the configuration file."""

    base: Path = Path()

    def __call__(self, value: Any) -> Path:
        if type(value) is not str or not 0 < len(value) <= MAX_PATH or "\x00" in value:
            raise ValueError(f"expected a path, not {reprlib.repr(value)}")
        return self.base / value


def as_table(value: Any, at: str) -> Mapping[str, Any]:
    """The value, if it is a table. Raises ConfigError."""
    if not isinstance(value, dict):
        raise ConfigError(
            f"{at}: expected a table, not {reprlib.repr(value)}", hint=f"begin it with a line [{at}] of its own"
        )
    return value


def check_keys(table: Mapping[str, Any], known: Mapping[str, Any], at: str) -> None:
    """Raises ConfigError for a key that is not known, naming the nearest."""
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            where = f"[{at}] has" if at else "there is"
            hint = f"do you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
            raise ConfigError(f"{_path(at, key)}: {where} no such key", hint=hint)


def read_table(kind: type[T], value: Any, *, at: str, base: Path) -> T:
    """The table as ``kind``, whose fields carry their rules.

    Args:
        value: what the file has there.
        at: the table's name, for errors.
        base: the folder of the file.

    Raises:
        ConfigError: no table, an unknown key, one that is missing, or a value that its rule refuses.
    """
    table = as_table(value, at)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    check_keys(table, fields, at)
    hints = get_type_hints(kind, include_extras=True)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        rule, meaning = hints[name].__metadata__
        if name in table:
            values[name] = _checked(rule, table[name], at=_path(at, name), base=base, meaning=meaning)
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{_path(at, name)} is missing", hint=f"{name}: {meaning}")
    return kind(**values)


def _checked(rule: Any, value: Any, *, at: str, base: Path, meaning: str) -> Any:
    if isinstance(rule, Location):
        rule = Location(base)
    try:
        return rule(value)
    except ValueError as error:
        raise ConfigError(f"{at}: {error}", hint=f"it is: {meaning}") from None


def _path(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key
