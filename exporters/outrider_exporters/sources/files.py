"""An existing ``.onnx`` or ``.tflite`` file as a source: what it takes and gives, and how it is bound."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from outrider_exporters.convert.files import ModelFile, open_session
from outrider_exporters.convert.quantize import (
    is_quantized_onnx,
    is_quantized_tflite,
    quantized_share_onnx,
    quantized_share_tflite,
)
from outrider_exporters.convert.quiet import quiet
from outrider_exporters.rows import UNNAMED_AXES, count_rows, default_axes, free_axes
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.engines import FileTensor, Session
from outrider_runtimes.engines._interpreter import SignatureSession
from outrider_runtimes.errors import ExportError, InferenceError
from outrider_runtimes.tensors import (
    BATCH_AXIS,
    Array,
    Binding,
    Interface,
    Shape,
    TensorBinding,
    Tensors,
    TensorSpec,
    check_inputs,
)

FORMAT_OF_SUFFIX = {".onnx": "onnx", ".tflite": "tflite"}
PICKLED = frozenset([".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".joblib"])
HALF = 0.5  # of the weights
RANDOM_ROWS = 8
RANDOM_SEED = 20
CHANNEL_LAST_AXES = "NHWC"  # TFLite's own order of an image's axes


@dataclass(frozen=True, kw_only=True)
class DeclaredFile:
    """A model file behind the interface that it declares. It was loaded and run once.

    Attributes:
        file: with its binding; ``scheme`` is ``as-is``.
        interface: names, dtypes and shapes of the file.
        inputs: those it was run on: the example, else seeded random rows.
    """

    file: ModelFile
    interface: Interface
    inputs: dict[str, Array]


def declare(
    path: Path,
    *,
    axes: Mapping[str, str] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    meanings: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
    example: Tensors | None = None,
    one_is_batch: bool = False,
) -> DeclaredFile:
    """Load a file, read its interface, and run it once.

    A first size that the file leaves open is the batch, N; any other first size is fixed, unless ``axes`` names it N
    and it is 1: then the file is run once a row. A tensor with a scale is a float32 tensor of real numbers to the
    caller.

    Args:
        axes, ranges, meanings: by tensor name; see TensorSpec.
        example: inputs by name, one row or more; needed where an axis other than the first is open.
        one_is_batch: take a first size of 1 for N in every tensor that ``axes`` does not name.

    Raises:
        ExportError: the file is of another kind (a pickled model too) or cannot be run on the inputs.
        ModelLoadError: the file is cut short, uses external data, or the engine refuses it.
        InputError: the example is not what the file takes.
    """
    model_format = format_of(path)
    session = open_session(path, model_format)
    tensors = (*session.inputs, *session.outputs)
    named = dict(axes or {})
    for option in (named, ranges or {}, meanings or {}):
        _check_known(option, [tensor.name for tensor in tensors])
    if one_is_batch:
        named = {**{t.name: _letters(t, model_format) for t in tensors if t.shape[:1] == (1,)}, **named}
    interface, inputs = _interface(session, model_format, named, frozenset(axes or ()), example)
    binding = Binding(
        inputs=tuple(_bound(tensor) for tensor in session.inputs),
        outputs=tuple(_bound(tensor) for tensor in session.outputs),
        signatures=session.signatures if isinstance(session, SignatureSession) else (),
    )
    interface = _follow_rows(path, session, replace(interface, labels=tuple(labels)), binding, inputs)
    file = ModelFile(
        path=path,
        format=model_format,
        precision=_precision(path, model_format, session),
        binding=binding,
        scheme="as-is",
    )
    return DeclaredFile(file=file, interface=_described(interface, ranges or {}, meanings or {}), inputs=inputs)


def format_of(path: Path) -> str:
    """``onnx`` or ``tflite``, by the name. Raises ExportError for any other file, or none."""
    kind = path.suffix.lower()
    if kind in PICKLED:
        raise ExportError(
            f"{path.name} is a pickled model, and opening one runs whatever code is in it",
            hint="load it yourself where you trust it, and pass the module to outrider_exporters.export",
        )
    if kind not in FORMAT_OF_SUFFIX:
        raise ExportError(f"{path.name} is neither .onnx nor .tflite", hint="convert it first, or rename it")
    if not path.is_file():
        raise ExportError(f"there is no file {path.name}", hint="check the path")
    return FORMAT_OF_SUFFIX[kind]


def count_parameters(file: ModelFile) -> int:
    """The elements of all stored weights."""
    return sum(math.prod(shape) for shape in _weight_shapes(file))


def with_signature(file: ModelFile, path: Path) -> ModelFile:
    """A TFLite file without any signature, or with tensors that have no name, as a copy with both; any other as it is.

    A signature that is added has the tensors' names.
    """
    import flatbuffers  # type: ignore[import-untyped]
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(file.path.read_bytes(), 0))
    nameless = [(at, tensor) for graph in model.subgraphs for at, tensor in enumerate(graph.tensors) if not tensor.name]
    if model.signatureDefs and not nameless:
        return file
    for at, tensor in nameless:
        tensor.name = f"tensor_{at}"
    graph = model.subgraphs[0]

    def maps(indices: Sequence[int]) -> list[Any]:
        entries = []
        for index in indices:
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = graph.tensors[index].name, int(index)
            entries.append(entry)
        return entries

    if not model.signatureDefs:
        signature = schema.SignatureDefT()
        signature.inputs, signature.outputs = maps(graph.inputs), maps(graph.outputs)
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        model.signatureDefs = [signature]
    builder = flatbuffers.Builder(file.path.stat().st_size)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return replace(file, path=path)


def _weight_shapes(file: ModelFile) -> list[tuple[int, ...]]:
    if file.format == "onnx":
        import onnx

        model = onnx.load(str(file.path), load_external_data=False)
        return [tuple(weight.dims) for weight in model.graph.initializer]
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils

    tflite = tfl_flatbuffer_utils.read_model(str(file.path))
    tensors = [tensor for graph in tflite.subgraphs for tensor in graph.tensors]
    return [tuple(t.shape) for t in tensors if t.shape is not None and tflite.buffers[t.buffer].data is not None]


def random_inputs(specs: Sequence[TensorSpec], tensors: Sequence[FileTensor], rows: int, seed: int) -> dict[str, Array]:
    """Seeded inputs at the interface: floats from a normal distribution, quantized tensors and 8-bit integers over all
    of their range, wider integers 0 or 1 (they may be indices). Raises ExportError for an axis of unknown size.
    """
    rng = np.random.default_rng(seed)
    inputs = {}
    for spec, tensor in zip(specs, tensors, strict=True):
        shape = (rows, *spec.shape[1:]) if spec.batched else spec.shape
        if None in shape:
            raise ExportError(
                f"input {spec.name!r} has axes of any size: {list(shape)}", hint="pass example= with arrays that fit"
            )
        inputs[spec.name] = _random(rng, tensor, tuple(size or 0 for size in shape)).astype(spec.dtype)
    return inputs


def _random(rng: np.random.Generator, tensor: FileTensor, shape: tuple[int, ...]) -> Array:
    dtype = np.dtype(tensor.dtype)
    if dtype.kind == "f":
        return rng.standard_normal(shape)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape)
    limits = np.iinfo(dtype)
    if tensor.scale is not None:
        stored = rng.integers(limits.min, limits.max, shape, dtype=np.int64, endpoint=True)
        return (stored - tensor.zero_point) * tensor.scale
    if dtype.itemsize == 1:
        return rng.integers(limits.min, limits.max, shape, endpoint=True)
    return rng.integers(0, 2, shape)


def _check_known(option: Mapping[str, object], known: list[str]) -> None:
    for stray in option.keys() - set(known):
        raise ExportError(f"axes names a tensor {stray!r} that the file does not have", hint=f"it has {known}")


def _interface(
    session: Session, model_format: str, axes: Mapping[str, str], named: Collection[str], example: Tensors | None
) -> tuple[Interface, dict[str, Array]]:
    """The interface that a file declares, and the inputs to run it on. Args: named: tensors whose axes a user named."""
    inputs = _apart([_spec(tensor, axes.get(tensor.name), model_format) for tensor in session.inputs], named)
    batched = any(spec.batched for spec in inputs)
    outputs = tuple(_spec(t, axes.get(t.name) if batched else "", model_format) for t in session.outputs)
    interface = Interface(inputs=inputs, outputs=outputs)
    given = random_inputs(inputs, session.inputs, RANDOM_ROWS, RANDOM_SEED) if example is None else dict(example)
    return interface, dict(zip([spec.name for spec in inputs], check_inputs(interface, given), strict=True))


def _apart(specs: Sequence[TensorSpec], named: Collection[str]) -> tuple[TensorSpec, ...]:
    """Open axes that nobody named with letters of their own: nothing says that two inputs' are one size."""
    taken: set[str] = set()
    apart = []
    for spec in specs:
        letters = list(spec.axes)
        for at, letter in free_axes(spec).items() if spec.name not in named else ():
            if letter in taken:
                letters[at] = next(spare for spare in UNNAMED_AXES if spare not in taken | set(letters))
        taken.update(letters)
        apart.append(replace(spec, axes="".join(letters)))
    return tuple(apart)


def _described(
    interface: Interface, ranges: Mapping[str, tuple[float, float]], meanings: Mapping[str, str]
) -> Interface:
    def described(spec: TensorSpec) -> TensorSpec:
        bounds = ranges.get(spec.name)
        return replace(
            spec,
            range=None if bounds is None else (float(bounds[0]), float(bounds[1])),
            meaning=meanings.get(spec.name, ""),
        )

    return replace(
        interface,
        inputs=tuple(described(spec) for spec in interface.inputs),
        outputs=tuple(described(spec) for spec in interface.outputs),
    )


def _follow_rows(path: Path, session: Session, interface: Interface, binding: Binding, inputs: Tensors) -> Interface:
    """Without N on outputs whose first size is open for another reason: as many rows as were detected, say."""
    try:
        with quiet():
            outputs = BoundSession(session, interface, binding).run(inputs).outputs
    except InferenceError as error:
        raise ExportError(
            f"{path.name} cannot run on the golden inputs: {error}",
            hint="pass example= with inputs like those of the field",
        ) from error
    rows = count_rows(inputs, interface)
    kept = tuple(
        replace(spec, axes="") if spec.batched and outputs[spec.name].shape[:1] != (rows,) else spec
        for spec in interface.outputs
    )
    return replace(interface, outputs=kept)


def _spec(tensor: FileTensor, letters: str | None, model_format: str) -> TensorSpec:
    dtype = _dtype(tensor)
    if letters is None:
        letters = _letters(tensor, model_format) if tensor.shape[:1] == (None,) else ""
    elif letters.startswith(BATCH_AXIS) and tensor.shape[:1] not in ((None,), (1,)):
        raise ExportError(f"tensor {tensor.name!r} has {tensor.shape[:1]} rows, which cannot be N")
    shape: Shape = (None, *tensor.shape[1:]) if letters.startswith(BATCH_AXIS) else tensor.shape
    return TensorSpec(name=tensor.name, dtype=dtype, shape=shape, axes=letters)


def _letters(tensor: FileTensor, model_format: str) -> str:
    """The axes of a batched tensor that nobody named."""
    letters = default_axes(len(tensor.shape), _dtype(tensor))
    return CHANNEL_LAST_AXES if model_format == "tflite" and letters == "NCHW" else letters


def _dtype(tensor: FileTensor) -> str:
    return tensor.dtype if tensor.scale is None else "float32"


def _bound(tensor: FileTensor) -> TensorBinding:
    return TensorBinding(
        name=tensor.name,
        file_name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        scale=tensor.scale,
        zero_point=tensor.zero_point,
    )


def _precision(path: Path, model_format: str, session: Session) -> str:
    quantized = is_quantized_onnx(path) if model_format == "onnx" else is_quantized_tflite(path)
    if quantized:
        return "int8"
    share = quantized_share_onnx(path) if model_format == "onnx" else quantized_share_tflite(path)
    if share > HALF:  # of a file that is not quantized: weights in 16 bits
        return "float16"
    floats = [t.dtype for t in (*session.inputs, *session.outputs) if t.dtype.startswith("float")]
    return floats[0] if floats else "float32"
