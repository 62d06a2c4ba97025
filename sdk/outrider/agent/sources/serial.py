"""A sensor that writes lines of numbers to a serial port. Needs pyserial (the extra ``sensors``)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from outrider.agent.payload import Signal, Windows
from outrider.agent.sourceconfig import SerialConfig
from outrider.agent.sources.base import Frame, Lines, known, readable, unreadable
from outrider_runtimes.errors import InputError, MissingExtra, SourceError
from outrider_runtimes.tensors import Array

MAX_LINE_BYTES: Final = 16 * 1024


class SerialSource:
    """Windows of readings from one port. The first line after it is opened is left out: it may be half a line."""

    def __init__(self, config: SerialConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock

    def frames(self) -> Iterator[Frame | None]:
        """See ``Source``."""
        config = self._config
        port = self._open()
        try:
            lines = self._lines(port)
            while next(lines) is None:
                yield None
            readings = _Readings(config)
            for line in lines:
                if line is None:
                    yield None
                    continue
                try:
                    windows = readings.add(line)
                except InputError as error:
                    yield Frame(name=config.port, read=unreadable(error))
                    continue
                for window in windows:
                    yield Frame(name=config.port, read=known(Signal(array=window, axes="TC")))
        finally:
            port.close()

    def _open(self) -> Any:
        try:
            import serial
        except ImportError:
            raise MissingExtra("pyserial", extra="sensors", purpose="reading a serial port") from None
        try:
            return serial.Serial(self._config.port, self._config.baud, timeout=0, exclusive=True)
        except (OSError, ValueError) as error:  # SerialException is an OSError
            raise SourceError(
                f"serial port {self._config.port} cannot be opened: {error}",
                hint="is it plugged in, and is the user in the group dialout?",
            ) from None

    def _lines(self, port: Any) -> Iterator[bytes | None]:
        lines, heard_s = Lines(MAX_LINE_BYTES), self._clock()
        while True:
            if readable(port.fileno()):
                try:
                    data = os.read(port.fileno(), 4096)
                except OSError as error:
                    raise SourceError(f"serial port {self._config.port} went away: {error.strerror}") from None
                if not data:
                    raise SourceError(f"serial port {self._config.port} went away")
                for line in lines.add(data):
                    yield line
                    heard_s = self._clock()
            if self._clock() - heard_s >= self._config.silence_s:
                raise SourceError(
                    f"serial port {self._config.port} gave no line for {self._config.silence_s:g} s",
                    hint="is source.baud that of the sensor?",
                )
            yield None


class _Readings:
    """Lines as windows of rows that all have as many numbers."""

    def __init__(self, config: SerialConfig) -> None:
        self._config = config
        self._windows = Windows(config.window, config.hop)
        self._columns = 0
        self._before = 0

    def add(self, line: bytes) -> list[Array]:
        """The windows that are full with this line.

        Raises:
            InputError: it cannot be read, or has another count of numbers than those before. Two in a row of that
                other count are believed, and a window begins anew: what came first was no reading then, but a sensor
                that said its version, say.
        """
        row = read_row(line, self._config.separator, self._config.columns)
        before, self._before = self._before, len(row)
        if len(row) != self._columns:
            if self._columns and before != len(row):
                raise InputError(f"a line of {len(row)} numbers after lines of {self._columns}")
            self._columns, self._windows = len(row), Windows(self._config.window, self._config.hop)
        return list(self._windows.add(row[None]))


def read_row(line: bytes, separator: str, columns: tuple[int, ...] | None) -> Array:
    """The numbers in a line: float64 [C]. Raises InputError."""
    text = line.decode("ascii", errors="replace")
    if len(line) > MAX_LINE_BYTES:
        raise InputError(f"the line {text[:40]!r}... has more than {MAX_LINE_BYTES} bytes")
    words = text.split() if separator == " " else text.split(separator)
    try:
        picked = words if columns is None else [words[column] for column in columns]
        row = np.array([float(word) for word in picked])
    except (ValueError, IndexError) as error:
        raise InputError(f"the line {text[:40]!r} does not hold the numbers: {error}") from None
    if not len(row) or not np.isfinite(row).all():
        raise InputError(f"the line {text[:40]!r} holds no number, or one that is not finite")
    return row
