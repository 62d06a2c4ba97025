"""From a trained torch network to a bundle: passes, conversion, measurement, gates, one file at the end or none."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider_exporters.data import Data, golden_rows
from outrider_exporters.gates import Figures, Gate, GateResult, Step, check_gates, explain, judge
from outrider_exporters.job import FORMATS, Job, bundle_name, check_job
from outrider_exporters.measure import LATENCY_THREADS, Evaluate, latencies_p50_ms, metrics_of
from outrider_exporters.packing import Built, environment, write
from outrider_exporters.passes.base import Fit, OnProgress, PassContext, Progress, Stage, run_passes, silent, weigh
from outrider_exporters.recipe import Recipe
from outrider_exporters.report import ExportReport, VariantReport
from outrider_exporters.rows import Predict
from outrider_runtimes.errors import ExportError, GateMissed, MissingExtra
from outrider_runtimes.tensors import Interface, Tensors

if TYPE_CHECKING:
    from torch import nn

    from outrider_exporters.convert import ModelFile
    from outrider_exporters.sources import PositionalModule

MAX_FLOAT_PARITY = 1e-4  # of the output's range; right conversions are a hundred times closer
PARITY_ROWS = 64


def export(
    model: nn.Module,
    *,
    example: Tensors,
    outputs: Sequence[str],
    data: Data,
    evaluate: Evaluate,
    output: str | Path,
    fit: Fit | None = None,
    teacher: nn.Module | None = None,
    recipe: Recipe | None = None,
    formats: Sequence[str] = FORMATS,
    targets: Sequence[str] = (),
    gates: Sequence[Gate] = (),
    name: str | None = None,
    version: int = 1,
    labels: Sequence[str] = (),
    signing_keys: Sequence[Any] = (),
    seed: int = 0,
    progress: OnProgress | None = None,
) -> ExportReport:
    """Make a bundle of a trained network, or say what stands in the way; a bundle is written whole or not at all.

    The model is copied first and never changed. Weights, files and golden rows are the same for the same seed,
    machine and versions; latencies are measured.

    Args:
        model: the trained network.
        example: one array an input by name, at least one row; the interface is found by running it.
        outputs: names for what the network returns, in order.
        data: see Data.
        evaluate: ``evaluate(predict, data.test) -> {"accuracy": 0.97}``; ``predict`` takes arrays by input name and
            gives arrays by output name, in torch and on the device's engines alike.
        output: the ``.outrider`` file; replaced if it is there.
        fit: ``fit(model, data.train)`` fine-tunes in place; Prune needs it.
        teacher: a network with the same inputs and outputs; Distill needs it.
        recipe: what to do to the network; nothing when left out.
        formats: of ``onnx`` and ``tflite``.
        targets: the boards that the bundle is meant for; see ``outrider_runtimes.targets``.
        gates: bounds that every variant must meet.
        name, version: the bundle's; the name is the output file's unless given.
        labels: what the classes are called.
        signing_keys: Ed25519 private keys; see ``outrider.bundle``.
        progress: called with a Progress as the work goes on.

    Raises:
        ConfigError: an argument, the data or the recipe is wrong; before any long work.
        ExportError: a pass, a conversion or ``evaluate`` failed.
        GateMissed: a bound was not met; names variant, figure, bound and the step that lost most.
        MissingExtra: torch or a converter is not installed.
    """
    begun = time.perf_counter()
    network, interface = _source(model, example, outputs, labels)
    context = PassContext(
        interface=interface,
        example=example,
        data=data,
        fit=fit,
        teacher=teacher,
        seed=seed,
        progress=progress or silent,
    )
    job = Job(
        name=bundle_name(name, Path(output)),
        version=version,
        output=Path(output),
        recipe=recipe or Recipe(),
        formats=tuple(formats),
        targets=tuple(targets),
        gates=tuple(gates),
        signing_keys=tuple(signing_keys),
        evaluate=evaluate,
        context=context,
    )
    check_job(job)
    baseline, stages = _shrink(network, job)
    with tempfile.TemporaryDirectory(prefix="outrider-export-") as folder:
        built = _build(network.module, job, Path(folder), baseline)
        results = _judge(job, baseline, stages, built.variants)
        golden, digest = write(job, built, baseline, stages, results)
    return ExportReport(
        name=job.name,
        version=version,
        baseline=baseline,
        stages=stages,
        variants=built.variants,
        gates=results,
        bundle=job.output,
        digest=digest,
        size_bytes=job.output.stat().st_size,
        golden=golden,
        environment=environment(),
        recipe=job.recipe.to_dict(),
        targets=job.targets,
        seconds=time.perf_counter() - begun,
        seed=seed,
    )


def _source(
    model: nn.Module, example: Tensors, outputs: Sequence[str], labels: Sequence[str]
) -> tuple[PositionalModule, Interface]:
    """A copy that the passes may change, trainable where the original is, and its interface."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra("torch", extra="export", purpose="export") from error
    from outrider_exporters.sources import PositionalModule, interface_from_module

    interface = interface_from_module(model, example, outputs, labels=labels)
    network = PositionalModule(model, [spec.name for spec in interface.inputs], list(outputs))
    for mine, original in zip(network.module.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(original.requires_grad)
    return network, interface


def _shrink(network: PositionalModule, job: Job) -> tuple[Stage, tuple[Stage, ...]]:
    """The baseline, and the stages of the network's passes, which change it in place."""
    from outrider_exporters.sources import torch_predict

    job.context.progress(Progress(step="baseline", done=0, total=1, message="evaluate the original model"))
    weight = weigh(network, job.context)
    predict = torch_predict(network.module, job.interface)
    metrics = metrics_of(job.evaluate, predict, job.data.test, what="the original model")
    check_gates(job.gates, metrics)
    baseline = Stage(name="baseline", metrics=metrics, parameters=weight.parameters, macs=weight.macs)

    def measure(module: nn.Module, what: str) -> Mapping[str, float]:
        predict = torch_predict(module, job.interface)
        return metrics_of(job.evaluate, predict, job.data.test, what=what, expected=metrics)

    return baseline, run_passes(network, job.recipe.network_passes, job.context, measure)


def _build(network: nn.Module, job: Job, folder: Path, baseline: Stage) -> Built:
    """Convert, check and measure every variant; each was loaded and run by the device's engine before it is kept."""
    from outrider_exporters.convert import open_file
    from outrider_exporters.sources import torch_predict

    files = _convert(network, job, folder)
    reference = torch_predict(network, job.interface)
    sessions = {variant: open_file(file, job.interface, threads=LATENCY_THREADS) for variant, file in files.items()}
    try:
        predicts: dict[str, Predict] = {v: _predictor(session.run) for v, session in sessions.items()}
        metrics, parities = {}, {}
        for done, (variant, predict) in enumerate(predicts.items()):
            job.context.progress(Progress(step="measure", done=done, total=len(files), message=variant))
            parities[variant] = _parity(job, variant, files[variant], reference, predict)
            metrics[variant] = metrics_of(
                job.evaluate, predict, job.data.test, what=f"variant {variant}", expected=baseline.metrics
            )
        latencies = _latencies(job, predicts)
    finally:
        for session in sessions.values():
            session.close()
    variants = tuple(
        VariantReport(
            name=variant,
            format=file.format,
            precision=file.precision,
            scheme=file.scheme,
            size_bytes=file.path.stat().st_size,
            metrics=metrics[variant],
            latency_host_ms_p50=latencies[variant],
            parity=parities[variant],
        )
        for variant, file in files.items()
    )
    return Built(network=network, files=files, variants=variants)


def _convert(network: nn.Module, job: Job, folder: Path) -> dict[str, ModelFile]:
    """The model files by variant name: float32 in every format, then the quantized ones."""
    from outrider_exporters.convert.onnx import to_onnx
    from outrider_exporters.convert.quantize import quantize_onnx, quantize_tflite
    from outrider_exporters.convert.tflite import to_tflite

    converters = {"onnx": to_onnx, "tflite": to_tflite}
    quantizers = {"onnx": quantize_onnx, "tflite": quantize_tflite}
    rules = job.recipe.quantizations
    total = len(job.formats) * (1 + len(rules))
    files: dict[str, ModelFile] = {}

    def begin(variant: str) -> None:
        job.context.progress(Progress(step="convert", done=len(files), total=total, message=variant))

    for kind in job.formats:
        plain = f"{kind}-float32"
        begin(plain)
        files[plain] = converters[kind](network, job.interface, job.context.example, folder / f"{plain}.{kind}")
        for rule in rules:
            variant = f"{kind}-{rule.scheme}"
            begin(variant)
            calibration = [] if job.data.calibration is None else [job.data.calibration]
            files[variant] = quantizers[kind](files[plain], calibration, job.interface, folder / f"{variant}.{kind}")
    return files


def _predictor(run: Callable[[Tensors], Any]) -> Predict:
    return lambda inputs: dict(run(inputs).outputs)


def _parity(job: Job, variant: str, file: ModelFile, reference: Predict, predict: Predict) -> float:
    """The difference from torch on rows of the data. Raises ExportError for a float file that is not the network."""
    from outrider_exporters.convert import parity

    rows, _ = golden_rows(job.data, job.interface, rows=PARITY_ROWS, seed=job.context.seed)
    error = parity(reference(rows), predict(rows))
    if not math.isfinite(error):
        raise ExportError(f"variant {variant} answers NaN or infinity where the torch network does not")
    if file.precision == "float32" and not error <= MAX_FLOAT_PARITY:
        raise ExportError(
            f"variant {variant} differs from the torch network by {error:.2g} of the output's range, "
            f"at most {MAX_FLOAT_PARITY:g} is allowed",
            hint="random numbers, conditions on values or very large activations in forward are the usual causes",
        )
    return error


def _latencies(job: Job, predicts: Mapping[str, Predict]) -> dict[str, float]:
    row, _ = golden_rows(job.data, job.interface, rows=1, seed=job.context.seed)
    job.context.progress(Progress(step="latency", done=0, total=1, message="time one row of each variant on this host"))
    return latencies_p50_ms({v: _call(predict, row) for v, predict in predicts.items()}, seed=job.context.seed)


def _call(predict: Predict, row: Tensors) -> Callable[[], object]:
    return lambda: predict(row)


def _judge(
    job: Job, baseline: Stage, stages: Sequence[Stage], variants: Sequence[VariantReport]
) -> tuple[GateResult, ...]:
    """Every gate on every variant. Raises GateMissed."""
    figures = [
        Figures(
            variant=variant.name,
            metrics=variant.metrics,
            size_bytes=variant.size_bytes,
            steps=steps_to(variant, baseline, stages, variants),
        )
        for variant in variants
    ]
    results = judge(job.gates, figures, baseline.metrics)
    missed = [result for result in results if not result.passed]
    if missed:
        raise GateMissed(explain(missed), hint="no bundle was written; change the recipe, or the bound")
    return results


def steps_to(
    variant: VariantReport, baseline: Stage, stages: Sequence[Stage], variants: Sequence[VariantReport]
) -> tuple[Step, ...]:
    """(what was done, metrics after it) from the original model to a variant."""
    steps: list[Step] = [("baseline", baseline.metrics)]
    steps += [(f"after {stage.name}", stage.metrics) for stage in stages]
    if variant.precision != "float32":
        steps += [
            (f"in {v.name}", v.metrics) for v in variants if (v.format, v.precision) == (variant.format, "float32")
        ]
    return (*steps, (f"in {variant.name}", variant.metrics))
