"""What serves now, where that may change between two calls: a bundle on trial, or a ladder of variants."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from outrider.opening import Opened
from outrider_runtimes.errors import InputError, NotInstalled, OutriderError, RolledBack, StoreError
from outrider_runtimes.runner import Answer, Served
from outrider_runtimes.tensors import Array, Interface, Tensors

log = logging.getLogger(__name__)

Kind = Literal["rollback", "step_down", "step_up"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """That a model serves something else from now on.

    Attributes:
        kind: ``rollback``: a fresh bundle did not prove itself, and what was good before serves again;
            ``step_down``, ``step_up``: along the ladder of variants.
        reason: why, in one line.
        before, after: what served, and what serves. ``before.variant`` is empty where it was never loaded here.
    """

    kind: Kind
    reason: str
    before: Served
    after: Served


OnChange = Callable[[Change], None]


class Trial(Protocol):
    """What watches the first calls of a fresh bundle; ``outrider.probation`` has the one."""

    @property
    def over(self) -> bool:
        """Whether the bundle owes no more calls."""
        ...

    def inside(self, yes: bool) -> None:
        """A call begins or ends."""
        ...

    def fault(self, arrays: list[Array], answer: Answer) -> str:
        """What is wrong with an answer, or with how long answers take; empty for nothing."""
        ...

    def last_good(self) -> Opened:
        """What was good before, loaded. Raises OutriderError."""
        ...

    def roll_back(self) -> None:
        """Make it the current one. Raises StoreError, NotInstalled."""
        ...

    def close(self) -> None:
        """Leave what was found out to the next process."""
        ...


class Serving:
    """The session that serves, which can be replaced between calls. Safe from several threads; one call at a time.

    It has the face of a ``BoundSession`` and says of each answer what gave it.

    Args:
        opened: what serves first; it is owned.
        trial: watches it where it is fresh; owned too.
    """

    def __init__(self, opened: Opened, *, trial: Trial | None = None) -> None:
        self.interface: Interface = opened.session.interface
        self._opened = opened
        self._trial = trial
        self._refusal = ""  # why nothing serves any more
        self._lock = threading.RLock()
        self._told: Callable[[Opened, Change], None] = lambda _, __: None
        self._note: Callable[[Answer], None] = lambda _: None
        self._end_company: Callable[[], None] = lambda: None
        self._accompanied = False
        self._leaving = False
        self._closed = False

    @property
    def served(self) -> Served:
        """What serves now."""
        return self._opened.served

    @property
    def settled(self) -> bool:
        """Whether a call is that of a session and nothing else: nothing is on trial, and no ladder is climbed."""
        return self._trial is None and not self._accompanied

    def on_change(self, callback: Callable[[Opened, Change], None]) -> None:
        """Tell this one of each change, and what serves after it, in the thread that made it, before the next call."""
        self._told = callback

    def accompany(self, note: Callable[[Answer], None], end: Callable[[], None]) -> None:
        """Have ``note`` called with every answer, and ``end`` before this is closed."""
        self._note, self._end_company, self._accompanied = note, end, True

    def run(self, inputs: Tensors) -> Answer:
        """As ``BoundSession.run``."""
        begun = time.perf_counter_ns()
        arrays = self.check(inputs)
        return self.execute(arrays, check_ms=(time.perf_counter_ns() - begun) / 1e6)

    def check(self, inputs: Tensors) -> list[Array]:
        """As ``BoundSession.check``; every variant of a bundle takes the same."""
        return self._opened.session.check(inputs)

    def execute(self, arrays: list[Array], *, check_ms: float = 0.0) -> Answer:
        """As ``BoundSession.execute``.

        Raises:
            RolledBack: a fresh bundle failed, and what was good before has another interface.
        """
        with self._lock:
            if self._refusal:
                raise self._refused()
            trial = self._trial
            if trial is None:
                answer = self._opened.session.execute(arrays, check_ms=check_ms)
            else:
                answer = self._tried(trial, arrays, check_ms)
            self._note(answer)
            return Answer(outputs=answer.outputs, timing_ms=answer.timing_ms, served=self._opened.served)

    def replace(
        self, opened: Opened, *, kind: Kind, reason: str, keep: bool = False, expected: str | None = None
    ) -> Opened | None:
        """Serve something else from the next call on. Waits for the call that runs.

        Args:
            opened: what serves then; it is owned, and freed where it cannot.
            kind, reason: of the Change.
            keep: leave what served open, for the caller to close.
            expected: the digest of the bundle that has to serve still; any will do where it is None.

        Returns:
            What served; None where nothing was changed: this was closed, or another bundle serves.
        """
        with self._lock:
            another = expected is not None and expected != self.served.bundle
            if self._closed or self._refusal or another:
                opened.session.close()
                return None
            old, self._opened = self._opened, opened
            if not keep:
                old.session.close()
            self._told(opened, Change(kind=kind, reason=reason, before=old.served, after=opened.served))
            return old

    def leave(self) -> None:
        """It is about to be closed: the call that runs may be ended for it, which is no fault of what serves."""
        self._leaving = True

    def close(self) -> None:
        """Free what serves."""
        self._end_company()  # without the lock, which it may wait for
        with self._lock:
            self._closed = True
            self._opened.session.close()
            if self._trial is not None:
                self._end_trial(self._trial)

    def _tried(self, trial: Trial, arrays: list[Array], check_ms: float) -> Answer:
        try:
            trial.inside(True)
            answer = self._opened.session.execute(arrays, check_ms=check_ms)
            why, failure = trial.fault(arrays, answer), None
        except InputError:
            raise
        except OutriderError as error:
            answer, why, failure = None, str(error), error
        finally:
            trial.inside(False)
        better = self._better(trial, arrays, check_ms, why) if why and not self._leaving else None
        if better is not None:
            return better
        if trial.over:
            self._end_trial(trial)
        if failure is not None:
            raise failure
        assert answer is not None
        return answer

    def _better(self, trial: Trial, arrays: list[Array], check_ms: float, why: str) -> Answer | None:
        """What was good before answers, and serves from now on; None where it does no better, or cannot be had.

        A failure counts only where what was good before does not fail on the same input.
        """
        good: Opened | None = None
        try:
            good = trial.last_good()
            alike = good.session.interface.digest == self.interface.digest
            better = good.session.execute(arrays, check_ms=check_ms) if alike else None
            if better is not None and trial.fault([], better):
                good.session.close()
                return None
            trial.roll_back()
        except OutriderError as error:
            log.warning("%s in a call on trial; what was good before does no better: %s", why, error)
            if good is not None:
                good.session.close()
            return None
        return self._go_back(trial, good, better, why)

    def _go_back(self, trial: Trial, good: Opened, better: Answer | None, why: str) -> Answer:
        self._end_trial(trial)
        version = good.installed.manifest.version
        log.warning("%s: rolled back to version %d: %s", good.installed.name, version, why)
        if better is not None:
            self.replace(good, kind="rollback", reason=why)
            return better
        good.session.close()
        self._told(self._opened, Change(kind="rollback", reason=why, before=self.served, after=good.served))
        self._refusal = (
            f"{good.installed.name} was rolled back to version {version}, which has another interface: {why}"
        )
        raise self._refused()

    def _refused(self) -> RolledBack:
        """Another one for each call: an exception that is raised again keeps the frames of every call before."""
        return RolledBack(self._refusal, hint="load it again")

    def _end_trial(self, trial: Trial) -> None:
        self._trial = None
        try:
            trial.close()
        except (StoreError, NotInstalled) as error:
            log.warning("the end of a trial could not be recorded: %s", error)
