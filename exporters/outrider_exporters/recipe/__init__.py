"""A recipe: passes as a frozen value in Python, and a TOML file that names them with the model and the gates."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider_exporters.gates import GATES, Gate, gate_to_dict
from outrider_exporters.offload import Offload
from outrider_exporters.passes import QAT, TRANSFORMS, Distill, Pass, Prune, Quantize
from outrider_exporters.passes.qat import check_training
from outrider_exporters.values import METRIC, WORDS, Metric, is_a
from outrider_runtimes.errors import ConfigError

MODEL_KEYS = {"source": "source", "file": "model_file", "checkpoint": "checkpoint", "build": "build"}
NAMED = {"dynamic_axes": "str", "shapes": "int", "state": "str"}  # tables by tensor or letter, and of what
Transform = Prune | Distill | QAT | Quantize


@dataclass(frozen=True, init=False)
class Recipe:
    """Transforms in the order in which they run. Those that change the network stand before the quantization.

    >>> Recipe([Prune(ratio=0.5), Quantize("int8")]).kinds
    ('prune', 'quantize')
    """

    passes: tuple[Transform, ...]

    def __init__(self, passes: Sequence[Transform] = ()) -> None:
        object.__setattr__(self, "passes", tuple(passes))
        quantized = False
        for position, item in enumerate(self.passes):
            if not isinstance(item, tuple(TRANSFORMS.values())):
                known = ", ".join(t.__name__ for t in TRANSFORMS.values())
                raise ConfigError(f"passes[{position}] is a {type(item).__name__}", hint=f"one of {known}")
            if quantized and not isinstance(item, Quantize):
                raise ConfigError(
                    f"passes[{position}]: {item.kind} comes after quantize, which is a stage of the conversion",
                    hint="put quantize last",
                )
            quantized = isinstance(item, Quantize)
        check_training(self.passes)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the transforms, in order."""
        return tuple(item.kind for item in self.passes)

    @property
    def network_passes(self) -> tuple[Pass, ...]:
        """Those that change the network."""
        return tuple(item for item in self.passes if not isinstance(item, Quantize))

    @property
    def quantizations(self) -> tuple[Quantize, ...]:
        """One rule a scheme; of two rules for one scheme the later wins."""
        rules = {item.scheme: item for item in self.passes if isinstance(item, Quantize)}
        return tuple(rules.values())

    def to_dict(self) -> dict[str, Any]:
        """``{"passes": [{"type": "prune", "ratio": 0.5, ...}, ...]}``."""
        return {"passes": [{"type": item.kind, **dataclasses.asdict(item)} for item in self.passes]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of ``to_dict``. Raises ConfigError naming the key's path, such as ``passes[1].temprature``."""
        _check_keys(data, {"passes"}, "")
        return cls([build(TRANSFORMS, item, f"passes[{i}]") for i, item in enumerate(_tables(data, "passes"))])

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """The passes of a recipe file, which is checked as a whole. Raises ConfigError."""
        return RecipeFile.from_toml(path).recipe


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """A recipe file: which model, through which passes, under which gates.

    Attributes:
        path: of the file; empty where there is none.
        source: ``module:function``; the function gives ``export``'s ``model``, ``example``, ``outputs``, ``data`` and
            ``evaluate``, and ``fit`` and ``teacher`` where a pass needs them. Empty where the file has no ``[model]``.
        model_file: ``model.file``, an ``.onnx`` or ``.tflite`` file instead of the function's ``model``.
        checkpoint, build: ``model.checkpoint`` and ``model.build`` (``module:function``), a file of weights and what
            builds the network for them, instead of the function's ``model``.
        name: the bundle's, or None for the output file's.
        version, formats, targets, labels, seed: as ``export`` takes them; no formats are all that can be made.
        dynamic_axes, shapes, state: as ``export`` takes them, each a table.
    """

    path: str = ""
    source: str = ""
    model_file: str = ""
    checkpoint: str = ""
    build: str = ""
    name: str | None = None
    version: int = 1
    formats: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    seed: int = 0
    dynamic_axes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shapes: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    state: Mapping[str, str] = dataclasses.field(default_factory=dict)
    recipe: Recipe = Recipe()
    gates: tuple[Gate, ...] = ()
    offload: Offload | None = None
    cloud_only: bool = False

    @classmethod
    def from_toml(cls, path: str | Path) -> RecipeFile:
        """Read a file. Raises ConfigError naming the file and the key's path."""
        import tomllib

        file = Path(path)
        if file.exists() and not file.is_file():  # a pipe or a device would be read for ever
            raise ConfigError(f"{file} is not a regular file")
        try:
            data = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not TOML: {error}") from None
        try:
            return dataclasses.replace(cls.from_dict(data), path=str(file))
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}", hint=error.hint) from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RecipeFile:
        """The inverse of ``to_dict``. Raises ConfigError naming the key's path."""
        plain = {"model", "name", "version", "formats", "targets", "labels", "seed", "passes", "gates", "offload"}
        _check_keys(data, {*plain, "cloud_only", *NAMED}, "")
        model = data.get("model", {})
        if not isinstance(model, Mapping):
            raise ConfigError("model: expected a table", hint='[model] source = "module:function"')
        _check_keys(model, set(MODEL_KEYS), "model")
        values: dict[str, Any] = {key: _value("int", data[key], key) for key in ("version", "seed") if key in data}
        values |= {key: _texts(data[key], key) for key in ("formats", "targets", "labels") if key in data}
        values |= {key: _named(kind, data[key], key) for key, kind in NAMED.items() if key in data}
        if "cloud_only" in data:
            values["cloud_only"] = _value("bool", data["cloud_only"], "cloud_only")
        if "name" in data:
            values["name"] = _value("str", data["name"], "name")
        return cls(
            **{field: _value("str", model.get(key, ""), f"model.{key}") for key, field in MODEL_KEYS.items()},
            recipe=Recipe.from_dict({"passes": data.get("passes", [])}),
            gates=tuple(build(GATES, item, f"gates[{i}]") for i, item in enumerate(_tables(data, "gates"))),
            offload=_offload(data["offload"]) if "offload" in data else None,
            **values,
        )

    def to_dict(self) -> dict[str, Any]:
        """As the file says it; what is empty is left out."""
        model = {key: getattr(self, field) for key, field in MODEL_KEYS.items() if getattr(self, field)}
        out: dict[str, Any] = {"model": model} if model else {}
        if self.name is not None:
            out["name"] = self.name
        out |= {"version": self.version, "seed": self.seed}
        out |= {key: list(getattr(self, key)) for key in ("formats", "targets", "labels") if getattr(self, key)}
        out |= {key: _plain(getattr(self, key)) for key in NAMED if getattr(self, key)}
        if self.offload is not None:
            out["offload"] = dataclasses.asdict(self.offload)
        if self.cloud_only:
            out["cloud_only"] = True
        return {**out, **self.recipe.to_dict(), "gates": [gate_to_dict(gate) for gate in self.gates]}


def _offload(table: Any) -> Offload:
    if not isinstance(table, Mapping):
        raise ConfigError(f"offload: expected a table, not {table!r}", hint="[offload] alpha = 0.01")
    _check_keys(table, {field.name for field in dataclasses.fields(Offload)}, "offload")
    made: Offload = _fill(Offload, table, "offload", "a threshold")
    return made


def to_toml(data: Mapping[str, Any]) -> str:
    """A recipe file of ``RecipeFile.to_dict()``."""
    lines = [f"{key} = {_toml(value)}" for key, value in data.items() if not _is_table(value)]
    for key, value in data.items():
        tables = [(f"[{key}]", value)] if isinstance(value, Mapping) else []
        if isinstance(value, list) and _is_table(value):
            tables = [(f"[[{key}]]", item) for item in value]
        for header, items in tables:
            lines += ["", header, *(f"{name} = {_toml(item)}" for name, item in items.items() if item is not None)]
    return "\n".join(lines) + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(item, Mapping) for item in value))


def _toml(value: Any) -> str:
    """One value. JSON's are TOML's too, but for characters beyond ASCII and for DEL, which TOML wants escaped."""
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {_toml(item)}' for key, item in value.items())} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def build(kinds: Mapping[str, type[Any]], table: Any, path: str) -> Any:
    """A frozen dataclass from a table with its ``type`` and fields.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type or out of its range; names its path.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: expected a table, not {table!r}")
    kind = table.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(
            f"{path}.type: {'missing' if kind is None else f'unknown: {kind!r}'}", hint=_near(kind, kinds)
        )
    cls = kinds[kind]
    _check_keys(table, {"type", *(f.name for f in dataclasses.fields(cls))}, path)
    return _fill(cls, {key: value for key, value in table.items() if key != "type"}, path, kind)


def _fill(cls: type[Any], table: Mapping[str, Any], path: str, what: str) -> Any:
    """A dataclass from a table of its fields, whose keys are known."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {key: _value(str(fields[key].type), value, f"{path}.{key}") for key, value in table.items()}
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise ConfigError(f"{path}.{name}: missing", hint=f"{what} needs it")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", hint=error.hint) from None


def _check_keys(table: Mapping[str, Any], known: set[str], path: str) -> None:
    for key in table:
        if key not in known:
            raise ConfigError(f"{path + '.' if path else ''}{key}: unknown key", hint=_near(key, known))


def _near(wrong: object, known: Mapping[str, Any] | set[str]) -> str:
    close = difflib.get_close_matches(str(wrong), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"one of {', '.join(sorted(known))}"


def _value(type_name: str, value: Any, path: str) -> Any:
    if type_name == METRIC and isinstance(value, Mapping):
        _check_keys(value, {f.name for f in dataclasses.fields(Metric)}, path)
        return _fill(Metric, value, path, "a metric")
    if not is_a(type_name, value):
        raise ConfigError(f"{path}: expected {WORDS[type_name]}, not {value!r}")
    return float(value) if type_name == "float" else value


def _texts(value: Any, path: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"{path}: expected a list of strings, not {value!r}")
    return tuple(_value("str", item, f"{path}[{i}]") for i, item in enumerate(value))


def _named(type_name: str, value: Any, path: str) -> dict[str, Any]:
    """A table of values of one type by name."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected a table, not {value!r}", hint=f"[{path}]")
    if type_name == "int":  # a list of them
        return {key: _whole_numbers(item, f"{path}.{key}") for key, item in value.items()}
    return {key: _value(type_name, item, f"{path}.{key}") for key, item in value.items()}


def _whole_numbers(value: Any, path: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"{path}: expected a list of whole numbers, not {value!r}")
    return tuple(_value("int", item, f"{path}[{i}]") for i, item in enumerate(value))


def _plain(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value if isinstance(value, str) else list(value) for key, value in table.items()}


def _tables(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key, [])
    if not isinstance(value, list):
        raise ConfigError(f"{key}: expected a list of tables", hint=f"[[{key}]]")
    return value
