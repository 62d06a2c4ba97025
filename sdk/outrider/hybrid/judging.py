"""What is taken of an edge's answer, by what really gave it: a model may have stepped or gone back under the call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from outrider.bundle import OffloadRule
from outrider.policy import Policy
from outrider_runtimes.errors import ConfigError, FormatError
from outrider_runtimes.runner import Answer, Runner, Served
from outrider_runtimes.scores import Score
from outrider_runtimes.tensors import Array, Interface, Tensors

FEWEST_CLASSES = 2  # one number alone decides nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """How one answer is judged.

    Attributes:
        bundle, variant: that gave it.
        score: what is taken of it.
        least: what the score must reach.
        certified: the threshold that its bundle's export certified for its variant; None where the policy's own counts.
        rule: of that bundle, where it has one.
    """

    bundle: str
    variant: str
    score: Score
    least: float
    certified: float | None = None
    rule: OffloadRule | None = None


def judged(policy: Policy, by_margin: Score | None, model: Runner, answer: Answer) -> Judged | None:
    """How an answer of the edge is judged; None where nothing is: no rule, or none of the variant that answered."""
    if by_margin is None and not policy.obey_certified:
        return None
    served = answer.served
    bundle = _digest(model) if served is None else served.bundle
    variant = str(getattr(model, "variant", "")) if served is None else served.variant
    rule = rule_of(model, served)
    if by_margin is not None:
        return Judged(bundle=bundle, variant=variant, score=by_margin, least=policy.min_margin, rule=rule)
    certified = None if rule is None else rule.thresholds.get(variant)
    if rule is None or certified is None:
        return None
    return Judged(bundle=bundle, variant=variant, score=rule.score, least=certified, certified=certified, rule=rule)


def rule_of(model: Runner, served: Served | None) -> OffloadRule | None:
    """What the export of the bundle that answered certified; None for nothing, or where it is not known."""
    find = getattr(model, "rule_of", None)
    if find is not None:
        rule = find(served)
    elif served is None or served.bundle == _digest(model):
        rule = getattr(model, "offload", None)
    else:
        rule = None
    return rule if isinstance(rule, OffloadRule) else None


def margin_of(policy: Policy, interface: Interface) -> Score | None:
    """What ``min_margin`` is of; None where it judges nothing. Raises ConfigError."""
    names = [spec.name for spec in interface.outputs]
    if policy.output is not None and policy.output not in names:
        raise ConfigError(f"policy.output is {policy.output!r}, the interface's outputs are {names}")
    if policy.min_margin == 0.0:
        return None
    if policy.output is None and len(names) > 1:
        raise ConfigError("policy.output is not given", hint=f"name the output that holds the logits, out of {names}")
    score = Score(output=policy.output or names[0])
    try:
        score.check(interface)
    except FormatError as error:
        raise ConfigError(f"policy.output: {error}", hint="logits have two classes or more") from None
    return score


def differing(score: Score, edge: Tensors, cloud: Tensors, rows: Array) -> float | None:
    """The share of rows in which the first class is another at any place; None where there is no class to compare.

    Args:
        edge, cloud: outputs by name; of ``score.output`` float [N, ..., classes].
        rows: bool [N], which rows count.
    """
    ours, theirs = edge.get(score.output), cloud.get(score.output)
    if score.kind == "detection" or ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    if ours.ndim < 1 or ours.shape[-1] < FEWEST_CLASSES or not rows.any():
        return None
    other: Array = np.not_equal(ours.argmax(-1), theirs.argmax(-1)).reshape(len(rows), -1).any(axis=1)
    return float(other[rows].mean())


def _digest(model: Runner) -> str:
    bundle = getattr(model, "bundle", "")
    return bundle if isinstance(bundle, str) else str(getattr(bundle, "digest", ""))
