"""Bundles of real small models: `make_real_bundle(path)` writes one that installs, loads and answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outrider.bundle import Golden, GoldenTensor, OffloadRule, Variant, write_bundle
from outrider_runtimes.golden import DecisionCheck
from outrider_runtimes.tensors import Binding, Interface, TensorBinding, TensorSpec
from support import tinymodels
from support.tinymodels import CLASSES, SIDE

ROWS = 16
ONNX, TFLITE = "onnx-float32", "tflite-float32"
TOLERANCE = 1e-3
NHWC = (0, 2, 3, 1)

INTERFACE = Interface(
    inputs=(TensorSpec(name="image", dtype="float32", shape=(None, 1, SIDE, SIDE), axes="NCHW", range=(0.0, 1.0)),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=(None, CLASSES), axes="NC"),),
    labels=tuple("0123456789"),
)

images = tinymodels.images


def expected(x: np.ndarray, seed: int = 0) -> np.ndarray:
    """The logits, float32 [N, 10], that a bundle made with that seed must give for images [N, 1, 8, 8]."""
    return tinymodels.reference(tinymodels.weights(seed), x)


def close_to(outputs: Mapping[str, np.ndarray], x: np.ndarray, seed: int = 0) -> bool:
    """Whether the outputs are what a bundle made with that seed must give for those images."""
    return bool(np.allclose(outputs["logits"], expected(x, seed), atol=1e-4))


def rewrite_admission(state: Path, change: Callable[[dict[str, Any]], object], place: str = "current") -> None:
    """Change what the store kept of the latest admission of "tiny", as another engine, board or hand would have it."""
    path = state / "names/tiny.json"
    record = json.loads(path.read_text())
    change(record[place]["choice"]["admissions"][0])
    path.write_text(json.dumps(record))


def make_real_bundle(
    path: Path,
    *,
    name: str = "tiny",
    version: int = 1,
    seed: int = 0,
    formats: Sequence[str] = ("onnx",),
    files: Mapping[str, bytes] | None = None,
    golden_shift: float = 0.0,
    signing_keys: Sequence[Any] = (),
    interface: Interface = INTERFACE,
    offload: OffloadRule | None = None,
    cloud_only: bool = False,
) -> str:
    """Write a bundle with one float32 variant a format, named "onnx-float32" and "tflite-float32".

    Args:
        seed: of the weights; `expected(x, seed)` are the answers.
        formats: of "onnx" and "tflite".
        files: by format, other bytes than the right model's.
        golden_shift: added to the variants' stored answers: more than 1e-3 makes them wrong.
        interface: another one with the same tensors.
        offload, cloud_only: as ``write_bundle`` takes them.

    Returns:
        The digest.
    """
    variants = [_variant(kind) for kind in formats]
    x = images(ROWS)
    logits = expected(x, seed)
    members: dict[str, bytes] = {
        variant.member: (files or {}).get(variant.format) or model_file(variant.format, seed) for variant in variants
    }
    members |= {"golden/image.bin": x.tobytes(), "golden/reference.bin": logits.tobytes()}
    members |= {_stored(variant): (logits + np.float32(golden_shift)).tobytes() for variant in variants}
    return write_bundle(
        path,
        name=name,
        version=version,
        interface=interface,
        variants=variants,
        golden=_golden(variants),
        members=members,
        provenance={"made_by": "tests", "seed": seed},
        signing_keys=signing_keys,
        offload=offload,
        cloud_only=cloud_only,
    )


def model_file(kind: str, seed: int = 0) -> bytes:
    """The right model's file in that format."""
    w = tinymodels.weights(seed)
    return tinymodels.classifier_onnx(w) if kind == "onnx" else tinymodels.classifier_tflite(w)


def _variant(kind: str) -> Variant:
    batch = None if kind == "onnx" else 1
    image: tuple[int | None, ...] = (batch, 1, SIDE, SIDE) if kind == "onnx" else (batch, SIDE, SIDE, 1)
    binding = Binding(
        inputs=(
            TensorBinding(
                name="image",
                file_name="x",
                dtype="float32",
                shape=image,
                permutation=() if kind == "onnx" else NHWC,
            ),
        ),
        outputs=(TensorBinding(name="logits", file_name="y", dtype="float32", shape=(batch, CLASSES)),),
    )
    return Variant(
        name=f"{kind}-float32", format=kind, precision="float32", member=f"model/float32.{kind}", binding=binding
    )


def _stored(variant: Variant) -> str:
    return f"golden/{variant.name}.bin"


def _golden(variants: Sequence[Variant]) -> Golden:
    def logits(member: str) -> dict[str, GoldenTensor]:
        return {"logits": GoldenTensor(member=member, dtype="float32", shape=(ROWS, CLASSES))}

    return Golden(
        rows=ROWS,
        inputs={"image": GoldenTensor(member="golden/image.bin", dtype="float32", shape=(ROWS, 1, SIDE, SIDE))},
        reference=logits("golden/reference.bin"),
        variants={variant.name: logits(_stored(variant)) for variant in variants},
        tolerance={variant.name: {"logits": TOLERANCE} for variant in variants},
        decision=DecisionCheck(kind="argmax", output="logits", axis=-1, min_agreement=0.95),
    )
