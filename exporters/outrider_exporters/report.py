"""What an export did, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider_exporters.gates import GateResult
from outrider_exporters.passes.base import Stage


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
    """

    name: str
    format: str
    precision: str
    scheme: str
    size_bytes: int
    metrics: Mapping[str, float]
    latency_host_ms_p50: float
    parity: float

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
            "parity": self.parity,
        }


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """A finished export.

    Attributes:
        name, version: the bundle's.
        baseline: the original model.
        stages: the network after each pass.
        variants: what the bundle holds.
        gates: every gate on every variant; all passed.
        bundle, digest, size_bytes: the file that was written, its identity and its size.
        golden: ``rows`` and the part of the data that they come from.
        environment: the host that measured, its threads, and the versions of the tools.
        recipe: the recipe as data.
        targets: what the bundle was made for.
        seconds: the whole export took.
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
        }
