"""Frozen dataclasses that are made in a tenth of the time, for the classes that every start of a process makes.

The standard decorator compiles seven methods for each frozen class, which is a third of the time from
``import outrider`` to a first answer. Here none is compiled: the methods are the same functions for all classes, and do
the same: ``fields``, ``replace``, ``asdict``, ``field(repr=False)``, ``inspect.signature`` and FrozenInstanceError are
as ever. ``field(init=False)`` is not among it. A comparison and a hash take longer, so that the standard one is the
better one wherever a start does not lead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any, Final

__all__ = ["dataclass", "filled"]

# ``filled(kind, values)``: a NamedTuple of all its fields in order. Its own ``__new__`` is a function in Python, which
# takes three times as long: for the three that each call makes.
filled: Final = tuple.__new__


def _init_of(cls: type, fields: tuple[dataclasses.Field[Any], ...]) -> Callable[..., None]:
    """``__init__`` with the fields as its keywords."""
    checks = hasattr(cls, "__post_init__")

    def init(self: Any, **given: Any) -> None:
        values = self.__dict__  # past ``__setattr__``, which refuses
        for field in fields:
            if field.name in given:
                values[field.name] = given.pop(field.name)
            elif field.default is not MISSING:
                values[field.name] = field.default
            elif field.default_factory is not MISSING:
                values[field.name] = field.default_factory()
            else:
                raise TypeError(f"{cls.__qualname__}() is called without {field.name!r}")
        if given:
            raise TypeError(f"{cls.__qualname__}() has no field {next(iter(given))!r}")
        if checks:
            self.__post_init__()

    return init


class _Signature:
    """What ``inspect.signature`` and ``help`` show of a class, made when they ask for it."""

    def __get__(self, _: object, cls: type) -> Any:
        from inspect import Parameter, Signature

        def shown(field: dataclasses.Field[Any]) -> Parameter:
            defaults = [default for default in (field.default, field.default_factory) if default is not MISSING]
            default = defaults[0] if defaults else Parameter.empty
            return Parameter(field.name, Parameter.KEYWORD_ONLY, annotation=field.type, default=default)

        return Signature([shown(field) for field in dataclasses.fields(cls)])


def _set(_: Any, name: str, value: object) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


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
    "__signature__": _Signature(),
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
    made: Any = dataclasses.dataclass(init=False, kw_only=True, repr=False, eq=False)(cls)
    made.__init__ = _init_of(made, dataclasses.fields(made))
    return cls
