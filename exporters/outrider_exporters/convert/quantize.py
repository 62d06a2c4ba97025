"""Float32 model files into smaller ones under a rule, each checked before it is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from outrider_exporters.convert.files import (
    ModelFile,
    bind,
    check_file,
    first_line,
    kept_when_good,
    open_session,
)
from outrider_exporters.convert.observers import Range
from outrider_exporters.convert.onnx_graphs import graphs_of
from outrider_exporters.convert.quiet import quiet
from outrider_exporters.convert.trained import Trained, check_scales, ranges_of
from outrider_exporters.convert.write_onnx import activation_scales_onnx, activations_onnx, write_onnx
from outrider_exporters.convert.write_tflite import activation_scales_tflite, activations_tflite, write_tflite
from outrider_exporters.known_gaps import SEVERAL_SIGNATURES, find_gap
from outrider_exporters.passes.quantize import Quantize
from outrider_exporters.rows import count_rows
from outrider_runtimes.bound import input_converter
from outrider_runtimes.errors import ExportError, InputError, MissingExtra, OutriderError
from outrider_runtimes.tensors import Array, Interface, Tensors, check_inputs

Write = Callable[[Path, Sequence[dict[str, Array]], Path, Quantize, Mapping[str, Range] | None], None]
# Below this share of the weights an int8 file is a float file with a wrong name.
MIN_QUANTIZED_SHARE = 0.05
MIN_INT4_SHARE = 0.5  # what is left in float outweighs 4-bit weights at once: an int8 file would be smaller
CALIBRATION_BATCH = 8  # rows of one run where N is free in the file; bounds the memory of what is observed
PRECISIONS = {"float16": "float16", "int4": "int4"}
SUITS = {
    "int8": "convolutions and dense layers are what it quantizes",
    "dynamic": "dense layers, attention and LSTMs are what it quantizes (in TFLite convolutions too)",
    "weight-only": "convolutions, dense and recurrent layers and embeddings are what it stores in 8 bits",
    "float16": "convolutions, dense and recurrent layers and embeddings are what it stores in 16 bits",
    "int4": "dense layers and matrix products are what it quantizes; they must be most of the network",
}
_SCALES = ("_scale", "_scales")  # of weights that are stored in fewer bits
TFLITE_FLOAT16 = 1  # of the schema's TensorType
_QUANTIZED_OPERATORS = ("Quantize", "QLinear", "Integer", "NBits", "QGemm", "QAttention")


def quantize_file(
    source: ModelFile,
    calibration: Sequence[Tensors],
    interface: Interface,
    path: Path,
    *,
    rule: Quantize | None = None,
    trained: Trained | None = None,
) -> ModelFile:
    """A float32 file made smaller under a rule.

    Inputs and outputs stay float, but for static int8 in TFLite: there they are int8, with their scales in the binding.

    Args:
        calibration: inputs at the interface, each with one row or more. ``int8`` takes the ranges of activations from
            all of them; the finished file is run on the first.
        path: written in one step, once the file was loaded and run.
        rule: see Quantize; static int8 when left out.
        trained: what the network of the file learned with; ``int8`` then takes the ranges of activations from there.

    Raises:
        InputError: a calibration row is not what the interface says; the message says which.
        ConfigError: ``keep_float`` names what the file does not have.
        ExportError: no calibration rows, an already quantized file, next to nothing could be quantized, or the file
            rounds a tensor that was not trained to be rounded.
    """
    rule = rule or Quantize()
    tool = _TOOLS[source.format]
    _refuse_signatures(source, rule)
    rows = encoded_rows(source, calibration, interface, batch=CALIBRATION_BATCH)
    _refuse_quantized(source, tool.is_quantized(source.path))
    learned = trained if rule.scheme == "int8" else None
    ranges = None if learned is None else trained_ranges(source, interface, learned)
    with kept_when_good(path) as part:
        file = write_file(source, rows, interface, part, rule=rule, ranges=ranges)
        if learned is not None:
            check_trained(file, learned)
            file = replace(file, scheme=f"{file.scheme}-trained")
        check_share(file, source, rule)
        check_file(file, interface, calibration[0])
    return replace(file, path=path)


def write_file(
    source: ModelFile,
    rows: Sequence[dict[str, Array]],
    interface: Interface,
    path: Path,
    *,
    rule: Quantize,
    ranges: Mapping[str, Range] | None = None,
) -> ModelFile:
    """A float32 file made smaller under a rule, bound to the interface; neither its weights nor its answers checked.

    Args:
        rows: inputs as the file takes them; see ``encoded_rows``.
        ranges: what ``observed`` gave for the same rows; observed anew when left out.

    Raises:
        ExportError: the tool failed.
    """
    tool = _TOOLS[source.format]
    with _guarded(tool.name, source):
        tool.write(source.path, rows, path, rule, ranges)
    # As the float file is: an existing .tflite that takes NCHW goes on taking it.
    turned = any(item.permutation for item in (*source.binding.inputs, *source.binding.outputs))
    session, signatures = open_session(path, source.format), source.binding.signatures
    return ModelFile(
        path=path,
        format=source.format,
        precision=PRECISIONS.get(rule.scheme, "int8"),
        binding=bind(interface, session, channel_last=turned, signatures=signatures),
        scheme=scheme_name(source.format, rule),
        sizes=source.sizes,
    )


def trained_ranges(source: ModelFile, interface: Interface, trained: Trained) -> dict[str, Range]:
    """The ranges for ``write_file`` that the network of a float32 file learned with. Raises ExportError."""
    tool = _TOOLS[source.format]
    rows = encoded_rows(source, [trained.inputs], interface, batch=1)
    with _guarded(tool.name, source):
        return ranges_of(trained, tool.activations(source.path, rows))


def check_trained(file: ModelFile, trained: Trained) -> None:
    """Raise ExportError where a static int8 file rounds a tensor otherwise than its network learned to."""
    check_scales(trained, _TOOLS[file.format].scales(file.path), f"the {file.format} file")


def scheme_name(model_format: str, rule: Quantize) -> str:
    """How a file was made, in one word: ``qdq-u8s8-per-channel-mse-mixed``."""
    first = rule.scheme
    if rule.scheme == "int8":
        first = "static-int8" + ("-float-io" if rule.io == "float" else "")
        if model_format == "onnx":
            first = f"{rule.operators}-{'s8s8' if rule.activations == 'int8' else 'u8s8'}"
    words = [first]
    if rule.scheme in ("int8", "dynamic", "weight-only"):
        words.append("per-channel" if rule.per_channel else "per-tensor")
    words += [rule.observer] if rule.observer != "min-max" else []
    words += ["mixed"] if rule.keep_float else []
    return "-".join(words)


def is_quantized_onnx(path: Path) -> bool:
    """Whether an ONNX file computes in quantized form, or stores weights in 8 bits or less."""
    import onnx

    types = onnx.TensorProto
    small = {types.INT8, types.UINT8, types.INT4, types.UINT4}
    graphs = list(graphs_of(_load_onnx(path).graph))
    return any(mark in node.op_type for graph in graphs for node in graph.node for mark in _QUANTIZED_OPERATORS) or any(
        len(weight.dims) >= 2 and weight.data_type in small for graph in graphs for weight in graph.initializer
    )


def is_quantized_tflite(path: Path) -> bool:
    """Whether a TFLite file has a tensor with a scale."""
    return any(_has_scale(tensor) for tensor, _ in _tflite_tensors(path))


def quantized_share_onnx(path: Path) -> float:
    """Share of the weights' elements that are stored in 16 bits or less; weights have two axes or more."""
    import onnx

    types = onnx.TensorProto
    small = {types.INT8, types.UINT8, types.INT4, types.UINT4, types.FLOAT16}
    wide = {types.FLOAT, types.DOUBLE}
    quantized = floating = 0
    for graph in graphs_of(_load_onnx(path).graph):
        packed = {node.input[1] for node in graph.node if node.op_type == "MatMulNBits"}  # two in a byte
        for weight in (w for w in graph.initializer if len(w.dims) >= 2 and not w.name.endswith(_SCALES)):
            elements = int(np.prod(weight.dims))
            quantized += elements * (weight.data_type in small) * (2 if weight.name in packed else 1)
            floating += elements * (weight.data_type in wide)
    return _share(quantized, floating)


def quantized_share_tflite(path: Path) -> float:
    """Share of the weights' elements that are stored in 16 bits or less; weights have two axes or more."""
    quantized = floating = 0
    for tensor, constant in _tflite_tensors(path):
        if constant and tensor.shape is not None and len(tensor.shape) >= 2:
            elements = int(np.prod(tensor.shape))
            if _has_scale(tensor) or tensor.type == TFLITE_FLOAT16:
                quantized += elements
            else:
                floating += elements
    return _share(quantized, floating)


def _share(quantized: int, floating: int) -> float:
    return quantized / (quantized + floating) if quantized else 0.0


def _refuse_signatures(source: ModelFile, rule: Quantize) -> None:
    gap = find_gap(source.format, rule.scheme, operators={SEVERAL_SIGNATURES})
    if gap is not None and len(source.binding.signatures) > 1:
        raise ExportError(f"{source.path.name}: {gap.network}: {gap.reason}", hint=gap.instead)


def _refuse_quantized(source: ModelFile, quantized: bool) -> None:
    if quantized or source.precision != "float32":
        raise ExportError(
            f"{source.path.name} is quantized already",
            hint="start from the float32 file, or keep this one as it is with outrider_exporters.package",
        )


def check_share(file: ModelFile, source: ModelFile, rule: Quantize) -> None:
    """Refuse a file in which next to nothing is smaller. Raises ExportError."""
    share = _TOOLS[file.format].share(file.path)
    least = MIN_INT4_SHARE if rule.scheme == "int4" else MIN_QUANTIZED_SHARE
    if share < least:
        gap = find_gap(source.format, rule.scheme, operators=_operator_types(source))
        otherwise = gap.instead if gap else "another scheme, or keep this network in float32"
        raise ExportError(
            f"{source.path.name}: {rule.scheme} quantized {share:.1%} of the weights, at least {least:.0%} expected",
            hint=f"{SUITS[rule.scheme]}; " + ("name less in keep_float" if rule.keep_float else otherwise),
        )


def _operator_types(source: ModelFile) -> set[str]:
    """As the list of known gaps calls them; it has none of TFLite's for quantization."""
    if source.format != "onnx":
        return set()
    return {node.op_type for graph in graphs_of(_load_onnx(source.path).graph) for node in graph.node}


@contextlib.contextmanager
def _guarded(tool: str, source: ModelFile) -> Iterator[None]:
    """A quantizer runs inside, in silence; what it raises becomes an ExportError that names it."""
    try:
        with quiet():
            yield
    except (OutriderError, OSError):
        raise
    except Exception as error:
        raise ExportError(
            f"{tool} failed on {source.path.name}: {first_line(error)}", hint="keep this network in float32"
        ) from error


def encoded_rows(
    source: ModelFile, calibration: Sequence[Tensors], interface: Interface, *, batch: int
) -> list[dict[str, Array]]:
    """The calibration inputs as the file takes them, by its names, in batches of at most ``batch`` rows.

    A file with a fixed N gets one row at a time.
    """
    if not calibration:
        raise ExportError(
            "there are no calibration rows",
            hint="static int8 needs some hundred inputs like those of the field: Data(calibration=...)",
        )
    converters = [input_converter(s, b) for s, b in zip(interface.inputs, source.binding.inputs, strict=True)]
    free = all(b.shape[0] is None for s, b in zip(interface.inputs, source.binding.inputs, strict=True) if s.batched)
    encoded = []
    for chunk in _chunks(calibration, interface, batch if free else 1):
        arrays = [convert(array) for convert, array in zip(converters, chunk, strict=True)]
        encoded.append({b.file_name: array for b, array in zip(source.binding.inputs, arrays, strict=True)})
    return encoded


def _chunks(calibration: Sequence[Tensors], interface: Interface, size: int) -> Iterator[list[Array]]:
    for position, inputs in enumerate(calibration):
        try:
            arrays = check_inputs(interface, inputs)
        except InputError as error:
            raise type(error)(f"calibration row {position}: {error}", tensor=error.tensor, hint=error.hint) from error
        rows = count_rows(inputs, interface)
        if not rows:
            raise InputError(f"calibration row {position} has N = 0", hint="leave it out")
        for at in range(0, rows, size):
            yield [a[at : at + size] if s.batched else a for a, s in zip(arrays, interface.inputs, strict=True)]


def _load_onnx(path: Path) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("onnx", extra="export", purpose="reading ONNX") from error
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ExportError(f"{path.name} is no ONNX file: {first_line(error)}") from error


def _tflite_tensors(path: Path) -> list[tuple[Any, bool]]:
    """Each tensor of a TFLite file, and whether its values are stored in the file."""
    try:
        from ai_edge_quantizer.utils import tfl_flatbuffer_utils
    except ImportError as error:
        raise MissingExtra("ai-edge-quantizer", extra="export", purpose="reading TFLite") from error
    model = tfl_flatbuffer_utils.read_model(str(path))
    return [(t, model.buffers[t.buffer].data is not None) for graph in model.subgraphs for t in graph.tensors]


def _has_scale(tensor: Any) -> bool:
    quantization = tensor.quantization
    return quantization is not None and quantization.scale is not None and len(quantization.scale) > 0


@dataclass(frozen=True, kw_only=True)
class _Tool:
    """What makes and reads the smaller files of a format."""

    name: str
    write: Write
    share: Callable[[Path], float]
    is_quantized: Callable[[Path], bool]
    activations: Callable[[Path, Sequence[dict[str, Array]]], Iterator[dict[str, Array]]]
    scales: Callable[[Path], dict[str, float]]


_TOOLS = {
    "onnx": _Tool(
        name="ONNX Runtime",
        write=write_onnx,
        share=quantized_share_onnx,
        is_quantized=is_quantized_onnx,
        activations=activations_onnx,
        scales=activation_scales_onnx,
    ),
    "tflite": _Tool(
        name="AI Edge Quantizer",
        write=write_tflite,
        share=quantized_share_tflite,
        is_quantized=is_quantized_tflite,
        activations=activations_tflite,
        scales=activation_scales_tflite,
    ),
}
