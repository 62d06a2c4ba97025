"""TCP ports of this machine."""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path

LOWEST = 20_000  # below, Ray's workers have theirs
WORKERS = 4  # of a run; each has ports of its own, so that none takes what another has just found free


def free_port() -> int:
    """One on which nothing listens, and that this process was not given lately.

    It is below those that the kernel gives to whoever asks for any. So none of them takes it before it is listened on,
    nor while a server that will come back is away; and who connects to it in vain does not meet himself.
    """
    return next(port for port in _ports if _free(port))


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _of_this_worker() -> range:
    try:
        given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:  # not every container shows it
        given = 32_768
    width = (max(given, LOWEST + 4000) - LOWEST) // WORKERS
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    return range(LOWEST + worker * width, LOWEST + (worker + 1) * width)


_all = _of_this_worker()
_begin = os.getpid() * 37 % len(_all)  # another run on this machine begins elsewhere
_ports = itertools.cycle((*_all[_begin:], *_all[:_begin]))
