"""An int8 variant that misses a gate which its float file meets, made again with some layers in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from outrider_exporters.candidates import Plan
from outrider_exporters.choose import formats_of, resolved, takes_activations
from outrider_exporters.gates import QUANTIZATION_GATES, Figures, judge
from outrider_exporters.job import Job
from outrider_exporters.passes.base import Progress
from outrider_runtimes.targets import Target

if TYPE_CHECKING:
    from outrider_exporters.convert import ModelFile
    from outrider_exporters.convert.rescue import Rescue
    from outrider_exporters.convert.trained import Trained

Metrics = Mapping[str, float]


def meets(job: Job, figures: Figures, baseline: Metrics) -> bool:
    """Whether a variant meets every gate on what quantization can lose."""
    gates = [gate for gate in job.gates if gate.kind in QUANTIZATION_GATES]
    return all(result.passed for result in judge(gates, [figures], baseline))


def lost_in_vain(job: Job, plan: Plan, made: Sequence[Plan], figures: Mapping[str, Figures], baseline: Metrics) -> bool:
    """Whether the recipe asks for static int8 here, it misses a gate, its float file does not, and some target has no
    other form of it that meets the gates.

    Args:
        made: all files that were planned.
        figures: of those that could be made.
    """
    if plan.rule is None or plan.rule.scheme != "int8" or not plan.asked:
        return False

    def good(name: str) -> bool:
        return name in figures and meets(job, figures[name], baseline)

    if good(plan.name) or not good(f"{plan.format}-float32"):
        return False
    return not stood_in_for(plan, made, [resolved(name, job.host) for name in job.targets], good)


def stood_in_for(plan: Plan, made: Sequence[Plan], targets: Sequence[Target], good: Callable[[str], bool]) -> bool:
    """Whether each target that could take a static int8 variant can take another form of it that is good.

    Without targets nothing stands in: the recipe's own form is what goes into the bundle.

    Args:
        good: whether the file of that name was made and meets the gates.
    """
    from outrider_exporters.convert.quantize import scheme_name

    others = [
        scheme_name(other.format, other.rule)
        for other in made
        if other.slot == plan.slot and other.name != plan.name and other.rule is not None
        if other.rule.scheme == "int8" and good(other.name)
    ]
    taking = [target for target in targets if plan.format in formats_of(target)]
    return bool(taking) and all(any(takes_activations(target, scheme) for scheme in others) for target in taking)


def rescued(
    job: Job,
    plan: Plan,
    plain: ModelFile,
    folder: Path,
    holds: Callable[[ModelFile], bool],
    *,
    trained: Trained | None = None,
) -> Rescue | None:
    """The variant with the fewest layers in float that meets the gates; None where there is no such file.

    Args:
        plain: the float32 file that the variant is made from.
        folder: for the file.
        holds: whether a file meets the gates.
        trained: see ``quantize_file``.

    Raises:
        ExportError: ``evaluate`` failed.
    """
    from outrider_exporters.convert.rescue import rescue

    def on_trial(done: int, total: int, message: str) -> None:
        job.context.progress(Progress(step="rescue", done=done, total=total, message=f"{plan.name}: {message}"))

    path = folder / f"{plan.name}-mixed.{plan.format}"
    given = job.context.data.calibration
    calibration = [] if given is None else [given]
    return rescue(
        plain, calibration, job.interface, path, holds=holds, rule=plan.rule, trained=trained, on_trial=on_trial
    )
