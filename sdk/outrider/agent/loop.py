"""The loop: what a source gives is read, fitted, answered and written; nothing that goes wrong with one ends it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Mapping
from typing import Final, Protocol

from outrider.agent.answering import Answering
from outrider.agent.counting import Counts
from outrider.agent.logs import say
from outrider.agent.outputs import AnswerWriter
from outrider.agent.payload import fit
from outrider.agent.sourceconfig import SourceConfig
from outrider.agent.sources.base import TICK_S, Frame, Source
from outrider.prediction import Prediction
from outrider_runtimes.errors import InputError, MissingExtra, OutriderError, RolledBack
from outrider_runtimes.tensors import Array

FIRST_RETRY_S: Final = 1.0
LAST_RETRY_S: Final = 60.0

_log = logging.getLogger(__name__)


class Tell(Protocol):
    """Reports an event."""

    def __call__(self, name: str, /, **fields: object) -> None:
        """Take it; it never fails."""
        ...


class Loop:
    """Runs on one thread; what is public may be set from others and holds from the next turn on.

    Attributes:
        source: what is read; see ``read_from``.
        paused: whether it is not to be read. It is closed then, and opened again after.
        stopped: why it is to end; empty while it is not.
        state: ``starting``, ``reading`` or ``failed``.
        counts: of frames.
    """

    def __init__(
        self,
        answering: Answering,
        source: Source,
        fitted: SourceConfig,
        *,
        writer: AnswerWriter | None,
        tell: Tell,
        failure: Callable[[Exception], object],
        answered: Callable[[Mapping[str, Array], Prediction], object],
        beat: Callable[[], None],
        rolled_back: Callable[[], object],
        paused: bool,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Nothing is read before ``run``.

        Args:
            fitted: how what the source gives becomes inputs.
            failure: reports that a frame got no answer; it never fails.
            answered: is given what was answered, and how; it never fails.
            beat: called at every turn, several times a second.
            rolled_back: called when the model went back to one of another interface, and has to be opened again.
        """
        self.source = source
        self.paused = paused
        self.stopped = ""
        self.state = "starting"
        self.counts = Counts(clock)
        self._answering = answering
        self._fitted = fitted
        self._writer = writer
        self._old_writer: AnswerWriter | None = None
        self._tell = tell
        self._failure = failure
        self._answered = answered
        self._beat = beat
        self._rolled_back = rolled_back
        self._clock = clock
        self._sleep = sleep

    def run(self) -> str:
        """Read and answer until ``stopped``, or the source's end; why."""
        failures, ended = 0, False
        while not (self.stopped or ended):
            if self.paused:
                self.state = "starting"
                self._rest(lambda: self.paused)
                continue
            source, frames = self.source, self.counts.frames
            try:
                ended = self._read(source)
            except Exception as error:
                failures = 0 if self.counts.frames > frames else failures
                self._source_failed(error, min(FIRST_RETRY_S * 2**failures, LAST_RETRY_S), source)
                failures = min(failures + 1, 16)
        return self.stopped or "source ended"

    def read_from(self, source: Source, fitted: SourceConfig) -> None:
        """Read another source from the next turn on, or the same in another way."""
        self.source, self._fitted = source, fitted

    def write_to(self, writer: AnswerWriter | None) -> None:
        """Write answers elsewhere from the next on; what was written to is closed by the next change, or the end."""
        if self._old_writer is not None:
            self._old_writer.close()
        self._old_writer, self._writer = self._writer, writer

    def close(self) -> None:
        """Close what is written to."""
        for writer in (self._old_writer, self._writer):
            if writer is not None:
                writer.close()

    def _read(self, source: Source) -> bool:
        """Answer what a source gives; whether it came to its end."""
        with contextlib.closing(_frames(source)) as frames:
            for frame in frames:
                self._beat()
                self._found()
                if frame is not None:
                    self.counts.frames += 1
                    self._answer(frame)
                if self.stopped or self.paused or self.source is not source:
                    return False
        return True

    def _answer(self, frame: Frame) -> None:
        answering, fitted, writer = self._answering, self._fitted, self._writer
        try:
            interface, payload = answering.interface, frame.read()
            inputs = fit(interface, payload, name=fitted.input, scale=fitted.scale, offset=fitted.offset)
            prediction = answering.infer(inputs)
        except (InputError, MissingExtra) as error:
            self._failed("refused", frame, error)
        except OutriderError as error:
            self._failed("failed", frame, error)
            if isinstance(error, RolledBack):
                self._rolled_back()
        except Exception as error:  # an engine's, a numpy's: the next one may do
            _log.exception("a fault of Outrider's at %s", frame.name)
            self._failed("failed", frame, error)
        else:
            self.counts.answered += 1
            self._answered(inputs, prediction)
            if writer is not None:
                writer.write(frame.name, prediction, interface)
        try:
            frame.done()
        except OutriderError as error:
            say("not_remembered", level=logging.ERROR, frame=frame.name, error=str(error), hint=error.hint)

    def _failed(self, how: str, frame: Frame, error: Exception) -> None:
        kind = type(error).__name__
        self._failure(error)
        count = self.counts.fail(how, kind)
        if count is not None:
            say(f"frame_{how}", level=logging.WARNING, frame=frame.name, error=f"{kind}: {error}", count=count)

    def _found(self) -> None:
        if self.state != "reading":
            say("source_reading", before=self.state)
            if self.state == "failed":
                self._tell("source_back")
            self.state = "reading"

    def _source_failed(self, error: Exception, retry_s: float, source: Source) -> None:
        """Say so, and wait until it is worth another try."""
        if not isinstance(error, OutriderError):
            _log.exception("a fault of Outrider's in the source")
        kind, hint = type(error).__name__, getattr(error, "hint", "")
        say("source_failed", level=logging.ERROR, error=f"{kind}: {error}", hint=hint, retry_s=retry_s)
        if self.state != "failed":
            self._tell("source_failed", error=kind)
        self.state = "failed"
        until = self._clock() + retry_s
        self._rest(lambda: self._clock() < until and self.source is source and not self.paused)

    def _rest(self, still: Callable[[], bool]) -> None:
        """Wait while that holds, and stay alive."""
        while not self.stopped and still():
            self._beat()
            self._sleep(TICK_S)


def _frames(source: Source) -> Generator[Frame | None, None, None]:
    """The source's iterator, with a ``close``."""
    yield from source.frames()
