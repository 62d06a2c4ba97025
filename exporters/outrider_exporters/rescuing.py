"""An int8 variant that misses a gate which its float file meets, made again with some layers in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from outrider_exporters.candidates import Plan
from outrider_exporters.gates import QUANTIZATION_GATES, Figures, judge
from outrider_exporters.job import Job
from outrider_exporters.passes.base import Progress

if TYPE_CHECKING:
    from outrider_exporters.convert import ModelFile
    from outrider_exporters.convert.rescue import Rescue

Metrics = Mapping[str, float]


def meets(job: Job, figures: Figures, baseline: Metrics) -> bool:
    """Whether a variant meets every gate on what quantization can lose."""
    gates = [gate for gate in job.gates if gate.kind in QUANTIZATION_GATES]
    return all(result.passed for result in judge(gates, [figures], baseline))


def lost_in_vain(job: Job, plan: Plan, figures: Mapping[str, Figures], baseline: Metrics) -> bool:
    """Whether the recipe asks for static int8 here, it misses a gate, and its float file does not."""
    if plan.rule is None or plan.rule.scheme != "int8" or not plan.asked:
        return False
    return not meets(job, figures[plan.name], baseline) and meets(job, figures[f"{plan.format}-float32"], baseline)


def rescued(
    job: Job,
    plan: Plan,
    plain: ModelFile,
    folder: Path,
    holds: Callable[[ModelFile], bool],
) -> Rescue | None:
    """The variant with the fewest layers in float that meets the gates; None where there is no such file.

    Args:
        plain: the float32 file that the variant is made from.
        folder: for the file.
        holds: whether a file meets the gates.

    Raises:
        ExportError: ``evaluate`` failed.
    """
    from outrider_exporters.convert.rescue import rescue

    def on_trial(done: int, total: int, message: str) -> None:
        job.context.progress(Progress(step="rescue", done=done, total=total, message=f"{plan.name}: {message}"))

    path = folder / f"{plan.name}-mixed.{plan.format}"
    calibration = [] if job.data.calibration is None else [job.data.calibration]
    return rescue(plain, calibration, job.interface, path, holds=holds, rule=plan.rule, on_trial=on_trial)
