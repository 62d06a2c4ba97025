"""A recurrent function small enough for numpy, as ONNX and as TFLite with a signature a length.

``x: float32 [N, T], h: float32 [N, 1] -> y = x + h [N, T], h_next = h / 2 + the mean of x [N, 1]``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from outrider.model import BundleInfo, Model
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.engines import engine_named
from outrider_runtimes.tensors import Binding, Interface, StatePair, TensorBinding, TensorSpec
from support.models import onnx_model
from support.tflitefiles import Operator, Tensor, packed_tflite, parsed_tflite, write_tflite

X = TensorSpec(name="x", dtype="float32", shape=(None, None), axes="NT")
H = TensorSpec(name="h", dtype="float32", shape=(None, 1), axes="NC")
Y = TensorSpec(name="y", dtype="float32", shape=(None, None), axes="NT")
H_NEXT = TensorSpec(name="h_next", dtype="float32", shape=(None, 1), axes="NC")
INTERFACE = Interface(inputs=(X, H), outputs=(Y, H_NEXT), state=(StatePair(input="h", output="h_next"),))
LENGTHS = (3, 5)
SIGNATURES = tuple({"x": (1, length), "h": (1, 1)} for length in LENGTHS)


def step(x: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the files compute."""
    return x + h, h / 2 + x.mean(1, keepdims=True)


def onnx_bytes() -> bytes:
    """N and T are free."""
    from onnx import helper, numpy_helper

    nodes = [
        helper.make_node("Add", ["x", "h"], ["y"]),
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["h", "half"], ["less"]),
        helper.make_node("Add", ["less", "mean"], ["h_next"]),
    ]
    inputs, outputs = (
        [(long, "float32", ["N", "T"]), (short, "float32", ["N", 1])] for long, short in (("x", "h"), ("y", "h_next"))
    )
    model = onnx_model(nodes, inputs, outputs, [numpy_helper.from_array(np.float32([0.5]), "half")])
    return bytes(model.SerializeToString())


def tflite_bytes(lengths: Sequence[int] = LENGTHS, *, names: Sequence[str] = ("x", "h"), same: str = "h_next") -> bytes:
    """One signature a length, N = 1; they share their constants.

    Args:
        names: of the inputs in the last signature; ``x`` and ``h`` in the others.
        same: the name of the second output in the last signature.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = [_one_length(Path(folder, "one.tflite"), length).read_bytes() for length in lengths]
    model, *others = map(parsed_tflite, written)
    for at, other in enumerate(others, 1):
        (signature,) = other.signatureDefs
        signature.signatureKey, signature.subgraphIndex = f"length_{at}", at
        model.subgraphs += other.subgraphs
        model.signatureDefs.append(signature)
    last = model.signatureDefs[-1]
    for entry, name in zip((*last.inputs, *last.outputs), (*names, "y", same), strict=True):
        entry.name = name
    return packed_tflite(model)


def _one_length(path: Path, length: int) -> Path:
    tensors = [
        *(Tensor(name=name, shape=(1, length)) for name in ("x", "y")),
        *(Tensor(name=name, shape=(1, 1)) for name in ("h", "less", "h_next")),
        Tensor(name="half", shape=(1,), data=np.float32([0.5])),
        Tensor(name="axis", dtype="int32", shape=(1,), data=np.int32([1])),
        Tensor(name="mean", shape=(1,)),
    ]
    operators = [
        Operator(kind="ADD", inputs=["x", "h"], outputs=["y"], options="AddOptions"),
        Operator(kind="MEAN", inputs=["x", "axis"], outputs=["mean"], options="ReducerOptions"),
        Operator(kind="MUL", inputs=["h", "half"], outputs=["less"], options="MulOptions"),
        Operator(kind="ADD", inputs=["less", "mean"], outputs=["h_next"], options="AddOptions"),
    ]
    ends = {"inputs": {name: name for name in ("x", "h")}, "outputs": {name: name for name in ("y", "h_next")}}
    return write_tflite(path, tensors, operators, **ends)


def memory_model(folder: Path, kind: str = "onnx") -> Model:
    """The function as a Model on the engine of that format; no bundle, no store."""
    path = folder / f"memory.{kind}"
    path.write_bytes(onnx_bytes() if kind == "onnx" else tflite_bytes())
    engine = "onnxruntime" if kind == "onnx" else "litert"
    session = BoundSession(engine_named(engine).prepare(path, threads=1), INTERFACE, binding(kind))
    info = BundleInfo(name="memory", version=1, digest="5" * 64, verified=False)
    return Model(session, bundle=info, variant=f"{kind}-float32", engine=engine, threads=1)


def binding(kind: str) -> Binding:
    """How either file is bound to ``INTERFACE``."""
    rows = None if kind == "onnx" else 1

    def bound(spec: TensorSpec) -> TensorBinding:
        return TensorBinding(name=spec.name, file_name=spec.name, dtype="float32", shape=(rows, *spec.shape[1:]))

    return Binding(
        inputs=(bound(X), bound(H)),
        outputs=(bound(Y), bound(H_NEXT)),
        signatures=() if kind == "onnx" else SIGNATURES,
    )
