"""The variants of one bundle beside each other: ResNet-8 on 32x32 images, one thread."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bundles import export_noise, load_variant
from benchmarks.measure import Call, compare_calls, say
from benchmarks.networks import seeded
from networks.tiny import resnet8
from outrider.bundle import open_bundle
from outrider.model import Model

BLOCKS = 40
CALLS_A_BLOCK = 50
BASE = "onnx-float32"


def run(folder: Path) -> dict[str, Any]:
    """Measure. Returns what is stored as ``results/variants.json``."""
    bundle = export_noise(seeded(resnet8), (3, 32, 32), name="resnet8", folder=folder)
    inputs = {"image": np.random.default_rng(1).random((1, 3, 32, 32), np.float32)}
    with open_bundle(bundle) as opened:
        manifest = opened.manifest
        sizes = {variant.name: manifest.member(variant.member).size_bytes for variant in manifest.variants}
    say(f"variants: {', '.join(sizes)}")

    def infer(model: Model) -> Call:
        return lambda: model.infer(inputs)

    with ExitStack() as stack:
        models = {name: stack.enter_context(load_variant(bundle, name, folder=folder)) for name in sizes}
        calls = {name: infer(model) for name, model in models.items()}
        found, _ = compare_calls(calls, base=BASE, blocks=BLOCKS, calls_a_block=CALLS_A_BLOCK)
    return {
        "network": "ResNet-8 (MLPerf Tiny), 32x32x3, seeded weights",
        "blocks": BLOCKS,
        "calls_a_block": CALLS_A_BLOCK,
        "size_bytes": sizes,
        "latency": found.to_dict(),
    }
