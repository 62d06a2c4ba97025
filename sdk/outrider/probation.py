"""The first calls of a freshly installed bundle, and the way back where they fail.

``install`` puts a bundle that replaces another one on trial, in the store: it owes some good calls, over as many
processes as that takes. Failing its golden inputs at load, an error, a NaN or a latency far beyond what was measured
takes what was good before back at once; so does the second process that dies inside a call.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress

from outrider.admit.admission import Choice
from outrider.admit.trial import Refused, any_nan, check_golden
from outrider.bundle import load_golden
from outrider.opening import Opened
from outrider.serving import Change
from outrider.store import Installed, Store
from outrider.store.marks import Mark
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.errors import AdmissionError, ModelLoadError, NotInstalled, OutriderError, StoreError
from outrider_runtimes.runner import Answer, Served
from outrider_runtimes.tensors import Array, Interface

log = logging.getLogger(__name__)

STRIKES = 2  # one death may be the operator's doing, who stops a busy device in the middle of a call
JUDGED_AFTER = 5  # timed calls
LATE = 10.0  # times the median of the install: not the noise of a busy board
LATE_MS = 5.0  # and at least so much above it: of a 20 us model ten times is a single pause

Open = Callable[[Installed], Opened]


def too_late(taken_ms: Sequence[float], bound_ms: float) -> bool:
    """Whether the calls so far take longer than they may: their median, once there are some."""
    return len(taken_ms) >= JUDGED_AFTER and statistics.median(taken_ms) > bound_ms


def latency_bound_ms(choice: Choice, given_ms: float | None) -> float:
    """What the median call may take: the bound of the install, else ten times its median and 5 ms more."""
    return given_ms if given_ms is not None else choice.p50_ms * LATE + LATE_MS


def rows_like_the_install(interface: Interface, arrays: Sequence[Array]) -> int | None:
    """How many rows a call has; None where it cannot be compared with the install's, which had one.

    It can where nothing but N is free: the time of a sequence depends on its length.
    """
    rows = 1
    for spec, array in zip(interface.inputs, arrays, strict=True):
        if None in spec.shape[1:] or (None in spec.shape and not spec.batched):
            return None
        if spec.batched:
            rows = max(1, array.shape[0])
    return rows


def begin(
    store: Store, installed: Installed, open_: Open, open_good: Open
) -> tuple[Opened, Probation | None, list[Change]]:
    """Open a bundle that is on trial; or what was good before, where this one fails at that.

    Where a trial cannot be recorded (the disk is full or read-only), what was good before serves, and the bundle stays
    on trial for later: untried and uncounted it could kill one process after the other.

    Returns:
        What serves; its trial, where that goes on; and the rollback, where there was one.

    Raises:
        OutriderError: as ``open_``, where there is no way back.
    """
    try:
        trial = store.trial(installed.name, installed.digest)
        strikes = 0 if trial is None else trial.strikes
        mark = store.mark(installed.digest) if strikes < STRIKES else None
    except StoreError as error:
        return _not_tried(store, installed, open_, open_good, error), None, []
    if mark is None:
        return _gone_back(store, installed, open_, open_good, f"{strikes} processes died inside its first calls")
    try:
        opened, why = _opened(mark, installed, open_)
    except BaseException:
        mark.release()
        raise
    if opened is None:
        mark.release()
        return _gone_back(store, installed, open_, open_good, why)
    left = 0 if trial is None else trial.left
    bound_ms = latency_bound_ms(opened.choice, opened.bound_ms)
    return opened, Probation(store, mark, installed, left=left, bound_ms=bound_ms, open_good=open_good), []


def _opened(mark: Mark, installed: Installed, open_: Open) -> tuple[Opened | None, str]:
    """Load a bundle and check its golden inputs; or why it failed. The loading may be what kills this process."""
    mark.inside(True)
    try:
        opened = open_(installed)
        why = golden_fault(opened)
    except (ModelLoadError, AdmissionError) as error:
        return None, str(error)
    finally:
        mark.inside(False)
    if not why:
        return opened, ""
    opened.session.close()
    return None, why


def _not_tried(store: Store, installed: Installed, open_: Open, open_good: Open, why: StoreError) -> Opened:
    version = installed.manifest.version
    good = _whole_good(store, installed.name)
    if good is not None:
        was = good.manifest.version
        try:
            opened = open_good(good)
        except OutriderError as error:
            log.warning("%s version %d cannot serve in the place of %d: %s", installed.name, was, version, error)
        else:
            log.warning("%s: version %d serves: %d cannot be tried: %s", installed.name, was, version, why)
            return opened
    log.warning("%s: version %d serves, and its first calls are not counted: %s", installed.name, version, why)
    return open_(installed)


def _whole_good(store: Store, name: str) -> Installed | None:
    """What was good before, if it is whole; nothing is written."""
    with suppress(StoreError):
        return store.last_good(name, hashed=True)
    return None


def _gone_back(
    store: Store, installed: Installed, open_: Open, open_good: Open, why: str
) -> tuple[Opened, Probation | None, list[Change]]:
    version = installed.manifest.version
    try:
        good = store.rollback(installed.name, failed=installed.digest)
    except StoreError as error:
        found = _whole_good(store, installed.name)
        if found is None:
            log.error("%s version %d: %s; there is no way back: %s", installed.name, version, why, error)
            return open_(installed), None, []
        log.error("%s: the rollback cannot be recorded, so the next start does it again: %s", installed.name, error)
        good = found
    log.warning("%s: rolled back from version %d to %d: %s", installed.name, version, good.manifest.version, why)
    opened = open_good(good)
    before = Served(variant="", engine="", bundle=installed.digest, verified=installed.verified)
    return opened, None, [Change(kind="rollback", reason=why, before=before, after=opened.served)]


class Probation:
    """One process's share of a trial; see ``outrider.serving.Trial``.

    Args:
        store: where the bundle is installed.
        mark: this process's; it is owned.
        installed: what is on trial.
        left: how many good calls it owes.
        bound_ms: what the median call may take.
        open_good: loads what was good before.
    """

    def __init__(
        self, store: Store, mark: Mark, installed: Installed, *, left: int, bound_ms: float, open_good: Open
    ) -> None:
        self._store = store
        self._name, self._digest = installed.name, installed.digest
        self._interface = installed.manifest.interface
        self._left = left
        self._bound_ms = bound_ms
        self._open_good = open_good
        self._mark = mark
        self._good = 0
        self._taken_ms: list[float] = []

    @property
    def over(self) -> bool:
        """Whether the bundle owes no more calls."""
        return self._good >= self._left

    def inside(self, yes: bool) -> None:
        """A call begins or ends; a process that dies in between has left a strike."""
        self._mark.inside(yes)

    def fault(self, arrays: list[Array], answer: Answer) -> str:
        """Judge a call. With no ``arrays``, the answer alone."""
        if any_nan(answer.outputs):
            return "a NaN in its answer"
        if not arrays:
            return ""
        rows = rows_like_the_install(self._interface, arrays)
        if rows is not None:
            self._taken_ms.append(answer.timing_ms.infer / rows)
        if too_late(self._taken_ms, self._bound_ms):
            median_ms = statistics.median(self._taken_ms)
            return f"its calls take {median_ms:.3g} ms, at most {self._bound_ms:.3g} ms is allowed"
        self._good += 1
        return ""

    def last_good(self) -> Opened:
        """What was good before, loaded. Raises OutriderError."""
        good = self._store.last_good(self._name)
        if good is None:
            raise NotInstalled(f"{self._name!r} has nothing to go back to")
        return self._open_good(good)

    def roll_back(self) -> None:
        """Make it the current one. Raises StoreError, NotInstalled."""
        self._store.rollback(self._name, failed=self._digest)

    def close(self) -> None:
        """Count the good calls for the next process, and take the mark away. Raises StoreError."""
        good, self._good, self._left = self._good, 0, self._left - self._good
        self._mark.release()
        if good:
            with suppress(NotInstalled):
                self._store.tried(self._name, self._digest, good)


def golden_fault(opened: Opened) -> str:
    """What is wrong with the answers to the golden inputs, in this process; empty for nothing."""
    manifest = opened.installed.manifest
    variant = manifest.variant(opened.choice.variant)
    try:
        golden = load_golden(opened.installed.read, manifest)
        check_golden(manifest, golden, variant, BoundSession(opened.raw, manifest.interface.judged, variant.binding))
    except (Refused, OutriderError) as error:
        return f"its golden inputs: {error}"
    return ""
