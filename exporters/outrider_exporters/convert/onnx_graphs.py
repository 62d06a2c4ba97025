"""All graphs of an ONNX model, and what their notes are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def graphs_of(holder: Any) -> Iterator[Any]:
    """A graph (or the body of a function) and the graphs within its nodes."""
    yield holder
    for node in holder.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from graphs_of(inner)


def strip_metadata(model: Any) -> None:
    """Remove notes that the exporter left on a ModelProto, its graphs, nodes and tensors, in place."""
    _clear(model)
    for holder in (graph for body in (model.graph, *model.functions) for graph in graphs_of(body)):
        _clear(holder)
        for node in holder.node:
            _clear(node)
        if hasattr(holder, "initializer"):  # a function has none
            for item in (*holder.input, *holder.output, *holder.value_info, *holder.initializer):
                _clear(item)


def _clear(item: Any) -> None:
    for name in ("metadata_props", "doc_string"):
        if hasattr(item, name):
            item.ClearField(name)
