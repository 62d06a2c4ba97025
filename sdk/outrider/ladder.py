"""Stepping down to a cheaper variant while the board is too hot for the better one, and up again.

``decide`` is the rule: a pure function of what was seen and of the time. ``Ladder`` looks, asks it, and obeys.
"""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from outrider.opening import Opened
from outrider.serving import Serving
from outrider_runtimes.errors import ConfigError, OutriderError
from outrider_runtimes.heat import Heat, read_heat
from outrider_runtimes.runner import Answer

log = logging.getLogger(__name__)

INTERVAL_S = 2.0  # between two looks; a processor's temperature changes in seconds
LONGEST_HOLD_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Rules:
    """When to step.

    Attributes:
        latency_ms: what the median call may take.
        hot_c: from here on, or where the board says that it is slowed down, heat is the cause of a late call.
        cool_c: below this, and not slowed down, the board is cool. In between nothing is done: the hysteresis.
        hold_s: how long it must be cool, and the bound held, before a step up. Twice as long after each step up that
            did not last as long.
        calls: how many calls since the last step are judged; fewer are no reason for anything.
    """

    latency_ms: float
    hot_c: float = 80.0
    cool_c: float = 70.0
    hold_s: float = 30.0
    calls: int = 20


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where on the ladder a model stands.

    Attributes:
        rung: 0 for the first variant, the best one.
        stepped_up_s: when the last step up was.
        cool_since_s: since when the board is cool; None while it is not.
        hold_s: how long it must be cool now.
    """

    rung: int = 0
    stepped_up_s: float | None = None
    cool_since_s: float | None = None
    hold_s: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rung down or up, and why."""

    kind: Literal["step_down", "step_up"]
    reason: str


def decide(
    standing: Standing, rules: Rules, heat: Heat, taken_ms: Sequence[float], *, rungs: int, now_s: float
) -> tuple[Standing, Step | None]:
    """What to do now.

    Where a board says nothing of its heat, a late call alone is reason to step down, and the time that the bound was
    held the only reason to step up.

    Args:
        standing: where the model stands.
        rules: when to step.
        heat: what the board says now.
        taken_ms: how long the calls since the last step took, the latest last.
        rungs: how many variants there are.
        now_s: a monotonic clock.

    Returns:
        Where the model stands then, and the step, if there is one.
    """
    judged = taken_ms[-rules.calls :]
    median_ms = statistics.median(judged) if len(judged) >= rules.calls else None
    late = median_ms is not None and median_ms > rules.latency_ms
    hot, cool = is_hot(heat, rules), is_cool(heat, rules)
    since_s = None if late or not cool else now_s if standing.cool_since_s is None else standing.cool_since_s
    standing = replace(standing, cool_since_s=since_s)
    if late and hot and standing.rung < rungs - 1:
        reason = f"its calls take {median_ms:.3g} ms, at most {rules.latency_ms:g} ms is allowed, {described(heat)}"
        return _down(standing, rules, now_s), Step(kind="step_down", reason=reason)
    if standing.rung and since_s is not None and now_s - since_s >= standing.hold_s:
        up = replace(standing, rung=standing.rung - 1, stepped_up_s=now_s, cool_since_s=None)
        return up, Step(kind="step_up", reason=f"for {standing.hold_s:g} s {described(heat)}")
    return standing, None


def is_hot(heat: Heat, rules: Rules) -> bool:
    """Whether heat, or the supply, may be why a call is late; it may where nothing is known."""
    if heat.throttled or heat.undervolted or (heat.celsius is not None and heat.celsius >= rules.hot_c):
        return True
    return heat.celsius is None and heat.throttled is None


def is_cool(heat: Heat, rules: Rules) -> bool:
    """Whether a better variant may be tried; also where nothing is known."""
    return not heat.throttled and not heat.undervolted and (heat.celsius is None or heat.celsius < rules.cool_c)


def described(heat: Heat) -> str:
    """Heat in words."""
    known = [] if heat.celsius is None else [f"at {heat.celsius:.0f} C"]
    known += ["slowed down"] if heat.throttled else []
    known += ["with too weak a supply"] if heat.undervolted else []
    return ", ".join(known) or "nothing known of its heat"


def _down(standing: Standing, rules: Rules, now_s: float) -> Standing:
    """A step up that did not last as long as it was waited for makes the next wait twice as long."""
    up_s = standing.stepped_up_s
    soon = up_s is not None and now_s - up_s < standing.hold_s
    hold_s = min(standing.hold_s * 2, LONGEST_HOLD_S) if soon else rules.hold_s
    return replace(standing, rung=standing.rung + 1, cool_since_s=None, hold_s=hold_s)


def check_ladder(variants: Any, latency_ms: Any) -> None:
    """Raises ConfigError for a ladder that cannot be climbed."""
    named = isinstance(variants, (list, tuple)) and all(isinstance(each, str) for each in variants)
    if not named or len(variants) < 2 or len(set(variants)) != len(variants):
        raise ConfigError(
            f"ladder is {variants!r:.80}, expected two variants or more, the best one first",
            hint="a list of their names, each once",
        )
    number = isinstance(latency_ms, Real) and not isinstance(latency_ms, bool)
    if not number or not 0 < latency_ms < math.inf:
        raise ConfigError(
            f"a ladder needs latency_ms, what a call may take, a number above 0; it is {latency_ms!r:.40}",
            hint="latency_ms=20.0",
        )


class Ladder:
    """Keeps a model on the best variant that holds the bound, in a thread of its own until it is closed.

    While it changes, both sessions are loaded; else one, unless ``resident``.

    Args:
        serving: what it changes.
        variants: their names, the best one first; the first one serves.
        rules: when to step.
        open_variant: loads one.
        resident: keep every session that was loaded.
        root: where ``sys`` is.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        serving: Serving,
        variants: Sequence[str],
        rules: Rules,
        open_variant: Callable[[str], Opened],
        *,
        resident: bool = False,
        root: Path = Path("/"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._serving = serving
        self._variants = tuple(variants)
        self._rules = rules
        self._open = open_variant
        self._resident = resident
        self._root = root
        self._clock = clock
        self._bundle = serving.served.bundle
        self._standing = Standing(hold_s=rules.hold_s)
        self._taken_ms: deque[float] = deque(maxlen=rules.calls)
        self._kept: dict[int, Opened] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="outrider-ladder", daemon=True)
        serving.accompany(self._note, self.close)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def look(self) -> None:
        """Look once, and step where that is what the rule says."""
        if self._serving.served.bundle != self._bundle:  # rolled back: these are not its variants
            self._ended.set()
            return
        before = self._standing
        standing, step = decide(
            before,
            self._rules,
            read_heat(self._root),
            list(self._taken_ms),
            rungs=len(self._variants),
            now_s=self._clock(),
        )
        if step is None:
            self._standing = standing
            return
        try:
            opened = self._kept.pop(standing.rung, None) or self._open(self._variants[standing.rung])
        except OutriderError as error:
            log.warning("the ladder cannot step to %s: %s", self._variants[standing.rung], error)
            self._standing = replace(before, cool_since_s=None)  # else it would try again at every look
            self._taken_ms.clear()
            return
        self._standing = standing
        old = self._serving.replace(
            opened, kind=step.kind, reason=step.reason, keep=self._resident, expected=self._bundle
        )
        if old is None:  # closed, or rolled back while the variant was loaded
            self._ended.set()
            return
        if self._resident:
            self._kept[before.rung] = old
        self._taken_ms.clear()
        log.warning("%s: %s to %s: %s", opened.info.name, step.kind, opened.served.variant, step.reason)

    def close(self) -> None:
        """Stop looking, and free what was kept."""
        self._ended.set()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join()
        while self._kept:
            self._kept.popitem()[1].session.close()

    def _note(self, answer: Answer) -> None:
        self._taken_ms.append(answer.timing_ms.total - answer.timing_ms.queue)

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            try:
                self.look()
            except Exception:
                log.exception("the ladder failed to look; the model goes on as it is")
