"""What a step's keys may hold, and the base class that checks and stores them."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, get_type_hints

from outrider_runtimes.errors import FormatError
from outrider_runtimes.tensors import BATCH_AXIS

Rule = Callable[[Any], Any]  # the value as a step keeps it; ValueError says what was expected

MAX_SIDE = 8192  # of an image, in pixels
MAX_PIXELS = 2**24  # of an image: 200 MB as float32 with three channels
MAX_AXES = 8


@dataclass(frozen=True)
class Whole:
    """A whole number within bounds; a bool is none.

    Attributes:
        optional: whether None will do.
    """

    low: int
    high: int
    optional: bool = False

    def __call__(self, value: Any) -> int | None:
        if value is None and self.optional:
            return None
        if type(value) is not int or not self.low <= value <= self.high:
            raise ValueError(f"expected a whole number of {self.low} to {self.high}, not {reprlib.repr(value)}")
        return int(value)


@dataclass(frozen=True)
class Number:
    """A finite number within bounds, kept as a float.

    Attributes:
        optional: whether None will do.
    """

    low: float
    high: float
    optional: bool = False

    def __call__(self, value: Any) -> float | None:
        if value is None and self.optional:
            return None
        right = type(value) in (int, float) and math.isfinite(value) and self.low <= value <= self.high
        if not right:
            raise ValueError(f"expected a number of {self.low:g} to {self.high:g}, not {reprlib.repr(value)}")
        return float(value)


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]

    def __call__(self, value: Any) -> str:
        if type(value) is not str or value not in self.words:
            raise ValueError(f"expected one of {', '.join(self.words)}, not {reprlib.repr(value)}")
        return value


@dataclass(frozen=True)
class Text:
    """A text within bounds of length."""

    low: int
    high: int

    def __call__(self, value: Any) -> str:
        if type(value) is not str or not self.low <= len(value) <= self.high:
            raise ValueError(f"expected a text of {self.low} to {self.high} characters, not {reprlib.repr(value)}")
        return value


@dataclass(frozen=True)
class Many:
    """A list within bounds of length, of one kind of thing; kept as a tuple."""

    each: Rule
    low: int
    high: int

    def __call__(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or not self.low <= len(value) <= self.high:
            raise ValueError(f"expected a list of {self.low} to {self.high}, not {reprlib.repr(value)}")
        return tuple(map(self.each, value))


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"expected true or false, not {reprlib.repr(value)}")
    return value


def _letters(value: Any) -> str:
    fits = type(value) is str and 0 < len(value) <= MAX_AXES and value.isascii() and value.isalpha() and value.isupper()
    if not fits or len(set(value)) != len(value) or not value.startswith(BATCH_AXIS):
        raise ValueError(f"expected at most {MAX_AXES} different capital letters, N first, not {reprlib.repr(value)}")
    return str(value)


Name = Annotated[str, Text(1, 256)]  # of a tensor
Flag = Annotated[bool, _flag]
Axes = Annotated[str, _letters]
Axis = Annotated[int, Whole(-16, 15)]
Side = Annotated[int, Whole(1, MAX_SIDE)]


@lru_cache(maxsize=64)  # as many as there are kinds
def _rules_of(kind: Any) -> dict[str, Rule]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name].__metadata__[0] for field in dataclasses.fields(kind)}


@dataclass(frozen=True, kw_only=True)
class StoredStep:
    """What every step shares: its fields are checked by the rules in their annotations, and stored by name.

    A field is ``Annotated[type, rule]``. See ``Step`` for the rest.
    """

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for name, rule in self._rules().items():
            try:
                object.__setattr__(self, name, rule(getattr(self, name)))
            except ValueError as error:
                raise FormatError(f"{name}: {error}") from None
        self.check()

    def check(self) -> None:
        """What one field alone does not show. Raises FormatError."""

    def to_dict(self) -> dict[str, Any]:
        """As the manifest stores it: ``{"step": kind, ...}``."""
        return {"step": self.kind, **{name: _plain(getattr(self, name)) for name in self._rules()}}

    def _rules(self) -> dict[str, Rule]:
        kind: Any = type(self)
        return _rules_of(kind)


def check_area(height: int, width: int) -> None:
    """Whether an image of that size may be made. Raises FormatError."""
    if height * width > MAX_PIXELS:
        raise FormatError(f"{height} x {width} pixels are more than {MAX_PIXELS}")


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
