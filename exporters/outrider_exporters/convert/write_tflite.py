"""The writer of smaller TFLite files. It takes a float32 file and gives bytes on disk, unchecked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outrider_exporters.convert.activations import observe, run_tflite
from outrider_exporters.convert.observers import Range
from outrider_exporters.convert.operators import Operator, find_named, tflite_operators
from outrider_runtimes.errors import ExportError, MissingExtra
from outrider_runtimes.tensors import Array

if TYPE_CHECKING:
    from outrider_exporters.passes.quantize import Quantize

Rows = Sequence[dict[str, Array]]


def write_tflite(
    source: Path, rows: Rows, path: Path, rule: Quantize, ranges: Mapping[str, Range] | None = None
) -> None:
    """Write ``source`` under a rule to ``path``. ``int8`` observes ``rows`` unless it is given the ranges."""
    try:
        from ai_edge_quantizer import quantizer
    except ImportError as error:
        raise MissingExtra("ai-edge-quantizer", extra="export", purpose="quantizing TFLite") from error

    kept = find_named(tflite_operators(source), rule.keep_float, "tflite")
    worker = quantizer.Quantizer(str(source), _recipe(rule, kept))
    statistics = None
    if rule.scheme == "int8":
        found = observe(run_tflite(source, rows), rule.observer) if ranges is None else ranges
        statistics = _as_statistics(source, found)
    result = worker.quantize(statistics, enable_progress_bar=False, enable_progress_report=False)
    if result.quantized_model is None:
        raise ExportError(f"AI Edge Quantizer gave nothing for {source.name}")
    path.write_bytes(bytes(result.quantized_model))


def examine_tflite(source: Path, rows: Rows, rule: Quantize) -> tuple[tuple[Operator, ...], dict[str, Range]]:
    """The operators that a rule may name, and the ranges that ``write_tflite`` would observe."""
    return tflite_operators(source), observe(run_tflite(source, rows), rule.observer)


def activations_tflite(source: Path, rows: Rows) -> Iterator[dict[str, Array]]:
    """Every float tensor of the graph that ``write_tflite`` quantizes, by name, one dictionary a row of N = 1."""
    return run_tflite(source, rows)


def activation_scales_tflite(path: Path) -> dict[str, float]:
    """The scale of every computed tensor that a static int8 file rounds, by name."""
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils as flatbuffers

    model = flatbuffers.read_model(str(path))
    tensors = [t for t in model.subgraphs[0].tensors if model.buffers[t.buffer].data is None]
    found = {flatbuffers.get_tensor_name(t): t.quantization for t in tensors if t.quantization is not None}
    return {name: float(q.scale[0]) for name, q in found.items() if q.scale is not None and len(q.scale)}


def _recipe(rule: Quantize, kept: Sequence[str]) -> Any:
    """The rule in AI Edge Quantizer's terms; of its entries the later ones win."""
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import QuantGranularity, TFLOperationName
    from ai_edge_quantizer.recipe_manager import RecipeManager

    manager = RecipeManager()
    every = TFLOperationName.ALL_SUPPORTED
    grain = QuantGranularity.CHANNELWISE if rule.per_channel else QuantGranularity.TENSORWISE
    if rule.scheme == "int8":
        manager.add_static_config(".*", every, activation_num_bits=8, weight_num_bits=8, weight_granularity=grain)
        # Static rules leave embedding tables in float.
        manager.add_dynamic_config(".*", TFLOperationName.EMBEDDING_LOOKUP, num_bits=8)
        for end in (TFLOperationName.INPUT, TFLOperationName.OUTPUT) if rule.io == "float" else ():
            manager.add_quantization_config(".*", end, algorithm_key=AlgorithmName.NO_QUANTIZE)
    elif rule.scheme == "dynamic":
        manager.add_dynamic_config(".*", every, num_bits=8, granularity=grain)
        if not rule.per_channel:  # the engines read a scale for every channel, beyond the one that there is
            depthwise = TFLOperationName.DEPTHWISE_CONV_2D
            manager.add_quantization_config(".*", depthwise, algorithm_key=AlgorithmName.NO_QUANTIZE)
    elif rule.scheme == "int4":
        manager.add_dynamic_config(".*", TFLOperationName.FULLY_CONNECTED, num_bits=4)
        manager.add_dynamic_config(".*", TFLOperationName.EMBEDDING_LOOKUP, num_bits=8)
    elif rule.scheme == "weight-only":
        manager.add_weight_only_config(".*", every, num_bits=8, granularity=grain)
        manager.add_dynamic_config(".*", TFLOperationName.EMBEDDING_LOOKUP, num_bits=8)
    else:
        manager.add_weight_only_config(".*", every, num_bits=16, algorithm_key=AlgorithmName.FLOAT_CASTING)
    for scope in kept:
        manager.add_quantization_config(f"^{re.escape(scope)}$", every, algorithm_key=AlgorithmName.NO_QUANTIZE)
    return manager.get_quantization_recipe()


def _as_statistics(source: Path, ranges: Mapping[str, Range]) -> dict[str, dict[str, Array]]:
    """Ranges in the form of AI Edge Quantizer's calibration result: arrays with as many axes as the tensor."""
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils

    tensors = tfl_flatbuffer_utils.read_model(str(source)).subgraphs[0].tensors
    axes = {tfl_flatbuffer_utils.get_tensor_name(t): 0 if t.shape is None else len(t.shape) for t in tensors}
    return {
        name: {end: np.full((1,) * axes[name], value, np.float32) for end, value in zip(("min", "max"), r, strict=True)}
        for name, r in ranges.items()
        if name in axes
    }
