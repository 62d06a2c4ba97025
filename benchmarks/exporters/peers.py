"""The same weights through the converters' and quantizers' own front doors, with their own recipes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.exporters.labels import PEERS
from benchmarks.exporters.subjects import INPUT, Material
from outrider_exporters.convert.quiet import quiet
from outrider_runtimes.tensors import Array


def make_peers(material: Material, folder: Path) -> dict[str, Path]:
    """Every peer's file, by its name in ``PEERS``; calibrated on the material's calibration rows."""
    with quiet():
        return dict(zip(PEERS, (*_onnx(material, folder), *_tflite(material, folder)), strict=True))


def _onnx(material: Material, folder: Path) -> Iterator[Path]:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, prepared = folder / "peer-fp32.onnx", folder / "peer-prepared.onnx"
    example = torch.from_numpy(material.calibration[:1])
    torch.onnx.export(
        material.module, (example,), plain, dynamo=True, input_names=[INPUT], external_data=False, verbose=False
    )
    yield plain
    quant_pre_process(plain, prepared)
    forms: dict[str, dict[str, Any]] = {
        "qdq-s8s8": {},
        "qdq-u8s8-per-channel": {"activation_type": QuantType.QUInt8, "per_channel": True},
        "qoperator-u8s8": {"quant_format": QuantFormat.QOperator, "activation_type": QuantType.QUInt8},
    }
    for name, options in forms.items():
        path = folder / f"peer-{name}.onnx"
        quantize_static(prepared, path, _Rows(material.calibration), **options)
        yield path


def _tflite(material: Material, folder: Path) -> Iterator[Path]:
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe

    plain, small = folder / "peer-fp32.tflite", folder / "peer-static_wi8_ai8.tflite"
    rows = material.calibration.transpose(0, 2, 3, 1)
    network: nn.Module = litert_torch.to_channel_last_io(material.module, args=[0]).eval()
    with torch.no_grad():
        litert_torch.convert(network, (torch.from_numpy(rows[:1].copy()),)).export(str(plain))
    yield plain
    worker = quantizer.Quantizer(str(plain), recipe.static_wi8_ai8())
    statistics = worker.calibrate({"serving_default": [{"args_0": row[None].copy()} for row in rows]})
    worker.quantize(statistics).export_model(str(small), overwrite=True)
    yield small


class _Rows:
    """The calibration rows one by one, as onnxruntime's calibrator asks for them."""

    def __init__(self, images: Array) -> None:
        self._rows = iter(images)

    def get_next(self) -> dict[str, Array] | None:
        row = next(self._rows, None)
        return None if row is None else {INPUT: row[None]}
