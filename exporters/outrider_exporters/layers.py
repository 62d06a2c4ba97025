"""Where quantization loses: the activations of a float file and of a quantized one, layer by layer on the same rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from outrider_exporters.convert import ModelFile
from outrider_exporters.convert.quiet import quiet
from outrider_exporters.rows import count_rows
from outrider_runtimes.bound import input_converter
from outrider_runtimes.tensors import Array, Interface, Tensors, check_inputs

NAMED = 3  # layers that an error message names
INTEGER = "_quantized"  # how ONNX Runtime's quantizer ends the name of an integer tensor
WEIGHTED_OPERATORS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")  # in all of these the weights come second
WORTH_NAMING = 0.01  # a layer that adds less than this share of its signal is not to blame


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """One layer of a quantized file against the same layer of the float file.

    Attributes:
        layer: the module's name where the file kept it, else the node's.
        operator: ``Conv``, ``FULLY_CONNECTED``.
        error: root mean square of the difference of its outputs, as a share of the float outputs'.
        added: by how much ``error`` is above the largest error among the layer's inputs; below 0 where errors average
            out. Layers behind one that lost much are wrong because their inputs are: this is what tells them apart.
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
    with quiet():
        for row in _rows(inputs, interface):
            exact = watch_plain(_encoded(row, plain, interface))
            close = watch_quantized(_encoded(row, quantized, interface))
            for name in exact.keys() & close.keys():
                if exact[name].shape == close[name].shape and exact[name].dtype.kind == "f":
                    wanted = exact[name].astype(np.float64)
                    noise[name] = noise.get(name, 0.0) + float(np.sum((close[name] - wanted) ** 2))
                    signal[name] = signal.get(name, 0.0) + float(np.sum(wanted**2))
    return compare(nodes, {name: _ratio(noise[name], signal[name]) for name in noise})


def compare(nodes: Sequence[Node], errors: Mapping[str, float]) -> tuple[LayerError, ...]:
    """The layers that have an error, with what each added. An operator that was fused away passes on what it got:
    the error of its inputs, and its label where the next one has no weights of its own."""
    reached = dict(errors)
    fused: dict[str, Node] = {}
    layers = []
    for node in nodes:
        before = max((reached[name] for name in node.inputs if name in reached), default=0.0)
        owner = node
        if not node.weighted:
            owner = next((fused[name] for name in node.inputs if name in fused), node)
        if node.output not in errors:
            reached[node.output] = before
            fused[node.output] = owner
            continue
        error = errors[node.output]
        layers.append(LayerError(layer=owner.label, operator=owner.operator, error=error, added=error - before))
    return tuple(layers)


def to_blame(layers: Sequence[LayerError], count: int = NAMED) -> tuple[LayerError, ...]:
    """The layers that added most error, worst first; fewer than ``count`` where the others added next to nothing."""
    guilty = [layer for layer in layers if layer.added >= WORTH_NAMING]
    return tuple(sorted(guilty, key=lambda layer: -layer.added)[:count])


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
    weights = {item.name for item in graph.graph.initializer if len(item.dims) >= 2}
    nodes = [
        Node(
            label=_onnx_label(node, weights),
            operator=node.op_type,
            inputs=tuple(node.input),
            output=node.output[0],
            weighted=any(name in weights for name in node.input),
        )
        for node in graph.graph.node
        if node.output
    ]
    names = {node.output for node in nodes}
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in other.graph.initializer}
    made = {name for node in other.graph.node for name in node.output}
    places = {name: place for name in names if (place := _onnx_place(name, made, stored)) is not None}
    for node in nodes:  # an integer operator gives what ReLU would have given, under the name of what it would read
        before = node.inputs[0] if node.inputs else ""
        if node.operator in ("Relu", "Clip") and node.output not in places and places.get(before, "").endswith(INTEGER):
            places[node.output] = places.pop(before)
    return nodes, _onnx_watch(graph, {name: name for name in names}, {}), _onnx_watch(other, places, stored)


def _onnx_label(node: Any, weights: set[str]) -> str:
    """The module that holds the weights: torch's exporter names them by their place in the network."""
    for name in node.input:
        if name in weights and name.endswith(".weight"):
            return str(name.removeprefix("module.").removesuffix(".weight"))
    return str(node.name or node.output[0])


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
    nodes = []
    for operator in first._get_ops_details():
        inputs = [details[index] for index in operator["inputs"] if index in details]
        outputs = [details[index]["name"] for index in operator["outputs"] if index in details]
        if not outputs:
            continue
        weighted = operator["op_name"] in WEIGHTED_OPERATORS
        nodes.append(
            Node(
                label=_tflite_label([*(item["name"] for item in inputs[1:2] if weighted), *outputs], operator),
                operator=operator["op_name"],
                inputs=tuple(item["name"] for item in inputs),
                output=outputs[0],
                weighted=weighted,
            )
        )
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
            return ".".join(pieces) or operator["op_name"]
    return f"{operator['op_name']} {operator['index']}"
