"""A circuit breaker as a value: what it was, and pure functions that make what it is next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outrider.policy import Policy

# The devices of a fleet lose the cloud together; a quarter of the wait is spread so that they do not return together.
JITTER_SHARE = 0.25


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


def _shifted(policy: Policy, recent: int, bit: int) -> int:
    return (recent << 1 | bit) & ((1 << policy.window) - 1)
