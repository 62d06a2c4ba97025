"""JSON on standard input, one input a line; the end of it is the source's end."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from functools import partial

from outrider.agent.payload import Payload, Values, read_json
from outrider.agent.sourceconfig import StdinConfig
from outrider.agent.sources.base import Frame, Lines, readable
from outrider_runtimes.errors import SourceError


class StdinSource:
    """Lines of standard input, or of another open file. What was read of a line survives a pause."""

    def __init__(self, _: StdinConfig, *, descriptor: int = 0) -> None:
        self._descriptor = descriptor
        self._lines = Lines()
        self._count = 0
        self._waiting: deque[bytes] = deque()
        self._ended = False

    def frames(self) -> Iterator[Frame | None]:
        """See ``Source``."""
        while True:
            while self._waiting:
                line = self._waiting.popleft()
                self._count += 1
                if line.strip():
                    yield Frame(name=f"line {self._count}", read=partial(_read, line))
            if self._ended:
                return
            if not readable(self._descriptor):
                yield None
                continue
            data = self._read_some()
            self._waiting += self._lines.add(data)
            if not data:
                self._waiting.append(self._lines.end())
                self._ended = True
            yield None  # of a line that has no end, there are bytes all the time

    def _read_some(self) -> bytes:
        try:
            return os.read(self._descriptor, 1 << 16)
        except OSError as error:
            raise SourceError(
                f"standard input cannot be read: {error.strerror}", hint="give the agent a pipe or a file"
            ) from None


def _read(line: bytes) -> Payload:
    return Values(value=read_json(line))
