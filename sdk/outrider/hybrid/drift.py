"""Whether two sides disagree more often than they may: a test that may be looked at after every answer.

Page's cumulative sum (Page: "Continuous Inspection Schemes", 1954) of likelihood ratios of a bounded observation, as an
e-detector (Shin, Ramdas, Rinaldo: "E-detectors: a nonparametric framework for sequential change detection", 2022):
as long as the expected share of differing answers is at most the bound, whatever else is true of them, false alarms
are at least ``ANSWERS_A_FALSE_ALARM`` answers apart on average, and one among the first n has a probability of at most
n over that. No number of answers is fixed beforehand.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable
from dataclasses import dataclass, replace

ANSWERS_A_FALSE_ALARM = 10_000
ODDS = (2.0, 4.0, 8.0)  # how much worse it may have become, in odds; the mean over them sees each almost as soon
ANSWERS_A_FALSE_END = 100  # the same for the end of an episode, while the odds are still at least doubled
MOST_WATCHED = 16  # variants that a ladder and a rollback can bring; the longest unseen is forgotten


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What was seen of one sample.

    Attributes:
        bound: the share of answers that may differ, above 0 and below 1.
        logs: logarithms of the cumulative ratios, one for each of ``ODDS``.
        answers: how many were seen since these were last all at their floor.
        differing: the sum of their shares.
        alarmed: an episode is under way; its evidence then is that it has ended.
    """

    bound: float
    logs: tuple[float, ...] = (0.0,) * len(ODDS)
    answers: int = 0
    differing: float = 0.0
    alarmed: bool = False


def observed(evidence: Evidence, share: float) -> tuple[Evidence, bool]:
    """After one more answer.

    Args:
        share: of its rows that differ, 0.0 to 1.0.

    Returns:
        The evidence then, and whether an episode begins with this answer. What is told of it is in ``answers`` and
        ``differing``.
    """
    if evidence.alarmed:
        return _towards_the_end(evidence, share), False
    bound = evidence.bound
    logs = tuple(
        max(0.0, log + math.log(_ratio(share, null=bound, other=_worse(bound, odds))))
        for log, odds in zip(evidence.logs, ODDS, strict=True)
    )
    if not any(logs):
        return Evidence(bound=bound), False
    after = replace(evidence, logs=logs, answers=evidence.answers + 1, differing=evidence.differing + share)
    began = sum(map(math.exp, logs)) >= ANSWERS_A_FALSE_ALARM * len(ODDS)
    return replace(after, alarmed=True, logs=(0.0,)) if began else after, began


def _towards_the_end(evidence: Evidence, share: float) -> Evidence:
    worse = _worse(evidence.bound, ODDS[0])
    log = max(0.0, evidence.logs[0] + math.log(_ratio(share, null=worse, other=evidence.bound)))
    if log >= math.log(ANSWERS_A_FALSE_END):
        return Evidence(bound=evidence.bound)
    return replace(evidence, logs=(log,))


def _worse(bound: float, odds: float) -> float:
    """The share at so many times the odds; below 1."""
    return bound * odds / (1.0 - bound + bound * odds)


def _ratio(share: float, *, null: float, other: float) -> float:
    """How much likelier the observation is at ``other``; linear in it, so that its mean is 1 at ``null``."""
    return share * other / null + (1.0 - share) * (1.0 - other) / (1.0 - null)


class Drift:
    """The evidence of several samples. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: dict[Hashable, Evidence] = {}

    def note(self, sample: Hashable, bound: float, share: float) -> Evidence | None:
        """After one more answer of a sample: the evidence where an episode begins, else None."""
        with self._lock:
            known = self._samples.pop(sample, None)
            if known is None or known.bound != bound:
                known = Evidence(bound=bound)
            after, began = observed(known, share)
            self._samples[sample] = after
            while len(self._samples) > MOST_WATCHED:
                del self._samples[next(iter(self._samples))]
            return after if began else None
