"""Measured variants into one bundle, with its golden and where everything comes from."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from outrider.bundle import Golden, Variant, write_bundle
from outrider_exporters.data import Data, golden_rows
from outrider_exporters.gates import GateResult
from outrider_exporters.job import Job
from outrider_exporters.measure import LATENCY_THREADS
from outrider_exporters.passes import Progress, Stage
from outrider_exporters.report import VariantReport
from outrider_exporters.rows import count_rows, example_rows
from outrider_runtimes.golden import DecisionCheck
from outrider_runtimes.tensors import Interface, Tensors

if TYPE_CHECKING:
    from torch import nn

    from outrider_exporters.convert import ModelFile

GOLDEN_ROWS = (8, 64)
GOLDEN_BYTES = 4 * 2**20
TURNED_SHARE, TURNED_ROWS = 0.1, 2
DISTRIBUTIONS = (
    "torch",
    "onnx",
    "onnxruntime",
    "litert-torch",
    "ai-edge-litert",
    "ai-edge-quantizer",
    "torch-pruning",
    "numpy",
)


@dataclass(frozen=True, kw_only=True)
class Built:
    """Variants with their files, and the torch network that they were made from."""

    network: nn.Module
    files: Mapping[str, ModelFile]
    variants: tuple[VariantReport, ...]


def write(
    job: Job, built: Built, baseline: Stage, stages: Sequence[Stage], results: Sequence[GateResult]
) -> tuple[dict[str, Any], str]:
    """Write the bundle. Gives where its golden rows come from, and its digest."""
    job.context.progress(Progress(step="bundle", done=0, total=1, message=str(job.output)))
    golden, members, origin = _golden(job, built)
    digest = write_bundle(
        job.output,
        name=job.name,
        version=job.version,
        interface=job.interface,
        variants=_variants(built),
        golden=golden,
        members={**members, **{_member(v, file.format): file.path for v, file in built.files.items()}},
        provenance={
            "made_by": {"outrider": metadata.version("outrider")},
            "environment": environment(),
            "recipe": job.recipe.to_dict(),
            "baseline": baseline.to_dict(),
            "stages": [stage.to_dict() for stage in stages],
            "gates": [result.to_dict() for result in results],
            "targets": list(job.targets),
            "golden": origin,
            "seed": job.context.seed,
        },
        signing_keys=job.signing_keys,
    )
    return origin, digest


def _golden(job: Job, built: Built) -> tuple[Golden, dict[str, bytes], dict[str, Any]]:
    """The golden, its members, and where its rows come from."""
    from outrider_exporters.convert import predict_file
    from outrider_exporters.golden import build_golden
    from outrider_exporters.sources import torch_predict

    count = golden_count(job.context.example, job.interface)
    inputs, part = golden_rows(job.data, job.interface, rows=count, seed=job.context.seed)
    rows = count_rows(inputs, job.interface)
    golden, members = build_golden(
        job.interface,
        inputs,
        torch_predict(built.network, job.interface),
        {variant: predict_file(file, job.interface) for variant, file in built.files.items()},
        precisions={variant: file.precision for variant, file in built.files.items()},
        decision=decision_for(job.interface, job.data, rows),
    )
    return golden, members, {"rows": rows, "from": part}


def _variants(built: Built) -> list[Variant]:
    host = environment()["host"]
    return [
        Variant(
            name=report.name,
            format=report.format,
            precision=report.precision,
            member=_member(report.name, report.format),
            binding=built.files[report.name].binding,
            measured={**report.to_dict(), "host": host},
        )
        for report in built.variants
    ]


def _member(variant: str, kind: str) -> str:
    return f"models/{variant}.{kind}"


def golden_count(example: Tensors, interface: Interface) -> int:
    """How many golden rows to take: many of small inputs, few of large ones, as every board stores and runs them."""
    row_bytes = sum(array.nbytes for array in example_rows(example, interface, 1).values())
    return max(GOLDEN_ROWS[0], min(GOLDEN_ROWS[1], GOLDEN_BYTES // max(1, row_bytes)))


def decision_for(interface: Interface, data: Data, rows: int) -> DecisionCheck:
    """The golden decision: the class, where the one output holds class scores; else none.

    Scores are taken for class scores when the labels name them one by one or the training targets are class numbers.
    Quantization may turn one decision in ten, and two of a few.
    """
    spec = interface.outputs[0]
    scores = len(interface.outputs) == 1 and spec.batched and len(spec.shape) == 2 and spec.dtype.startswith("float")
    targets = None if data.train is None else data.train[1]
    numbered = targets is not None and targets.ndim == 1 and targets.dtype.kind in "iu"
    if not scores or spec.shape[1] == 1 or not (numbered or len(interface.labels) == spec.shape[1]):
        return DecisionCheck()
    allowed = max(TURNED_SHARE, TURNED_ROWS / rows)
    return DecisionCheck(kind="argmax", output=spec.name, axis=-1, min_agreement=max(0.0, round(1.0 - allowed, 4)))


def environment() -> dict[str, Any]:
    """Where the figures come from: the host, its CPU, the versions of the tools."""
    return {
        "host": platform.node(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": LATENCY_THREADS,
        "python": platform.python_version(),
        "tools": {tool: version for tool in DISTRIBUTIONS if (version := _installed(tool))},
    }


def _installed(tool: str) -> str:
    try:
        return metadata.version(tool)
    except metadata.PackageNotFoundError:
        return ""
