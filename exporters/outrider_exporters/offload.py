"""When a request is heavy because its answer is unsure: a threshold a variant, certified on rows of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from outrider.bundle import OffloadRule
from outrider_exporters.beside import Teacher, may_differ
from outrider_exporters.certify import Certified, Point, certify, check_enough, check_levels
from outrider_exporters.data import Data, check_labelled
from outrider_exporters.rows import Predict
from outrider_exporters.values import check_fields
from outrider_runtimes.errors import ConfigError, ExportError, FormatError
from outrider_runtimes.scores import Score
from outrider_runtimes.tensors import Array, Interface, Tensors

if TYPE_CHECKING:
    from outrider_exporters.job import Job

Wrong = Callable[[Tensors, Array], Array]
HINT = "Data(certification=(inputs, targets), calibration=inputs, ...), rows that nothing was trained on"


@dataclass(frozen=True, kw_only=True)
class Offload:
    """Ask for a threshold below which an answer is uncertain, certified by Learn-then-Test; see ``certify``.

    Attributes:
        alpha: at most this share of the answers that are kept is wrong.
        delta: the probability, over the rows of ``data.certification``, that this does not hold.
        score: ``margin``, ``entropy``, ``energy`` or ``detection``; see ``outrider_runtimes.scores``.
        output: of the bundle's interface; empty for the only one.
        values: ``logits`` or ``probabilities``: what that output holds.
    """

    alpha: float = 0.01
    delta: float = 0.1
    score: str = "margin"
    output: str = ""
    values: str = "logits"

    def __post_init__(self) -> None:
        check_fields(self)
        check_levels(self.alpha, self.delta)
        try:
            Score(kind=self.score, output=self.output or "?", values=self.values)
        except FormatError as error:
            raise ConfigError(f"offload: {error}", hint=error.hint) from None


def score_of(offload: Offload, interface: Interface) -> Score:
    """The score at the caller's side. Raises ConfigError where the interface has no such output."""
    names = [spec.name for spec in interface.outputs]
    if not offload.output and len(names) > 1:
        raise ConfigError("offload.output is not given", hint=f"name the output that is judged, out of {names}")
    score = Score(kind=offload.score, output=offload.output or names[0], values=offload.values)
    try:
        score.check(interface)
    except FormatError as error:
        raise ConfigError(f"offload.output: {error}", hint=error.hint) from None
    return score


def check_offload(offload: Offload, data: Data, interface: Interface) -> None:
    """Refuse before any long work what cannot be certified. Raises ConfigError, and ExportError for too few rows."""
    if not isinstance(offload, Offload):
        raise ConfigError(f"offload is a {type(offload).__name__}, not an Offload", hint="Offload(alpha=0.01)")
    score_of(offload, interface)
    if data.certification is None or data.calibration is None:
        missing = "certification" if data.certification is None else "calibration"
        raise ConfigError(f"offload needs data.{missing}", hint=HINT)
    check_labelled(data.certification, interface, part="data.certification")
    try:
        check_enough(len(data.certification[1]), offload.alpha, offload.delta)
    except ExportError as error:
        raise ExportError(f"offload: {error}", hint=error.hint) from None


def not_the_class(score: Score) -> Wrong:
    """Whether the first class is another than the target, which is a class number; of several places any may be."""

    def wrong(outputs: Tensors, targets: Array) -> Array:
        given = outputs[score.output].argmax(-1)
        if given.shape != targets.shape or targets.dtype.kind not in "iub":
            raise ConfigError(
                f"data.certification targets are {targets.dtype} {list(targets.shape)}, the answers' classes "
                f"{list(given.shape)}",
                hint="export(..., is_wrong=f) with f(outputs, targets) -> bool [N] judges other answers",
            )
        flags: Array = (given != targets).reshape(len(given), -1).any(axis=1)
        return flags

    return wrong


def certified_rule(
    offload: Offload,
    job: Job,
    predicts: Mapping[str, Predict],
    *,
    is_wrong: Wrong | None = None,
    teacher: Predict | None = None,
) -> OffloadRule:
    """A threshold for each variant.

    Args:
        predicts: by variant, at the caller's side, on the engine that devices use.
        is_wrong: ``(outputs, targets) -> bool [N]``; the first class against a class number when left out.
        teacher: at the caller's side; what offloaded requests would be answered by, for the curve.

    Raises:
        ExportError: a variant cannot be certified; says how many rows it would take.
    """
    data, interface = job.data, job.caller.interface
    if data.certification is None or data.calibration is None:
        raise ConfigError("offload needs data.certification and data.calibration", hint=HINT)
    score = score_of(offload, interface)
    judge = is_wrong or not_the_class(score)
    inputs, targets = data.certification
    said = None if teacher is None else teacher(inputs)
    cloud = None if said is None else Teacher(outputs=said, wrong=_flags(judge, said, targets))
    thresholds, measured = {}, {}
    for variant, predict in predicts.items():
        outputs = predict(inputs)
        scores, wrong = score.rows(outputs), _flags(judge, outputs, targets)
        try:
            made = certify(
                scores,
                wrong,
                score.rows(predict(data.calibration)),
                alpha=offload.alpha,
                delta=offload.delta,
                least=score.least_threshold,
            )
        except ExportError as error:
            raise ExportError(f"offload: variant {variant}: {error}", hint=error.hint) from None
        thresholds[variant] = made.chosen.threshold
        measured[variant] = _measured(made, scores, wrong, None if cloud is None else cloud.wrong)
        measured[variant]["may_differ"] = may_differ(
            score,
            outputs,
            scores >= made.chosen.threshold,
            cloud,
            alpha=offload.alpha,
            delta=offload.delta,
            by_class=is_wrong is None,
        )
    return OffloadRule(
        score=score,
        alpha=offload.alpha,
        delta=offload.delta,
        rows=len(targets),
        thresholds=thresholds,
        measured=measured,
    )


def _flags(judge: Wrong, outputs: Tensors, targets: Array) -> Any:
    flags = np.asarray(judge(outputs, targets))
    if flags.shape != (len(targets),) or flags.dtype != bool:
        raise ConfigError(f"is_wrong gave {flags.dtype} {list(flags.shape)}, expected bool [{len(targets)}]")
    return flags


def _measured(made: Certified, scores: Any, wrong: Any, cloud: Any) -> dict[str, Any]:
    points: Sequence[Point] = made.curve
    curve = [_on_curve(point, scores, wrong, cloud) for point in points]
    return {"chosen": _on_curve(made.chosen, scores, wrong, cloud), "curve": curve}


def _on_curve(point: Point, scores: Any, wrong: Any, cloud: Any) -> dict[str, float]:
    """Accuracies are shares of right answers: of what is kept, and of all where the cloud answers the rest."""
    figures = {
        "threshold": point.threshold,
        "offloaded": 1.0 - point.kept,
        "accuracy_kept": 1.0 - point.risk,
        "p_value": point.p_value,
    }
    if cloud is not None:
        figures["accuracy_together"] = 1.0 - float(np.where(scores >= point.threshold, wrong, cloud).mean())
    return {name: round(value, 6) for name, value in figures.items()} | {"threshold": point.threshold}
