"""Sound by ALSA's own program: ``arecord`` as a child that writes raw PCM to a pipe, so that no package is needed."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Final

from outrider.agent.payload import Signal, Windows
from outrider.agent.sound import mono, pcm
from outrider.agent.sourceconfig import MicrophoneConfig
from outrider.agent.sources.base import Frame, known, readable
from outrider_runtimes.errors import SourceError

SILENCE_S: Final = 10.0  # a microphone that is there never stops sending
_WIDTH: Final = 2
_MOST_READS: Final = 64  # whoever complains without an end is not listened to for ever


class MicrophoneSource:
    """Windows of one channel of sound."""

    def __init__(self, config: MicrophoneConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock

    def frames(self) -> Iterator[Frame | None]:
        """See ``Source``."""
        config = self._config
        windows = Windows(config.window, config.hop)
        frame_bytes = _WIDTH * config.channels
        with self._recording() as child:
            said = _Said(child)
            rest, heard_s = b"", self._clock()
            while True:
                assert child.stdout is not None
                is_there = readable(child.stdout.fileno())
                said.read()
                said.check_rate(config)
                if not is_there:
                    if self._clock() - heard_s >= SILENCE_S:
                        raise SourceError(f"microphone {config.device} gave nothing for {SILENCE_S:g} s")
                    yield None
                    continue
                data = os.read(child.stdout.fileno(), 1 << 16)
                if not data:
                    raise SourceError(
                        f"microphone {config.device} ended: {said.last_line()}", hint="`arecord -L` lists what there is"
                    )
                heard_s = self._clock()
                rest += data
                whole = len(rest) - len(rest) % frame_bytes
                samples, rest = mono(pcm(rest[:whole], _WIDTH), config.channels), rest[whole:]
                for window in windows.add(samples):
                    yield Frame(name=config.device, read=known(Signal(array=window, axes="T")))
                yield None

    @contextlib.contextmanager
    def _recording(self) -> Iterator[subprocess.Popen[bytes]]:
        config = self._config
        command = ["arecord", "-t", "raw", "-f", "S16_LE", "-D", config.device]
        command += ["-r", str(config.rate_hz), "-c", str(config.channels)]
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "LC_ALL": "C"},  # what it says is looked at
            )
        except OSError as error:
            raise SourceError(f"arecord cannot be started: {error.strerror}", hint="apt install alsa-utils") from None
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(timeout=2.0)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            for pipe in (child.stdout, child.stderr):
                if pipe is not None:
                    pipe.close()


class _Said:
    """What arecord says. It is read all the time: a pipe that is full would stop the sound."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stderr is not None
        self._descriptor = child.stderr.fileno()
        self._text = b""

    def read(self, timeout_s: float = 0.0) -> None:
        """Take what there is, within reason; wait so long for more of it."""
        for _ in range(_MOST_READS):
            if not readable(self._descriptor, timeout_s) or not (data := os.read(self._descriptor, 4096)):
                return
            self._text = (self._text + data)[-2000:]

    def check_rate(self, config: MicrophoneConfig) -> None:
        """Raises SourceError where the device has another rate: arecord warns, and goes on with what the device has."""
        found = re.search(r"rate is not accurate.*", self._text.decode(errors="replace"))
        if found is not None:
            raise SourceError(
                f"microphone {config.device} does not have {config.rate_hz} samples a second: {found.group()}",
                hint="name it plughw:..., which converts them, or set source.rate_hz to what it has",
            )

    def last_line(self) -> str:
        """Its last word, at its end."""
        self.read(0.5)
        lines = self._text.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "arecord said nothing"
