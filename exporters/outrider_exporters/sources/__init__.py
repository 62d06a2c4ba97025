"""What an export starts from: a trained network, or a model file as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.bundle.manifest import FORMATS
from outrider_exporters.convert.files import ModelFile, predict_file
from outrider_exporters.known_gaps import SEVERAL_SIGNATURES, find_gap
from outrider_exporters.passes.base import PassContext, weigh
from outrider_exporters.rows import Predict, Sizes, free_letters, sizes_text
from outrider_exporters.sources.keras_model import is_keras
from outrider_exporters.sources.sizes import asked_sizes, sizes_in
from outrider_runtimes.errors import ConfigError, ExportError, FormatError, InputError, MissingExtra
from outrider_runtimes.tensors import Interface, StatePair, Tensors

if TYPE_CHECKING:
    from torch import nn

    from outrider_exporters.convert.trained import Trained
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
        sizes: of the interface's free axes, beside the example's, at which the network was run.
        shapes: the sizes of them that a TFLite file is to have.
    """

    interface: Interface
    example: Tensors
    network: PositionalModule | None = None
    file: ModelFile | None = None
    sizes: tuple[Sizes, ...] = ()
    shapes: tuple[Sizes, ...] = ()

    @property
    def module(self) -> nn.Module:
        """The network as it is now. Raises ConfigError for a file."""
        if self.network is None:
            raise ConfigError("the model is a file, which has no torch network")
        return self.network.module

    @property
    def trained(self) -> Trained | None:
        """What training under quantization found; None where it did not run."""
        return None if self.network is None else self.network.trained

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
            from outrider_exporters.convert.onnx import to_onnx

            return to_onnx(self.module, self.interface, self.example, path, sizes=self.sizes)
        from outrider_exporters.convert.tflite import to_tflite

        return to_tflite(self.module, self.interface, self.example, path, sizes=self.shapes)

    def check_sizes(self, *given: Tensors) -> None:
        """Refuse rows that TFLite variants would be evaluated on and cannot take. Raises ConfigError."""
        for rows in given if self.shapes else ():
            sizes = sizes_in(rows, self.interface.inputs)
            if sizes not in self.shapes:
                raise ConfigError(
                    f"the data has {sizes_text(sizes)}, and no TFLite file is made for that",
                    hint=f"shapes has {'; '.join(map(sizes_text, self.shapes))}; add the data's",
                )

    def quantizable(self, file: ModelFile, folder: Path) -> ModelFile:
        """What quantizers start from: ``file``, or a copy with the signature that the one for TFLite needs."""
        if self.file is None or file.format != "tflite":
            return file
        from outrider_exporters.sources.files import with_signature

        return with_signature(file, folder / f"{file.path.stem}-signed.tflite")

    def weigh(self, context: PassContext) -> tuple[int, int | None]:
        """Parameters and multiply-accumulates a row. Of a file the latter may not be known: then None."""
        if self.network is not None:
            weight = weigh(self.network, context)
            return weight.parameters, weight.macs
        if self.file is None:
            return 0, None
        from outrider_exporters.sources.files import count_parameters
        from outrider_exporters.sources.macs import onnx_macs

        return count_parameters(self.file), onnx_macs(self.file.path) if self.file.format == "onnx" else None

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
    dynamic_axes: Mapping[str, str] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    state: Mapping[str, str] | None = None,
) -> Source:
    """A torch network, a Keras 3 model on the torch backend, or the path of an ``.onnx`` or ``.tflite`` file.

    Args:
        example, outputs: needed for a network. A file names its tensors itself; a first size of 1 in a file is taken
            for N, unless ``axes`` says ``""``.
        axes, ranges, meanings: by tensor name; see TensorSpec.
        dynamic_axes: by input name, the letters of its axes that may have any size; of a network only.
        shapes: by letter of those, the sizes that a TFLite file has signatures for.
        state: by input name, the output that is this input of the next call.

    Raises:
        ConfigError: an argument is missing, or does not go with the file.
        ExportError: the network or the file cannot be run.
        ModelLoadError: the engine refuses the file.
        MissingExtra: torch is not installed.
    """
    options: dict[str, Any] = {"labels": labels, "axes": axes, "ranges": ranges, "meanings": meanings}
    if isinstance(model, str | Path):
        if dynamic_axes or shapes:
            raise ConfigError(
                f"{'dynamic_axes' if dynamic_axes else 'shapes'} is given, and the model is a file",
                hint="a file says itself which of its axes have any size",
            )
        return _with_state(_open_file(Path(model), example, outputs, options), state or {})
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
    from outrider_exporters.sources.module import describe_module, run_sizes, trainable_copy

    described = describe_module(model, example, outputs, dynamic_axes=dynamic_axes, state=state, **options)
    interface = described.interface
    asked = asked_sizes(shapes or {}, interface.inputs)
    run_sizes(model, interface, example, asked)
    network = trainable_copy(model, [spec.name for spec in interface.inputs], list(outputs))
    return Source(interface=interface, example=example, network=network, sizes=described.sizes, shapes=asked)


def formats_for(source: Source, asked: Sequence[str] | None, recipe: Recipe) -> tuple[str, ...]:
    """The formats to make, and the refusal of what cannot be made of a file. Raises ConfigError."""
    if source.file is None:
        _refuse_keras(source, recipe)
        formats = FORMATS if asked is None else tuple(asked)
        _check_shapes(source, formats, recipe)
        return formats
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


def _check_shapes(source: Source, formats: Sequence[str], recipe: Recipe) -> None:
    """TFLite has no axis of any size, and nothing else has ``shapes``."""
    free = free_letters(source.interface.inputs)
    if "tflite" in formats and free and not source.shapes:
        sizes = ", ".join(f'"{letter}": [8, 16]' for letter in free)
        raise ConfigError(
            f"dynamic_axes leaves {', '.join(free)} free, and a TFLite file has fixed sizes",
            hint=f'shapes={{{sizes}}} makes a signature a size, which share the weights; or formats=("onnx",)',
        )
    static = any(rule.scheme == "int8" for rule in recipe.quantizations)
    gap = find_gap("tflite", "int8", operators={SEVERAL_SIGNATURES})
    if "tflite" in formats and static and len(source.shapes) > 1 and gap is not None:
        raise ConfigError(f"static int8 of {gap.network}: {gap.reason}", hint=gap.instead)
    if source.shapes and "tflite" not in formats:
        raise ConfigError(
            f"shapes is given, and formats is {tuple(formats)}", hint="ONNX files take any size: leave it out"
        )


def _with_state(source: Source, state: Mapping[str, str]) -> Source:
    """A file with what its caller says of its state."""
    pairs = tuple(StatePair(input=before, output=after) for before, after in state.items())
    try:
        return replace(source, interface=replace(source.interface, state=pairs))
    except FormatError as error:
        raise ConfigError(str(error), hint=error.hint) from None


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
