"""The types of a recipe's values, checked the same way in Python and in a file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from outrider_runtimes.errors import ConfigError

METRIC = "str | Metric"
TEXTS = "tuple[str, ...]"
WORDS = {
    "float": "a number",
    "int": "an integer",
    "str": "a string",
    "bool": "true or false",
    METRIC: "a metric's name or a Metric",
    TEXTS: "a list of strings",
}


@dataclass(frozen=True)
class Metric:
    """A figure that ``evaluate`` gives, and which way is up.

    >>> Metric("mean_error", higher_is_better=False)
    Metric(name='mean_error', higher_is_better=False)
    """

    name: str
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.name:
            raise ConfigError("name is empty, expected the name of a figure that evaluate gives")


_TYPES: dict[str, tuple[type, ...]] = {
    "float": (int, float),
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
    METRIC: (str, Metric),
}


def is_a(type_name: str, value: object) -> bool:
    """Whether a value is of the type that a field is annotated with; an integer is a number, a truth value is not."""
    if type_name == TEXTS:
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    return isinstance(value, _TYPES[type_name]) and isinstance(value, bool) == (type_name == "bool")


def check_fields(instance: Any) -> None:
    """Raise ConfigError for the first field of a dataclass whose value is of another type than its annotation."""
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if not is_a(str(field.type), value):
            raise ConfigError(f"{field.name} is {value!r}, expected {WORDS[str(field.type)]}")
