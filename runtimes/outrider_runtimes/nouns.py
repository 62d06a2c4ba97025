"""Frozen dataclasses that are made in a quarter of the time, for the classes that every start of a process makes.

The standard decorator compiles seven methods for each frozen class, which is a third of the time from
``import outrider`` to a first answer. Here only ``__init__`` is compiled; the other methods are the same functions for
all classes, and do the same: ``fields``, ``replace``, ``asdict``, ``field(repr=False)`` and FrozenInstanceError are as
ever. A comparison and a hash take longer, so that the standard one is the better one wherever a start does not lead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]


def _set(self: Any, name: str, value: object) -> None:
    """Each field once, by ``__init__``."""
    if name in self.__dict__ or name not in self.__dataclass_fields__:
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
    object.__setattr__(self, name, value)


def _delete(_: Any, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


def _compared(self: Any) -> tuple[Any, ...]:
    return tuple(getattr(self, field.name) for field in dataclasses.fields(self) if field.compare)


def _equal(self: Any, other: object) -> Any:
    return _compared(self) == _compared(other) if other.__class__ is self.__class__ else NotImplemented


def _hash(self: Any) -> int:
    return hash(_compared(self))


def _repr(self: Any) -> str:
    shown = [f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self) if field.repr]
    return f"{type(self).__qualname__}({', '.join(shown)})"


_METHODS = {
    "__setattr__": _set,
    "__delattr__": _delete,
    "__eq__": _equal,
    "__hash__": _hash,
    "__repr__": _repr,
}

if TYPE_CHECKING:
    from dataclasses import dataclass  # to a type checker they are the same
else:

    def dataclass(*, frozen: bool, kw_only: bool) -> Callable[[type], type]:
        """As ``dataclasses.dataclass(frozen=True, kw_only=True)``; there are no other options."""
        assert frozen and kw_only
        return _made


def _made(cls: type) -> type:
    for name, method in _METHODS.items():
        setattr(cls, name, method)
    return dataclasses.dataclass(kw_only=True, repr=False, eq=False)(cls)
