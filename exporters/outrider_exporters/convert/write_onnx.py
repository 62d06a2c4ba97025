"""The writers of smaller ONNX files, one a scheme. Each takes a float32 file and gives bytes on disk, unchecked."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outrider_exporters.convert import onnx_weights
from outrider_exporters.convert.activations import observe, run_onnx
from outrider_exporters.convert.observers import Range
from outrider_exporters.convert.operators import Operator, find_named, onnx_operators
from outrider_runtimes.errors import MissingExtra
from outrider_runtimes.tensors import Array

if TYPE_CHECKING:
    from outrider_exporters.passes.quantize import Quantize

Rows = Sequence[dict[str, Array]]
# ConvInteger makes a convolutional network several times slower than in float.
DYNAMIC_OPERATORS = ("MatMul", "Attention", "LSTM", "Gather")
INT4_BLOCK = 32  # weights that share a scale; a smaller block is more exact and larger
INT4_ACCURACY_LEVEL = 4  # products in int8; the default computes in float and gains nothing


def write_onnx(source: Path, rows: Rows, path: Path, rule: Quantize, ranges: Mapping[str, Range] | None = None) -> None:
    """Write ``source`` under a rule to ``path``. ``int8`` observes ``rows`` unless it is given the ranges."""
    model = _prepared(source, path.with_name("prepared.onnx"))
    kept = find_named(onnx_operators(model), rule.keep_float, "onnx")
    if rule.scheme == "int8":
        found = observe(run_onnx(model, rows), rule.observer) if ranges is None else ranges
        _write_static(model, rows[:1], path, rule, kept, ranges=found)
    else:
        WRITERS[rule.scheme](model, path, rule, kept)


def examine_onnx(source: Path, rows: Rows, rule: Quantize) -> tuple[tuple[Operator, ...], dict[str, Range]]:
    """The operators that a rule may name, and the ranges that ``write_onnx`` would observe."""
    model = _prepared_apart(source)
    return onnx_operators(model), observe(run_onnx(model, rows), rule.observer)


def activations_onnx(source: Path, rows: Rows) -> Iterator[dict[str, Array]]:
    """Every float tensor of the graph that ``write_onnx`` quantizes, by name, one dictionary a row."""
    return run_onnx(_prepared_apart(source), rows)


def activation_scales_onnx(path: Path) -> dict[str, float]:
    """The scale of every computed tensor that a static int8 file rounds, by its name in the float file."""
    import onnx

    stored = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(str(path)).graph.initializer}
    scales = {name.removesuffix("_scale"): array for name, array in stored.items() if name.endswith("_scale")}
    return {name: float(array.item()) for name, array in scales.items() if not _is_stored(name, stored)}


def _is_stored(name: str, stored: Collection[str]) -> bool:
    """Whether what has a scale is a constant; a bias's scale is called after its integers."""
    return name in stored or f"{name}_quantized" in stored or name.endswith("_quantized")


def _prepared_apart(source: Path) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return _prepared(source, Path(folder) / "prepared.onnx")


def _prepared(source: Path, path: Path) -> Any:
    """The float model with batch norm fused and shapes inferred."""
    try:
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise MissingExtra("onnxruntime", extra="export", purpose="quantizing ONNX") from error
    quant_pre_process(source, path, skip_symbolic_shape=True)
    return onnx.load(str(path))


def _write_static(
    model: Any, rows: Rows, path: Path, rule: Quantize, kept: Sequence[str], *, ranges: Mapping[str, Range]
) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    whole = rule.operators == "qoperator"
    bounds = _without_activations(model, ranges) if whole else ranges
    quantize_static(
        model,
        path,
        _Reader(rows),  # it asks for its own ranges as well; ours replace them all
        quant_format=QuantFormat.QOperator if whole else QuantFormat.QDQ,
        per_channel=rule.per_channel,
        activation_type=QuantType.QInt8 if rule.activations == "int8" else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        nodes_to_exclude=list(kept),
        extra_options={"TensorQuantOverrides": {name: [_override(found)] for name, found in bounds.items()}},
    )


def _without_activations(model: Any, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The ranges for a file of integer operators, in which ReLU and Clip are left to the rounding before them: what
    they read gets the range of what they give."""
    readers = Counter(name for node in model.graph.node for name in node.input)
    found = dict(ranges)
    for node in model.graph.node:
        if node.op_type in ("Relu", "Clip") and readers[node.input[0]] == 1 and node.output[0] in ranges:
            found[node.input[0]] = ranges[node.output[0]]
    return found


def _override(bounds: Range) -> dict[str, Array]:
    return {end: np.array(value, np.float32) for end, value in zip(("rmin", "rmax"), bounds, strict=True)}


def _write_dynamic(model: Any, path: Path, rule: Quantize, kept: Sequence[str]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    onnx_weights.split_gemm(model)
    quantize_dynamic(
        model,
        path,
        op_types_to_quantize=list(DYNAMIC_OPERATORS),
        per_channel=rule.per_channel,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=list(kept),
    )


def _write_weight_only(model: Any, path: Path, rule: Quantize, kept: Sequence[str]) -> None:
    onnx_weights.store_int8(model, per_channel=rule.per_channel, kept=kept)
    path.write_bytes(model.SerializeToString())


def _write_float16(model: Any, path: Path, rule: Quantize, kept: Sequence[str]) -> None:
    onnx_weights.store_float16(model, kept=kept)
    path.write_bytes(model.SerializeToString())


def _write_int4(model: Any, path: Path, rule: Quantize, kept: Sequence[str]) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    onnx_weights.split_gemm(model)
    quantizer = MatMulNBitsQuantizer(
        model,
        bits=4,
        block_size=INT4_BLOCK,
        is_symmetric=True,
        accuracy_level=INT4_ACCURACY_LEVEL,
        nodes_to_exclude=list(kept),
        op_types_to_quantize=("MatMul",),
    )
    quantizer.process()
    path.write_bytes(quantizer.model.model.SerializeToString())


WRITERS: dict[str, Callable[[Any, Path, Quantize, Sequence[str]], None]] = {
    "dynamic": _write_dynamic,
    "weight-only": _write_weight_only,
    "float16": _write_float16,
    "int4": _write_int4,
}


class _Reader:
    """What onnxruntime's calibrator asks for its rows; it asks duck-typed."""

    def __init__(self, rows: Rows) -> None:
        self._rows = iter(rows)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._rows, None)

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> dict[str, Array]:
        return next(self._rows)
