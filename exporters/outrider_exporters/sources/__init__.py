"""What an export starts from: a trained network, or a model file as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.bundle.manifest import FORMATS
from outrider_exporters.convert.files import ModelFile, predict_file
from outrider_exporters.passes.base import PassContext, Weight, weigh
from outrider_exporters.rows import Predict
from outrider_exporters.sources.keras_model import is_keras
from outrider_runtimes.errors import ConfigError, ExportError, InputError, MissingExtra
from outrider_runtimes.tensors import Interface, Tensors

if TYPE_CHECKING:
    from torch import nn

    from outrider_exporters.recipe import Recipe
    from outrider_exporters.sources.module import PositionalModule

FREE_PRECISION = "float32"  # what can be quantized


@dataclass(frozen=True, kw_only=True)
class Source:
    """A network that passes may change, or a file that is kept as it is; exactly one of them.

    Attributes:
        interface: what it takes and gives.
        example: inputs by name that it was run on.
        network: a copy of the user's, trainable where the original is.
        file: with its binding to the interface.
    """

    interface: Interface
    example: Tensors
    network: PositionalModule | None = None
    file: ModelFile | None = None

    @property
    def module(self) -> nn.Module:
        """The network as it is now. Raises ConfigError for a file."""
        if self.network is None:
            raise ConfigError("the model is a file, which has no torch network")
        return self.network.module

    @property
    def precision(self) -> str:
        """Of the first variant: that of the file, else ``float32``."""
        return FREE_PRECISION if self.file is None else self.file.precision

    def to_file(self, model_format: str, path: Path) -> ModelFile:
        """The first variant of a format: the network converted to ``path``, or the file where it stands.

        Raises:
            ExportError: the network cannot be converted; nothing was written.
        """
        if self.file is not None:
            return self.file
        if model_format == "onnx":
            from outrider_exporters.convert.onnx import to_onnx as convert
        else:
            from outrider_exporters.convert.tflite import to_tflite as convert
        return convert(self.module, self.interface, self.example, path)

    def quantizable(self, file: ModelFile, folder: Path) -> ModelFile:
        """What quantizers start from: ``file``, or a copy with the signature that the one for TFLite needs."""
        if self.file is None or file.format != "tflite":
            return file
        from outrider_exporters.sources.files import with_signature

        return with_signature(file, folder / f"{file.path.stem}-signed.tflite")

    def weigh(self, context: PassContext) -> Weight:
        """Parameters and multiply-accumulates a row. Of a file only its parameters are counted; its MACs are 0."""
        if self.network is not None:
            return weigh(self.network, context)
        from outrider_exporters.sources.files import count_parameters

        return Weight(parameters=0 if self.file is None else count_parameters(self.file), macs=0)

    def predict(self) -> Predict:
        """The source as it is now, behind its interface: the reference that variants are compared with."""
        if self.file is not None:
            return predict_file(self.file, self.interface)
        from outrider_exporters.sources.module import torch_predict

        return torch_predict(self.module, self.interface)


def open_source(
    model: Any,
    example: Tensors | None,
    outputs: Sequence[str] | None,
    *,
    labels: Sequence[str] = (),
    axes: Mapping[str, str] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    meanings: Mapping[str, str] | None = None,
) -> Source:
    """A torch network, a Keras 3 model on the torch backend, or the path of an ``.onnx`` or ``.tflite`` file.

    Args:
        example, outputs: needed for a network. A file names its tensors itself; a first size of 1 in a file is taken
            for N, unless ``axes`` says ``""``.
        axes, ranges, meanings: by tensor name; see TensorSpec.

    Raises:
        ConfigError: an argument is missing, or does not go with the file.
        ExportError: the network or the file cannot be run.
        ModelLoadError: the engine refuses the file.
        MissingExtra: torch is not installed.
    """
    options: dict[str, Any] = {"labels": labels, "axes": axes, "ranges": ranges, "meanings": meanings}
    if isinstance(model, str | Path):
        return _open_file(Path(model), example, outputs, options)
    if example is None or outputs is None:
        missing = "example" if example is None else "outputs"
        raise ConfigError(
            f"{missing} is missing: a network does not say what it {'takes' if example is None else 'gives'}",
            hint='export(model, example={"image": x}, outputs=["logits"], ...)',
        )
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra("torch", extra="export", purpose="export") from error
    from outrider_exporters.sources.module import interface_from_module, trainable_copy

    interface = interface_from_module(model, example, outputs, **options)
    network = trainable_copy(model, [spec.name for spec in interface.inputs], list(outputs))
    return Source(interface=interface, example=example, network=network)


def formats_for(source: Source, asked: Sequence[str] | None, recipe: Recipe) -> tuple[str, ...]:
    """The formats to make, and the refusal of what cannot be made of a file. Raises ConfigError."""
    if source.file is None:
        _refuse_keras(source, recipe)
        return FORMATS if asked is None else tuple(asked)
    file = source.file
    if asked is not None and tuple(asked) != (file.format,):
        raise ConfigError(
            f"formats is {tuple(asked)}, but an existing .{file.format} file gives {file.format} variants only",
            hint=f"formats=({file.format!r},), or start from the network itself",
        )
    for position, item in enumerate(recipe.passes):
        if item in recipe.network_passes:
            raise ConfigError(
                f"passes[{position}]: {item.kind} changes a network, and the model is the file {file.path.name}",
                hint="a file can only be quantized; start from the torch or Keras network",
            )
        if file.precision != FREE_PRECISION:
            raise ConfigError(
                f"passes[{position}]: {file.path.name} is {file.precision} already and is not quantized again",
                hint="leave quantize out: the file is packed as it is; or start from the float32 file",
            )
    return (file.format,)


def _refuse_keras(source: Source, recipe: Recipe) -> None:
    """Passes that know torch's layers only would leave a Keras model as it is."""
    for position, item in enumerate(recipe.passes):
        if item.kind == "prune" and is_keras(source.module):
            raise ConfigError(
                f"passes[{position}]: prune slices torch layers, and a Keras model has its own",
                hint="Distill the model into a smaller Keras model, or build it in torch",
            )


def _open_file(
    path: Path, example: Tensors | None, outputs: Sequence[str] | None, options: Mapping[str, Any]
) -> Source:
    from outrider_exporters.sources.files import declare

    try:
        declared = declare(path, example=example, one_is_batch=True, **options)
    except InputError as error:
        raise ExportError(f"the example is not what {path.name} takes: {error}", hint=error.hint) from error
    given = [spec.name for spec in declared.interface.outputs]
    if outputs is not None and list(outputs) != given:
        raise ConfigError(f"outputs is {list(outputs)}, {path.name} has {given}", hint="leave outputs out for a file")
    return Source(interface=declared.interface, example=declared.inputs, file=declared.file)
