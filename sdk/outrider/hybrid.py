"""The edge's model and the cloud behind one ``infer``: it obeys a policy, and no call outlives its deadline.

A caller's thread only ever waits on futures, and only for the time that is left; what comes later is dropped.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from outrider.policy import (
    CLOSED,
    Breaker,
    Policy,
    State,
    allow,
    failed,
    least_margin,
    obstacle,
    released,
    review,
    route,
    succeeded,
)
from outrider.prediction import OnPrediction, Prediction, Source, Watchers
from outrider_runtimes.deadline import Clock, Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineError,
    InterfaceMismatch,
    OutriderError,
    QueueFull,
    RemoteRefused,
    RemoteUnavailable,
    ReplyError,
    RunnerClosed,
    RunnerError,
)
from outrider_runtimes.runner import Answer, Runner, wait
from outrider_runtimes.tensors import Array, Interface, Tensors, by_name, check_named

__all__ = ["Hybrid"]

log = logging.getLogger(__name__)

# A board that boots beside a dead endpoint must come up; the interface is then compared before the first offload.
CONNECT_MS = 1000.0


class Hybrid:
    """Answers at the edge, and from the cloud where the policy says so. Safe from several threads.

    It owns neither side: ``close`` leaves both open. A cloud whose interface cannot be learned at construction (1 s
    at most) is compared before the first request is sent; found unequal then, it is never asked, and answers that
    it should have given are marked ``edge_degraded`` with the reason ``interface_mismatch``.
    """

    def __init__(
        self,
        model: Runner,
        cloud: Runner,
        policy: Policy,
        *,
        clock: Clock = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        """Compose two sides.

        Args:
            model: the edge: a Model, or another local Runner.
            cloud: a Remote, or another Runner, which may be a second Model.
            policy: when to ask the cloud.
            clock: seconds, monotonic.
            rng: spreads how long the circuit stays open; seeded by the system where it is None.

        Raises:
            InterfaceMismatch: the cloud answers at another interface.
            ConfigError: the policy judges an output that the interface does not have, or that holds no logits.
        """
        if not isinstance(policy, Policy):
            raise ConfigError(f"policy is {policy!r}, not a Policy", hint="outrider.Policy(deadline_ms=80.0)")
        self.interface: Interface = model.interface
        self.policy = policy
        self._judged = _judged_output(policy, self.interface)
        self._model = model
        self._clock = clock
        self._edge_tried_s = -math.inf
        self._cloud = _Cloud(cloud, self.interface, policy, clock=clock, rng=rng or random.Random())
        self._watchers = Watchers()
        self._closed = False
        self._cloud.introduce(Deadline.after_ms(CONNECT_MS, clock=clock))

    def infer(self, inputs: Tensors | Array, *, deadline_ms: float | None = None) -> Prediction:
        """Answer one request by its deadline, or fail by then.

        Args:
            inputs: every input of the interface by name; where there is one input, its array alone will do.
            deadline_ms: overrides the policy's.

        Returns:
            A Prediction whose ``reason`` is, by ``source``:
            ``edge``: "confident", or "edge" where the policy judges nothing;
            ``cloud``: "uncertain", "queue" (the edge could not make the deadline) or "edge_failed";
            ``edge_degraded``: why the cloud did not answer: "circuit_open", "no_time_left", "cloud_late",
            "cloud_unavailable", "cloud_refused", "cloud_busy", "cloud_bad_reply", "cloud_failed" or
            "interface_mismatch".

        Raises:
            InputError: an input is not what the interface says; neither side was called.
            DeadlineExceeded: neither side answered in time.
            EngineError, RunnerError: the edge failed or its queue is full, and the cloud could not help.
        """
        begun_ns = time.perf_counter_ns()
        if self._closed:
            raise RunnerClosed("the hybrid was closed")
        deadline = Deadline.after_ms(self.policy.deadline_ms if deadline_ms is None else deadline_ms, clock=self._clock)
        outcome = self._answer(check_named(self.interface, by_name(self.interface, inputs)), deadline)
        prediction = self._prediction(outcome, begun_ns)
        self._watchers.tell(prediction)
        return prediction

    def on_prediction(self, callback: OnPrediction) -> Callable[[], None]:
        """Call ``callback`` with each Prediction, in the caller's thread; returns what takes it off.

        It runs before ``infer`` returns, so its time adds to the call's: it must be quick. What it raises does not
        reach the caller of ``infer``; the first time, it is logged.
        """
        return self._watchers.add(callback)

    def close(self) -> None:
        """Answer no more calls. Both sides stay open: they are their maker's to close."""
        self._closed = True
        self._watchers.clear()

    def __enter__(self) -> Hybrid:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, inputs: Tensors, deadline: Deadline) -> _Outcome:
        now_s = self._clock()
        state = self._state(deadline)
        decision = route(self.policy, state, now_s)
        if decision.side == "refuse":
            raise DeadlineExceeded("the deadline had passed before either side was asked")
        if decision.side == "cloud":
            return self._cloud_first(inputs, deadline, refresh_edge=decision.refresh_edge)
        try:
            answer = wait(self._submit(inputs, deadline), deadline)
        except DeadlineExceeded:
            raise DeadlineExceeded("the edge did not answer in time") from None
        except QueueFull as error:
            return self._cloud_instead("queue", error, state, inputs, deadline)
        except (EngineError, RunnerError) as error:
            return self._cloud_instead("edge_failed", error, state, inputs, deadline)
        return self._reviewed(answer, state, inputs, deadline)

    def _reviewed(self, answer: Answer, state: State, inputs: Tensors, deadline: Deadline) -> _Outcome:
        """The edge's answer, or the cloud's where the edge's is uncertain and the cloud gives one in time."""
        margin = None if self._judged is None else least_margin(answer.outputs[self._judged])
        verdict = review(self.policy, state, margin, self._clock())
        if verdict.action == "keep":
            return _Outcome(answer, "edge", "edge", verdict.reason)
        if verdict.action == "degrade":
            return _Outcome(answer, "edge", "edge_degraded", verdict.reason)
        better = self._cloud.ask(inputs, self._reserved(deadline))
        if isinstance(better, Answer):
            return _Outcome(better, "cloud", "cloud", verdict.reason)
        return _Outcome(answer, "edge", "edge_degraded", better.reason)

    def _cloud_instead(
        self, reason: str, error: OutriderError, state: State, inputs: Tensors, deadline: Deadline
    ) -> _Outcome:
        """The edge has no answer. Raises its error where the cloud has none either."""
        if obstacle(self.policy, state, self._clock()) is not None:
            raise error
        answer = self._cloud.ask(inputs, deadline)
        if isinstance(answer, Answer):
            return _Outcome(answer, "cloud", "cloud", reason)
        if deadline.passed:
            raise DeadlineExceeded(f"neither side answered in time: {error}; {answer.error}") from error
        raise error from answer.error

    def _cloud_first(self, inputs: Tensors, deadline: Deadline, *, refresh_edge: bool) -> _Outcome:
        """The edge cannot make the deadline by its measured latency; where the cloud fails early, it tries."""
        edge: Future[Answer] | None = None
        if refresh_edge:
            try:
                edge = self._submit(inputs, deadline)
            except (EngineError, RunnerError):
                edge = None
        answer = self._cloud.ask(inputs, deadline if edge is None else self._reserved(deadline))
        if isinstance(answer, Answer):
            return _Outcome(answer, "cloud", "cloud", "queue")
        try:
            late = wait(self._submit(inputs, deadline) if edge is None else edge, deadline)
        except DeadlineExceeded:
            raise DeadlineExceeded(f"neither side answered in time ({answer.reason})") from answer.error
        return _Outcome(late, "edge", "edge_degraded", answer.reason)

    def _submit(self, inputs: Tensors, deadline: Deadline) -> Future[Answer]:
        self._edge_tried_s = self._clock()
        return self._model.submit(inputs, deadline)

    def _reserved(self, deadline: Deadline) -> Deadline:
        """Early enough to hand out the edge's answer when the cloud is late."""
        return Deadline(deadline.at_s - self.policy.reserve_ms / 1000.0, clock=self._clock)

    def _state(self, deadline: Deadline) -> State:
        cloud = self._cloud
        return State(
            deadline_s=deadline.at_s,
            edge_ms=self._model.estimate_ms(),
            edge_tried_s=self._edge_tried_s,
            cloud_ms=cloud.runner.estimate_ms(),
            cloud_tried_s=cloud.tried_s,
            breaker=cloud.breaker,
            mismatch=cloud.mismatch,
        )

    def _prediction(self, outcome: _Outcome, begun_ns: int) -> Prediction:
        answer = outcome.answer
        runner = self._model if outcome.side == "edge" else self._cloud.runner
        bundle = getattr(runner, "bundle", None)
        waited_ms = (time.perf_counter_ns() - begun_ns) / 1e6
        return Prediction(
            outputs=answer.outputs,
            source=outcome.source,
            reason=outcome.reason,
            variant=str(getattr(runner, "variant", None) or ""),
            engine=str(getattr(runner, "engine", None) or type(runner).__name__.lower()),
            bundle=bundle if isinstance(bundle, str) else str(getattr(bundle, "digest", "")),
            verified=bool(getattr(bundle, "verified", False)),
            timing_ms=dataclasses.replace(answer.timing_ms, total=waited_ms),
        )


@dataclass(frozen=True, slots=True)
class _Outcome:
    answer: Answer
    side: Literal["edge", "cloud"]
    source: Source
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Miss:
    """The cloud gave no answer; ``error`` is None where it was not asked."""

    reason: str
    error: Exception | None = None


class _Cloud:
    """The cloud behind its circuit breaker; it raises nothing, and is only asked at an equal interface."""

    def __init__(
        self, runner: Runner, interface: Interface, policy: Policy, *, clock: Clock, rng: random.Random
    ) -> None:
        self.runner = runner
        self.breaker: Breaker = CLOSED
        self.tried_s = -math.inf
        self.mismatch = False
        self._digest = interface.digest
        self._policy = policy
        self._clock = clock
        self._rng = rng
        self._lock = threading.Lock()
        self._introducing = threading.Lock()
        self._introduced = False

    def introduce(self, deadline: Deadline) -> None:
        """Compare interfaces now where the cloud can be reached. Raises InterfaceMismatch."""
        try:
            self._compare(deadline)
        except (RunnerError, DeadlineExceeded) as error:
            log.warning(
                "the cloud cannot be reached yet; its interface is compared before the first offload: %s", error
            )

    def ask(self, inputs: Tensors, deadline: Deadline) -> Answer | _Miss:
        """One attempt; ends by the deadline."""
        if not self._take():
            return _Miss(reason="circuit_open")
        worked: bool | None = None
        trouble: Exception | None = None
        try:
            self._compare(deadline)
            answer = wait(self.runner.submit(inputs, deadline), deadline)
            worked = True
            return answer
        except InterfaceMismatch as error:
            self._disagree(error)
            return _Miss(reason="interface_mismatch", error=error)
        except QueueFull as error:
            return _Miss(reason="cloud_busy", error=error)
        except Exception as error:
            worked, trouble = False, error
            return _Miss(reason=_miss_reason(error), error=error)
        finally:
            self._settle(worked, trouble)

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


def _judged_output(policy: Policy, interface: Interface) -> str | None:
    """The output whose margin is judged; None where nothing is. Raises ConfigError."""
    names = [spec.name for spec in interface.outputs]
    if policy.output is not None and policy.output not in names:
        raise ConfigError(f"policy.output is {policy.output!r}, the interface's outputs are {names}")
    if policy.min_margin == 0.0:
        return None
    if policy.output is None and len(names) > 1:
        raise ConfigError("policy.output is not given", hint=f"name the output that holds the logits, out of {names}")
    spec = interface.outputs[names.index(policy.output or names[0])]
    if not spec.dtype.startswith("float") or not spec.shape or spec.shape[-1] in (0, 1):
        raise ConfigError(
            f"policy.output: {spec.name!r} is {spec.dtype} {list(spec.shape)}, expected float [..., classes]",
            hint="logits have two classes or more; min_margin=0.0 judges nothing",
        )
    return spec.name
