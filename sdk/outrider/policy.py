"""When to call the cloud: pure functions of measured state and a clock. Nothing here sleeps, reads or writes.

``route`` decides before the edge runs, ``review`` after it answered; the circuit breaker is a value with pure
transitions. Both decisions are shared constants, so that a decision allocates nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from outrider_runtimes.deadline import LONGEST_MS
from outrider_runtimes.errors import ConfigError

# The devices of a fleet lose the cloud together; a quarter of the wait is spread so that they do not return together.
JITTER_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be sent to the cloud. A request counts the bytes of its inputs and of the outputs that came back; what
    the protocol adds is not counted.

    Attributes:
        requests_per_hour, requests_per_day, bytes_per_hour, bytes_per_day: None for any number. Hours and days are
            those of the clock, in UTC.

    Raises:
        ConfigError: naming the field.
    """

    requests_per_hour: int | None = None
    requests_per_day: int | None = None
    bytes_per_hour: int | None = None
    bytes_per_day: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigError(f"budget.{name} is {value!r}, expected a whole number of 0 or more, or None")

    def covers(self, spent: Spent, size_bytes: int) -> bool:
        """Whether one more request of so many bytes is within it."""
        return (
            _within(spent.hour_requests + 1, self.requests_per_hour)
            and _within(spent.day_requests + 1, self.requests_per_day)
            and _within(spent.hour_bytes + size_bytes, self.bytes_per_hour)
            and _within(spent.day_bytes + size_bytes, self.bytes_per_day)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """What was sent in this hour and in this day."""

    hour_requests: int = 0
    hour_bytes: int = 0
    day_requests: int = 0
    day_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When a request leaves the board, and for how long the cloud is left alone when it fails.

    Attributes:
        deadline_ms: by when a call has answered, unless the call names its own; None for never.
        min_margin: an answer is uncertain when the softmax of its first class exceeds that of its second by less
            than this, in any row; 0.0 to 1.0. 0.0: the threshold that the bundle's export certified is obeyed, where
            the bundle has one; else nothing is judged.
        output: the output that ``min_margin`` judges: logits, float [..., classes]; None for the only one.
        obey_certified: False leaves answers unjudged where ``min_margin`` is 0.0.
        offload_when_queued: ask the cloud first when the board's queue and measured latency say that the deadline
            cannot be met here, and the measured round trip says that it can be met there.
        hedge_after_ms: when the board has not answered after so long, the cloud is asked too, and the first answer is
            taken; None never does that.
        reserve_ms: kept back of the deadline to hand out the edge's answer when the cloud is late; covers waking up
            the caller's thread on a busy board.
        budget: what may be sent to the cloud in an hour and in a day; None for any amount.
        failures_in_a_row: so many open the circuit.
        window: half of so many last attempts failed: the circuit opens as well.
        open_s: how long it stays open at first. Doubles with each failed probe. Also the age at which a latency
            that nobody measured again no longer counts.
        open_max_s: where doubling ends. Up to a quarter is added to each wait by chance.

    Raises:
        ConfigError: naming the field.
    """

    deadline_ms: float | None = field(kw_only=False)
    min_margin: float = 0.0
    output: str | None = None
    obey_certified: bool = True
    offload_when_queued: bool = True
    hedge_after_ms: float | None = None
    reserve_ms: float = 2.0
    budget: Budget | None = None
    failures_in_a_row: int = 5
    window: int = 10
    open_s: float = 5.0
    open_max_s: float = 60.0

    def __post_init__(self) -> None:
        if self.deadline_ms is not None:
            _require(_number(self.deadline_ms) and self.deadline_ms > 0, self, "deadline_ms", "above 0, or None")
        _require(_number(self.min_margin) and 0 <= self.min_margin <= 1, self, "min_margin", "from 0 to 1")
        _require(self.output is None or isinstance(self.output, str), self, "output", "an output's name, or None")
        _require(isinstance(self.obey_certified, bool), self, "obey_certified", "True or False")
        _require(self.budget is None or isinstance(self.budget, Budget), self, "budget", "a Budget, or None")
        _require(isinstance(self.offload_when_queued, bool), self, "offload_when_queued", "True or False")
        if self.hedge_after_ms is not None:
            positive = _number(self.hedge_after_ms) and self.hedge_after_ms >= 0
            _require(positive, self, "hedge_after_ms", "0 or more, or None")
        _require(_number(self.reserve_ms) and self.reserve_ms >= 0, self, "reserve_ms", "0 or more")
        _require(
            self.deadline_ms is None or self.reserve_ms < self.deadline_ms, self, "reserve_ms", "below deadline_ms"
        )
        _require(_count(self.failures_in_a_row), self, "failures_in_a_row", "a whole number of 1 or more")
        _require(_count(self.window) and self.window <= 1024, self, "window", "a whole number from 1 to 1024")
        _require(_number(self.open_s) and self.open_s > 0, self, "open_s", "above 0")
        _require(_number(self.open_max_s) and self.open_max_s >= self.open_s, self, "open_max_s", "open_s or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Breaker:
    """A circuit breaker at one moment; the functions below make the next.

    Attributes:
        streak: failures since the last success.
        recent: the last ``window`` attempts as bits, the newest lowest, 1 for failed; what has not happened yet is 0.
        opened: how often it opened since the last success.
        until_s: open until then, half-open afterwards; None when closed.
        probing: half-open, and the one probe is under way.
    """

    streak: int = 0
    recent: int = 0
    opened: int = 0
    until_s: float | None = None
    probing: bool = False


CLOSED = Breaker()


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What was measured, as a decision sees it.

    Attributes:
        deadline_s: when the call must have answered, on the same clock as ``now_s``; ``math.inf`` for never.
        edge_ms: how long the board would take now, its queue included; None before anything was measured.
        edge_tried_s: when the board was last given a request; ``-math.inf`` for never.
        cloud_ms: the cloud's round trip; None before anything was measured.
        cloud_tried_s: when the cloud was last given a request; ``-math.inf`` for never.
        breaker: of the cloud.
        mismatch: the cloud was found to have another interface.
        certified: the threshold of the board's variant, from its bundle; None where it has none.
        private: this request must not leave the board.
        spent: the budget of this hour or this day does not cover it.
    """

    deadline_s: float
    edge_ms: float | None = None
    edge_tried_s: float = -math.inf
    cloud_ms: float | None = None
    cloud_tried_s: float = -math.inf
    breaker: Breaker = CLOSED
    mismatch: bool = False
    certified: float | None = None
    private: bool = False
    spent: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """Who is asked first, and why.

    Attributes:
        side: "edge", "cloud", or "refuse" where the deadline has passed already.
        reason: "edge", "queue" or "no_time".
        refresh_edge: give the request to the edge as well: a latency, its own or the cloud's, was not measured for
            long.
    """

    side: Literal["edge", "cloud", "refuse"]
    reason: str
    refresh_edge: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Review:
    """What becomes of the edge's answer, and why.

    Attributes:
        action: "keep" it, "degrade" (keep it, marked, since the cloud cannot be asked) or "offload".
        reason: "edge" (nothing is judged) or "confident" where it is kept; "uncertain" where it is offloaded; else
            why the cloud cannot be asked: "private", "interface_mismatch", "budget_spent", "circuit_open",
            "no_time_left".
    """

    action: Literal["keep", "degrade", "offload"]
    reason: str


EDGE = Route(side="edge", reason="edge")
CLOUD = Route(side="cloud", reason="queue")
CLOUD_AND_EDGE = Route(side="cloud", reason="queue", refresh_edge=True)
REFUSE = Route(side="refuse", reason="no_time")

UNJUDGED = Review(action="keep", reason="edge")
CONFIDENT = Review(action="keep", reason="confident")
UNCERTAIN = Review(action="offload", reason="uncertain")
DEGRADED = {
    reason: Review(action="degrade", reason=reason)
    for reason in ("private", "interface_mismatch", "budget_spent", "circuit_open", "no_time_left")
}


def route(policy: Policy, state: State, now_s: float) -> Route:
    """Who is asked first."""
    left_ms = (state.deadline_s - now_s) * 1000.0
    if left_ms <= 0.0:
        return REFUSE
    edge_ms, cloud_ms = state.edge_ms, state.cloud_ms
    if edge_ms is None or edge_ms <= left_ms or not policy.offload_when_queued:
        return EDGE
    if obstacle(policy, state, now_s) is not None:
        return EDGE
    if cloud_ms is None or cloud_ms > left_ms:
        # Nothing says that the cloud can. Where nobody tried of late, one request finds out, at both sides.
        return EDGE if now_s - state.cloud_tried_s <= policy.open_s else CLOUD_AND_EDGE
    return CLOUD if now_s - state.edge_tried_s <= policy.open_s else CLOUD_AND_EDGE


def threshold(policy: Policy, certified: float | None) -> float | None:
    """What a score must reach for its answer to be kept; None where nothing is judged."""
    if policy.min_margin > 0.0:
        return policy.min_margin
    return certified if policy.obey_certified else None


def review(policy: Policy, state: State, score: float | None, now_s: float) -> Review:
    """What becomes of the edge's answer.

    Args:
        score: of its least sure row, higher is surer; None where nothing is judged. NaN is uncertain.
    """
    least = threshold(policy, state.certified)
    if score is None or least is None:
        return UNJUDGED
    if score >= least:
        return CONFIDENT
    reason = obstacle(policy, state, now_s, reserve_ms=policy.reserve_ms)
    return UNCERTAIN if reason is None else DEGRADED[reason]


def obstacle(policy: Policy, state: State, now_s: float, *, reserve_ms: float = 0.0) -> str | None:
    """Why the cloud cannot be asked now; None when it can."""
    if state.private or state.mismatch or state.spent:
        return "private" if state.private else "interface_mismatch" if state.mismatch else "budget_spent"
    if not may_call(state.breaker, now_s):
        return "circuit_open"
    left_ms = (state.deadline_s - now_s) * 1000.0 - reserve_ms
    if left_ms <= 0.0:
        return "no_time_left"
    # A round trip that is never tried again would be believed for ever: past its age one request finds out.
    if state.cloud_ms is not None and state.cloud_ms > left_ms and now_s - state.cloud_tried_s <= policy.open_s:
        return "no_time_left"
    return None


def may_call(breaker: Breaker, now_s: float) -> bool:
    """Whether ``allow`` would let a call through."""
    return breaker.until_s is None or (now_s >= breaker.until_s and not breaker.probing)


def allow(breaker: Breaker, now_s: float) -> tuple[bool, Breaker]:
    """Take leave for one call. Who got it reports back with ``succeeded``, ``failed`` or ``released``."""
    if breaker.until_s is None:
        return True, breaker
    if now_s < breaker.until_s or breaker.probing:
        return False, breaker
    probe = Breaker(
        streak=breaker.streak, recent=breaker.recent, opened=breaker.opened, until_s=breaker.until_s, probing=True
    )
    return True, probe


def succeeded(policy: Policy, breaker: Breaker) -> Breaker:
    """The call was answered. Closes it after a probe; an answer from before it opened changes nothing."""
    if breaker.until_s is not None:
        return CLOSED if breaker.probing else breaker
    if breaker.recent == 0:
        return CLOSED
    return Breaker(recent=_shifted(policy, breaker.recent, 0))


def failed(policy: Policy, breaker: Breaker, now_s: float, jitter: float) -> Breaker:
    """The call failed or was late. Opens it after too many, and after a failed probe for twice as long.

    Args:
        jitter: a random number from 0.0 to 1.0.
    """
    if breaker.until_s is not None and not breaker.probing:
        return breaker
    streak, recent = breaker.streak + 1, _shifted(policy, breaker.recent, 1)
    often = 2 * recent.bit_count() >= policy.window
    if not (breaker.probing or often or streak >= policy.failures_in_a_row):
        return Breaker(streak=streak, recent=recent)
    until_s = now_s + open_for_s(policy, breaker.opened, jitter)
    return Breaker(streak=streak, recent=recent, opened=breaker.opened + 1, until_s=until_s)


def released(breaker: Breaker) -> Breaker:
    """The call ended without saying anything about the cloud: another may probe."""
    if not breaker.probing:
        return breaker
    return Breaker(streak=breaker.streak, recent=breaker.recent, opened=breaker.opened, until_s=breaker.until_s)


def open_for_s(policy: Policy, opened: int, jitter: float) -> float:
    """How long a circuit stays open that opened ``opened`` times before, since the last success."""
    # 2.0**64 times any open_s is past any open_max_s that makes sense, and a larger exponent would overflow.
    wait_s = min(policy.open_s * 2.0 ** min(opened, 64), policy.open_max_s)
    return wait_s * (1.0 + JITTER_SHARE * jitter)


def _within(amount: int, limit: int | None) -> bool:
    return limit is None or amount <= limit


def _shifted(policy: Policy, recent: int, bit: int) -> int:
    return (recent << 1 | bit) & ((1 << policy.window) - 1)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LONGEST_MS


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _require(holds: bool, policy: Policy, name: str, expected: str) -> None:
    if not holds:
        raise ConfigError(f"policy.{name} is {getattr(policy, name)!r}, expected {expected}")
