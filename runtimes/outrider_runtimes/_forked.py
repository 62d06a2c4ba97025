"""What a forked child does with what its parent had: other threads are gone there, and what they held stays held."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

from outrider_runtimes.errors import RunnerClosed


class Forked(Protocol):
    """Holds locks, threads or connections."""

    def forked(self) -> None:
        """Called in a child before anything else runs there. Waits for nothing, and touches nothing of the parent's."""
        ...


_living: weakref.WeakSet[Forked] = weakref.WeakSet()


def tell_of_fork(owner: Forked) -> None:
    """From now on ``forked`` is called in every child, for as long as ``owner`` lives."""
    _living.add(owner)


def made_before_fork(what: str) -> RunnerClosed:
    """For what cannot go on in a child."""
    return RunnerClosed(f"{what} was made before a fork", hint="make or load it in the child process")


def _in_child() -> None:
    for owner in list(_living):
        owner.forked()


os.register_at_fork(after_in_child=_in_child)
