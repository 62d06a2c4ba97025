"""A pruned network beside the same network that was trained on just as long, both as TFLite files."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.exporters.labels import PRUNED, UNPRUNED
from benchmarks.exporters.subjects import INPUT, OUTPUT, Material, Tuning, evaluate
from outrider.bundle import open_bundle
from outrider_exporters import Prune, Recipe, export
from outrider_exporters.report import ExportReport

VARIANT = "tflite-float32"


def make_pruned(material: Material, tuning: Tuning, folder: Path) -> dict[str, Any]:
    """Train both on, export both, and give their files, multiply-accumulates and accuracy."""
    longer = copy.deepcopy(material.module)
    tuning.fit(longer, material.data.train)
    plain = _export(longer, material, Recipe([]), tuning, folder / UNPRUNED)
    small = _export(material.module, material, Recipe([Prune(ratio=tuning.ratio)]), tuning, folder / PRUNED)
    before, after = plain.baseline, small.stages[-1]
    return {
        "asked_ratio": tuning.ratio,
        "epochs": tuning.epochs,
        "files": {name: _member(folder / f"{name}.outrider") for name in (UNPRUNED, PRUNED)},
        "macs": {UNPRUNED: before.macs, PRUNED: after.macs},
        "accuracy": {UNPRUNED: _accuracy(plain), PRUNED: _accuracy(small)},
    }


def _export(module: Any, material: Material, recipe: Recipe, tuning: Tuning, path: Path) -> ExportReport:
    return export(
        module,
        example={INPUT: material.calibration[:1]},
        outputs=[OUTPUT],
        data=dataclasses.replace(material.data, calibration=None),
        evaluate=evaluate,
        recipe=recipe,
        fit=tuning.fit,
        formats=("tflite",),
        output=path.with_suffix(".outrider"),
    )


def _member(bundle: Path) -> str:
    """The bundle's TFLite file, beside it; its name."""
    path = bundle.with_suffix(".tflite")
    with open_bundle(bundle) as opened:
        path.write_bytes(opened.read(opened.manifest.variant(VARIANT).member))
    return path.name


def _accuracy(report: ExportReport) -> float:
    (variant,) = report.variants
    return float(variant.metrics["accuracy"])
