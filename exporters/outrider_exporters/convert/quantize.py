"""Static int8: weights per channel, activations by their range over the calibration rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from outrider_exporters.convert.quiet import quiet
from outrider_exporters.rows import count_rows
from outrider_runtimes.bound import input_converter
from outrider_runtimes.errors import ExportError, InputError, MissingExtra, OutriderError
from outrider_runtimes.tensors import Array, Interface, Tensors, check_inputs

ONNX_SCHEME = "qdq-s8s8-per-channel"
TFLITE_SCHEME = "static-int8-per-channel"
# Below this share of the weights an int8 file is a float file with a wrong name.
MIN_QUANTIZED_SHARE = 0.05
CALIBRATION_BATCH = 32  # rows of one run where N is free in the file; bounds the memory of what is observed
_QUANTIZED_OPERATORS = ("Quantize", "QLinear", "Integer", "NBits", "QGemm", "QAttention")


def quantize_onnx(source: ModelFile, calibration: Sequence[Tensors], interface: Interface, path: Path) -> ModelFile:
    """A float32 ONNX file as int8 with QuantizeLinear/DequantizeLinear pairs, signed weights and activations.

    Inputs and outputs stay float. Ranges are the minimum and maximum over the calibration rows.

    Args:
        calibration: inputs at the interface, each with one row or more.
        path: written in one step, once the file was loaded and run.

    Raises:
        InputError: a calibration row is not what the interface says; the message says which.
        ExportError: no calibration rows, an already quantized file, or next to nothing could be quantized.
    """
    _check_format(source, "onnx")
    rows = _encoded_rows(source, calibration, interface, batch=CALIBRATION_BATCH)
    _refuse_quantized(source, is_quantized_onnx(source.path))
    with kept_when_good(path) as part:
        _guard("ONNX Runtime", source, lambda: _write_onnx(source.path, rows, part))
        _check_share(quantized_share_onnx(part), source)
        file = _kept(source, interface, part, scheme=ONNX_SCHEME)
        check_file(file, interface, calibration[0])
    return _moved(file, path)


def quantize_tflite(source: ModelFile, calibration: Sequence[Tensors], interface: Interface, path: Path) -> ModelFile:
    """A float32 TFLite file as int8 with int8 inputs and outputs, whose scales are in the binding.

    Ranges are the minimum and maximum over the calibration rows. Arguments and errors: see ``quantize_onnx``.
    """
    _check_format(source, "tflite")
    rows = _encoded_rows(source, calibration, interface, batch=1)
    _refuse_quantized(source, is_quantized_tflite(source.path))
    with kept_when_good(path) as part:
        _guard("AI Edge Quantizer", source, lambda: _write_tflite(source.path, rows, part))
        _check_share(quantized_share_tflite(part), source)
        file = _kept(source, interface, part, scheme=TFLITE_SCHEME)
        check_file(file, interface, calibration[0])
    return _moved(file, path)


def is_quantized_onnx(path: Path) -> bool:
    """Whether an ONNX file computes or stores anything in quantized form."""
    graphs = list(_graphs(_load_onnx(path).graph))
    return any(mark in node.op_type for graph in graphs for node in graph.node for mark in _QUANTIZED_OPERATORS)


def is_quantized_tflite(path: Path) -> bool:
    """Whether a TFLite file has a tensor with a scale."""
    return any(_has_scale(tensor) for tensor, _ in _tflite_tensors(path))


def quantized_share_onnx(path: Path) -> float:
    """Share of the weights' elements that are stored in 8 bits or less; weights have two axes or more."""
    import onnx

    small = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
    wide = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}
    weights = [w for graph in _graphs(_load_onnx(path).graph) for w in graph.initializer if len(w.dims) >= 2]
    quantized = sum(int(np.prod(w.dims)) for w in weights if w.data_type in small)
    return _share(quantized, sum(int(np.prod(w.dims)) for w in weights if w.data_type in wide))


def quantized_share_tflite(path: Path) -> float:
    """Share of the weights' elements that are stored in 8 bits or less; weights have two axes or more."""
    quantized = floating = 0
    for tensor, constant in _tflite_tensors(path):
        if constant and tensor.shape is not None and len(tensor.shape) >= 2:
            elements = int(np.prod(tensor.shape))
            if _has_scale(tensor):
                quantized += elements
            else:
                floating += elements
    return _share(quantized, floating)


def _share(quantized: int, floating: int) -> float:
    return quantized / (quantized + floating) if quantized else 0.0


def _check_format(source: ModelFile, wanted: str) -> None:
    if source.format != wanted:
        raise ExportError(f"{source.path.name} is a {source.format} file, expected {wanted}")


def _refuse_quantized(source: ModelFile, quantized: bool) -> None:
    if quantized or source.precision != "float32":
        raise ExportError(
            f"{source.path.name} is quantized already",
            hint="start from the float32 file, or keep this one as it is with outrider_exporters.package",
        )


def _check_share(share: float, source: ModelFile) -> None:
    if share < MIN_QUANTIZED_SHARE:
        raise ExportError(
            f"{source.path.name}: static int8 quantized {share:.1%} of the weights, "
            f"at least {MIN_QUANTIZED_SHARE:.0%} expected",
            hint="convolutions and dense layers are what it quantizes; keep this network in float32",
        )


def _kept(source: ModelFile, interface: Interface, path: Path, *, scheme: str) -> ModelFile:
    """The quantized file with its binding: layouts and names as in the source, scales as the engine reads them."""
    binding = bind(interface, open_session(path, source.format), channel_last=source.format == "tflite")
    return ModelFile(path=path, format=source.format, precision="int8", binding=binding, scheme=scheme)


def _moved(file: ModelFile, path: Path) -> ModelFile:
    return ModelFile(path=path, format=file.format, precision=file.precision, binding=file.binding, scheme=file.scheme)


def _guard(tool: str, source: ModelFile, write: Any) -> None:
    """Run a quantizer in silence; what it raises becomes an ExportError that names it."""
    try:
        with quiet():
            write()
    except (OutriderError, OSError):
        raise
    except Exception as error:
        raise ExportError(
            f"{tool} failed on {source.path.name}: {first_line(error)}", hint="keep this network in float32"
        ) from error


def _encoded_rows(
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


def _write_onnx(source: Path, rows: list[dict[str, Array]], path: Path) -> None:
    try:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise MissingExtra("onnxruntime", extra="export", purpose="quantizing ONNX") from error

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)  # fuses batch norm and adds shapes
    quantize_static(
        prepared,
        path,
        _Reader(rows),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )


class _Reader:
    """What onnxruntime's calibrator asks for its rows; it asks duck-typed."""

    def __init__(self, rows: Sequence[dict[str, Array]]) -> None:
        self._rows = iter(rows)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._rows, None)

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> dict[str, Array]:
        return next(self._rows)


def _write_tflite(source: Path, rows: list[dict[str, Array]], path: Path) -> None:
    try:
        from ai_edge_quantizer import calibrator, qtyping, quantizer, recipe
        from ai_edge_quantizer.recipe_manager import RecipeManager
        from ai_edge_quantizer.utils import qsv_utils
    except ImportError as error:
        raise MissingExtra("ai-edge-quantizer", extra="export", purpose="quantizing TFLite") from error

    manager = RecipeManager()
    manager.load_quantization_recipe(recipe.static_wi8_ai8())
    # Static rules leave embedding tables in float.
    manager.add_dynamic_config(".*", qtyping.TFLOperationName.EMBEDDING_LOOKUP, num_bits=8)
    # The calibrator's own default is a moving average, which clips what the last rows did not have.
    observer = calibrator.Calibrator(str(source), num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    (signature,) = observer.get_signature_list()
    observer.calibrate({signature: rows}, manager)
    worker = quantizer.Quantizer(str(source), manager.get_quantization_recipe())
    result = worker.quantize(observer.get_model_qsvs(), enable_progress_bar=False, enable_progress_report=False)
    if result.quantized_model is None:
        raise ExportError(f"AI Edge Quantizer gave nothing for {source.name}")
    path.write_bytes(bytes(result.quantized_model))


def _load_onnx(path: Path) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("onnx", extra="export", purpose="reading ONNX") from error
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ExportError(f"{path.name} is no ONNX file: {first_line(error)}") from error


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and the graphs within its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _graphs(inner)


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
