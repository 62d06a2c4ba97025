"""The files of an export: made, loaded, run and measured by the engines of devices."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider_exporters.candidates import Plan, plans
from outrider_exporters.choose import resolved
from outrider_exporters.gates import Figures
from outrider_exporters.job import Job
from outrider_exporters.likeness import Recording, likeness
from outrider_exporters.measure import LATENCY_THREADS, Latency, metrics_of, twin_latencies
from outrider_exporters.packing import Built, decision_for, sample_rows
from outrider_exporters.passes.base import Progress, Stage
from outrider_exporters.report import VariantReport
from outrider_exporters.rescuing import lost_in_vain, meets, rescued
from outrider_exporters.rows import Predict
from outrider_exporters.sources import Source
from outrider_runtimes.errors import ExportError
from outrider_runtimes.tensors import Tensors

if TYPE_CHECKING:
    from outrider_exporters.convert import ModelFile
    from outrider_exporters.convert.trained import Trained

MAX_FLOAT_PARITY = 1e-4  # of the output's range; right conversions are a hundred times closer
PARITY_ROWS = 64


def build(source: Source, job: Job, folder: Path, baseline: Stage) -> Built:
    """Convert, check and measure every candidate; each was loaded and run by the device's engine before it is kept.

    A form that the recipe did not ask for is left out if it cannot be made or measured; ``Built.failed`` says why. A
    static int8 variant that misses a gate which its float file meets, and which no other form of it stands in for, is
    made again with some layers in float, if that helps; its note says which.

    Raises:
        ExportError: a file that the recipe asks for cannot be made, or is not the network; or ``evaluate`` failed.
    """
    made, files, failed = _convert(source, job, folder)
    reference = source.predict()

    answers: dict[str, Recording] = {}  # of the float32 file of each format

    def measure(variant: str, file: ModelFile) -> Figures:
        return _figures(job, variant, file, reference, baseline, answers=answers)

    light = {variant: _lighter(source, file, folder) for variant, file in files.items()}
    figures = _measured(job, made, light, measure, failed)
    shipped = {variant: light[variant] for variant in figures}
    notes = {}
    for plan in made:
        if plan.name in figures and lost_in_vain(job, plan, made, figures, baseline.metrics):
            plain = source.quantizable(files[f"{plan.format}-float32"], folder)
            found = rescued(
                job,
                plan,
                plain,
                folder,
                lambda file: meets(job, measure("in trial", file), baseline.metrics),
                trained=source.trained,
            )
            if found is not None:
                files[plan.name], notes[plan.name] = found.file, found.text
                shipped[plan.name] = _lighter(source, found.file, folder)
                figures[plan.name] = measure(plan.name, shipped[plan.name])
    return Built(
        reference=reference,
        files=shipped,
        named={variant: files[variant] for variant in shipped},
        variants=_reports(shipped, figures, _latencies(job, shipped), notes),
        slots={plan.name: plan.slot for plan in made if plan.name in shipped},
        failed=failed,
    )


def _measured(
    job: Job,
    made: Sequence[Plan],
    files: Mapping[str, ModelFile],
    measure: Callable[[str, ModelFile], Figures],
    failed: dict[str, str],
) -> dict[str, Figures]:
    """By variant; of a form that nobody asked for and that cannot be measured, why is added to ``failed``."""
    figures = {}
    for done, plan in enumerate(plan for plan in made if plan.name in files):
        job.context.progress(Progress(step="measure", done=done, total=len(files), message=plan.name))
        try:
            figures[plan.name] = measure(plan.name, files[plan.name])
        except ExportError as error:
            if plan.asked:
                raise
            failed[plan.name] = str(error)
    return figures


def _lighter(source: Source, file: ModelFile, folder: Path) -> ModelFile:
    """The file without names and notes; what the user brought as a file stays as it is."""
    from outrider_exporters.convert.strip import stripped

    if source.file is not None and file.path == source.file.path:
        return file
    return stripped(file, source.interface, source.example, folder / f"{file.path.stem}-light.{file.format}")


def _reports(
    files: Mapping[str, ModelFile],
    figures: Mapping[str, Figures],
    latencies: Mapping[str, Latency],
    notes: Mapping[str, str],
) -> tuple[VariantReport, ...]:
    return tuple(
        VariantReport(
            name=variant,
            format=file.format,
            precision=file.precision,
            scheme=file.scheme,
            size_bytes=figures[variant].size_bytes,
            metrics=figures[variant].metrics,
            latency_host_ms_p50=latencies[variant].p50_ms,
            latency_noise=latencies[variant].noise,
            parity=figures[variant].parity,
            likeness=figures[variant].likeness,
            note=notes.get(variant, ""),
        )
        for variant, file in files.items()
    )


def _figures(
    job: Job, variant: str, file: ModelFile, reference: Predict, baseline: Stage, *, answers: dict[str, Recording]
) -> Figures:
    """What a file answers, by the engine of devices; neither its latency nor the way that led to it.

    Args:
        answers: by format, those of the float32 file, which is measured first and is compared with.
    """
    from outrider_exporters.convert import open_file

    with contextlib.closing(open_file(file, job.interface, threads=LATENCY_THREADS)) as session:
        predict = _predictor(session.run)
        parity = _parity(job, variant, file, reference, predict)
        recording = Recording(predict)
        metrics = metrics_of(
            job.evaluate, recording, job.data.test, what=f"variant {variant}", expected=baseline.metrics
        )
    plain = answers.setdefault(file.format, recording)
    decides = decision_for(job.interface, job.data, 1).output
    return Figures(
        variant=variant,
        parity=parity,
        metrics=metrics,
        size_bytes=file.path.stat().st_size,
        likeness=None if plain is recording else likeness(plain, recording, decides=decides),
    )


def _convert(source: Source, job: Job, folder: Path) -> tuple[tuple[Plan, ...], dict[str, ModelFile], dict[str, str]]:
    """What was to be made, the model files by variant name, and why a form that nobody asked for is not among them."""
    targets = [resolved(name, job.host) for name in job.targets]
    made = plans(job.formats, source.precision, job.recipe.quantizations, targets, job.host)
    files: dict[str, ModelFile] = {}
    plain: dict[str, ModelFile] = {}
    failed: dict[str, str] = {}
    for done, plan in enumerate(made):
        job.context.progress(Progress(step="convert", done=done, total=len(made), message=plan.name))
        path = folder / f"{plan.name}.{plan.format}"
        if plan.rule is None:
            files[plan.name] = plain[plan.format] = source.to_file(plan.format, path)
            continue
        try:
            float_file = source.quantizable(plain[plan.format], folder)
            files[plan.name] = _quantize(job, plan, float_file, path, source.trained)
        except ExportError as error:
            if plan.asked:
                raise
            failed[plan.name] = f"could not be made: {error}"
    return made, files, failed


def _quantize(job: Job, plan: Plan, plain: ModelFile, path: Path, trained: Trained | None) -> ModelFile:
    from outrider_exporters.convert.quantize import quantize_file

    given = job.context.data.calibration
    calibration = [job.context.example if given is None else given]
    return quantize_file(plain, calibration, job.interface, path, rule=plan.rule, trained=trained)


def _predictor(run: Callable[[Tensors], Any]) -> Predict:
    return lambda inputs: dict(run(inputs).outputs)


def _parity(job: Job, variant: str, file: ModelFile, reference: Predict, predict: Predict) -> float:
    """The difference from torch on rows of the data. Raises ExportError for a float file that is not the network."""
    from outrider_exporters.convert.files import parity_at_sizes

    rows = sample_rows(job, PARITY_ROWS)
    error = parity_at_sizes(file, job.interface, reference, predict, rows)
    if not math.isfinite(error):
        raise ExportError(f"variant {variant} answers NaN or infinity where the torch network does not")
    if file.precision == "float32" and not error <= MAX_FLOAT_PARITY:
        raise ExportError(
            f"variant {variant} differs from the torch network by {error:.2g} of the output's range, "
            f"at most {MAX_FLOAT_PARITY:g} is allowed",
            hint="random numbers, conditions on values or very large activations in forward are the usual causes",
        )
    return error


def _latencies(job: Job, files: Mapping[str, ModelFile]) -> dict[str, Latency]:
    """Of each file twice, in two sessions: what lies between the two is noise."""
    from outrider_exporters.convert import open_file

    row = sample_rows(job, 1)
    job.context.progress(Progress(step="latency", done=0, total=1, message="time one row of each variant on this host"))
    with contextlib.ExitStack() as stack:

        def call(file: ModelFile) -> Callable[[], object]:
            session = stack.enter_context(contextlib.closing(open_file(file, job.interface, threads=LATENCY_THREADS)))
            return _call(_predictor(session.run), row)

        twins = {variant: (call(file), call(file)) for variant, file in files.items()}
        return twin_latencies(twins, seed=job.context.seed)


def _call(predict: Predict, row: Tensors) -> Callable[[], object]:
    return lambda: predict(row)
