"""A transport that sends all that is written within one turn of the loop in one system call, when the turn ends.

Sent at once, each reply would wake a caller on another core, which costs more than to send it; what a turn has for many
callers goes out together, and their next requests come together.
"""

from __future__ import annotations

import asyncio
from typing import Any

MAX_HELD_BYTES = 64 << 10  # more is sent at once: a copy of it would cost more than the call
UNREAD_S = 10.0  # what is still unread so long after the end is thrown away


class Corked:
    """An asyncio transport under which a reply's head and body leave together. Everything else is the transport's."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []
        self.is_closing = transport.is_closing  # asked several times a request, and __getattr__ is slow

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send it when this turn of the loop ends."""
        if not self._held:
            self._loop.call_soon(self.flush)
        self._held.append(data)
        if len(data) > MAX_HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send what is held."""
        if not self._held:
            return
        held, self._held = self._held, []
        if not self._transport.is_closing():
            self._transport.writelines(held)

    def write_eof(self) -> None:
        """As the transport's, after what is held."""
        self.flush()
        self._transport.write_eof()

    def close(self) -> None:
        """As the transport's, after what is held; but a peer that never reads does not keep it open for ever."""
        self.flush()
        self._transport.close()
        if self._transport.get_write_buffer_size():
            self._loop.call_later(UNREAD_S, self._transport.abort)
