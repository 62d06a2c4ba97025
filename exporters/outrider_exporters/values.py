"""The types of a recipe's values, checked the same way in Python and in a file."""

from __future__ import annotations

import dataclasses
from typing import Any

from outrider_runtimes.errors import ConfigError

WORDS = {"float": "a number", "int": "an integer", "str": "a string"}
_TYPES: dict[str, tuple[type, ...]] = {"float": (int, float), "int": (int,), "str": (str,)}


def is_a(type_name: str, value: object) -> bool:
    """Whether a value is of the type that a field is annotated with; an integer is a number, a truth value is not."""
    return isinstance(value, _TYPES[type_name]) and not isinstance(value, bool)


def check_fields(instance: Any) -> None:
    """Raise ConfigError for the first field of a dataclass whose value is of another type than its annotation."""
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if not is_a(str(field.type), value):
            raise ConfigError(f"{field.name} is {value!r}, expected {WORDS[str(field.type)]}")
