"""An existing model file as a bundle, as it is: nothing is converted."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider._version import __version__
from outrider.bundle import Variant, write_bundle
from outrider_exporters.convert.files import engine_for, predict_file
from outrider_exporters.golden import build_golden
from outrider_exporters.sources.files import RANDOM_SEED, declare, format_of
from outrider_runtimes.errors import ExportError
from outrider_runtimes.tensors import Interface, Tensors

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

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
    ranges: Mapping[str, tuple[float, float]] | None = None,
    meanings: Mapping[str, str] | None = None,
    signing_keys: Sequence[Ed25519PrivateKey] = (),
    cloud_only: bool = False,
) -> PackageReport:
    """Pack an ``.onnx`` or ``.tflite`` file into a bundle, with the interface that the file declares.

    Names, dtypes and shapes are the file's. A first size that the file leaves open is the batch, N; any other first
    size is fixed, unless ``axes`` names it N and it is 1: then the file is run once a row. A tensor with a scale is a
    float32 tensor of real numbers to the caller.

    The golden inputs are the example, else 8 rows from a seeded generator: floats from a normal
    distribution, quantized tensors and 8-bit integers over all of their range, wider integers 0 or 1 (they may be
    indices). The golden answers are the file's own; no decision is checked.

    Args:
        name: of the bundle; else made from the file's name.
        example: inputs by name, one row or more; needed where an axis other than the first is open.
        axes, ranges, meanings: by tensor name; axes has one letter a dimension. See TensorSpec.
        cloud_only: its task belongs to the cloud: a board that has one asks it first, see ``outrider.Policy``.

    Returns:
        What was packed; ``output`` was written in one step.

    Raises:
        ExportError: the file is of another kind (a pickled model too) or cannot be run on the golden inputs.
        ModelLoadError: the file is cut short, uses external data, or the engine refuses it.
        InputError: the example is not what the file takes.
        BundleError: the bundle cannot be written, or its name or version is not allowed.
    """
    path, output = Path(path), Path(output)
    format_of(path)
    if output.resolve() == path.resolve():
        raise ExportError(f"{output.name} is the model file itself", hint="give the bundle another name")
    declared = declare(path, axes=axes, ranges=ranges, meanings=meanings, labels=labels, example=example)
    interface, file = declared.interface, declared.file
    predict = predict_file(file, interface)
    variant = Variant(
        name=f"{file.format}-{file.precision}",
        format=file.format,
        precision=file.precision,
        member=f"models/{file.format}-{file.precision}.{file.format}",
        binding=file.binding,
    )
    golden, members = build_golden(
        interface, declared.inputs, predict, {variant.name: predict}, precisions={variant.name: file.precision}
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
        provenance=_provenance(path, file.format, given=example is not None),
        signing_keys=signing_keys,
        cloud_only=cloud_only,
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


def _bundle_name(path: Path) -> str:
    name = re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("-._")
    return name[:MAX_NAME_LENGTH] or "model"


def _provenance(path: Path, model_format: str, *, given: bool) -> dict[str, Any]:
    engine = engine_for(model_format)
    return {
        "made_by": {"outrider": __version__, engine.name: engine.version()},
        "source": {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        "golden_inputs": "given" if given else f"random, seed {RANDOM_SEED}",
    }
