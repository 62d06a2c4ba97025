"""A sensor's registers on an I2C bus. Needs smbus2 (the extra ``sensors``)."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from outrider.agent.payload import Signal, Windows
from outrider.agent.sourceconfig import I2cConfig
from outrider.agent.sources.base import TICK_S, Frame, Sleep, known
from outrider_runtimes.errors import MissingExtra, SourceError
from outrider_runtimes.tensors import Array

ReadBlock = Callable[[int, int, int], list[int]]  # address, register, how many bytes


class I2cSource:
    """Windows of readings at a steady interval."""

    def __init__(
        self, config: I2cConfig, *, sleep: Sleep = time.sleep, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._sleep = sleep
        self._clock = clock

    def frames(self) -> Iterator[Frame | None]:
        """See ``Source``."""
        bus = self._open()
        try:
            yield from self.readings(bus.read_i2c_block_data)
        finally:
            bus.close()

    def readings(self, read_block: ReadBlock) -> Iterator[Frame | None]:
        """The same over what reads a block of registers."""
        config = self._config
        windows = Windows(config.window, config.hop)
        size_bytes = struct.calcsize(config.format)
        due = self._clock()
        while True:
            try:
                raw = read_block(config.address, config.register, size_bytes)
            except OSError as error:
                raise SourceError(
                    f"sensor 0x{config.address:02x} on I2C bus {config.bus} does not answer: {error.strerror or error}",
                    hint="`i2cdetect -y BUS` shows what is there",
                ) from None
            if len(raw) != size_bytes:
                raise SourceError(
                    f"sensor 0x{config.address:02x} on I2C bus {config.bus} gave {len(raw)} bytes of {size_bytes}"
                )
            for window in windows.add(read_registers(bytes(raw), config.format)[None]):
                yield Frame(name=f"i2c 0x{config.address:02x}", read=known(Signal(array=window, axes="TC")))
            yield None  # a bus may be slower than the interval, and never leave time to rest
            due = max(due + config.interval_s, self._clock())
            while (left_s := due - self._clock()) > 0:
                yield None
                self._sleep(min(left_s, TICK_S))

    def _open(self) -> Any:
        try:
            import smbus2
        except ImportError:
            raise MissingExtra("smbus2", extra="sensors", purpose="reading an I2C sensor") from None
        try:
            return smbus2.SMBus(self._config.bus)
        except OSError as error:
            raise SourceError(
                f"I2C bus {self._config.bus} cannot be opened: {error.strerror}",
                hint="raspi-config switches it on; the user must be in the group i2c",
            ) from None


def read_registers(raw: bytes, format_: str) -> Array:
    """The numbers in a block of registers, float64 [C]; ``format_`` in the letters of the struct module."""
    return np.array(struct.unpack(format_, raw), np.float64)
