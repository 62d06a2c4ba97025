"""docs/telemetry.schema.json, and what it has against a value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import jsonschema

SCHEMA: Final[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "docs" / "telemetry.schema.json").read_text(encoding="utf-8")
)


def complaints(name: str, value: object) -> list[str]:
    """What the schema has against a payload or a body."""
    schema = {"$schema": SCHEMA["$schema"], "$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]}
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(value)]
