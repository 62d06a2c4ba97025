"""What a recipe may do to a network. One frozen dataclass a transform: it is the configuration and the pass."""

from __future__ import annotations

from typing import Any

from outrider_exporters.passes.base import Pass, PassContext, Progress, Stage, run_passes
from outrider_exporters.passes.distill import Distill
from outrider_exporters.passes.prune import Prune
from outrider_exporters.passes.qat import QAT
from outrider_exporters.passes.quantize import Quantize

TRANSFORMS: dict[str, type[Any]] = {transform.kind: transform for transform in (Prune, Distill, QAT, Quantize)}

__all__ = [
    "QAT",
    "TRANSFORMS",
    "Distill",
    "Pass",
    "PassContext",
    "Progress",
    "Prune",
    "Quantize",
    "Stage",
    "run_passes",
]
