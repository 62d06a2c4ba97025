"""Whether the calibrated risk still holds: what the cloud says of answers that the edge gave too.

The certificate is about the answers that are kept, and those that the cloud sees anyway are the others. So a share of
the kept ones, drawn by chance, is sent as well (``Policy.audit_share``): what is seen of them is an unbiased sample of
what is kept. The uncertain ones are judged by themselves, against what the export measured of uncertain ones: where
they differ more often, the requests are not like those that were certified on, though the kept ones may still be well.
The truth is not known on a board: the cloud's word stands for it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Literal

import numpy as np

from outrider.bundle import OffloadRule
from outrider.events import HybridEvent
from outrider.hybrid.cloud import Cloud, Miss
from outrider.hybrid.drift import Drift
from outrider.hybrid.judging import Judged, differing
from outrider.policy import Policy
from outrider_runtimes.deadline import Clock, Deadline
from outrider_runtimes.runner import Answer
from outrider_runtimes.tensors import Array, Tensors

AUDIT_MS = 2000.0  # nobody waits for an audit; a cloud that takes longer is late all the same


class Audits:
    """Compares two sides, and tells of drift. Safe from several threads.

    Args:
        cloud: asked about confident answers, one at a time and in the background.
        tell: gets an event once an episode, in the thread that compared.
    """

    def __init__(self, cloud: Cloud, policy: Policy, tell: Callable[[HybridEvent], None], *, clock: Clock) -> None:
        self._cloud = cloud
        self._policy = policy
        self._tell = tell
        self._clock = clock
        self._drift = Drift()
        self._lock = threading.Lock()
        self._under_way: object | None = None

    @property
    def idle(self) -> bool:
        """Whether none is under way."""
        return self._under_way is None

    def begin(self, how: Judged, inputs: Tensors, answer: Answer, asked: Future[Answer] | None = None) -> bool:
        """Ask the cloud about a confident answer, and return at once. While one audit is under way there is no other.

        There is none either where the budget cannot be charged without waiting for the card: the next finds it written.

        Args:
            asked: the attempt of a hedge, where the cloud was asked already.

        Returns:
            Whether the cloud was asked, or what it was asked already is taken for the audit.
        """
        bound = audit_bound(self._policy, how.rule, how.variant)
        if bound is None or not self._cloud.introduced:
            return False
        mine = object()
        try:
            begun = self._begun(mine, inputs) if asked is None else asked
            if begun is None or (asked is not None and not self._takes(mine)):
                return False
            self._follow(begun, mine, how, bound, answer)
        except BaseException:
            self._ended(mine)
            raise
        return True

    def _begun(self, mine: object, inputs: Tensors) -> Future[Answer] | None:
        if not self._takes(mine):
            return None
        begun = self._cloud.begin(inputs, Deadline.after_ms(AUDIT_MS, clock=self._clock))
        if isinstance(begun, Miss):
            self._ended(mine)
            return None
        return begun

    def _takes(self, mine: object) -> bool:
        with self._lock:
            if self._under_way is None:
                self._under_way = mine
            return self._under_way is mine

    def _ended(self, mine: object) -> None:
        with self._lock:
            if self._under_way is mine:
                self._under_way = None

    def _follow(self, begun: Future[Answer], mine: object, how: Judged, bound: float, answer: Answer) -> None:
        edge = {how.score.output: answer.outputs[how.score.output].copy()}

        def ended(future: Future[Answer]) -> None:
            self._ended(mine)
            said = self._cloud.finish(future, Deadline(math.inf, clock=self._clock))
            if isinstance(said, Answer):
                every = np.ones(len(how.score.rows(edge)), dtype=bool)
                self._compare("audit", how, bound, differing(how.score, edge, said.outputs, every))

        begun.add_done_callback(ended)

    def uncertain(self, how: Judged, edge: Tensors, cloud: Tensors, rows: Array) -> None:
        """Both sides answered an uncertain request. rows: bool [N], which of it were uncertain."""
        bound = None if how.certified is None else may_differ(how.rule, how.variant, "offloaded")
        if bound is not None:
            self._compare("uncertain", how, bound, differing(how.score, edge, cloud, rows))

    def _compare(self, sample: str, how: Judged, bound: float, share: float | None) -> None:
        if share is None:
            return
        evidence = self._drift.note((sample, how.bundle, how.variant), bound, share)
        if evidence is None:
            return
        fields: dict[str, str | int | float] = {
            "sample": sample,
            "bundle": how.bundle,
            "variant": how.variant,
            "bound": round(bound, 6),
            "share": round(evidence.differing / evidence.answers, 6),
            "answers": evidence.answers,
        }
        self._tell(HybridEvent(name="drift", fields=fields))


def audit_bound(policy: Policy, rule: OffloadRule | None, variant: str) -> float | None:
    """The share of confident answers in which the cloud may say otherwise; None where none is known."""
    return policy.audit_allowed if policy.audit_allowed is not None else may_differ(rule, variant, "kept")


def may_differ(rule: OffloadRule | None, variant: str, which: Literal["kept", "offloaded"]) -> float | None:
    """The share of such answers in which the cloud may say otherwise, as the export wrote it; None for unknown.

    The export took its teacher for the cloud, so where another model answers there, it is another figure.
    """
    entry = None if rule is None else rule.measured.get(variant)
    shares = entry.get("may_differ") if isinstance(entry, Mapping) else None
    share = shares.get(which) if isinstance(shares, Mapping) else None
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.0 < share < 1.0:
        return None
    return float(share)
