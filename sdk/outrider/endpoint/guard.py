"""The endpoint's loop in a thread of its own, and another one in its place where a model is stuck in it.

A model that answers in less than it takes to wake a thread is run in the loop itself. A call inside an engine cannot be
interrupted, so that one which never returns would take the whole endpoint with it. It takes the connections that were
open: they are cut, and a new loop takes the next ones. If the call returns after all, the old loop ends.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Protocol

from outrider.endpoint.calls import Call

log = logging.getLogger(__name__)

# What is run in a loop takes a fraction of a millisecond. A board that swaps may take seconds; one that was stopped
# finds that much time passed in a single look.
LOOK_S = 0.25
STUCK_LOOKS = 20


class Loop(Protocol):
    """A server that runs a loop in the thread that calls ``run``."""

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on these until it is stopped."""
        ...

    def abandon(self) -> Iterable[socket.socket]:
        """It is stuck: let it end as soon as it can, and give the sockets of its connections."""
        ...


class Guarded(Protocol):
    """What the loops run."""

    @property
    def here(self) -> Call | None:
        """What the loop runs itself at this moment."""
        ...

    def guard(self) -> None:
        """From now on the loop may run what could be stuck."""
        ...

    def give_up(self) -> None:
        """The loop is stuck: what is inside is not answered."""
        ...


def run_guarded(make: Callable[[], Loop], sock: socket.socket, endpoint: Guarded) -> None:
    """Run one server after the other, until one ends by itself. Raises what that one does.

    Args:
        make: the next server.
        sock: where they listen.
        endpoint: what they run in their loops.
    """
    endpoint.guard()
    while True:
        server, own = make(), sock.dup()
        thread = _Thread(server, own)
        thread.start()
        stuck = _watched(thread, endpoint)
        if stuck is None:
            if thread.error is not None:
                raise thread.error
            return
        log.error("a call of %s is stuck in the endpoint's loop: another loop takes over", stuck.model)
        endpoint.give_up()
        for connection in server.abandon():
            _cut(connection)


class _Thread(threading.Thread):
    """``error``: what the server ended with."""

    def __init__(self, server: Loop, sock: socket.socket) -> None:
        super().__init__(name="outrider-loop", daemon=True)
        self._server = server
        self._sock = sock
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._server.run(sockets=[self._sock])
        except BaseException as error:
            self.error = error
        finally:
            self._sock.close()


def _watched(thread: threading.Thread, endpoint: Guarded) -> Call | None:
    """What is stuck in the thread's loop; None where that has ended."""
    seen: Call | None = None
    looks = 0
    while True:
        thread.join(LOOK_S)
        if not thread.is_alive():
            return None
        here = endpoint.here
        looks = looks + 1 if here is not None and here is seen else 0
        if looks >= STUCK_LOOKS:
            return here
        seen = here


def _cut(connection: socket.socket) -> None:
    """Tell its peer that nothing comes any more. Its loop still has the descriptor."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as own:
        own.shutdown(socket.SHUT_RDWR)
