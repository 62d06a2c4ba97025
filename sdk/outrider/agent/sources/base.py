"""What every source is: an iterator of frames that comes back several times a second, whether there is one or not."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from outrider.agent.payload import MAX_INPUT_BYTES, Payload
from outrider_runtimes.errors import InputError

# So long a source keeps the agent's loop at most: a stop is obeyed, and systemd's watchdog is fed, within it.
TICK_S: Final = 0.25

Sleep = Callable[[float], object]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One input of the model, before it is read.

    Attributes:
        name: where it comes from, for people.
        read: gives it. Raises InputError for what cannot be read: this frame is lost, and the next is asked for.
        done: to be called when it has been dealt with.
    """

    name: str
    read: Callable[[], Payload]
    done: Callable[[], None] = lambda: None


class Source(Protocol):
    """Where frames come from."""

    def frames(self) -> Iterator[Frame | None]:
        """Open it and give what comes; None, at least every ``TICK_S``, while nothing does.

        Its end is that of the iterator, and closing the iterator closes the source. It can be opened again.

        Raises:
            SourceError: it is not there, or went away; opened again later it may be back.
            MissingExtra: the package that it needs is not installed.
        """
        ...


def unreadable(error: InputError) -> Callable[[], Payload]:
    """What reads a frame of which it is known already that it cannot be read."""

    def read() -> Payload:
        raise error

    return read


def known(payload: Payload) -> Callable[[], Payload]:
    """What reads a frame that is here."""
    return lambda: payload


def readable(descriptor: int, timeout_s: float = TICK_S) -> bool:
    """Wait until there is something to read, or for so long."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


class Lines:
    """Bytes that come in pieces, as lines without their ends.

    Of a line that is too long the beginning is kept, and a byte more than allowed, so that its taker can tell.
    """

    def __init__(self, max_bytes: int = MAX_INPUT_BYTES) -> None:
        self._kept_bytes = max_bytes + 1
        self._rest = bytearray()

    def add(self, data: bytes) -> Iterator[bytes]:
        """Take bytes; give the lines that are whole now."""
        *lines, last = data.split(b"\n")
        for line in lines:
            self._keep(line)
            yield self.end().rstrip(b"\r")
        self._keep(last)

    def end(self) -> bytes:
        """What came after the last line's end."""
        rest, self._rest = bytes(self._rest), bytearray()
        return rest

    def _keep(self, data: bytes) -> None:
        self._rest += data[: self._kept_bytes - len(self._rest)]
