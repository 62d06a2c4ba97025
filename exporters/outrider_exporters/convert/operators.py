"""The operators of a model file in one form for both formats, and which of them a name means. Pure but for reading."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider_runtimes.errors import ConfigError, MissingExtra

# A segment of a layer's path under every name that it may have: TFLite files write ``Conv2d_stem`` for ``stem``.
Segment = tuple[str, ...]
ROOT = "module"  # where ``sources.PositionalModule`` keeps the user's network
PARAMETERS = ("weight", "bias")
TFLITE_FLOAT32 = 0  # of the schema's TensorType


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator of a float file.

    Attributes:
        name: unique in the file: of the node (ONNX), of its outputs (TFLite).
        kind: ``Conv``, ``CONV_2D``.
        inputs, outputs: the tensors that are computed, by name; constants are not among them.
        layers: the torch layers that it was made from, as paths.
        weighted: whether it has a constant with two axes or more.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[tuple[Segment, ...], ...] = ()
    weighted: bool = False

    @property
    def label(self) -> str:
        """What a person calls it: the path of its weights' layer where the file has it, else its name."""
        path = max(self.layers, key=len, default=())
        parts = [names[0] for names in path]
        return ".".join(parts[:-1] if parts and parts[-1] in PARAMETERS else parts) or self.name

    def within(self, layer: str) -> bool:
        """Whether it was made from the layer with this path, or from one below it."""
        wanted = layer.split(".")
        return any(
            len(path) >= len(wanted) and all(part in names for part, names in zip(wanted, path, strict=False))
            for path in self.layers
        )


def find_named(operators: Sequence[Operator], names: Iterable[str], model_format: str) -> tuple[str, ...]:
    """The operators that ``keep_float`` means, by name, in the file's order.

    A layer's path means its operators and those without weights that follow; ``onnx:NAME`` or ``tflite:NAME`` means
    this operator, and nothing in the other format.

    Raises:
        ConfigError: nothing in the file is called so.
    """
    kept: set[str] = set()
    for name in names:
        prefix, _, rest = name.partition(":")
        if prefix in ("onnx", "tflite"):
            if prefix == model_format:
                kept |= {_exactly(operators, rest, model_format)}
            continue
        found = {operator.name for operator in operators if operator.within(name)}
        if not found:
            raise ConfigError(
                f"keep_float: no layer {name!r} is in the {model_format} file", hint=_near(name, _layers(operators))
            )
        kept |= with_followers(operators, found)
    return tuple(operator.name for operator in operators if operator.name in kept)


def with_followers(operators: Sequence[Operator], names: Iterable[str]) -> set[str]:
    """These operators and, down to the next weights, those without weights that take what they give.

    A layer whose output is hard to quantize passes it on through activations, pools and sums.
    """
    kept = set(names)
    given = {tensor for operator in operators if operator.name in kept for tensor in operator.outputs}
    for operator in operators:  # a producer stands before its consumers in both formats
        if not operator.weighted and given.intersection(operator.inputs):
            kept.add(operator.name)
            given.update(operator.outputs)
    return kept


def onnx_operators(model: Any) -> tuple[Operator, ...]:
    """The nodes of an ONNX ModelProto's graph; nodes without a name get one, in place."""
    axes = {weight.name: len(weight.dims) for weight in model.graph.initializer}
    taken = {node.name for node in model.graph.node}
    operators = []
    for place, node in enumerate(model.graph.node):
        if not node.name:
            node.name = next(n for n in (f"{node.op_type}_{place}", f"unnamed_{place}") if n not in taken)
        constants = [name for name in node.input if name in axes]
        operators.append(
            Operator(
                name=node.name,
                kind=node.op_type,
                inputs=tuple(name for name in node.input if name and name not in axes),
                outputs=tuple(name for name in node.output if name),
                layers=tuple(_onnx_path(name) for name in constants),
                weighted=any(axes[name] >= 2 for name in constants),
            )
        )
    return tuple(operators)


def tflite_operators(path: Path) -> tuple[Operator, ...]:
    """The operators of a TFLite file's first graph; a name is what AI Edge Quantizer calls the operator's scope."""
    try:
        from ai_edge_quantizer.utils import tfl_flatbuffer_utils as flatbuffers
    except ImportError as error:
        raise MissingExtra("ai-edge-quantizer", extra="export", purpose="reading TFLite") from error
    model = flatbuffers.read_model(str(path))
    graph = model.subgraphs[0]
    operators = []
    for item in graph.operators:
        code = model.operatorCodes[item.opcodeIndex].builtinCode
        inputs = [graph.tensors[at] for at in item.inputs if at >= 0]
        constants = [tensor for tensor in inputs if model.buffers[tensor.buffer].data is not None]
        outputs = [flatbuffers.get_tensor_name(graph.tensors[at]) for at in item.outputs]
        names = [*outputs, *(flatbuffers.get_tensor_name(tensor) for tensor in constants)]
        operators.append(
            Operator(
                name=flatbuffers.get_op_scope(item, graph.tensors),
                kind=str(getattr(flatbuffers.TFL_OP_CODE_TO_NAME.get(code), "value", code)),
                inputs=tuple(flatbuffers.get_tensor_name(t) for t in inputs if not any(t is c for c in constants)),
                outputs=tuple(outputs),
                layers=tuple(path for name in names for path in tflite_paths(name)),
                weighted=any(_is_weight(tensor) for tensor in constants),
            )
        )
    return tuple(operators)


def _is_weight(tensor: Any) -> bool:
    return tensor.type == TFLITE_FLOAT32 and tensor.shape is not None and len(tensor.shape) >= 2


def tflite_paths(name: str) -> tuple[tuple[Segment, ...], ...]:
    """The layers in a tensor's name as litert-torch writes it: ``a.Net_module/b.Sequential_blocks/c.Block_0;1``.

    A fused operator's tensor names several, separated by ``;``. Each segment is a class and an attribute, joined by
    an underscore; where the class has underscores of its own, any of them may be the joint.
    """
    paths = []
    for chunk in name.split(";"):
        segments = [_alternatives(segment) for segment in chunk.split("/")]
        roots = [at for at, names in enumerate(segments) if at and ROOT in names]
        if roots and segments[roots[0] + 1 :]:
            paths.append(tuple(segments[roots[0] + 1 :]))
    return tuple(paths)


def _alternatives(segment: str) -> Segment:
    words = re.sub(r"^.*\.", "", segment)
    joints = [match.end() for match in re.finditer("_", words) if match.start()]
    return tuple(words[at:] for at in joints if words[at:])


def _onnx_path(name: str) -> tuple[Segment, ...]:
    return tuple((part,) for part in name.removeprefix(f"{ROOT}.").split("."))


def _exactly(operators: Sequence[Operator], name: str, model_format: str) -> str:
    known = [operator.name for operator in operators]
    if name not in known:
        raise ConfigError(
            f"keep_float: no operator {name!r} is in the {model_format} file",
            hint=_near(name, known),
        )
    return name


def _layers(operators: Sequence[Operator]) -> list[str]:
    paths = {path for operator in operators for path in operator.layers}
    return sorted({".".join(names[0] for names in path[:depth]) for path in paths for depth in (1, len(path))})


def _near(wrong: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"for example {', '.join(repr(name) for name in known[:5])}"
