"""What a converter or an engine raised, as an error of ours: which operator, which node, whose refusal, what works."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from outrider_exporters.known_gaps import DATA_DEPENDENT, find_gap
from outrider_runtimes.errors import ExportError

FORMAT_NAMES = {"onnx": "ONNX", "tflite": "TFLite"}
CONVERTERS = {"onnx": "torch.onnx", "tflite": "litert-torch"}
MAX_LINE = 300
OTHERWISE = {
    "onnx": 'write this part of forward with other operators; formats=("tflite",) where TFLite has it',
    "tflite": 'write this part of forward with other operators; formats=("onnx",) where ONNX has it',
}
_NO_OPERATOR = (
    re.compile(r"Lowerings? not found: (?P<operator>[\w:.]+)"),
    re.compile(r"No ONNX function found for <OpOverload\(op='(?P<operator>[\w:.]+)'"),
    re.compile(r"Missing ATen function[^\w]*(?P<operator>[\w:.]+)"),
)
_ENGINE_LACKS = re.compile(r"Didn't find op for builtin opcode '(?P<operator>\w+)'")
_NODE = re.compile(
    r"%(?P<node>\w+) : (?:\[num_users=\d+\] = )?call_function\[target=torch\.ops\.(?P<operator>[\w.]+)\]"
)
_DATA_DEPENDENT = re.compile(r"data-dependent expression|DataDependentOutputException|Dynamic control flow")
_RAISED_AT = re.compile(r'raised this error:\s+File "(?P<file>[^"]+)", line (?P<line>\d+), in \w+\s+(?P<code>[^\n]+)')
_AT = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in \w+\n\s+(?P<code>[^\n]+)')
_COLOURS = re.compile(r"\x1b\[\d+m")


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What could be read out of an error; empty where it does not say.

    Attributes:
        operator: as the tool calls it, or ``DATA_DEPENDENT``.
        node: of the traced graph.
        place: file, line and code of the user's.
        who: ``litert-torch``, ``torch.onnx`` or ``LiteRT``: who refused it.
        said: the error's own first line.
    """

    operator: str = ""
    node: str = ""
    place: str = ""
    who: str
    said: str

    @property
    def text(self) -> str:
        """In one line."""
        where = f" at {self.place}" if self.place else ""
        if self.operator == DATA_DEPENDENT:
            return f"{self.who} met a condition or a size that depends on a tensor's values{where}"
        if not self.operator:
            return f"{self.who} said: {self.said}"
        node = f" (node {self.node!r})" if self.node else ""
        return f"{self.who} has no form of the operator {self.operator}{node}{where}"


def diagnose(error: BaseException, model_format: str) -> Diagnosis:
    """Read the text of an error and of its causes."""
    texts = _texts(error)
    text = "\n".join(texts)
    who = CONVERTERS[model_format]
    said = _first_line(texts[-1], error)
    refused = _ENGINE_LACKS.search(text)
    if refused:
        return Diagnosis(operator=refused["operator"], who="LiteRT", said=said)
    if _DATA_DEPENDENT.search(text):
        return Diagnosis(operator=DATA_DEPENDENT, place=_place(text), who=who, said=said)
    node = _NODE.search(text)
    operator = next((found["operator"] for pattern in _NO_OPERATOR if (found := pattern.search(text))), "")
    return Diagnosis(
        operator=operator or (node["operator"] if node else ""),
        node=node["node"] if node else "",
        who=who,
        said=said,
    )


def conversion_error(error: BaseException, module: Any, model_format: str) -> ExportError:
    """The error that a user gets when a network cannot be converted; its hint is the list of known gaps'."""
    found = diagnose(error, model_format)
    layers = {type(layer).__name__ for layer in module.modules()}
    gap = find_gap(model_format, "float32", operators={found.operator}, layers=layers)
    reason = f": {gap.reason}" if gap else ""
    return ExportError(
        f"{type(module).__name__} cannot be converted to {FORMAT_NAMES[model_format]}: {found.text}{reason}",
        hint=gap.instead if gap else OTHERWISE[model_format],
    )


def _texts(error: BaseException) -> list[str]:
    """Of an error and its causes, the root last."""
    texts: list[str] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        texts.append(_COLOURS.sub("", str(error)))
        following = error.__cause__ or error.__context__
        if following is None:
            break
        error = following
    return texts


def _first_line(text: str, error: BaseException) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:MAX_LINE] if lines else type(error).__name__


def _place(text: str) -> str:
    """``model.py:12 `if x.sum() > 0:` ``; the file's name only, the folders are nobody's business."""
    found = _RAISED_AT.search(text) or next(reversed(list(_AT.finditer(text))), None)
    if found is None:
        return ""
    name = re.split(r"[/\\]", found["file"])[-1]
    return f"{name}:{found['line']} `{found['code'].strip()[:120]}`"
