"""Where quantization loses: the activations of a float file and of a quantized one, layer by layer on the same rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from outrider_exporters.convert import ModelFile
from outrider_exporters.convert.activations import stored_tensors
from outrider_exporters.convert.quiet import quiet
from outrider_exporters.rows import count_rows
from outrider_runtimes.bound import input_converter
from outrider_runtimes.tensors import Array, Interface, Tensors, check_inputs

_MOVES_ONNX = ("Gather", "Slice", "Split", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
_MOVES_TFLITE = (
    "GATHER",
    "SLICE",
    "STRIDED_SLICE",
    "SPLIT",
    "UNPACK",
    "RESHAPE",
    "TRANSPOSE",
    "SQUEEZE",
    "EXPAND_DIMS",
)
MOVES = frozenset([*_MOVES_ONNX, *_MOVES_TFLITE])
SUMS = frozenset(["Add", "Sub", "Sum", "ADD", "SUB", "ADD_N", "SQUARED_DIFFERENCE"])
NAMED = 3  # layers that an error message names
INTEGER = "_quantized"  # how ONNX Runtime's quantizer ends the name of an integer tensor
WORTH_NAMING = 0.01  # a layer that adds less than this share of its signal is not to blame


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """One layer of a quantized file against the same layer of the float file.

    Attributes:
        layer: the module's name where the file kept it, else the node's.
        operator: ``Conv``, ``FULLY_CONNECTED``.
        error: root mean square of the difference of its outputs, as a share of the float outputs'.
        added: by how much ``error`` is above the largest error among the layer's inputs; below 0 where errors average
            out. Layers behind one that lost much are wrong because their inputs are: this tells them apart. What is
            next to nothing beside what it is added to counts for as little: the mean within a norm is all noise.
    """

    layer: str
    operator: str
    error: float
    added: float

    def to_dict(self) -> dict[str, Any]:
        """As the report stores it."""
        return {"layer": self.layer, "operator": self.operator, "error": self.error, "added": self.added}


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator of the float file: a label for people, the tensors that it reads and the one that it gives."""

    label: str
    operator: str
    inputs: tuple[str, ...]
    output: str
    weighted: bool


Watch = Callable[[Tensors], Mapping[str, Array]]


def layer_errors(
    plain: ModelFile, quantized: ModelFile, interface: Interface, inputs: Tensors
) -> tuple[LayerError, ...]:
    """The error of each layer whose output has the same name in both files, in the order in which they run.

    Args:
        plain: the float32 file that ``quantized`` was made from.
        inputs: at the interface, a few rows; every activation of a row is in memory at once.

    Raises:
        InputError: inputs that the interface does not allow.
    """
    nodes, watch_plain, watch_quantized = (_onnx if plain.format == "onnx" else _tflite)(plain, quantized)
    noise: dict[str, float] = {}
    signal: dict[str, float] = {}
    elements: dict[str, int] = {}
    with quiet():
        for row in _rows(inputs, interface):
            exact = watch_plain(_encoded(row, plain, interface))
            close = watch_quantized(_encoded(row, quantized, interface))
            for name in exact.keys() & close.keys():
                if exact[name].shape == close[name].shape and exact[name].dtype.kind == "f":
                    wanted = exact[name].astype(np.float64)
                    noise[name] = noise.get(name, 0.0) + float(np.sum((close[name] - wanted) ** 2))
                    signal[name] = signal.get(name, 0.0) + float(np.sum(wanted**2))
                    elements[name] = elements.get(name, 0) + wanted.size
    magnitudes = {name: math.sqrt(signal[name] / elements[name]) for name in signal if elements[name]}
    return compare(nodes, {name: _ratio(noise[name], signal[name]) for name in noise}, magnitudes)


def compare(
    nodes: Sequence[Node], errors: Mapping[str, float], magnitudes: Mapping[str, float] | None = None
) -> tuple[LayerError, ...]:
    """The layers that have an error, with what each added.

    An operator that was fused away passes on what it got: the error of its inputs, and its label where the next one has
    no weights of its own. What only moves values bears the label of what computed them: of a tensor that one part
    dominates, the error of the others shows once they are apart.

    Args:
        magnitudes: root mean square of tensors; of one that is missing all of its error counts.
    """
    shares = {node.output: _shares(node, magnitudes or {}) for node in nodes}
    counts = _counts(nodes, shares)
    reached = dict(errors)
    owners: dict[str, Node] = {}
    layers = []
    for node in nodes:
        before = max((reached[n] * shares[node.output][n] for n in node.inputs if n in reached), default=0.0)
        given = [owners[name] for name in node.inputs if name in owners and _passes_label(node, name, owners, errors)]
        owner = given[0] if given and not node.weighted else node
        if node.output in errors:
            error = errors[node.output]
            added = counts[node.output] * (error - before)
            layers.append(LayerError(layer=owner.label, operator=owner.operator, error=error, added=added))
        else:
            reached[node.output] = before
        owners[node.output] = owner
    return tuple(layers)


def _shares(node: Node, magnitudes: Mapping[str, float]) -> dict[str, float]:
    """How much each input counts in a node: in a sum, its magnitude beside that of the largest; else 1."""
    if node.operator not in SUMS:
        return dict.fromkeys(node.inputs, 1.0)
    most = max((magnitudes[name] for name in node.inputs if name in magnitudes), default=0.0)
    return {name: magnitudes[name] / most if most and name in magnitudes else 1.0 for name in node.inputs}


def _counts(nodes: Sequence[Node], shares: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """How much of each tensor counts behind it, along the way on which it counts most."""
    counts: dict[str, float] = {}
    for node in reversed(nodes):
        mine = counts.setdefault(node.output, 1.0)  # nothing reads it: an output
        for name, share in shares[node.output].items():
            counts[name] = max(counts.get(name, 0.0), share * mine)
    return counts


def _passes_label(node: Node, name: str, owners: Mapping[str, Node], errors: Mapping[str, float]) -> bool:
    """Whether a node bears the label of what gave one of its inputs."""
    return node.operator in MOVES or (name not in errors and owners[name].weighted)


def to_blame(layers: Sequence[LayerError]) -> tuple[LayerError, ...]:
    """The layers that added most error, worst first; fewer than ``NAMED`` where the others added next to nothing.

    A layer that is several operators, as an unrolled recurrent one is, stands for its worst.
    """
    worst: dict[str, LayerError] = {}
    for layer in sorted(layers, key=lambda layer: -layer.added):
        if layer.added >= WORTH_NAMING:
            worst.setdefault(layer.layer, layer)
    return tuple(worst.values())[:NAMED]


def blame_text(layers: Sequence[LayerError]) -> str:
    """The layers to blame in words; says so where none stands out."""
    if not layers:
        return ""
    guilty = to_blame(layers)
    if not guilty:
        return f"no layer adds {WORTH_NAMING:.0%} of error or more"
    named = ", ".join(f"{item.layer} ({item.operator}, +{item.added:.1%})" for item in guilty)
    return f"quantization error grows most in {named}"


def _ratio(noise: float, signal: float) -> float:
    """Root mean square error over root mean square signal; of a layer that gives zeros, the error itself."""
    return math.sqrt(noise / signal) if signal > 0.0 else math.sqrt(noise)


def _rows(inputs: Tensors, interface: Interface) -> Iterator[list[Array]]:
    arrays = check_inputs(interface, inputs)
    for at in range(count_rows(inputs, interface)):
        yield [a[at : at + 1] if spec.batched else a for a, spec in zip(arrays, interface.inputs, strict=True)]


def _encoded(row: Sequence[Array], file: ModelFile, interface: Interface) -> dict[str, Array]:
    """One row as the file takes it, by the file's names."""
    return {
        binding.file_name: input_converter(spec, binding)(array)
        for spec, binding, array in zip(interface.inputs, file.binding.inputs, row, strict=True)
    }


def _onnx(plain: ModelFile, quantized: ModelFile) -> tuple[list[Node], Watch, Watch]:
    import onnx

    graph, other = (onnx.load(str(file.path)) for file in (plain, quantized))
    nodes = _onnx_nodes(graph)
    names = {node.output for node in nodes}
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in other.graph.initializer}
    made = {name for node in other.graph.node for name in node.output}
    places = {name: place for name in names if (place := _onnx_place(name, made, stored)) is not None}
    for node in nodes:  # an integer operator gives what ReLU would have given, under the name of what it would read
        before = node.inputs[0] if node.inputs else ""
        if node.operator in ("Relu", "Clip") and node.output not in places and places.get(before, "").endswith(INTEGER):
            places[node.output] = places.pop(before)
    return nodes, _onnx_watch(graph, {name: name for name in names}, {}), _onnx_watch(other, places, stored)


def _onnx_nodes(model: Any) -> list[Node]:
    """The operators that compute something of the inputs, one node an output of theirs.

    What is made of constants alone is a constant too: torch's exporter cuts the weights of recurrent layers up and puts
    them together again.
    """
    constants = {item.name: (item.name,) for item in model.graph.initializer}
    matrices = {item.name for item in model.graph.initializer if len(item.dims) >= 2}
    added = _named_by_bias(model)
    nodes = []
    for operator in model.graph.node:
        inputs = [name for name in operator.input if name]
        held = tuple(dict.fromkeys(origin for name in inputs for origin in constants.get(name, ())))
        if all(name in constants for name in inputs):
            constants.update((name, held) for name in operator.output)
            continue
        named = [path for path in map(_onnx_path, held) if path] or [
            added[name] for name in operator.output if name in added and matrices.intersection(held)
        ]
        nodes += [
            Node(
                label=named[0] if named else str(operator.name or operator.output[0]),
                operator=operator.op_type,
                inputs=tuple(name for name in inputs if name not in constants),
                output=output,
                weighted=bool(matrices.intersection(held)),
            )
            for output in operator.output
            if output
        ]
    return nodes


def _named_by_bias(model: Any) -> dict[str, str]:
    """By what a bias is added to, the module of the bias: of a dense layer on a sequence torch's exporter folds the
    weights and keeps the name of the bias alone."""
    constants = {item.name for item in model.graph.initializer}
    named: dict[str, str] = {}
    for operator in model.graph.node:
        paths = [path for name in operator.input if name in constants and (path := _onnx_path(name))]
        if operator.op_type == "Add" and paths:
            named.update((name, paths[0]) for name in operator.input if name not in constants)
    return named


def _onnx_path(name: str) -> str:
    """The module of a constant that torch's exporter named by its place in the network; else nothing."""
    path, _, parameter = name.removeprefix("module.").rpartition(".")
    return path if parameter.startswith(("weight", "bias")) else ""


def _onnx_place(name: str, made: set[str], stored: Mapping[str, Array]) -> str | None:
    """What a float tensor is called after quantization: rounded to its scale where it is, else by its own name."""
    for place in (f"{name}_DequantizeLinear_Output", name, f"{name}{INTEGER}"):
        if place in made and (not place.endswith(INTEGER) or f"{name}_scale" in stored):
            return place
    return None


def _onnx_watch(model: Any, places: Mapping[str, str], stored: Mapping[str, Array]) -> Watch:
    """The file with every tensor in ``places`` as an output besides its own."""
    import onnx
    import onnxruntime

    present = {output.name for output in model.graph.output}
    watched = sorted(set(places.values()) - present)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in watched)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = sorted(set(places.values()))

    def watch(feeds: Tensors) -> dict[str, Array]:
        values = dict(zip(wanted, session.run(wanted, dict(feeds)), strict=True))
        return {name: _dequantized(values[place], place, stored) for name, place in places.items()}

    return watch


def _dequantized(array: Array, place: str, stored: Mapping[str, Array]) -> Array:
    name = place.removesuffix(INTEGER)
    if name == place or f"{name}_scale" not in stored:
        return array
    scale, zero = stored[f"{name}_scale"], stored.get(f"{name}_zero_point", np.zeros((), array.dtype))
    return (array.astype(np.float64) - float(zero)) * float(scale)


def _tflite(plain: ModelFile, quantized: ModelFile) -> tuple[list[Node], Watch, Watch]:
    with quiet():
        first, second = (_interpreter(file) for file in (plain, quantized))
    details = {item["index"]: item for item in first.get_tensor_details()}
    stored = stored_tensors(plain.path)
    nodes = []
    for operator in first._get_ops_details():
        inputs = [details[index] for index in operator["inputs"] if index in details]
        outputs = [details[index]["name"] for index in operator["outputs"] if index in details]
        weights = [item["name"] for item in inputs if item["index"] in stored and len(item["shape"]) >= 2]
        nodes += [
            Node(
                label=_tflite_label([*weights, *outputs], operator),
                operator=operator["op_name"],
                inputs=tuple(item["name"] for item in inputs if item["index"] not in stored),
                output=output,
                weighted=bool(weights),
            )
            for output in outputs
        ]
    names = {node.output for node in nodes}
    return nodes, _tflite_watch(first, names), _tflite_watch(second, names)


def _interpreter(file: ModelFile) -> Any:
    """Without the delegate that swallows the tensors between its operators."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        str(file.path),
        num_threads=1,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        experimental_preserve_all_tensors=True,
    )
    interpreter.allocate_tensors()
    return interpreter


def _tflite_watch(interpreter: Any, names: set[str]) -> Watch:
    signatures = interpreter.get_signature_list()
    by_name = {item["name"]: item["index"] for item in interpreter.get_input_details()}
    if signatures:
        key = next(iter(signatures))
        inputs = interpreter._get_full_signature_list()[key]["inputs"]
        by_name |= {name: int(index) for name, index in inputs.items()}
    kept = [item for item in interpreter.get_tensor_details() if item["name"] in names]

    def watch(feeds: Tensors) -> dict[str, Array]:
        for name, array in feeds.items():
            interpreter.set_tensor(by_name[name], array)
        interpreter.invoke()
        return {item["name"]: _tflite_value(interpreter, item) for item in kept}

    return watch


def _tflite_value(interpreter: Any, detail: Mapping[str, Any]) -> Array:
    array: Array = interpreter.get_tensor(detail["index"])
    scale, zero_point = detail["quantization"]
    if not scale:
        return array
    return (array.astype(np.float64) - float(zero_point)) * float(scale)


def _tflite_label(names: Sequence[str], operator: Mapping[str, Any]) -> str:
    """``features.0`` out of litert-torch's ``.../Small_module/...Sequential_features/...Conv2d_0;``, else the operator.

    Of a fused activation the name holds both modules; the one that came first in the network is last in it.
    """
    for name in names:
        parts = [part for part in name.split(";") if "/" in part]
        if parts:
            pieces = [re.sub(r"^[^_]*_", "", piece.rsplit(".", 1)[-1]) for piece in parts[-1].split("/")]
            if "module" in pieces:
                pieces = pieces[pieces.index("module") + 1 :]
            if pieces:
                return ".".join(pieces)
    return f"{operator['op_name']} {operator['index']}"
