"""A bundle of the tiny classifier with float32 and int8 variants in both formats, as an export would pack it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from outrider.bundle import Golden, GoldenTensor, Variant, open_bundle, write_bundle
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.engines import engines_for
from outrider_runtimes.golden import DecisionCheck
from support import tinymodels
from support.realbundles import INTERFACE, make_real_bundle, model_file
from support.tinymodels import CLASSES, SIDE

ROWS = 8
FLOAT_TOLERANCE, INT8_TOLERANCE = 1e-4, 0.05
VARIANTS = ("onnx-float32", "onnx-int8", "tflite-float32", "tflite-int8")


def make_bundle(
    path: Path,
    *,
    replaced: Mapping[str, bytes] | None = None,
    golden_shift: float = 0.0,
    tolerance: float | None = None,
    per_channel: bool = False,
    signing_keys: Any = (),
) -> str:
    """Write it; the stored answers are what this machine's engines gave.

    Args:
        replaced: by variant, other bytes than the right model's, after the answers were stored.
        golden_shift: added to every variant's stored answers.
        tolerance: of every variant; by precision where it is None.
        per_channel: one scale a channel in tflite-int8, which tflite-runtime 2.14 reads as one scale for all, silently.

    Returns:
        The digest.
    """
    variants = _variants(path)
    models = {name: _model(name, path.parent, per_channel) for name in VARIANTS}
    x = tinymodels.images(ROWS)
    members = {"golden/image.bin": x.tobytes(), "golden/reference.bin": _reference(x).tobytes()}
    for variant in variants:
        answer = _answer(variant, models[variant.name], x, path.parent)
        members[f"golden/{variant.name}.bin"] = (answer + np.float32(golden_shift)).tobytes()
        members[variant.member] = (replaced or {}).get(variant.name, models[variant.name])
    return write_bundle(
        path,
        name="tiny",
        version=1,
        interface=INTERFACE,
        variants=variants,
        golden=_golden(tolerance),
        members=members,
        provenance={"made_by": "tests"},
        signing_keys=signing_keys,
    )


def unknown_operator_onnx() -> bytes:
    """The classifier with an operator of ONNX's that no ONNX Runtime on a CPU has a kernel for in float64."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["logits"], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node("Softsign", ["wide"], ["soft"]),
        helper.make_node("Cast", ["soft"], ["y"], to=TensorProto.FLOAT),
    ]
    return tinymodels.classifier_onnx(tinymodels.weights(), extra=nodes)


def _variants(path: Path) -> list[Variant]:
    base = path.with_name("base.outrider")
    make_real_bundle(base, formats=("onnx", "tflite"))
    with open_bundle(base) as bundle:
        floats = bundle.manifest.variants
    return [
        dataclasses.replace(
            variant, name=f"{variant.format}-{p}", precision=p, member=f"model/{variant.format}-{p}.bin", measured={}
        )
        for variant in floats
        for p in ("float32", "int8")
    ]


def _model(name: str, folder: Path, per_channel: bool) -> bytes:
    kind, _, precision = name.partition("-")
    data = model_file(kind)
    if precision == "float32":
        return data
    source, target = folder / f"source.{kind}", folder / f"int8.{kind}"
    source.write_bytes(data)
    if kind == "onnx":
        _int8_onnx(source, target)
    else:
        _int8_tflite(source, target, per_channel)
    return target.read_bytes()


def _int8_onnx(source: Path, target: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Rows(CalibrationDataReader):
        def __init__(self) -> None:
            self._rows = iter([{"x": tinymodels.images(64, seed=3)}])

        def get_next(self) -> Any:
            return next(self._rows, None)

    quantize_static(
        str(source),
        str(target),
        Rows(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
    )


def _int8_tflite(source: Path, target: Path, per_channel: bool) -> None:
    from ai_edge_quantizer import qtyping, quantizer, recipe

    granularity = qtyping.QuantGranularity.CHANNELWISE if per_channel else qtyping.QuantGranularity.TENSORWISE
    (rule,) = recipe.dynamic_wi8_afp32()
    rule["op_config"]["weight_tensor_config"]["granularity"] = granularity
    quantize = quantizer.Quantizer(str(source))
    quantize.load_quantization_recipe([rule])
    quantize.quantize().export_model(str(target), overwrite=True)


def _answer(variant: Variant, data: bytes, x: np.ndarray, folder: Path) -> np.ndarray:
    file = folder / f"{variant.name}.model"
    file.write_bytes(data)
    session = engines_for(variant.format)[0].prepare(file, threads=1)
    logits: np.ndarray = BoundSession(session, INTERFACE, variant.binding).run({"image": x}).outputs["logits"]
    return logits


def _reference(x: np.ndarray) -> np.ndarray:
    return tinymodels.reference(tinymodels.weights(), x)


def _golden(tolerance: float | None) -> Golden:
    def logits(member: str) -> dict[str, GoldenTensor]:
        return {"logits": GoldenTensor(member=member, dtype="float32", shape=(ROWS, CLASSES))}

    def bound(name: str) -> float:
        return tolerance if tolerance is not None else INT8_TOLERANCE if "int8" in name else FLOAT_TOLERANCE

    return Golden(
        rows=ROWS,
        inputs={"image": GoldenTensor(member="golden/image.bin", dtype="float32", shape=(ROWS, 1, SIDE, SIDE))},
        reference=logits("golden/reference.bin"),
        variants={name: logits(f"golden/{name}.bin") for name in VARIANTS},
        tolerance={name: {"logits": bound(name)} for name in VARIANTS},
        decision=DecisionCheck(kind="argmax", output="logits", axis=-1, min_agreement=0.75),
    )
