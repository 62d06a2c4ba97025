"""The first stage: networks are trained, files made, their sizes and answers compared."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.exporters.labels import OURS, PEERS
from benchmarks.exporters.peers import make_peers
from benchmarks.exporters.pruning import make_pruned
from benchmarks.exporters.sizes import weight_bytes
from benchmarks.exporters.subjects import INPUT, OUTPUT, Material, Subject, evaluate
from benchmarks.measure import say
from benchmarks.raw import open_raw
from outrider.bundle import open_bundle
from outrider_exporters import Data, MaxDrop, Quantize, Recipe, export
from outrider_exporters.report import ExportReport
from outrider_runtimes.tensors import Array

MADE = "made.json"
IMAGE = "image.npy"
GATE = MaxDrop("accuracy", points=1.0)  # of the trained networks; what noise answers is not worth a gate


def make_subject(subject: Subject, folder: Path) -> None:
    """Export a subject for this host, make its peers, and write what both are to ``made.json`` beside the files."""
    folder.mkdir(parents=True, exist_ok=True)
    say(f"make {subject.name}")
    material = subject.make()
    begun = time.perf_counter()
    report = _export(subject, material, folder)
    seconds = time.perf_counter() - begun
    files = _members(report, folder) | {
        name: _file(path, is_float=PEERS[name].is_float) for name, path in make_peers(material, folder).items()
    }
    np.save(folder / IMAGE, material.test[0][:1])
    made = {
        "chosen": OURS + report.choices[0].kept[0],
        "kept": [OURS + name for name in report.choices[0].kept],
        "candidates": _candidates(report),
        "export_seconds": round(seconds, 1),
        "files": files,
    }
    if subject.tuning is not None:
        right = {name: _right(folder / file["file"], material) for name, file in files.items()}
        made["baseline"] = report.baseline.metrics["accuracy"]
        made["right"] = {name: "".join("01"[int(row)] for row in rows) for name, rows in right.items()}
        made["pruning"] = make_pruned(material, subject.tuning, folder)
    (folder / MADE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def read_made(folder: Path) -> dict[str, Any]:
    """What ``make_subject`` wrote; ``right`` (where the subject is trained) as bool arrays, one element a test row."""
    made: dict[str, Any] = json.loads((folder / MADE).read_text(encoding="utf-8"))
    if "right" in made:
        made["right"] = {name: np.array(list(text)) == "1" for name, text in made["right"].items()}
    return made


def _export(subject: Subject, material: Material, folder: Path) -> ExportReport:
    return export(
        material.module,
        example={INPUT: material.calibration[:1]},
        outputs=[OUTPUT],
        data=Data(calibration=material.data.calibration, test=material.data.test),
        evaluate=evaluate,
        recipe=Recipe([Quantize("int8")]),
        formats=("onnx", "tflite"),
        targets=("native",),
        gates=[GATE] if subject.tuning is not None else [],
        output=folder / f"{subject.name}.outrider",
    )


def _members(report: ExportReport, folder: Path) -> dict[str, dict[str, Any]]:
    """The model files that the bundle has, taken out of it."""
    files = {}
    with open_bundle(report.bundle) as opened:
        for variant in opened.manifest.variants:
            path = folder / f"{variant.name}.{variant.format}"
            path.write_bytes(opened.read(variant.member))
            files[OURS + variant.name] = _file(path, is_float=variant.precision == "float32")
    return files


def _candidates(report: ExportReport) -> dict[str, dict[str, Any]]:
    """Every form that the export made and measured, kept or not, as its report says."""
    return {
        variant.name: {
            "format": variant.format,
            "scheme": variant.scheme,
            "size_bytes": variant.size_bytes,
            "host_ms": variant.latency_host_ms_p50,
            "metrics": dict(variant.metrics),
        }
        for variant in (*report.variants, *report.passed_over)
    }


def _file(path: Path, *, is_float: bool) -> dict[str, Any]:
    return {
        "file": path.name,
        "format": path.suffix[1:],
        "float": is_float,
        "size_bytes": path.stat().st_size,
        "weight_bytes": weight_bytes(path),
    }


def _right(path: Path, material: Material) -> Array:
    """Which of the test rows a file answers right, row by row: bool [N]."""
    answer = open_raw(path).answer
    images, classes = material.test
    found = [answer(images[at : at + 1]).argmax() for at in range(len(images))]
    return np.asarray(np.asarray(found) == classes)
