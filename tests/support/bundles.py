"""Small real bundles whose model files are arbitrary bytes: enough for everything that never runs them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outrider.bundle import Golden, GoldenTensor, Variant, write_bundle
from outrider_runtimes.golden import DecisionCheck
from outrider_runtimes.tensors import Binding, Interface, TensorBinding, TensorSpec

INTERFACE = Interface(
    inputs=(TensorSpec(name="image", dtype="float32", shape=(None, 2, 2), axes="NHW"),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=(None, 3), axes="NC"),),
    labels=("a", "b", "c"),
)
VARIANTS = ("onnx-float32", "tflite-int8")
ROWS = 2


def binding(file_input: str = "x", file_output: str = "y") -> Binding:
    """The binding of a file that spells the interface as it is."""
    return Binding(
        inputs=(TensorBinding(name="image", file_name=file_input, dtype="float32", shape=(None, 2, 2)),),
        outputs=(TensorBinding(name="logits", file_name=file_output, dtype="float32", shape=(None, 3)),),
    )


def golden_members(variants: Sequence[str] = VARIANTS, seed: int = 7) -> dict[str, bytes]:
    """The golden's members: random inputs, random answers, the same for every variant."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(ROWS, 3)).astype("<f4").tobytes()
    members = {"golden/inputs/image.bin": rng.normal(size=(ROWS, 2, 2)).astype("<f4").tobytes()}
    members["golden/reference/logits.bin"] = logits
    return members | {f"golden/{name}/logits.bin": logits for name in variants}


def golden(variants: Sequence[str] = VARIANTS) -> Golden:
    """The golden that describes ``golden_members``."""

    def logits(folder: str) -> dict[str, GoldenTensor]:
        return {"logits": GoldenTensor(member=f"golden/{folder}/logits.bin", dtype="float32", shape=(ROWS, 3))}

    image = GoldenTensor(member="golden/inputs/image.bin", dtype="float32", shape=(ROWS, 2, 2))
    return Golden(
        rows=ROWS,
        inputs={"image": image},
        reference=logits("reference"),
        variants={name: logits(name) for name in variants},
        tolerance={name: {"logits": 0.001} for name in variants},
        decision=DecisionCheck(kind="argmax", output="logits", axis=-1, min_agreement=0.95),
    )


def model_members(variants: Sequence[str] = VARIANTS, *, size_bytes: int = 100, seed: int = 1) -> dict[str, bytes]:
    """One file of random bytes a variant."""
    rng = np.random.default_rng(seed)
    return {_model_path(name): rng.bytes(size_bytes + i) for i, name in enumerate(variants)}


def _model_path(variant: str) -> str:
    return f"models/{variant}.{variant.split('-', maxsplit=1)[0]}"


def make_bundle(
    folder: Path,
    *,
    name: str = "tiny",
    version: int = 1,
    keys: Sequence[Any] = (),
    variants: Sequence[str] = VARIANTS,
    size_bytes: int = 100,
    seed: int = 1,
    filename: str | None = None,
) -> Path:
    """Write a small sound bundle.

    Args:
        keys: private keys that sign it.
        variants: names like ``onnx-float32``; the part before the dash is the format.
        size_bytes: about the size of each model file.
        seed: another seed gives other model files, so another digest.
    """
    path = folder / (filename or f"{name}-{version}-{seed}.outrider")
    write_bundle(
        path,
        name=name,
        version=version,
        interface=INTERFACE,
        variants=[
            Variant(
                name=variant,
                format=variant.split("-")[0],
                precision=variant.split("-")[1],
                member=_model_path(variant),
                binding=binding(),
                measured={"size_bytes": size_bytes},
            )
            for variant in variants
        ],
        golden=golden(variants),
        members=model_members(variants, size_bytes=size_bytes, seed=seed) | golden_members(variants),
        provenance={"made_by": "tests"},
        signing_keys=keys,
    )
    return path


def manifest_data(path: Path) -> dict[str, Any]:
    """The manifest of a bundle as plain JSON, to be broken."""
    return json.loads(split(path)["manifest"])


def split(path: Path) -> dict[str, Any]:
    """A bundle taken apart by the specification, without the code under test."""
    data = path.read_bytes()
    _, _, signatures, size, members, _, sha256 = struct.unpack("<8sIIQII32s", data[:64])
    at = 64 + members + size
    return {
        "presence": data[64 : 64 + members],
        "manifest": data[64 + members : at],
        "records": data[at : at + 96 * signatures],
        "sha256": sha256,
        "prefix": at + 96 * signatures,
    }


def assemble(
    path: Path,
    manifest: Mapping[str, Any] | bytes,
    members: Sequence[bytes],
    *,
    records: bytes = b"",
    presence: bytes | None = None,
) -> Path:
    """Put a bundle together by the specification, whatever its manifest says, without the code under test."""
    raw = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    count = len(members) if presence is None else len(presence)
    data = struct.pack(
        "<8sIIQII32s",
        b"\x89OUTRDR\n",
        1,
        len(records) // 96,
        len(raw),
        count,
        0,
        hashlib.sha256(raw).digest(),
    )
    data += (presence if presence is not None else b"\x01" * count) + raw + records
    for member in members:
        data += bytes(-len(data) % 64) + member
    path.write_bytes(data)
    return path
