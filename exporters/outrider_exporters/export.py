"""From a trained network or a model file to a bundle: passes, conversion, gates, one file at the end or none."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider_exporters.arguments import checked
from outrider_exporters.around import open_around
from outrider_exporters.building import build
from outrider_exporters.data import Data, check_data, draw_rows
from outrider_exporters.deciding import decide, layers_of, with_blame
from outrider_exporters.gates import Gate, check_gates, explain
from outrider_exporters.job import Job, bundle_name, check_job
from outrider_exporters.measure import Evaluate, metrics_of
from outrider_exporters.offload import Offload, Wrong
from outrider_exporters.packing import Built, certify_kept, choose_golden, environment, sample_rows, write
from outrider_exporters.passes.base import Fit, OnProgress, PassContext, Progress, Stage, run_passes, silent
from outrider_exporters.passes.latency import latencies_of
from outrider_exporters.progress import with_time_left
from outrider_exporters.recipe import Recipe, RecipeFile
from outrider_exporters.report import ExportReport
from outrider_exporters.sources import Source, formats_for
from outrider_runtimes.board import this_board
from outrider_runtimes.errors import GateMissed
from outrider_runtimes.tensors import Tensors

if TYPE_CHECKING:
    from torch import nn

    from outrider_runtimes.processing import Step

LAYER_ROWS = 8  # of the golden rows; every activation of a row is in memory at once


@checked
def export(
    model: nn.Module | str | Path,
    *,
    example: Tensors | None = None,
    outputs: Sequence[str] | None = None,
    data: Data,
    evaluate: Evaluate,
    output: str | Path,
    fit: Fit | None = None,
    teacher: nn.Module | None = None,
    recipe: Recipe | None = None,
    formats: Sequence[str] | None = None,
    targets: Sequence[str] = (),
    gates: Sequence[Gate] = (),
    name: str | None = None,
    version: int = 1,
    labels: Sequence[str] = (),
    axes: Mapping[str, str] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    meanings: Mapping[str, str] | None = None,
    dynamic_axes: Mapping[str, str] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    state: Mapping[str, str] | None = None,
    preprocessing: Sequence[Step] = (),
    postprocessing: Sequence[Step] = (),
    signing_keys: Sequence[Any] = (),
    seed: int = 0,
    golden: Tensors | None = None,
    offload: Offload | None = None,
    is_wrong: Wrong | None = None,
    cloud_only: bool = False,
    report: str | Path | None = None,
    command: str = "",
    progress: OnProgress | None = None,
) -> ExportReport:
    """Make a bundle of a trained network, or say what stands in the way; a bundle is written whole or not at all.

    The model is copied first and never changed. Weights, files and golden rows are the same for the same seed,
    machine and versions; latencies are measured.

    Args:
        model: the trained network: a torch module, or a Keras 3 model on the torch backend; or the path of an ``.onnx``
            or ``.tflite`` file, which is kept as it is and gives variants of its own format only.
        example: one array an input by name, at least one row; the interface is found by running it. A file has names.
        outputs: names for what the network returns, in order, or keys of the mapping that it returns.
        data: see Data.
        evaluate: ``evaluate(predict, data.test) -> {"accuracy": 0.97}``; ``predict`` takes arrays by input name and
            gives arrays by output name, in torch and on the device's engines alike.
        output: the ``.outrider`` file; replaced if it is there.
        fit: ``fit(model, data.train)`` fine-tunes in place; Prune needs it.
        teacher: a network with the same inputs and outputs; Distill needs it.
        recipe: what to do to the network; nothing when left out.
        formats: of ``onnx`` and ``tflite``; both when left out, the file's own where the model is a file.
        targets: the boards that the bundle is meant for; see ``outrider_runtimes.targets``. With targets, other forms
            of int8 are made and measured too, and each target gets at most three variants; see ``choose``.
        gates: bounds that every variant must meet.
        name, version: the bundle's; the name is the output file's unless given.
        labels: what the classes are called.
        axes, ranges, meanings: by tensor name: a letter a dimension (``N`` is what batching acts on), the least and the
            greatest value, and what it is; see TensorSpec. Four axes are NCHW for torch and NHWC for Keras and TFLite.
        dynamic_axes: by input name, the letters of its axes that may have any size beside N: ``{"tokens": "T"}``. One
            letter in several inputs is one size. The network is run at other sizes, which shows which outputs follow.
        shapes: by letter of a free axis, the sizes that TFLite files are made for: ``{"T": [8, 16]}`` gives one file
            with a signature a size, or one for each combination of several letters; they share the weights. Other sizes
            are refused there; an ONNX file takes any.
        state: of a recurrent network, by input name, the output that is this input of the next call, as in
            ``{"h": "h_next"}``; see ``Model.stream``.
        preprocessing, postprocessing: steps between what a caller of the bundle passes and what the network takes, and
            between what it gives and what the caller gets; see docs/steps.md. With steps, ``example``, ``data`` and
            ``golden`` are what a caller passes, and ``predict`` has the steps around it; ``fit``, ``teacher`` and
            ``outputs`` belong to the network, and ``fit`` gets the inputs of ``data.train`` preprocessed.
        signing_keys: Ed25519 private keys; see ``outrider.bundle``.
        golden: inputs by name, one row or more, that become the bundle's golden rows and go to every board; when left
            out, rows of the test part, else generated ones.
        offload: certify, for each variant, below which score an answer is uncertain; see Offload. A board obeys it.
        is_wrong: for ``offload``: ``is_wrong(outputs, targets) -> bool [N]`` of arrays at the caller's side; when left
            out, the first class against a class number.
        cloud_only: the task belongs to the cloud: a board that has one asks it first, see ``outrider.Policy``.
        report: an ``.html`` file to write the report to, also when a gate was missed; the same as JSON beside it.
        command: what the report calls the command that made it.
        progress: called with a Progress as the work goes on.

    Raises:
        ConfigError: an argument, the data or the recipe is wrong; before any long work.
        ExportError: a pass, a conversion or ``evaluate`` failed, or ``offload`` cannot be certified.
        GateMissed: a bound was not met; names variant, figure, bound, the step that lost most and
            the layers whose quantization error grew most.
        MissingExtra: torch or a converter is not installed.
    """
    begun = time.perf_counter()
    source, caller = open_around(
        model,
        example,
        outputs,
        preprocessing=preprocessing,
        postprocessing=postprocessing,
        labels=labels,
        axes=axes,
        ranges=ranges,
        meanings=meanings,
        dynamic_axes=dynamic_axes,
        shapes=shapes,
        state=state,
    )
    check_data(data, caller.interface)
    evaluate = caller.evaluated(evaluate)
    context = PassContext(
        interface=source.interface,
        example=source.example,
        data=caller.prepared_data(data),
        fit=fit,
        teacher=teacher,
        seed=seed,
        progress=with_time_left(progress or silent),
        evaluate=evaluate,
        asked=(caller.interface, data),
        network=source.network,
        time_networks=latencies_of,
    )
    job = Job(
        name=bundle_name(name, Path(output)),
        version=version,
        output=Path(output),
        recipe=recipe or Recipe(),
        formats=formats_for(source, formats, recipe or Recipe()),
        targets=tuple(targets),
        gates=tuple(gates),
        signing_keys=tuple(signing_keys),
        data=data,
        evaluate=evaluate,
        caller=caller,
        context=context,
        host=this_board(),
        golden=golden,
        offload=offload,
        is_wrong=is_wrong,
        cloud_only=cloud_only,
        report=None if report is None else Path(report),
        tensors={"dynamic_axes": dynamic_axes or {}, "shapes": shapes or {}, "state": state or {}},
    )
    check_job(job)
    source.check_sizes(sample_rows(job, 1), job.caller.prepared(choose_golden(job).inputs))
    baseline, stages = _shrink(source, job)
    with tempfile.TemporaryDirectory(prefix="outrider-export-") as folder:
        built = build(source, job, Path(folder), baseline)
        made = _finish(job, built, baseline, stages)
    made = dataclasses.replace(made, seconds=time.perf_counter() - begun, command=command)
    if job.report is not None:
        from outrider_exporters.report.page import write_report

        write_report(job.report, made.to_dict())
    missed = [result for result in made.gates if not result.passed]
    if missed:
        raise GateMissed(explain(missed), hint="no bundle was written; change the recipe, or the bound")
    return made


def _shrink(source: Source, job: Job) -> tuple[Stage, tuple[Stage, ...]]:
    """The baseline, and the stages of the network's passes, which change it in place."""
    job.context.progress(Progress(step="baseline", done=0, total=1, message="evaluate the original model"))
    parameters, macs = source.weigh(job.context)
    metrics = metrics_of(job.evaluate, source.predict(), job.data.test, what="the original model")
    check_gates(job.gates, metrics)
    baseline = Stage(name="baseline", metrics=metrics, parameters=parameters, macs=macs)

    def measure(_: nn.Module, what: str) -> Mapping[str, float]:
        return metrics_of(job.evaluate, source.predict(), job.data.test, what=what, expected=metrics)

    if source.network is None:
        return baseline, ()
    return baseline, run_passes(source.network, job.recipe.network_passes, job.context, measure)


def _finish(job: Job, built: Built, baseline: Stage, stages: tuple[Stage, ...]) -> ExportReport:
    """Decide, and write the bundle unless a gate was missed; its report, without how long it took."""
    rows = choose_golden(job)
    decision = decide(job, built, baseline, stages)
    missed = tuple(dict.fromkeys(result.variant for result in decision.missed))
    shown = tuple(variant.name for variant in decision.kept) if job.report is not None else missed
    drawn = draw_rows(rows.inputs, job.caller.interface, rows=LAYER_ROWS, seed=0)
    layers = layers_of(job, built, shown, job.caller.prepared(drawn))
    decision = with_blame(decision, layers)
    rule = None if missed or job.offload is None else certify_kept(job, job.offload, built, decision)
    digest = "" if missed else write(job, built, decision, rows, (baseline, *stages), offload=rule)
    return ExportReport(
        name=job.name,
        version=job.version,
        baseline=baseline,
        stages=stages,
        variants=decision.kept,
        gates=decision.results,
        bundle=job.output,
        digest=digest,
        size_bytes=0 if missed else job.output.stat().st_size,
        golden=rows.to_dict(),
        environment=environment(job.host),
        recipe=job.recipe.to_dict(),
        targets=job.targets,
        seed=job.context.seed,
        asked=_asked(job),
        choices=decision.choices,
        passed_over=decision.passed_over,
        dropped=decision.dropped,
        layers=layers,
        offload={} if rule is None else rule.to_dict(),
        quantization=decision.worth.to_dict(),
    )


def _asked(job: Job) -> dict[str, Any]:
    """What a recipe file would say of this export; which model it was stays with the caller."""
    return RecipeFile(
        name=job.name,
        version=job.version,
        formats=job.formats,
        targets=job.targets,
        labels=job.interface.labels,
        seed=job.context.seed,
        recipe=job.recipe,
        gates=job.gates,
        offload=job.offload,
        cloud_only=job.cloud_only,
        **job.tensors,
    ).to_dict()
