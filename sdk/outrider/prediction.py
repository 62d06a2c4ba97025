"""What a call gives back: the outputs, and where they came from."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from outrider_runtimes.runner import Timing
from outrider_runtimes.tensors import Array

log = logging.getLogger(__name__)

Source = Literal["edge", "cloud", "edge_degraded"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One answer.

    Attributes:
        outputs: the interface's outputs by name; the caller's to keep.
        source: ``edge``, ``cloud``, or ``edge_degraded``: the edge answered because the cloud could not.
        reason: why it came from there, in one word; ``local`` where there was no choice.
        variant: the model file's name in the bundle that answered.
        engine: what ran it.
        bundle: that bundle's digest.
        verified: whether a trusted key had signed it.
        timing_ms: where the time went.
    """

    outputs: dict[str, Array]
    source: Source = "edge"
    reason: str = "local"
    variant: str
    engine: str
    bundle: str
    verified: bool
    timing_ms: Timing


OnPrediction = Callable[[Prediction], None]


class Watchers:
    """The callbacks of one source of predictions. Safe from several threads; none of them can lose an answer."""

    def __init__(self) -> None:
        self._watchers: tuple[_Watcher, ...] = ()
        self._lock = threading.Lock()

    def add(self, callback: OnPrediction) -> Callable[[], None]:
        """Call ``callback`` with each Prediction from now on; returns what takes it off."""
        watcher = _Watcher(callback)
        with self._lock:
            self._watchers = (*self._watchers, watcher)

        def unsubscribe() -> None:
            with self._lock:
                self._watchers = tuple(kept for kept in self._watchers if kept is not watcher)

        return unsubscribe

    def tell(self, prediction: Prediction) -> None:
        """Call each, in the order in which they came, in the caller's thread."""
        for watcher in self._watchers:
            watcher(prediction)

    def clear(self) -> None:
        """Take all of them off."""
        with self._lock:
            self._watchers = ()


class _Watcher:
    """One callback, and whether its failure was told."""

    __slots__ = ("_callback", "_told")

    def __init__(self, callback: OnPrediction) -> None:
        self._callback = callback
        self._told = False

    def __call__(self, prediction: Prediction) -> None:
        try:
            self._callback(prediction)
        except Exception:
            if not self._told:
                self._told = True
                log.exception("an on_prediction callback failed; the answers are not affected; told once")
