"""The cloud of a Hybrid behind its circuit breaker: it raises nothing, and is only asked at an equal interface."""

from __future__ import annotations

import logging
import math
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from outrider.breaker import CLOSED, Breaker, allow, failed, released, succeeded
from outrider.policy import Policy
from outrider.spending import Meter
from outrider_runtimes.deadline import Clock, Deadline
from outrider_runtimes.errors import (
    DeadlineExceeded,
    InterfaceMismatch,
    OutriderError,
    QueueFull,
    RemoteRefused,
    RemoteUnavailable,
    ReplyError,
    RunnerClosed,
    RunnerError,
    StoreError,
)
from outrider_runtimes.runner import Answer, Runner, wait
from outrider_runtimes.tensors import Interface, Tensors

log = logging.getLogger(__name__)

PAST = Deadline(-math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class Miss:
    """The cloud gave no answer; ``error`` is None where it was not asked."""

    reason: str
    error: Exception | None = None


class Cloud:
    """One runner, asked one attempt at a time by each caller. Safe from several threads."""

    def __init__(
        self,
        runner: Runner,
        interface: Interface,
        policy: Policy,
        *,
        clock: Clock,
        rng: random.Random,
        meter: Meter | None,
    ) -> None:
        self.runner = runner
        self.breaker: Breaker = CLOSED
        self.tried_s = -math.inf
        self.mismatch = False
        self._digest = interface.digest
        self._policy = policy
        self._clock = clock
        self._rng = rng
        self._meter = meter
        self._lock = threading.Lock()
        self._introducing = threading.Lock()
        self._introduced = False

    @property
    def introduced(self) -> bool:
        """Whether its interface was compared; asking it then waits for nothing but its answer."""
        return self._introduced

    def introduce(self, deadline: Deadline) -> None:
        """Compare interfaces now where the cloud can be reached. Raises InterfaceMismatch."""
        try:
            self._compare(deadline)
        except (RunnerError, DeadlineExceeded) as error:
            log.warning(
                "the cloud cannot be reached yet; its interface is compared before the first offload: %s", error
            )

    def ask(self, inputs: Tensors, deadline: Deadline, *, patient: bool = True) -> Answer | Miss:
        """One attempt; ends by the deadline. Not ``patient``: the edge answers else; see ``Remote.submit_once``."""
        once = None if patient else getattr(self.runner, "submit_once", None)
        begun = self._begin(inputs, deadline, once or self.runner.submit, deadline)
        return begun if isinstance(begun, Miss) else self.finish(begun, deadline)

    def begin(
        self, inputs: Tensors, deadline: Deadline, *, beside: Future[Answer] | None = None
    ) -> Future[Answer] | Miss:
        """Start an attempt behind an answer of the edge that is ``beside`` it, or that is there already (None).

        Nothing that the edge's answer need not wait for is waited for: the card where the budget is written down, no
        longer than for the edge. The arrays are copied: the caller may have its answer, and change them, before they
        are sent. Whoever gets a future gives it to ``finish`` or to ``abandon``.
        """
        copied = {name: array.copy() for name, array in inputs.items()}
        return self._begin(copied, deadline, self.runner.submit, PAST if beside is None else deadline, beside)

    def released(self) -> None:
        """A call ended in a way that says nothing about the cloud: by a signal's exception. Another may probe."""
        self._settle(None, None)

    def _begin(
        self,
        inputs: Tensors,
        deadline: Deadline,
        submit: Callable[[Tensors, Deadline], Future[Answer]],
        written_by: Deadline,
        beside: Future[Answer] | None = None,
    ) -> Future[Answer] | Miss:
        if not self._take():
            return Miss(reason="circuit_open")
        try:
            self._compare(deadline)
            if self._meter is not None and not self._meter.take(inputs, written_by, beside=beside):
                return self._unspent()
            return submit(inputs, deadline)
        except Exception as error:
            return self._missed(error)
        except BaseException:
            self.released()
            raise

    def finish(self, future: Future[Answer], deadline: Deadline) -> Answer | Miss:
        """What an attempt ends with; by the deadline."""
        try:
            answer = wait(future, deadline)
        except Exception as error:
            return self._missed(error)
        except BaseException:
            self.released()
            raise
        self._settle(True, None)
        if self._meter is not None:
            self._meter.received(answer.outputs, deadline)
        return answer

    def abandon(self, future: Future[Answer]) -> None:
        """Nobody waits for this attempt any more; what it shows of the cloud still counts when it ends."""

        def settle(ended: Future[Answer]) -> None:
            if ended.cancelled():
                self._settle(None, None)
            elif (error := ended.exception()) is not None:
                self._missed(error if isinstance(error, Exception) else RunnerClosed(str(error)))
            else:
                self.finish(ended, Deadline(math.inf, clock=self._clock))

        future.add_done_callback(settle)

    def _unspent(self) -> Miss:
        """Another call took what was left of the budget, or it could not be written down in time."""
        self._settle(None, None)
        return Miss(reason="budget_spent")

    def _missed(self, error: Exception) -> Miss:
        """An attempt that failed: whether that speaks against the cloud, and what it is called."""
        if isinstance(error, InterfaceMismatch):
            self._disagree(error)
            reason = "interface_mismatch"
        elif isinstance(error, QueueFull) or (isinstance(error, RemoteRefused) and error.busy):
            reason = "cloud_busy"
        elif isinstance(error, StoreError):
            log.error("the cloud is not asked: %s", error)
            reason = "budget_spent"
        else:
            self._settle(False, error)
            return Miss(reason=_miss_reason(error), error=error)
        self._settle(None, None)
        return Miss(reason=reason, error=error)

    def _compare(self, deadline: Deadline) -> None:
        if self._introduced:
            known = getattr(self.runner, "interface_digest", None)
            if isinstance(known, str) and known != self._digest:
                raise _mismatch(self._digest, known)
            return
        left_s = deadline.remaining_s()
        if not self._introducing.acquire(timeout=-1 if left_s == math.inf else left_s):
            raise DeadlineExceeded("the cloud's interface is not known yet")
        try:
            if not self._introduced:
                theirs = _digest_of(self.runner, deadline)
                if theirs != self._digest:
                    raise _mismatch(self._digest, theirs)
                self._introduced = True
        finally:
            self._introducing.release()

    def _take(self) -> bool:
        with self._lock:
            now_s = self._clock()
            allowed, self.breaker = allow(self.breaker, now_s)
            if allowed:
                self.tried_s = now_s
            return allowed

    def _settle(self, worked: bool | None, trouble: Exception | None) -> None:
        with self._lock:
            before = self.breaker
            if worked is None:
                after = released(before)
            elif worked:
                after = succeeded(self._policy, before)
            else:
                after = failed(self._policy, before, self._clock(), self._rng.random())
            self.breaker = after
        if after.opened > before.opened:
            log.warning("the cloud is left alone for a while, after: %s: %s", type(trouble).__name__, trouble)
        elif after.opened < before.opened:
            log.info("the cloud answers again")

    def _disagree(self, error: InterfaceMismatch) -> None:
        with self._lock:
            told, self.mismatch = self.mismatch, True
        if not told:
            log.error("the cloud is not asked: %s", error)


def _miss_reason(error: Exception) -> str:
    if isinstance(error, DeadlineExceeded):
        return "cloud_late"
    if isinstance(error, (RemoteUnavailable, RunnerClosed)):
        return "cloud_unavailable"
    if isinstance(error, RemoteRefused):
        return "cloud_refused"
    if isinstance(error, ReplyError):
        return "cloud_bad_reply"
    if not isinstance(error, OutriderError):
        log.error("the cloud's runner failed in a way that it should not", exc_info=error)
    return "cloud_failed"


def _digest_of(runner: Runner, deadline: Deadline) -> str:
    """The interface's digest; a runner that has to ask for it does so by the deadline."""
    connect = getattr(runner, "connect", None)
    if connect is not None:
        connect(deadline)
    known = getattr(runner, "interface_digest", None)
    return known if isinstance(known, str) else runner.interface.digest


def _mismatch(ours: str, theirs: str) -> InterfaceMismatch:
    return InterfaceMismatch(
        f"the cloud's interface is {theirs[:12]}, the edge's {ours[:12]}",
        hint="serve a bundle that was exported for the same inputs, outputs and labels",
    )
