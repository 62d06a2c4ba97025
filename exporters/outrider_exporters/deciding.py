"""What of the measured candidates goes into the bundle, and whether there may be one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from outrider_exporters.choose import Candidate, Choice, choose, resolved
from outrider_exporters.gates import QUANTIZATION_GATES, Figures, GateResult, Step, gated_metric, judge
from outrider_exporters.job import Job
from outrider_exporters.layers import LayerError, blame_text, layer_errors
from outrider_exporters.packing import Built
from outrider_exporters.passes.base import Progress, Stage
from outrider_exporters.report import VariantReport
from outrider_exporters.worth import Worth, no_better_than_float, worth_of
from outrider_runtimes.tensors import Tensors

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the gates and the targets say.

    Attributes:
        kept: the variants of the bundle, with what is to be said of them.
        passed_over: the candidates that are not in it.
        dropped: why, by the name of a candidate; also of those that could not be made.
        choices: one a target.
        results: every gate on every variant of the bundle; where a variant that the recipe asks for has no form that
            meets the gates, on the best of its forms.
        worth: whether quantizing paid.
    """

    kept: tuple[VariantReport, ...]
    passed_over: tuple[VariantReport, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    choices: tuple[Choice, ...] = ()
    results: tuple[GateResult, ...] = ()
    worth: Worth = field(default_factory=Worth)

    @property
    def missed(self) -> tuple[GateResult, ...]:
        """The gates that stand in the way of a bundle."""
        return tuple(result for result in self.results if not result.passed)


def decide(job: Job, built: Built, baseline: Stage, stages: Sequence[Stage]) -> Decision:
    """Judge every candidate, and choose for every target among those that meet the gates.

    Without targets all candidates are kept: they are the recipe's own. A variant of the recipe none of whose forms
    meets the gates is kept as well, with its missed gates: it is what the export fails with.
    """
    judged = _judged(job, built, baseline, stages)
    candidates = _candidates(job, built, baseline, judged)
    hopeless = _hopeless(built, candidates)
    choices: tuple[Choice, ...] = ()
    names = {item.name for item in candidates}
    if hopeless:
        names = hopeless
    elif job.targets:
        choices = tuple(choose(candidates, resolved(name, job.host), job.host) for name in job.targets)
        names = {name for choice in choices for name in choice.kept}
    notes = no_better_than_float(candidates) if not job.targets else _notes(choices)
    kept = tuple(_said(variant, choices, notes) for variant in built.variants if variant.name in names)
    return Decision(
        kept=kept,
        passed_over=tuple(variant for variant in built.variants if variant.name not in names),
        dropped={**_reasons(choices, names), **built.failed},
        choices=choices,
        results=tuple(r for gate in judged for r in gate if r.variant in names),
        worth=worth_of(candidates),
    )


def with_blame(decision: Decision, layers: Mapping[str, tuple[LayerError, ...]]) -> Decision:
    """The decision with the layers to blame in the gates that quantization missed."""
    results = tuple(
        dataclasses.replace(result, layers=blame_text(layers.get(result.variant, ())))
        if not result.passed and result.gate["type"] in QUANTIZATION_GATES
        else result
        for result in decision.results
    )
    return dataclasses.replace(decision, results=results)


def layers_of(job: Job, built: Built, variants: Sequence[str], rows: Tensors) -> dict[str, tuple[LayerError, ...]]:
    """The error of each layer of the quantized ones among the variants, by variant.

    Leaves out a variant whose file keeps nothing to compare: the step that lost most is then all that can be said.
    """
    plain = {file.format: file for file in built.named.values() if file.precision == "float32"}
    quantized = [v for v in variants if built.named[v].precision != "float32" and built.named[v].format in plain]
    found = {}
    for done, variant in enumerate(quantized):
        job.context.progress(Progress(step="layers", done=done, total=len(quantized), message=variant))
        file = built.named[variant]
        try:
            found[variant] = layer_errors(plain[file.format], file, job.interface, rows)
        except Exception as error:
            _log.warning("the layers of %s cannot be compared, so none is blamed: %s", variant, error)
    return {variant: layers for variant, layers in found.items() if layers}


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


def _judged(job: Job, built: Built, baseline: Stage, stages: Sequence[Stage]) -> list[tuple[GateResult, ...]]:
    """Gate by gate, each on every candidate."""
    figures = [
        Figures(
            variant=variant.name,
            metrics=variant.metrics,
            size_bytes=variant.size_bytes,
            latency_ms=variant.latency_host_ms_p50,
            parity=variant.parity,
            steps=steps_to(variant, baseline, stages, built.variants),
        )
        for variant in built.variants
    ]
    return [judge([gate], figures, baseline.metrics) for gate in job.gates]


def _candidates(job: Job, built: Built, baseline: Stage, judged: Sequence[Sequence[GateResult]]) -> list[Candidate]:
    """The variants as choose sees them."""
    missed: dict[str, list[str]] = {}
    for gate in judged:
        for result in gate:
            if not result.passed:
                missed.setdefault(result.variant, []).append(f"missed {result.gate['type']}: {result.text}")
    return [
        Candidate(
            name=variant.name,
            format=variant.format,
            precision=variant.precision,
            scheme=variant.scheme,
            accuracy=_accuracy(job, variant, baseline),
            size_bytes=variant.size_bytes,
            latency_ms=variant.latency_host_ms_p50,
            parity=variant.parity,
            missed="; ".join(missed.get(variant.name, ())),
            latency_noise=variant.latency_noise,
        )
        for variant in built.variants
    ]


def _accuracy(job: Job, variant: VariantReport, baseline: Stage) -> float:
    """A figure of which higher is better: the gated metric, turned where lower is better.

    Where no gate says which metric counts and which way is up, how little the first one moved.
    """
    metric = gated_metric(job.gates)
    if metric is None:
        first = next(iter(baseline.metrics))
        return -abs(variant.metrics[first] - baseline.metrics[first])
    reached = variant.metrics[metric.name]
    return reached if metric.higher_is_better else -reached


def _hopeless(built: Built, candidates: Sequence[Candidate]) -> set[str]:
    """Of each variant of the recipe none of whose forms meets the gates, the form with the best metric."""
    forms: dict[str, list[Candidate]] = {}
    for item in candidates:
        forms.setdefault(built.slots.get(item.name, item.name), []).append(item)
    lost = [items for items in forms.values() if all(item.missed for item in items)]
    return {max(items, key=lambda item: item.accuracy).name for items in lost}


def _said(variant: VariantReport, choices: Sequence[Choice], notes: Mapping[str, str]) -> VariantReport:
    """The variant with the targets that it was chosen for and what is to be said of it."""
    return dataclasses.replace(
        variant,
        targets={choice.target: choice.latency for choice in choices if variant.name in choice.kept},
        note="; ".join(text for text in (variant.note, notes.get(variant.name, "")) if text),
    )


def _notes(choices: Sequence[Choice]) -> dict[str, str]:
    notes: dict[str, list[str]] = {}
    for choice in choices:
        for name, text in choice.notes.items():
            notes.setdefault(name, []).append(f"{choice.target}: {text}")
    return {name: "; ".join(texts) for name, texts in notes.items()}


def _reasons(choices: Sequence[Choice], kept: set[str]) -> dict[str, str]:
    """Why a candidate is in for no target: the same words said once, with the targets that they hold for."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for choice in choices:
        for name, text in choice.dropped.items():
            if name not in kept:
                reasons.setdefault(name, {}).setdefault(text, []).append(choice.target)
    return {
        name: "; ".join(f"{', '.join(targets)}: {text}" for text, targets in texts.items())
        for name, texts in reasons.items()
    }
