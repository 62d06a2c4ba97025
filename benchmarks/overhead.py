"""What ``Model.infer`` adds to the raw engine, with every default check on and with a reporter watching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import outrider
from benchmarks.bundles import export_noise, load_variant
from benchmarks.measure import Call, compare_calls, say
from benchmarks.networks import TinyNet, seeded
from outrider.bundle import open_bundle
from outrider_runtimes.tensors import Array

BLOCKS = 40
CALLS_A_BLOCK = 250
CHECKS = ["names", "dtype", "shape", "memory and byte order", "finite", "one caller at a time", "timing"]
UNUSED_BROKER = "mqtt://127.0.0.1:9"


def run(folder: Path) -> dict[str, Any]:
    """Measure on both engines. Returns what is stored as ``results/overhead.json``."""
    bundle = export_noise(seeded(TinyNet), (1, 8, 8), name="tiny", folder=folder)
    image = np.random.default_rng(1).random((1, 1, 8, 8), np.float32)
    engines = {}
    for variant, raw in (("onnx-float32", raw_onnxruntime), ("tflite-float32", raw_litert)):
        say(f"overhead: {variant}")
        engines[variant] = _compare(bundle, variant, raw(_model_file(bundle, variant, folder), image), image, folder)
    return {"checks_on": CHECKS, "blocks": BLOCKS, "calls_a_block": CALLS_A_BLOCK, "variants": engines}


def _compare(bundle: Path, variant: str, raw: Call, image: Array, folder: Path) -> dict[str, Any]:
    inputs = {"image": image}
    reporter = outrider.Reporter(UNUSED_BROKER, device="bench", state=folder / "state")
    with (
        load_variant(bundle, variant, folder=folder) as plain,
        load_variant(bundle, variant, folder=folder) as watched,
        reporter,
    ):
        reporter.watch(watched)
        calls: dict[str, Call] = {
            "raw": raw,
            "Model.infer": lambda: plain.infer(inputs),
            "Model.infer, reporter watching": lambda: watched.infer(inputs),
        }
        found = compare_calls(calls, base="raw", blocks=BLOCKS, calls_a_block=CALLS_A_BLOCK)
    added = {name: found.p50_us[name] - found.p50_us["raw"] for name in found.ratios}
    return {**found.to_dict(), "added_us": added}


def raw_onnxruntime(path: Path, image: Array) -> Call:
    """``InferenceSession.run`` on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: image}
    return lambda: session.run(None, feeds)


def raw_litert(path: Path, image: Array) -> Call:
    """Set, invoke and get on one thread."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    entry, exit_ = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    data = np.ascontiguousarray(image.reshape(entry["shape"]))

    def call() -> object:
        interpreter.set_tensor(entry["index"], data)
        interpreter.invoke()
        return interpreter.get_tensor(exit_["index"])

    return call


def _model_file(bundle: Path, variant: str, folder: Path) -> Path:
    with open_bundle(bundle) as opened:
        path = folder / f"raw-{variant}"
        path.write_bytes(opened.read(opened.manifest.variant(variant).member))
        return path
