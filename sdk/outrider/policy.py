"""When to call the cloud: pure functions of measured state and a clock. Nothing here sleeps, reads or writes.

``route`` decides before the edge runs, ``review`` after it answered, ``rescue`` where it has no answer. Decisions are
shared constants, so that a decision allocates nothing.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from typing import Literal

from outrider.breaker import CLOSED, Breaker, may_call
from outrider_runtimes.deadline import LONGEST_MS
from outrider_runtimes.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be sent to the cloud. A request counts the bytes of its inputs and of the outputs that came back; what
    the protocol adds is not counted, nor what a Remote sends again.

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


SWITCHES = (
    "obey_certified",
    "obey_cloud_only",
    "offload_when_queued",
    "offload_beyond_shape",
    "offload_when_failed",
    "offload_when_throttled",
    "offload_when_low_power",
)
RESCUES = {"queue": "offload_when_queued", "shape": "offload_beyond_shape", "edge_failed": "offload_when_failed"}


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
        obey_cloud_only: ask the cloud first for what the bundle marks as a task of the cloud; the board's answer is
            then ``edge_degraded``.
        offload_when_queued: ask the cloud first when the board's queue and measured latency say that the deadline
            cannot be met here, and the measured round trip says that it can be met there; also when the queue is full.
        offload_beyond_shape: ask the cloud for a size that the interface leaves free and the board's file does not
            take.
        offload_when_failed: ask the cloud when the board's engine fails.
        hot_c: ask the cloud first, and spare the board, from this temperature on; None for never.
        offload_when_throttled: the same while the board's processor is slowed down for its heat.
        offload_when_low_power: the same while its supply is too weak, or it runs on a battery that has at most
            ``low_battery`` left, 0.0 to 1.0.
        audit_share: this share of the confident answers, drawn by chance, is sent to the cloud too, to see whether what
            was certified still holds; see ``Hybrid.on_event``. The board's answer is given back without waiting.
        audit_allowed: the share of confident answers in which the cloud may say otherwise; None for what the bundle's
            export wrote: its alpha, and the share in which its teacher was wrong.
        hedge_after_ms: when the board has not answered after so long, the cloud is asked too, and the first answer is
            taken; None never does that.
        reserve_ms: kept back of the deadline to hand out the edge's answer when the cloud is late; covers waking up
            the caller's thread on a busy board.
        private: nothing that is passed ever leaves the board, whatever else is said here: every call is as with
            ``infer(private=True)``, and the cloud is not even asked for its interface.
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
    obey_cloud_only: bool = True
    offload_when_queued: bool = True
    offload_beyond_shape: bool = True
    offload_when_failed: bool = True
    hot_c: float | None = 80.0
    offload_when_throttled: bool = True
    offload_when_low_power: bool = True
    low_battery: float = 0.2
    audit_share: float = 0.0
    audit_allowed: float | None = None
    hedge_after_ms: float | None = None
    reserve_ms: float = 2.0
    private: bool = False
    budget: Budget | None = None
    failures_in_a_row: int = 5
    window: int = 10
    open_s: float = 5.0
    open_max_s: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, (int, float)) and isinstance(value, numbers.Real):
                object.__setattr__(self, name, float(value))  # numpy's float32 would lend its precision to clocks
        if self.deadline_ms is not None:
            _require(_number(self.deadline_ms) and self.deadline_ms > 0, self, "deadline_ms", "above 0, or None")
        _require(_number(self.min_margin) and 0 <= self.min_margin <= 1, self, "min_margin", "from 0 to 1")
        _require(self.output is None or isinstance(self.output, str), self, "output", "an output's name, or None")
        for name in (*SWITCHES, "private"):
            _require(isinstance(getattr(self, name), bool), self, name, "True or False")
        _require(self.budget is None or isinstance(self.budget, Budget), self, "budget", "a Budget, or None")
        _require(self.hot_c is None or _number(self.hot_c), self, "hot_c", "degrees Celsius, or None")
        for name in ("low_battery", "audit_share"):
            value = getattr(self, name)
            _require(_number(value) and 0 <= value <= 1, self, name, "from 0 to 1")
        allowed = self.audit_allowed
        _require(allowed is None or (_number(allowed) and 0 < allowed < 1), self, "audit_allowed", "between 0 and 1")
        if self.hedge_after_ms is not None:
            positive = _number(self.hedge_after_ms) and self.hedge_after_ms >= 0
            _require(positive, self, "hedge_after_ms", "0 or more, or None")
        _require(_number(self.reserve_ms) and self.reserve_ms >= 0, self, "reserve_ms", "0 or more")
        if self.deadline_ms is not None:
            below, hint = f"below deadline_ms, {self.deadline_ms!r}", f"reserve_ms={self.deadline_ms / 4:g}"
            _require(self.reserve_ms < self.deadline_ms, self, "reserve_ms", below, hint=hint)
        _require(_count(self.failures_in_a_row), self, "failures_in_a_row", "a whole number of 1 or more")
        _require(_count(self.window) and self.window <= 1024, self, "window", "a whole number from 1 to 1024")
        _require(_number(self.open_s) and self.open_s > 0, self, "open_s", "above 0")
        _require(_number(self.open_max_s) and self.open_max_s >= self.open_s, self, "open_max_s", "open_s or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Strain:
    """What strains the board.

    Attributes:
        celsius: of its hottest part; None where nothing says so.
        throttled: its processor is slowed down.
        undervolted: its supply is too weak.
        battery: what is left, 0.0 to 1.0, while it runs on one; else None.
    """

    celsius: float | None = None
    throttled: bool = False
    undervolted: bool = False
    battery: float | None = None


UNKNOWN = Strain()


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
        private: this request must not leave the board.
        spent: the budget of this hour or this day does not cover it.
        cloud_only: the bundle marks its task as one of the cloud.
        strain: of the board.
    """

    deadline_s: float
    edge_ms: float | None = None
    edge_tried_s: float = -math.inf
    cloud_ms: float | None = None
    cloud_tried_s: float = -math.inf
    breaker: Breaker = CLOSED
    mismatch: bool = False
    private: bool = False
    spent: bool = False
    cloud_only: bool = False
    strain: Strain = UNKNOWN


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """Who is asked first, and why.

    Attributes:
        side: "edge", "cloud", or "refuse" where the deadline has passed already.
        reason: of "cloud": "cloud_only", "queue", "low_power", "throttled" or "hot"; of "edge": "edge", or why a task
            of the cloud cannot be given to it: its answer is then degraded; of "refuse": "no_time".
        refresh_edge: give the request to the edge as well: a latency, its own or the cloud's, was not measured for
            long.
        keep_edge: the edge could make the deadline: the cloud is given only what the edge does not need of the time.
    """

    side: Literal["edge", "cloud", "refuse"]
    reason: str
    refresh_edge: bool = False
    keep_edge: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Review:
    """What becomes of the edge's answer, and why.

    Attributes:
        action: "keep" it, "audit" (keep it, and ask the cloud in the background), "degrade" (keep it, marked, since the
            cloud cannot be asked) or "offload".
        reason: "edge" (nothing is judged), "confident" or "audit" where it is kept; "uncertain" where it is offloaded;
            else why the cloud cannot be asked: "private", "interface_mismatch", "budget_spent", "circuit_open",
            "no_time_left".
    """

    action: Literal["keep", "audit", "degrade", "offload"]
    reason: str


EDGE = Route(side="edge", reason="edge")
CLOUD = Route(side="cloud", reason="queue")
CLOUD_AND_EDGE = Route(side="cloud", reason="queue", refresh_edge=True)
REFUSE = Route(side="refuse", reason="no_time")
STRAINS = ("low_power", "throttled", "hot")
FIRST = {reason: Route(side="cloud", reason=reason, keep_edge=True) for reason in ("cloud_only", *STRAINS)}
FIRST_AND_EDGE = {reason: Route(side="cloud", reason=reason, refresh_edge=True) for reason in FIRST}

UNJUDGED = Review(action="keep", reason="edge")
CONFIDENT = Review(action="keep", reason="confident")
AUDIT = Review(action="audit", reason="audit")
UNCERTAIN = Review(action="offload", reason="uncertain")
OBSTACLES = ("private", "interface_mismatch", "budget_spent", "circuit_open", "no_time_left")
DEGRADED = {reason: Review(action="degrade", reason=reason) for reason in OBSTACLES}
STOPGAP = {reason: Route(side="edge", reason=reason) for reason in OBSTACLES}


def route(policy: Policy, state: State, now_s: float) -> Route:
    """Who is asked first.

    A task of the cloud goes there where it can; else the edge does what it can. A deadline that only the cloud can
    meet goes before sparing the board.
    """
    left_ms = (state.deadline_s - now_s) * 1000.0
    if left_ms <= 0.0:
        return REFUSE
    if state.cloud_only and policy.obey_cloud_only:
        reason = _obstacle_before_edge(policy, state, now_s)
        return _first(state, "cloud_only") if reason is None else STOPGAP[reason]
    edge_ms = state.edge_ms
    if edge_ms is not None and edge_ms > left_ms and policy.offload_when_queued:
        return _queued(policy, state, left_ms, now_s)
    if state.strain is not UNKNOWN:
        reason = strained(policy, state.strain)
        if reason is not None and _obstacle_before_edge(policy, state, now_s) is None:
            return _first(state, reason)
    return EDGE


def strained(policy: Policy, strain: Strain) -> str | None:
    """Why the board is spared; None where it is not. What is not known is no reason."""
    if policy.offload_when_low_power:
        battery = strain.battery
        if strain.undervolted or (battery is not None and battery <= policy.low_battery):
            return "low_power"
    if strain.throttled and policy.offload_when_throttled:
        return "throttled"
    hot = policy.hot_c is not None and strain.celsius is not None and strain.celsius >= policy.hot_c
    return "hot" if hot else None


def review(
    policy: Policy,
    state: State,
    score: float | None,
    now_s: float,
    *,
    certified: float | None = None,
    draw: float = 1.0,
) -> Review:
    """What becomes of the edge's answer.

    Args:
        score: of its least sure row, higher is surer; None where nothing is judged. NaN is uncertain.
        certified: the threshold of what answered, from its bundle; None where it has none.
        draw: a random number from 0.0 to 1.0, which may make it an audit.
    """
    least = threshold(policy, certified)
    if score is None or least is None:
        return UNJUDGED
    if score >= least:
        return AUDIT if draw < policy.audit_share and barred(state, now_s) is None else CONFIDENT
    reason = obstacle(policy, state, now_s, reserve_ms=policy.reserve_ms)
    return UNCERTAIN if reason is None else DEGRADED[reason]


def threshold(policy: Policy, certified: float | None) -> float | None:
    """What a score must reach for its answer to be kept; None where nothing is judged."""
    if policy.min_margin > 0.0:
        return policy.min_margin
    return certified if policy.obey_certified else None


def rescue(policy: Policy, state: State, reason: str, now_s: float) -> bool:
    """Whether the cloud is asked where the edge has no answer.

    Args:
        reason: why it has none: "queue" (it is full), "shape" or "edge_failed".
    """
    return bool(getattr(policy, RESCUES[reason])) and obstacle(policy, state, now_s) is None


def obstacle(policy: Policy, state: State, now_s: float, *, reserve_ms: float = 0.0) -> str | None:
    """Why the cloud cannot be asked now, for an answer by the deadline; None when it can."""
    reason = barred(state, now_s)
    if reason is not None:
        return reason
    left_ms = (state.deadline_s - now_s) * 1000.0 - reserve_ms
    if left_ms <= 0.0:
        return "no_time_left"
    # A round trip that is never tried again would be believed for ever: past its age one request finds out.
    if state.cloud_ms is not None and state.cloud_ms > left_ms and now_s - state.cloud_tried_s <= policy.open_s:
        return "no_time_left"
    return None


def barred(state: State, now_s: float) -> str | None:
    """Why the cloud cannot be asked now, whatever the time; None when it can."""
    if state.private or state.mismatch or state.spent:
        return "private" if state.private else "interface_mismatch" if state.mismatch else "budget_spent"
    return None if may_call(state.breaker, now_s) else "circuit_open"


def _queued(policy: Policy, state: State, left_ms: float, now_s: float) -> Route:
    """The edge cannot make the deadline by what was measured."""
    if obstacle(policy, state, now_s) is not None:
        return EDGE
    if state.cloud_ms is None or state.cloud_ms > left_ms:
        # Nothing says that the cloud can. Where nobody tried of late, one request finds out, at both sides.
        return EDGE if now_s - state.cloud_tried_s <= policy.open_s else CLOUD_AND_EDGE
    return CLOUD if now_s - state.edge_tried_s <= policy.open_s else CLOUD_AND_EDGE


def _first(state: State, reason: str) -> Route:
    """The cloud is asked first; an edge that was never measured is asked beside it."""
    return (FIRST_AND_EDGE if state.edge_ms is None else FIRST)[reason]


def _obstacle_before_edge(policy: Policy, state: State, now_s: float) -> str | None:
    """As ``obstacle``, where the edge is to answer in time should the cloud not."""
    return obstacle(policy, state, now_s, reserve_ms=policy.reserve_ms + (state.edge_ms or 0.0))


def _within(amount: int, limit: int | None) -> bool:
    return limit is None or amount <= limit


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LONGEST_MS


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _require(holds: bool, policy: Policy, name: str, expected: str, *, hint: str = "") -> None:
    if not holds:
        raise ConfigError(f"policy.{name} is {getattr(policy, name)!r:.40}, expected {expected}", hint=hint)
