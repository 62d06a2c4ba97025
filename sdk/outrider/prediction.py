"""What a call gives back: the outputs, and where they came from; or that it failed, and who is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, Literal, NamedTuple, TypeVar

from outrider_runtimes.errors import ConfigError, InputError, ShapeError
from outrider_runtimes.runner import Timing
from outrider_runtimes.tensors import Array, Interface, Tensors, by_name, check_named

Source = Literal["edge", "cloud", "edge_degraded"]


class Prediction(NamedTuple):
    """One answer. Its fields are known by their names; their order is not promised.

    Attributes:
        outputs: the interface's outputs by name; the caller's to keep.
        variant: the model file's name in the bundle that answered.
        engine: what ran it.
        bundle: that bundle's digest.
        verified: whether a trusted key had signed it.
        timing_ms: where the time went.
        source: ``edge``, ``cloud``, or ``edge_degraded``: the edge answered because the cloud could not.
        reason: why it came from there, in one word; ``local`` where there was no choice.
    """

    outputs: dict[str, Array]
    variant: str
    engine: str
    bundle: str
    verified: bool
    timing_ms: Timing
    source: Source = "edge"
    reason: str = "local"


class Failure(NamedTuple):
    """One call of ``infer`` that gave no answer.

    Attributes:
        error: what its caller got.
        refused: whether that is the caller's own doing: the inputs are not what the interface says, or the deadline
            is none. Else it was to be answered and was not, which speaks against what was asked.
    """

    error: Exception
    refused: bool


OnPrediction = Callable[[Prediction], None]
OnFailure = Callable[[Failure], None]
T = TypeVar("T")


def failure_of(error: Exception, interface: Interface, inputs: Tensors | Array) -> Failure:
    """Whose doing it is that a call with these inputs got no answer.

    A size that the interface leaves free, and the board's file does not take, is not the caller's mistake.
    """
    refused = isinstance(error, (InputError, ConfigError))
    if isinstance(error, ShapeError):
        with suppress(InputError):
            check_named(interface, by_name(interface, inputs), finite="pass")
            refused = False
    return Failure(error, refused)


class Watchers(Generic[T]):
    """The callbacks of one source of predictions, failures or changes. Safe from several threads; none loses an answer.

    ``kind``: the name of the method by which they came, for the log.
    """

    def __init__(self, kind: str = "on_prediction") -> None:
        self._kind = kind
        self._watchers: tuple[_Watcher[T], ...] = ()
        self._lock = threading.Lock()

    def add(self, callback: Callable[[T], None]) -> Callable[[], None]:
        """Call ``callback`` with each of them from now on; returns what takes it off."""
        watcher = _Watcher(callback, self._kind)
        with self._lock:
            self._watchers = (*self._watchers, watcher)

        def unsubscribe() -> None:
            with self._lock:
                self._watchers = tuple(kept for kept in self._watchers if kept is not watcher)

        return unsubscribe

    def tell(self, what: T) -> None:
        """Call each, in the order in which they came, in the caller's thread."""
        for watcher in self._watchers:
            try:
                watcher.callback(what)
            except Exception:
                watcher.failed()

    def clear(self) -> None:
        """Take all of them off."""
        with self._lock:
            self._watchers = ()


class _Watcher(Generic[T]):
    """One callback, and whether its failure was told."""

    __slots__ = ("_kind", "_told", "callback")

    def __init__(self, callback: Callable[[T], None], kind: str) -> None:
        self.callback = callback
        self._kind = kind
        self._told = False

    def failed(self) -> None:
        """Log the exception that is being handled, the first time."""
        if not self._told:
            self._told = True
            import logging

            log = logging.getLogger(__name__)
            log.exception("an %s callback failed; the answers are not affected; told once", self._kind)
