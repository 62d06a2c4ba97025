"""What an export did, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outrider_exporters.choose import Choice
from outrider_exporters.gates import GateResult
from outrider_exporters.layers import LayerError
from outrider_exporters.likeness import Likeness
from outrider_exporters.passes.base import Stage


def count_text(count: int | None) -> str:
    """``1,234,567``, or ``unknown``."""
    return "unknown" if count is None else f"{count:,}"


@dataclass(frozen=True, kw_only=True)
class VariantReport:
    """One variant of the bundle.

    Attributes:
        name, format, precision: like ``tflite-int8``, ``tflite``, ``int8``.
        scheme: how the file was made.
        size_bytes: of the file.
        metrics: what ``evaluate`` gave, on the device's engine.
        latency_host_ms_p50: the median time of one row on the exporting host, one thread; not a board's.
        parity: the largest difference from the torch network, as a share of the output's range.
        targets: by the name of each target that it was chosen for, whether its latency was measured.
        note: what has to be said of it, such as that it is no faster than float32; else empty.
        latency_noise: by how much the medians of two measurements of this file differed, as a share.
        likeness: to the float32 variant of the same format; None for that one.
    """

    name: str
    format: str
    precision: str
    scheme: str
    size_bytes: int
    metrics: Mapping[str, float]
    latency_host_ms_p50: float
    parity: float
    targets: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    latency_noise: float = 0.0
    likeness: Likeness | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON stores it."""
        return {
            "name": self.name,
            "format": self.format,
            "precision": self.precision,
            "scheme": self.scheme,
            "size_bytes": self.size_bytes,
            "metrics": dict(self.metrics),
            "latency_host_ms_p50": self.latency_host_ms_p50,
            "latency_noise": round(self.latency_noise, 4),
            "parity": self.parity,
            "likeness": None if self.likeness is None else self.likeness.to_dict(),
            "targets": dict(self.targets),
            "note": self.note,
        }


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """An export: a finished one, or one that missed a gate, of which only the report was written.

    Attributes:
        name, version: the bundle's.
        baseline: the original model.
        stages: the network after each pass.
        variants: what the bundle holds; of an export that missed a gate, what missed it.
        gates: every gate on every variant; all passed where there is a bundle.
        bundle, digest, size_bytes: the file that was written, its identity and its size; without a bundle the last
            two are empty and 0.
        golden: ``rows``, where they come from, and how many of them are training rows.
        environment: the host that measured, its threads, and the versions of the tools.
        recipe: the recipe as data.
        targets: what the bundle was made for.
        seconds: the whole export took.
        asked: what was asked for besides the recipe, as a recipe file says it.
        command: the command that did it, where there was one.
        choices: what each target got, and why it did not get the rest.
        passed_over: candidates that were measured and are not in the bundle.
        dropped: why, by the name of the candidate.
        layers: by the name of a quantized variant, the error of each of its layers; of every one in the bundle where
            a report was asked for, else of those that missed a gate.
        offload: which answers are uncertain, where it was asked for; see ``outrider.bundle.OffloadRule``.
        quantization: which quantized forms beat float32, with the figures; see ``Worth.to_dict``.
    """

    name: str
    version: int
    baseline: Stage
    stages: tuple[Stage, ...]
    variants: tuple[VariantReport, ...]
    gates: tuple[GateResult, ...]
    bundle: Path
    digest: str
    size_bytes: int
    golden: Mapping[str, Any]
    environment: Mapping[str, Any]
    recipe: Mapping[str, Any]
    targets: tuple[str, ...] = ()
    seconds: float = 0.0
    seed: int = 0
    asked: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    choices: tuple[Choice, ...] = ()
    passed_over: tuple[VariantReport, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, tuple[LayerError, ...]] = field(default_factory=dict)
    quantization: Mapping[str, Any] = field(default_factory=dict)
    offload: Mapping[str, Any] = field(default_factory=dict)

    def variant(self, name: str) -> VariantReport:
        """The variant of that name. Raises KeyError."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """As JSON stores it."""
        return {
            "name": self.name,
            "version": self.version,
            "baseline": self.baseline.to_dict(),
            "stages": [stage.to_dict() for stage in self.stages],
            "variants": [variant.to_dict() for variant in self.variants],
            "gates": [result.to_dict() for result in self.gates],
            "bundle": {"path": str(self.bundle), "digest": self.digest, "size_bytes": self.size_bytes},
            "golden": dict(self.golden),
            "environment": dict(self.environment),
            "recipe": dict(self.recipe),
            "targets": list(self.targets),
            "seconds": round(self.seconds, 3),
            "seed": self.seed,
            "offload": dict(self.offload),
            "asked": dict(self.asked),
            "command": self.command,
            "choices": [choice.to_dict() for choice in self.choices],
            "passed_over": [variant.to_dict() for variant in self.passed_over],
            "dropped": dict(self.dropped),
            "layers": {name: [layer.to_dict() for layer in layers] for name, layers in self.layers.items()},
            "quantization": dict(self.quantization),
        }
