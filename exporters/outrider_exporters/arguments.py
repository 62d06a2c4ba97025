"""What ``export`` was called with, looked at before anything is done: a wrong kind is named with what would do."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ParamSpec, TypeVar

from outrider_exporters.offload import Offload
from outrider_exporters.recipe import Recipe
from outrider_runtimes.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What an argument may be, in words, and whether a value is that."""

    words: str
    fits: Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _listed(each: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(map(each, value))


def _named(each: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(_text(key) and each(item) for key, item in value.items())


def _pair(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(map(_number, value))


def _path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def _step(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("kind", "specs", "apply", "to_dict")) and not isinstance(value, type)


def _gate(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("kind", "requires", "judge")) and not isinstance(value, type)


_TEXTS = _Kind(words='a list of strings: ["logits"]', fits=_listed(_text))
_LETTERS = _Kind(words='strings by name: {"image": "NCHW"}', fits=_named(_text))
_STEPS = _Kind(words="a list of steps; see docs/steps.md", fits=_listed(_step))
_PATH = _Kind(words="a path", fits=_path)
_FUNCTION = _Kind(words="a function", fits=callable)
_KINDS: Mapping[str, _Kind] = {
    "example": _Kind(words='arrays by input name: {"image": x}', fits=_named(lambda _: True)),
    "golden": _Kind(words='arrays by input name: {"image": x}', fits=_named(lambda _: True)),
    "outputs": _TEXTS,
    "formats": _TEXTS,
    "targets": _TEXTS,
    "labels": _TEXTS,
    "axes": _LETTERS,
    "meanings": _Kind(words='strings by name: {"image": "0 is black"}', fits=_named(_text)),
    "dynamic_axes": _Kind(words='letters by input name: {"tokens": "T"}', fits=_named(_text)),
    "state": _Kind(words='outputs by input name: {"h": "h_next"}', fits=_named(_text)),
    "ranges": _Kind(words='pairs of numbers by name: {"image": (0.0, 1.0)}', fits=_named(_pair)),
    "shapes": _Kind(words='sizes by letter: {"T": [8, 16]}', fits=_named(_listed(lambda size: type(size) is int))),
    "preprocessing": _STEPS,
    "postprocessing": _STEPS,
    "recipe": _Kind(words="a Recipe: Recipe([Quantize()])", fits=lambda value: isinstance(value, Recipe)),
    "gates": _Kind(words='a list of gates: [MaxDrop("accuracy", points=1.0)]', fits=_listed(_gate)),
    "offload": _Kind(words="an Offload", fits=lambda value: isinstance(value, Offload)),
    "cloud_only": _Kind(words="True or False", fits=lambda value: isinstance(value, bool)),
    "signing_keys": _Kind(words="a list of private keys", fits=_listed(lambda _: True)),
    "evaluate": _Kind(words='a function: evaluate(predict, test) -> {"accuracy": 0.97}', fits=callable),
    "fit": _FUNCTION,
    "is_wrong": _FUNCTION,
    "progress": _FUNCTION,
    "output": _PATH,
    "report": _PATH,
    "name": _Kind(words="a string", fits=_text),
    "command": _Kind(words="a string", fits=_text),
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, behind a look at what it is called with.

    It raises ConfigError for the first argument that is of another kind than it may be. None passes where it is the
    argument's default.
    """
    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in chain(zip(parameters, args, strict=False), kwargs.items()):
            kind = _KINDS.get(name) if name in parameters else None
            if kind is None or (value is None and parameters[name].default is None):
                continue
            if not kind.fits(value):
                raise ConfigError(f"{name} is {value!r:.60}, expected {kind.words}")
        return function(*args, **kwargs)

    return call
