"""The keys of an agent's configuration as docs/agent.md lists them, from the dataclasses that read them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from outrider.agent.config import (
    BrokerConfig,
    CloudConfig,
    CommandsConfig,
    InputsConfig,
    ModelConfig,
    OutputConfig,
    SparkplugConfig,
    TopConfig,
)
from outrider.agent.sourceconfig import SOURCES, Fitted

SECTIONS: Mapping[str, type[Any]] = {
    "top": TopConfig,
    "model": ModelConfig,
    "broker": BrokerConfig,
    "inputs": InputsConfig,
    "sparkplug": SparkplugConfig,
    "cloud": CloudConfig,
    "output": OutputConfig,
    "commands": CommandsConfig,
}


def rows(kind: type[Any], *, without: frozenset[str] = frozenset()) -> list[str]:
    """One line of a table a key: its name, its default, what it is."""
    hints = get_type_hints(kind, include_extras=True)
    fields = [field for field in dataclasses.fields(kind) if field.name not in without]
    return [f"| `{field.name}` | {_default(field)} | {hints[field.name].__metadata__[1]} |" for field in fields]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "**needed**"
    if field.default is None:
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{json.dumps(str(value) if isinstance(value, Path) else value)}`"


def tables() -> dict[str, list[str]]:
    """By heading: the keys above the tables, the tables, what all sources have, and each kind of source."""
    shared = frozenset(field.name for field in dataclasses.fields(Fitted))
    found = {name: rows(kind) for name, kind in SECTIONS.items()}
    found["source"] = rows(Fitted)
    return found | {f"source {kind}": rows(made, without=shared) for kind, made in SOURCES.items()}
