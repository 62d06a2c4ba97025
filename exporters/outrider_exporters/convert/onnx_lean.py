"""What an ONNX graph says twice, or says although it is the default. Without it the graph computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from outrider_exporters.convert.onnx_graphs import graphs_of

CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv", "ConvTranspose")
# What the operators' specification takes where an attribute is missing.
_DEFAULTS: dict[str, Callable[[Any], bool]] = {
    "auto_pad": lambda value: bool(value.s == b"NOTSET"),
    "group": lambda value: bool(value.i == 1),
    "dilations": lambda value: all(step == 1 for step in value.ints),
    "strides": lambda value: all(step == 1 for step in value.ints),
    "pads": lambda value: not any(value.ints),
}


def make_lean(model: Any) -> None:
    """Change a ModelProto in place: default attributes of convolutions, the zero points of constants where they are
    all zero, and what of a graph's constants repeats another one."""
    for graph in graphs_of(model.graph):
        for node in graph.node:
            if node.op_type in CONVOLUTIONS and node.domain == "":
                _drop_defaults(node)
        _drop_zero_points(graph)
    _share_constants(model.graph)


def _drop_defaults(node: Any) -> None:
    needless = [item for item in node.attribute if item.name in _DEFAULTS and _DEFAULTS[item.name](item)]
    for item in needless:
        node.attribute.remove(item)


def _drop_zero_points(graph: Any) -> None:
    """Of stored tensors: without one, it is zero.

    Activations keep theirs: from it the type of what a QuantizeLinear gives is known.
    """
    import onnx

    stored = {item.name: item for item in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 3 and node.input[0] in stored:
            zero = stored.get(node.input[2])
            if zero is not None and not np.any(onnx.numpy_helper.to_array(zero)):
                del node.input[2]
    _drop_unread(graph)


def _drop_unread(graph: Any) -> None:
    read = {name for inner in graphs_of(graph) for node in inner.node for name in node.input}
    read.update(value.name for inner in graphs_of(graph) for value in inner.output)
    unread = [item for item in graph.initializer if item.name not in read]
    for item in unread:
        graph.initializer.remove(item)


def _share_constants(graph: Any) -> None:
    """One constant for all that have the same type, shape and content; those that callers know by name stay."""
    known = {value.name for value in (*graph.input, *graph.output)}
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}
    for item in list(graph.initializer):
        if item.name in known:
            continue
        name, item.name = item.name, ""
        content = item.SerializeToString(deterministic=True)
        item.name = name
        if content in first:
            same[name] = first[content]
            graph.initializer.remove(item)
        else:
            first[content] = name
    for inner in graphs_of(graph):
        for node in inner.node:
            node.input[:] = [same.get(name, name) for name in node.input]
