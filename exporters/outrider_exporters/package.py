"""An existing model file as a bundle, as it is: nothing is converted."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version as distribution_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outrider.bundle import Variant, write_bundle
from outrider_exporters.convert.files import engine_for, open_session
from outrider_exporters.convert.quantize import is_quantized_onnx, is_quantized_tflite
from outrider_exporters.convert.quiet import quiet
from outrider_exporters.golden import build_golden
from outrider_exporters.rows import count_rows, default_axes
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.engines import FileTensor, Session
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

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FORMATS = {".onnx": "onnx", ".tflite": "tflite"}
PICKLED = frozenset([".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".joblib"])
GOLDEN_ROWS = 8
GOLDEN_SEED = 20
MAX_NAME_LENGTH = 64


@dataclass(frozen=True, kw_only=True)
class PackageReport:
    """What was packed. ``digest`` is the bundle's identity, ``size_bytes`` that of the bundle file."""

    path: Path
    digest: str
    name: str
    version: int
    variant: str
    interface: Interface
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As ``outrider package --json`` prints it."""
        return {
            "path": str(self.path),
            "digest": self.digest,
            "name": self.name,
            "version": self.version,
            "variant": self.variant,
            "interface": self.interface.to_dict(),
            "size_bytes": self.size_bytes,
        }


def package(
    path: str | Path,
    *,
    output: str | Path,
    name: str | None = None,
    version: int = 1,
    labels: Sequence[str] = (),
    example: Tensors | None = None,
    axes: Mapping[str, str] | None = None,
    signing_keys: Sequence[Ed25519PrivateKey] = (),
) -> PackageReport:
    """Pack an ``.onnx`` or ``.tflite`` file into a bundle, with the interface that the file declares.

    Names, dtypes and shapes are the file's. A first size that the file leaves open is the batch, N; any other first
    size is fixed, unless ``axes`` names it N and it is 1: then the file is run once a row. A tensor with a scale is a
    float32 tensor of real numbers to the caller.

    The golden inputs are the example, else ``GOLDEN_ROWS`` rows from a seeded generator: floats from a normal
    distribution, quantized tensors and 8-bit integers over all of their range, wider integers 0 or 1 (they may be
    indices). The golden answers are the file's own; no decision is checked.

    Args:
        name: of the bundle; else made from the file's name.
        example: inputs by name, one row or more; needed where an axis other than the first is open.
        axes: by tensor name, one letter a dimension.

    Returns:
        What was packed; ``output`` was written in one step.

    Raises:
        ExportError: the file is of another kind (a pickled model too) or cannot be run on the golden inputs.
        ModelLoadError: the file is cut short, uses external data, or the engine refuses it.
        InputError: the example is not what the file takes.
        BundleError: the bundle cannot be written, or its name or version is not allowed.
    """
    path, output = Path(path), Path(output)
    model_format = _format_of(path)
    if output.resolve() == path.resolve():
        raise ExportError(f"{output.name} is the model file itself", hint="give the bundle another name")
    session = open_session(path, model_format)
    interface, binding, inputs = _declared(session, axes or {}, tuple(labels), example)
    interface = _follow_rows(path, session, interface, binding, inputs)
    bound = BoundSession(session, interface, binding)

    def predict(tensors: Tensors) -> dict[str, Array]:
        return bound.run(tensors).outputs

    precision = _precision(path, model_format, session)
    variant = Variant(
        name=f"{model_format}-{precision}",
        format=model_format,
        precision=precision,
        member=f"models/{model_format}-{precision}.{model_format}",
        binding=binding,
    )
    golden, members = build_golden(
        interface, inputs, predict, {variant.name: predict}, precisions={variant.name: precision}
    )
    bundle_name = _bundle_name(path) if name is None else name
    digest = write_bundle(
        output,
        name=bundle_name,
        version=version,
        interface=interface,
        variants=[variant],
        golden=golden,
        members={variant.member: path, **members},
        provenance=_provenance(path, model_format, given=example is not None),
        signing_keys=signing_keys,
    )
    return PackageReport(
        path=output,
        digest=digest,
        name=bundle_name,
        version=version,
        variant=variant.name,
        interface=interface,
        size_bytes=output.stat().st_size,
    )


def random_inputs(specs: Sequence[TensorSpec], tensors: Sequence[FileTensor], rows: int, seed: int) -> dict[str, Array]:
    """Seeded inputs at the interface, as ``package`` says. Raises ExportError for an axis of unknown size."""
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


def _format_of(path: Path) -> str:
    kind = path.suffix.lower()
    if kind in PICKLED:
        raise ExportError(
            f"{path.name} is a pickled model, and opening one runs whatever code is in it",
            hint="load it yourself where you trust it, and pass the module to outrider_exporters.export",
        )
    if kind not in FORMATS:
        raise ExportError(f"{path.name} is neither .onnx nor .tflite", hint="convert it first, or rename it")
    if not path.is_file():
        raise ExportError(f"there is no file {path.name}", hint="check the path")
    return FORMATS[kind]


def _declared(
    session: Session, axes: Mapping[str, str], labels: tuple[str, ...], example: Tensors | None
) -> tuple[Interface, Binding, dict[str, Array]]:
    """The interface that a file declares, its binding, and the golden inputs."""
    known = [tensor.name for tensor in (*session.inputs, *session.outputs)]
    for stray in axes.keys() - set(known):
        raise ExportError(f"axes names a tensor {stray!r} that the file does not have", hint=f"it has {known}")
    inputs = tuple(_spec(tensor, axes.get(tensor.name)) for tensor in session.inputs)
    batched = any(spec.batched for spec in inputs)
    outputs = tuple(_spec(t, axes.get(t.name) if batched else "") for t in session.outputs)
    interface = Interface(inputs=inputs, outputs=outputs, labels=labels)
    given = random_inputs(inputs, session.inputs, GOLDEN_ROWS, GOLDEN_SEED) if example is None else dict(example)
    checked = dict(zip([spec.name for spec in inputs], check_inputs(interface, given), strict=True))
    binding = Binding(
        inputs=tuple(_bound(tensor) for tensor in session.inputs),
        outputs=tuple(_bound(tensor) for tensor in session.outputs),
    )
    return interface, binding, checked


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


def _spec(tensor: FileTensor, letters: str | None) -> TensorSpec:
    dtype = tensor.dtype if tensor.scale is None else "float32"
    if letters is None:
        letters = default_axes(len(tensor.shape), dtype) if tensor.shape[:1] == (None,) else ""
    elif letters.startswith(BATCH_AXIS) and tensor.shape[:1] not in ((None,), (1,)):
        raise ExportError(f"tensor {tensor.name!r} has {tensor.shape[:1]} rows, which cannot be N")
    shape: Shape = (None, *tensor.shape[1:]) if letters.startswith(BATCH_AXIS) else tensor.shape
    return TensorSpec(name=tensor.name, dtype=dtype, shape=shape, axes=letters)


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
    floats = [t.dtype for t in (*session.inputs, *session.outputs) if t.dtype.startswith("float")]
    return floats[0] if floats else "float32"


def _bundle_name(path: Path) -> str:
    name = re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("-._")
    return name[:MAX_NAME_LENGTH] or "model"


def _provenance(path: Path, model_format: str, *, given: bool) -> dict[str, Any]:
    engine = engine_for(model_format)
    return {
        "made_by": {"outrider": distribution_version("outrider"), engine.name: engine.version()},
        "source": {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        "golden_inputs": "given" if given else f"random, seed {GOLDEN_SEED}",
    }
