"""What systemd is told: ready, reloading, stopping, alive. The protocol of sd_notify(3) over a datagram socket."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping


class Notifier:
    """The service manager's socket; outside systemd there is none, and nothing is said.

    Attributes:
        alive_every_s: how often ``alive`` must be called, half of systemd's WatchdogSec; None where nobody watches.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ, *, clock: Callable[[], float] = time.monotonic) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._clock = clock
        self._said_at_s = -1e9
        self.alive_every_s = _watchdog_s(environ)

    def ready(self) -> None:
        """Started, or reloaded."""
        self.say("READY=1")

    def reloading(self) -> None:
        """A reload begins; ``ready`` ends it."""
        self.say("RELOADING=1", f"MONOTONIC_USEC={int(self._clock() * 1e6)}")

    def stopping(self) -> None:
        """The end begins."""
        self.say("STOPPING=1")

    def alive(self) -> None:
        """The caller has come round once more; said to systemd when it is time."""
        if self.alive_every_s is not None and self._clock() - self._said_at_s >= self.alive_every_s:
            self._said_at_s = self._clock()
            self.say("WATCHDOG=1")

    def say(self, *lines: str) -> None:
        """Send lines; that nobody takes them is no failure of ours."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(1.0)
                sock.sendto("\n".join(lines).encode(), self._address)
        except OSError:
            pass


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    try:
        interval_us = int(environ.get("WATCHDOG_USEC", "0"))
        watched = int(environ.get("WATCHDOG_PID", str(os.getpid())))
    except ValueError:
        return None
    return interval_us / 2e6 if interval_us > 0 and watched == os.getpid() else None
