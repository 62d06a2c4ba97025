"""The edge's model and the cloud behind one ``infer``: it obeys a policy, and no call outlives its deadline.

A caller's thread only ever waits on futures, and only for the time that is left; what comes later is dropped.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as first_of
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from outrider.bundle import OffloadRule
from outrider.cloud import Cloud, Miss
from outrider.policy import (
    Budget,
    Policy,
    State,
    obstacle,
    review,
    route,
)
from outrider.prediction import OnPrediction, Prediction, Source, Watchers
from outrider.spending import Meter, Spending
from outrider.store import find_state_dir
from outrider.stream import Stream
from outrider_runtimes.deadline import Clock, Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineError,
    FormatError,
    OutriderError,
    QueueFull,
    RunnerClosed,
    RunnerError,
    ShapeError,
)
from outrider_runtimes.runner import Answer, Runner, wait
from outrider_runtimes.scores import Score
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
        state: str | Path | None = None,
        clock: Clock = time.monotonic,
        wall: Clock = time.time,
        rng: random.Random | None = None,
    ) -> None:
        """Compose two sides.

        Args:
            model: the edge: a Model, or another local Runner.
            cloud: a Remote, or another Runner, which may be a second Model.
            policy: when to ask the cloud.
            state: the state directory, where a policy with a budget keeps what was spent, by the name of the edge's
                bundle; see ``outrider.install``. One Hybrid at a time has that file.
            clock, wall: seconds, monotonic and since the epoch.
            rng: spreads how long the circuit stays open; seeded by the system where it is None.

        Raises:
            InterfaceMismatch: the cloud answers at another interface.
            ConfigError: the policy judges an output that the interface does not have, or that holds no logits.
            StoreError: what was spent cannot be read.
        """
        if not isinstance(policy, Policy):
            raise ConfigError(f"policy is {policy!r}, not a Policy", hint="outrider.Policy(deadline_ms=80.0)")
        self.interface: Interface = model.interface
        self.policy = policy
        self._by_margin = _margin_of(policy, self.interface)
        self._model = model
        self._clock = clock
        self._edge_tried_s = -math.inf
        self._meter = None if policy.budget is None else _meter(policy.budget, model, state, wall)
        self._cloud = Cloud(cloud, self.interface, policy, clock=clock, rng=rng or random.Random(), meter=self._meter)
        self._watchers = Watchers[Prediction]()
        self._closed = False
        self._cloud.introduce(Deadline.after_ms(CONNECT_MS, clock=clock))

    def infer(self, inputs: Tensors | Array, *, deadline_ms: float | None = None, private: bool = False) -> Prediction:
        """Answer one request by its deadline, or fail by then.

        Args:
            inputs: every input of the interface by name; where there is one input, its array alone will do.
            deadline_ms: overrides the policy's.
            private: these inputs never leave the board, whatever becomes of the answer.

        Returns:
            A Prediction whose ``reason`` is, by ``source``:
            ``edge``: "confident", or "edge" where the policy judges nothing;
            ``cloud``: "uncertain", "queue" (the edge could not make the deadline), "hedge" (it was slow, both were
            asked), "shape" (a size that the interface leaves free and the board's file does not take) or
            "edge_failed";
            ``edge_degraded``: why the cloud did not answer: "private", "budget_spent", "circuit_open", "no_time_left",
            "cloud_late", "cloud_unavailable", "cloud_refused", "cloud_busy", "cloud_bad_reply", "cloud_failed" or
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
        checked = check_named(self.interface, by_name(self.interface, inputs))
        outcome = self._answer(checked, deadline, private=private)
        prediction = self._prediction(outcome, begun_ns)
        self._watchers.tell(prediction)
        return prediction

    def stream(self, *, initial: Tensors | None = None) -> Stream:
        """A sequence of a recurrent model, which holds its state between calls; see Stream. Raises ConfigError."""
        return Stream(self, initial=initial)

    def on_prediction(self, callback: OnPrediction) -> Callable[[], None]:
        """Call ``callback`` with each Prediction, in the caller's thread; returns what takes it off.

        It runs before ``infer`` returns, so its time adds to the call's: it must be quick. What it raises does not
        reach the caller of ``infer``; the first time, it is logged.
        """
        return self._watchers.add(callback)

    def close(self) -> None:
        """Answer no more calls. Both sides stay open: they are their maker's to close."""
        if self._meter is not None and not self._closed:
            self._meter.close()
        self._closed = True
        self._watchers.clear()

    def __enter__(self) -> Hybrid:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, inputs: Tensors, deadline: Deadline, *, private: bool) -> _Outcome:
        now_s = self._clock()
        state = self._state(inputs, deadline, private=private)
        decision = route(self.policy, state, now_s)
        if decision.side == "refuse":
            raise DeadlineExceeded("the deadline had passed before either side was asked")
        if decision.side == "cloud":
            return self._cloud_first(inputs, deadline, refresh_edge=decision.refresh_edge)
        try:
            edge = self._submit(inputs, deadline)
            hedged = self._hedged(edge, state, inputs, deadline)
            if hedged is not None:
                return hedged
            answer = wait(edge, deadline)
        except DeadlineExceeded:
            raise DeadlineExceeded("the edge did not answer in time") from None
        except QueueFull as error:
            return self._cloud_instead("queue", error, state, inputs, deadline)
        except ShapeError as error:  # the interface allows the size, and the board's file does not take it
            return self._cloud_instead("shape", error, state, inputs, deadline)
        except (EngineError, RunnerError) as error:
            return self._cloud_instead("edge_failed", error, state, inputs, deadline)
        return self._reviewed(answer, state, inputs, deadline)

    def _hedged(self, edge: Future[Answer], state: State, inputs: Tensors, deadline: Deadline) -> _Outcome | None:
        """The cloud's answer, where the edge is slow and the policy then asks both; None: the edge's is to be had."""
        hedge_ms = self.policy.hedge_after_ms
        if hedge_ms is None or _ended([edge], min(hedge_ms / 1000.0, deadline.remaining_s())):
            return None
        if not self._cloud.introduced or obstacle(self.policy, state, self._clock()) is not None:
            return None
        cloud = self._cloud.begin(inputs, deadline)
        if isinstance(cloud, Miss):
            return None
        _ended([edge, cloud], deadline.remaining_s())
        if edge.done() and not edge.cancelled() and edge.exception() is None:
            self._cloud.abandon(cloud)
            return None
        answer = self._cloud.finish(cloud, deadline)
        return _Outcome(answer, "cloud", "cloud", "hedge") if isinstance(answer, Answer) else None

    def _reviewed(self, answer: Answer, state: State, inputs: Tensors, deadline: Deadline) -> _Outcome:
        """The edge's answer, or the cloud's where the edge's is uncertain and the cloud gives one in time."""
        judged = self._judged()
        score = None if judged is None else judged.least(answer.outputs)
        verdict = review(self.policy, state, score, self._clock())
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

    def _judged(self) -> Score | None:
        """What is taken of the edge's answers; None where nothing is judged."""
        if self._by_margin is not None:
            return self._by_margin
        rule = _rule_of(self._model)
        return None if rule is None or not self.policy.obey_certified else rule.score

    def _submit(self, inputs: Tensors, deadline: Deadline) -> Future[Answer]:
        self._edge_tried_s = self._clock()
        return self._model.submit(inputs, deadline)

    def _reserved(self, deadline: Deadline) -> Deadline:
        """Early enough to hand out the edge's answer when the cloud is late."""
        return Deadline(deadline.at_s - self.policy.reserve_ms / 1000.0, clock=self._clock)

    def _state(self, inputs: Tensors, deadline: Deadline, *, private: bool) -> State:
        cloud = self._cloud
        return State(
            deadline_s=deadline.at_s,
            edge_ms=self._model.estimate_ms(),
            edge_tried_s=self._edge_tried_s,
            cloud_ms=cloud.runner.estimate_ms(),
            cloud_tried_s=cloud.tried_s,
            breaker=cloud.breaker,
            mismatch=cloud.mismatch,
            certified=_certified(self._model),
            private=private,
            spent=self._meter is not None and not self._meter.covers(inputs),
        )

    def _prediction(self, outcome: _Outcome, begun_ns: int) -> Prediction:
        answer = outcome.answer
        runner = answer.served or (self._model if outcome.side == "edge" else self._cloud.runner)
        bundle = getattr(runner, "bundle", None)
        waited_ms = (time.perf_counter_ns() - begun_ns) / 1e6
        return Prediction(
            outputs=answer.outputs,
            source=outcome.source,
            reason=outcome.reason,
            variant=str(getattr(runner, "variant", None) or ""),
            engine=str(getattr(runner, "engine", None) or type(runner).__name__.lower()),
            bundle=bundle if isinstance(bundle, str) else str(getattr(bundle, "digest", "")),
            verified=bool(getattr(bundle, "verified", getattr(runner, "verified", False))),
            timing_ms=answer.timing_ms._replace(total=waited_ms),
        )


@dataclass(frozen=True, slots=True)
class _Outcome:
    answer: Answer
    side: Literal["edge", "cloud"]
    source: Source
    reason: str


def _ended(futures: Sequence[Future[Answer]], seconds: float) -> bool:
    """Wait until one of them ends, or for so long; whether one has. Unlike ``wait`` it gives up none of them."""
    timeout_s = None if seconds == math.inf else seconds
    return bool(first_of(futures, timeout=timeout_s, return_when=FIRST_COMPLETED).done)


def _meter(budget: Budget, model: Runner, state: str | Path | None, wall: Clock) -> Meter:
    name = getattr(getattr(model, "bundle", None), "name", None) or "edge"
    return Meter(budget, Spending(find_state_dir(state) / "offload" / f"{name}.json", clock=wall))


def _rule_of(model: Runner) -> OffloadRule | None:
    """What the export of the edge's bundle certified; a runner without a bundle has nothing."""
    rule = getattr(model, "offload", None)
    return rule if isinstance(rule, OffloadRule) else None


def _certified(model: Runner) -> float | None:
    rule = _rule_of(model)
    return None if rule is None else rule.thresholds[str(getattr(model, "variant", ""))]


def _margin_of(policy: Policy, interface: Interface) -> Score | None:
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
