"""The edge's model and the cloud behind one ``infer``: it obeys a policy, and no call outlives its deadline.

A caller's thread only ever waits on futures, and only for the time that is left; what comes later is dropped.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from outrider.events import HybridEvent, OnEvent, event_of
from outrider.hybrid.audits import Audits, audit_bound
from outrider.hybrid.cloud import Cloud, Miss
from outrider.hybrid.judging import judged, margin_of, rule_of
from outrider.hybrid.strain import BoardWatch
from outrider.policy import CONFIDENT, UNJUDGED, UNKNOWN, Budget, Policy, Route, State, obstacle, rescue, review, route
from outrider.prediction import Failure, OnFailure, OnPrediction, Prediction, Source, Watchers, failure_of
from outrider.serving import Change
from outrider.spending import Meter, open_meter
from outrider.stream import Stream
from outrider_runtimes._forked import made_before_fork, tell_of_fork
from outrider_runtimes.deadline import Clock, Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineError,
    InputError,
    OutriderError,
    QueueFull,
    RunnerClosed,
    RunnerError,
    RunnerStuck,
    ShapeError,
)
from outrider_runtimes.options import require_kind
from outrider_runtimes.runner import Answer, Runner, first_ended, wait
from outrider_runtimes.tensors import Array, Finite, Interface, Tensors, by_name, compile_check

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
        meter: Meter | None = None,
        root: Path = Path("/"),
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
            meter: instead of the policy's budget: one that others spend from too, such as a Reporter on the same link;
                see ``outrider.spending.open_meter``. It stays open.
            root: where ``sys`` is, for the board's heat and power.
            clock, wall: seconds, monotonic and since the epoch.
            rng: spreads how long the circuit stays open and draws what is audited; seeded by the system where it is
                None.

        Raises:
            InterfaceMismatch: the cloud answers at another interface.
            ConfigError: the policy judges an output that the interface does not have, or that holds no logits; or it
                audits, and neither it nor the bundle says how often the cloud may say otherwise; or an option is of
                another kind than is said here.
            StoreError: what was spent cannot be read.
        """
        if not isinstance(policy, Policy):
            raise ConfigError(f"policy is {policy!r}, not a Policy", hint="outrider.Policy(deadline_ms=80.0)")
        for name, runner in (("model", model), ("cloud", cloud)):
            if not callable(getattr(runner, "submit", None)):
                hint = "a Model or a Remote; where there is no cloud, the Model alone will do"
                raise ConfigError(f"{name} is {runner!r:.40}, which answers nothing", hint=hint)
        require_kind("meter", meter, (Meter, type(None)), "what outrider.spending.open_meter gives, or None")
        require_kind("root", root, (Path,), "a Path")
        require_kind("rng", rng, (random.Random, type(None)), "a random.Random, or None")
        self.interface: Interface = model.interface
        self.policy = policy
        # What a board lets pass unseen would be refused by every endpoint.
        finite: Finite = "clip" if getattr(model, "finite", None) == "clip" else "reject"
        self._check = compile_check(self.interface, finite=finite)
        self._names = [spec.name for spec in self.interface.inputs]
        self._by_margin = margin_of(policy, self.interface)
        _check_audits(policy, model)
        self._model = model
        self._clock = clock
        self._rng = rng or random.Random()
        self._edge_tried_s = -math.inf
        if meter is not None and policy.budget is not None:
            raise ConfigError("policy.budget and meter exclude each other", hint="the meter has a budget of its own")
        self._own_meter = None if policy.budget is None else _meter(policy.budget, model, state, wall)
        self._meter = self._own_meter if meter is None else meter
        self._cloud = Cloud(cloud, self.interface, policy, clock=clock, rng=self._rng, meter=self._meter)
        self._watchers = Watchers[Prediction]()
        self._failure_watchers: Watchers[Failure] = Watchers("on_failure")
        self._event_watchers = Watchers[HybridEvent]("on_event")
        self._unfollow: Callable[[], None] | None = None
        self._following = threading.Lock()
        self._audits = Audits(self._cloud, policy, self._event_watchers.tell, clock=clock)
        self._board = BoardWatch(root, clock=clock) if _spares(policy) else None
        if self._board is not None:
            weakref.finalize(self, self._board.close)  # its thread outlives no Hybrid that was dropped
        self._closed = False
        self._forked = False
        tell_of_fork(self)
        if not policy.private:
            self._cloud.introduce(Deadline.after_ms(CONNECT_MS, clock=clock))

    @property
    def edge(self) -> Runner:
        """The edge, as it was given."""
        return self._model

    def infer(self, inputs: Tensors | Array, *, deadline_ms: float | None = None, private: bool = False) -> Prediction:
        """Answer one request by its deadline, or fail by then.

        Args:
            inputs: every input of the interface by name; where there is one input, its array alone will do.
            deadline_ms: overrides the policy's.
            private: these inputs never leave the board, whatever becomes of the answer; ``Policy.private``: none do.

        Returns:
            A Prediction whose ``reason`` is, by ``source``:
            ``edge``: "confident", "audit" (confident, and the cloud is asked too, behind the caller's back), or "edge"
            where the policy judges nothing;
            ``cloud``: "uncertain", "cloud_only" (the bundle says so), "queue" (the edge could not make the deadline),
            "low_power", "throttled" or "hot" (the board is spared), "hedge" (it was slow, both were asked), "shape" (a
            size that the interface leaves free and the board's file does not take) or "edge_failed";
            ``edge_degraded``: why the cloud did not answer: "private", "budget_spent", "circuit_open", "no_time_left",
            "cloud_late", "cloud_unavailable", "cloud_refused", "cloud_busy", "cloud_bad_reply", "cloud_failed" or
            "interface_mismatch".

        Raises:
            InputError: an input is not what the interface says; neither side was called. A ShapeError, also where the
                board's file does not take a size that the interface leaves free, and the cloud could not help.
            DeadlineExceeded: neither side answered in time.
            EngineError, RunnerError, MemoryError: the edge failed or its queue is full, and the cloud could not help.
        """
        begun_ns = time.perf_counter_ns()
        if self._closed:
            raise made_before_fork("the hybrid") if self._forked else RunnerClosed("the hybrid was closed")
        try:
            within_ms = self.policy.deadline_ms if deadline_ms is None else deadline_ms
            deadline = Deadline.after_ms(within_ms, clock=self._clock)
            checked = self._checked(inputs)
            outcome = self._answer(checked, deadline, private=bool(private) or self.policy.private)
        except Exception as error:
            self.tell_failure(error, inputs)
            raise
        except BaseException:  # a signal's; wherever it struck, a probe that was under way is over
            self._cloud.released()
            raise
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

    def on_failure(self, callback: OnFailure) -> Callable[[], None]:
        """Call ``callback`` with the Failure of each ``infer`` that raises; else as ``on_prediction``.

        A call that a signal's exception ends, such as KeyboardInterrupt, is neither answered nor failed; one after
        ``close`` is told to nobody.
        """
        return self._failure_watchers.add(callback)

    def tell_failure(self, error: Exception, inputs: Tensors | Array) -> None:
        """Tell of a call that ``error`` ended before ``infer`` had it, as a Stream's may; see ``on_failure``."""
        self._failure_watchers.tell(failure_of(error, self.interface, inputs))

    def on_event(self, callback: OnEvent) -> Callable[[], None]:
        """Call ``callback`` with each HybridEvent from now on; returns what takes it off.

        Drift is told in the thread that saw it, a caller's or one of the cloud's; a change of the edge in the thread
        that made it. What the callback raises is logged, once.
        """
        follow = getattr(self._model, "on_change", None)
        with self._following:
            if self._unfollow is None and follow is not None:
                self._unfollow = follow(self._changed)
        return self._event_watchers.add(callback)

    def close(self) -> None:
        """Answer no more calls; those under way go on. Both sides stay open: they are their maker's to close."""
        if self._own_meter is not None and not self._closed:
            self._own_meter.close()
        self._closed = True
        if self._board is not None:
            self._board.close()
        if self._unfollow is not None:
            self._unfollow()
        for watchers in (self._watchers, self._failure_watchers, self._event_watchers):
            watchers.clear()

    def forked(self) -> None:
        """As ``Forked`` says. It ends in the child: its edge has threads, and its account of spending one writer."""
        self._forked, self._closed = self._forked or not self._closed, True
        self._own_meter, self._unfollow, self._following = None, None, threading.Lock()
        self._watchers = Watchers[Prediction]()
        self._failure_watchers = Watchers[Failure]("on_failure")
        self._event_watchers = Watchers[HybridEvent]("on_event")

    def __enter__(self) -> Hybrid:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _checked(self, inputs: Tensors | Array) -> Tensors:
        arrays = self._check(by_name(self.interface, inputs))
        return dict(zip(self._names, arrays, strict=True))

    def _answer(self, inputs: Tensors, deadline: Deadline, *, private: bool) -> _Outcome:
        now_s = self._clock()
        state = self._state(inputs, deadline, now_s, private=private)
        decision = route(self.policy, state, now_s)
        if decision.side == "refuse":
            raise DeadlineExceeded("the deadline had passed before either side was asked")
        if decision.side == "cloud":
            return self._cloud_first(decision, state, inputs, deadline)
        return self._edge_first(decision, state, inputs, deadline)

    def _edge_first(self, decision: Route, state: State, inputs: Tensors, deadline: Deadline) -> _Outcome:
        asked: Answer | Future[Answer] | Miss | None = None
        try:
            edge = self._submit(inputs, deadline)
            asked = self._hedged(edge, state, inputs, deadline)
            if isinstance(asked, Answer):
                return _Outcome(asked, "cloud", "cloud", "hedge")
            answer = wait(edge, deadline)
        except DeadlineExceeded:
            raise DeadlineExceeded("the edge did not answer in time") from None
        except (ShapeError, EngineError, RunnerError, MemoryError) as error:
            if isinstance(asked, Miss):
                raise error from asked.error
            return self._cloud_instead(_why_none(error), error, state, inputs, deadline)
        if decision.reason != "edge":
            self._let_be(asked)
            return _Outcome(answer, "edge", "edge_degraded", decision.reason)
        return self._reviewed(answer, asked, state, inputs, deadline)

    def _hedged(
        self, edge: Future[Answer], state: State, inputs: Tensors, deadline: Deadline
    ) -> Answer | Future[Answer] | Miss | None:
        """Where the edge is slow and the policy then asks both: the cloud's answer, and the edge is not waited for.

        Else the edge's is to be had, and this is how far the cloud is: under way, failed, or not asked (None).
        """
        hedge_ms = self.policy.hedge_after_ms
        if hedge_ms is None or first_ended([edge], min(hedge_ms / 1000.0, deadline.remaining_s())):
            return None
        if not self._cloud.introduced or obstacle(self.policy, state, self._clock()) is not None:
            return None
        cloud = self._cloud.begin(inputs, deadline, beside=edge)
        if isinstance(cloud, Miss):
            return cloud if cloud.error is not None else None
        first_ended([edge, cloud], deadline.remaining_s())
        if edge.done() and not edge.cancelled() and edge.exception() is None:
            return cloud
        answer = self._cloud.finish(cloud, deadline)
        if isinstance(answer, Answer):
            edge.cancel()
        return answer

    def _let_be(self, asked: Future[Answer] | Miss | None) -> None:
        if isinstance(asked, Future):
            self._cloud.abandon(asked)

    def _reviewed(
        self, answer: Answer, asked: Future[Answer] | Miss | None, state: State, inputs: Tensors, deadline: Deadline
    ) -> _Outcome:
        """The edge's answer, or the cloud's where the edge's is uncertain and the cloud gives one in time.

        Args:
            asked: what became of the cloud, where a hedge asked it: it is not asked again.
        """
        how = judged(self.policy, self._by_margin, self._model, answer)
        if how is None:
            self._let_be(asked)
            return _Outcome(answer, "edge", "edge", UNJUDGED.reason)
        scores = how.score.rows(answer.outputs)
        score = float(scores.min()) if scores.size else math.inf
        draw = self._rng.random() if self.policy.audit_share else 1.0
        verdict = review(self.policy, state, score, self._clock(), certified=how.certified, draw=draw)
        if verdict.action == "audit":
            if not isinstance(asked, Miss) and self._audits.begin(how, inputs, answer, asked):
                return _Outcome(answer, "edge", "edge", verdict.reason)
            verdict = CONFIDENT
        if verdict.action != "offload":
            self._let_be(asked)
            source: Source = "edge" if verdict.action == "keep" else "edge_degraded"
            return _Outcome(answer, "edge", source, verdict.reason)
        better = self._better(asked, inputs, self._reserved(deadline))
        if not isinstance(better, Answer):
            return _Outcome(answer, "edge", "edge_degraded", better.reason)
        self._audits.uncertain(how, answer.outputs, better.outputs, ~(scores >= how.least))
        return _Outcome(better, "cloud", "cloud", verdict.reason)

    def _better(self, asked: Future[Answer] | Miss | None, inputs: Tensors, until: Deadline) -> Answer | Miss:
        """What the cloud says, with the edge's answer in hand."""
        if isinstance(asked, Miss):
            return asked
        return self._cloud.ask(inputs, until, patient=False) if asked is None else self._cloud.finish(asked, until)

    def _cloud_instead(
        self, reason: str, error: OutriderError | MemoryError, state: State, inputs: Tensors, deadline: Deadline
    ) -> _Outcome:
        """The edge has no answer. Raises its error where the cloud has none either."""
        if not rescue(self.policy, state, reason, self._clock()):
            raise error
        answer = self._cloud.ask(inputs, deadline)
        if isinstance(answer, Answer):
            return _Outcome(answer, "cloud", "cloud", reason)
        if deadline.passed:
            raise DeadlineExceeded(f"neither side answered in time: {error}; {answer.error}") from error
        raise error from answer.error

    def _cloud_first(self, decision: Route, state: State, inputs: Tensors, deadline: Deadline) -> _Outcome:
        """The cloud is asked first; where it has no answer, the edge tries in the time that is left."""
        edge: Future[Answer] | None = None
        if decision.refresh_edge:
            try:
                edge = self._submit(inputs, deadline)
            except (InputError, EngineError, RunnerError, MemoryError):
                edge = None
        until = deadline if edge is None else self._reserved(deadline)
        if decision.keep_edge:
            until = self._reserved(deadline, state.edge_ms or 0.0)
        answer = self._cloud.ask(inputs, until, patient=not decision.keep_edge)
        if isinstance(answer, Answer):
            return _Outcome(answer, "cloud", "cloud", decision.reason)
        try:
            late = wait(self._submit(inputs, deadline) if edge is None else edge, deadline)
        except DeadlineExceeded:
            raise DeadlineExceeded(f"neither side answered in time ({answer.reason})") from answer.error
        return _Outcome(late, "edge", "edge_degraded", answer.reason)

    def _submit(self, inputs: Tensors, deadline: Deadline) -> Future[Answer]:
        self._edge_tried_s = self._clock()
        return self._model.submit(inputs, deadline)

    def _reserved(self, deadline: Deadline, edge_ms: float = 0.0) -> Deadline:
        """Early enough to have the edge's answer, which takes so long, when the cloud is late."""
        return Deadline(deadline.at_s - (self.policy.reserve_ms + edge_ms) / 1000.0, clock=self._clock)

    def _changed(self, change: Change) -> None:
        self._event_watchers.tell(event_of(change))

    def _state(self, inputs: Tensors, deadline: Deadline, now_s: float, *, private: bool) -> State:
        cloud = self._cloud
        return State(
            deadline_s=deadline.at_s,
            edge_ms=self._model.estimate_ms(),
            edge_tried_s=self._edge_tried_s,
            cloud_ms=cloud.runner.estimate_ms(),
            cloud_tried_s=cloud.tried_s,
            breaker=cloud.breaker,
            mismatch=cloud.mismatch,
            private=private,
            spent=self._meter is not None and not self._meter.covers(inputs),
            cloud_only=bool(getattr(self._model, "cloud_only", False)),
            strain=UNKNOWN if self._board is None else self._board.latest(now_s),
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


def _meter(budget: Budget, model: Runner, state: str | Path | None, wall: Clock) -> Meter:
    name = getattr(getattr(model, "bundle", None), "name", None) or "edge"
    return open_meter(budget, state=state, name=f"offload/{name}", wall=wall)


def _why_none(error: OutriderError | MemoryError) -> str:
    """Why the edge has no answer. A size that the interface allows, the board's file may not take."""
    if isinstance(error, ShapeError):
        return "shape"
    return "queue" if isinstance(error, QueueFull) and not isinstance(error, RunnerStuck) else "edge_failed"


def _spares(policy: Policy) -> bool:
    return policy.hot_c is not None or policy.offload_when_throttled or policy.offload_when_low_power


def _check_audits(policy: Policy, model: Runner) -> None:
    if not policy.audit_share:
        return
    variant = str(getattr(model, "variant", ""))
    if audit_bound(policy, rule_of(model, None), variant) is None:
        raise ConfigError(
            "policy.audit_share is given, and nothing says how often the cloud may say otherwise",
            hint="Policy(audit_allowed=0.02), or a bundle that was exported with Offload(...)",
        )
