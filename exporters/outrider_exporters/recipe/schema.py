"""The JSON schema of a recipe file, made from the dataclasses: ``python -m outrider_exporters.recipe.schema``.

``docs/recipe.schema.json`` is what this prints; a test keeps it so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from outrider.bundle.manifest import FORMATS, NAME
from outrider_exporters.gates import GATES
from outrider_exporters.offload import Offload
from outrider_exporters.passes import TRANSFORMS
from outrider_exporters.recipe import MODEL_KEYS
from outrider_exporters.values import METRIC, TEXTS, Metric
from outrider_runtimes.targets import TARGETS

PYTHON_END = r"\Z"  # which JSON's regular expressions do not have
_TYPES: Mapping[str, Mapping[str, Any]] = {
    "float": {"type": "number"},
    "int": {"type": "integer"},
    "str": {"type": "string"},
    "bool": {"type": "boolean"},
    TEXTS: {"type": "array", "items": {"type": "string"}},
}


def recipe_schema() -> dict[str, Any]:
    """The schema, draft 2020-12. It says which keys there are and of which types; bounds are checked by the recipe."""
    texts = _TYPES[TEXTS]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Outrider recipe",
        "description": "A recipe file of `outrider export`, as TOML or JSON.",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "model": {
                "type": "object",
                "additionalProperties": False,
                "properties": {key: {"type": "string"} for key in MODEL_KEYS},
            },
            "name": {"type": "string", "pattern": f"^{NAME.pattern.removesuffix(PYTHON_END)}$"},
            "version": {"type": "integer", "minimum": 1},
            "formats": {"type": "array", "items": {"enum": list(FORMATS)}},
            "targets": {"type": "array", "items": {"enum": list(TARGETS)}},
            "labels": dict(texts),
            "seed": {"type": "integer"},
            "dynamic_axes": _by_name({"type": "string"}),
            "shapes": _by_name({"type": "array", "items": {"type": "integer"}}),
            "state": _by_name({"type": "string"}),
            "passes": {"type": "array", "items": _one_of(TRANSFORMS)},
            "gates": {"type": "array", "items": _one_of(GATES)},
            "offload": _table(Offload),
            "cloud_only": {"type": "boolean", "default": False},
        },
    }


def schema_text() -> str:
    """The schema as the file has it."""
    return json.dumps(recipe_schema(), indent=2) + "\n"


def _one_of(kinds: Mapping[str, type[Any]]) -> dict[str, Any]:
    return {"oneOf": [_table(cls, kind) for kind, cls in kinds.items()]}


def _table(cls: type[Any], kind: str = "") -> dict[str, Any]:
    """A dataclass as a table with its fields, and with ``type`` where it is one of several kinds."""
    fields = dataclasses.fields(cls)
    properties: dict[str, Any] = {"type": {"const": kind}} if kind else {}
    for field in fields:
        properties[field.name] = dict(_type(str(field.type)))
        if field.default is not dataclasses.MISSING:
            default = field.default
            properties[field.name]["default"] = list(default) if isinstance(default, tuple) else default
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    return {
        "type": "object",
        "description": _first_sentence(cls),
        "additionalProperties": False,
        "required": [*(["type"] if kind else []), *required],
        "properties": properties,
    }


def _by_name(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values}


def _type(name: str) -> Mapping[str, Any]:
    if name == METRIC:
        return {"oneOf": [{"type": "string"}, _table(Metric)]}
    return _TYPES[name]


def _first_sentence(cls: type[Any]) -> str:
    paragraph = (cls.__doc__ or "").strip().split("\n\n")[0]
    return " ".join(paragraph.split())


if __name__ == "__main__":
    print(schema_text(), end="")
