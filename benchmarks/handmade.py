"""Model files and bundles written by hand, in both formats: no converter, no torch, ready in a second.

A network is float32 [N, width] -> float32 [N, OUTPUTS], either a slice of its input, which costs nothing whatever the
width, or dense layers with ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from onnx import helper, numpy_helper

from outrider.bundle import Golden, GoldenTensor, Variant, write_bundle
from outrider_runtimes.golden import DecisionCheck
from outrider_runtimes.tensors import Array, Binding, Interface, TensorBinding, TensorSpec
from support.models import write_onnx
from support.tflitefiles import Operator, Tensor, write_tflite

OUTPUTS = 10
ROWS = 4  # of the golden
TOLERANCE = 1e-3
FORMATS = ("onnx", "tflite")


@dataclass(frozen=True, kw_only=True)
class Network:
    """``layers``: the weights of dense layers, float32 [before, after]; none for the slice."""

    name: str
    width: int
    layers: tuple[Array, ...] = ()

    def reference(self, x: Array) -> Array:
        """What it gives. x: float32 [N, width]."""
        for position, weights in enumerate(self.layers):
            x = x @ weights if position == 0 else np.maximum(x, 0.0) @ weights
        return np.ascontiguousarray(x[:, :OUTPUTS], np.float32)

    def input(self, rows: int = 1) -> Array:
        """float32 [rows, width] in 0..1."""
        return np.random.default_rng(1).random((rows, self.width), np.float32)


def dense(name: str, width: int, depth: int) -> Network:
    """``depth`` layers of ``width`` and a last one of ``OUTPUTS``, of seeded noise that keeps its size."""
    rng = np.random.default_rng(depth)
    sizes = [width] * depth + [OUTPUTS]
    layers = tuple((rng.standard_normal(shape) * np.sqrt(2 / shape[0])).astype(np.float32) for shape in pairwise(sizes))
    return Network(name=name, width=width, layers=layers)


def write_file(network: Network, path: Path) -> Path:
    """By the path's suffix, ``.onnx`` with free N or ``.tflite`` with one row; input x, output y."""
    return _write_onnx(network, path) if path.suffix == ".onnx" else _write_tflite(network, path)


def write_handmade(network: Network, folder: Path, *, formats: Sequence[str] = FORMATS) -> Path:
    """The bundle ``<name>.outrider`` with a variant ``<format>-float32`` a format; its files lie beside it."""
    variants = [_variant(network, format_) for format_ in formats]
    inputs = network.input(ROWS)
    outputs = network.reference(inputs).tobytes()
    members = {v.member: write_file(network, folder / f"{network.name}.{v.format}").read_bytes() for v in variants}
    members |= {"golden/x.bin": inputs.tobytes(), "golden/reference.bin": outputs}
    members |= {f"golden/{v.name}.bin": outputs for v in variants}

    def logits(member: str) -> dict[str, GoldenTensor]:
        return {"y": GoldenTensor(member=member, dtype="float32", shape=(ROWS, OUTPUTS))}

    path = folder / f"{network.name}.outrider"
    write_bundle(
        path,
        name=network.name,
        version=1,
        interface=Interface(inputs=(_spec("x", network.width),), outputs=(_spec("y", OUTPUTS),)),
        variants=variants,
        golden=Golden(
            rows=ROWS,
            inputs={"x": GoldenTensor(member="golden/x.bin", dtype="float32", shape=inputs.shape)},
            reference=logits("golden/reference.bin"),
            variants={v.name: logits(f"golden/{v.name}.bin") for v in variants},
            tolerance={v.name: {"y": TOLERANCE} for v in variants},
            decision=DecisionCheck(kind="argmax", output="y", axis=-1, min_agreement=0.95),
        ),
        members=members,
        provenance={"made_by": "benchmarks"},
    )
    return path


def _spec(name: str, width: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=(None, width), axes="NC")


def _variant(network: Network, format_: str) -> Variant:
    rows = None if format_ == "onnx" else 1

    def bind(name: str, width: int) -> tuple[TensorBinding, ...]:
        return (TensorBinding(name=name, file_name=name, dtype="float32", shape=(rows, width)),)

    binding = Binding(inputs=bind("x", network.width), outputs=bind("y", OUTPUTS))
    return Variant(
        name=f"{format_}-float32", format=format_, precision="float32", member=f"model.{format_}", binding=binding
    )


def _write_onnx(network: Network, path: Path) -> Path:
    if network.layers:
        names = ["x", *(f"h{position}" for position in range(len(network.layers) - 1))]
        nodes = []
        for position, before in enumerate(names):
            after = names[position + 1] if position + 1 < len(names) else "y"
            fed = before
            if position:
                nodes.append(helper.make_node("Relu", [before], [f"{before}+"]))
                fed = f"{before}+"
            nodes.append(helper.make_node("MatMul", [fed, f"w{position}"], [after]))
        tensors = [numpy_helper.from_array(w, f"w{position}") for position, w in enumerate(network.layers)]
    else:
        nodes = [helper.make_node("Slice", ["x", "from", "to", "axis"], ["y"])]
        bounds = {"from": 0, "to": OUTPUTS, "axis": 1}
        tensors = [numpy_helper.from_array(np.array([value], np.int64), name) for name, value in bounds.items()]
    return write_onnx(
        path, nodes, [("x", "float32", ["N", network.width])], [("y", "float32", ["N", OUTPUTS])], tensors
    )


def _write_tflite(network: Network, path: Path) -> Path:
    tensors = [Tensor(name="x", shape=(1, network.width)), Tensor(name="y", shape=(1, OUTPUTS))]
    operators = []
    before = "x"
    for position, weights in enumerate(network.layers):
        last = position + 1 == len(network.layers)
        dense_out, active = ("y", "y") if last else (f"h{position}", f"h{position}+")
        tensors.append(Tensor(name=f"w{position}", shape=weights.T.shape, data=weights.T))
        fed = [before, f"w{position}"]
        operators.append(
            Operator(kind="FULLY_CONNECTED", inputs=fed, outputs=[dense_out], options="FullyConnectedOptions")
        )
        if not last:
            tensors += [Tensor(name=name, shape=(1, weights.shape[1])) for name in (dense_out, active)]
            operators.append(Operator(kind="RELU", inputs=[dense_out], outputs=[active]))
        before = active
    if not network.layers:
        tensors.append(Tensor(name="from", dtype="int32", shape=(2,), data=np.zeros(2, np.int32)))
        tensors.append(Tensor(name="sizes", dtype="int32", shape=(2,), data=np.array([1, OUTPUTS], np.int32)))
        operators.append(Operator(kind="SLICE", inputs=["x", "from", "sizes"], outputs=["y"], options="SliceOptions"))
    return write_tflite(path, tensors, operators, inputs={"x": "x"}, outputs={"y": "y"})
