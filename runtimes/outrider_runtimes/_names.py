"""Host names to addresses, without anybody having to wait for a resolver that hangs."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
from concurrent.futures import Future
from queue import SimpleQueue

from outrider_runtimes.errors import RemoteUnavailable

MAX_LOOKUPS = 64

Address = tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]


def literal(host: str, port: int) -> Address | None:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return None
    return (socket.AF_INET6, (host, port, 0, 0)) if version == 6 else (socket.AF_INET, (host, port))


class _Resolver:
    """``getaddrinfo`` in one daemon thread: it cannot be interrupted, so nobody may have to wait for its return."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._waiting: dict[tuple[str, int], Future[list[Address]]] = {}
        self._queue: SimpleQueue[tuple[str, int]] = SimpleQueue()
        threading.Thread(target=self._work, name="outrider-dns", daemon=True).start()

    def lookup(self, host: str, port: int) -> Future[list[Address]]:
        """The addresses, some time; callers that ask for the same name share one answer."""
        with self._lock:
            future = self._waiting.get((host, port))
            if future is None:
                if len(self._waiting) >= MAX_LOOKUPS:
                    raise RemoteUnavailable(f"{host}: {MAX_LOOKUPS} other names are still being resolved")
                future = self._waiting[host, port] = Future()
                self._queue.put((host, port))
        return future

    def _work(self) -> None:
        while True:
            host, port = self._queue.get()
            addresses: list[Address] = []
            failure: Exception | None = None
            try:
                for family, _, _, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                    if family in (socket.AF_INET, socket.AF_INET6):
                        addresses.append((family, where))  # type: ignore[arg-type]
            except (OSError, UnicodeError) as error:
                failure = error if isinstance(error, OSError) else OSError(f"not a host name: {error}")
            with self._lock:
                future = self._waiting.pop((host, port))
            if failure is not None:
                future.set_exception(failure)
            else:
                future.set_result(addresses)


_resolver_lock = threading.Lock()
_resolver: _Resolver | None = None


def lookup(host: str, port: int) -> Future[list[Address]]:
    global _resolver  # noqa: PLW0603 - one thread for the process, started when it is first needed
    with _resolver_lock:
        # A forked child has the object and not its thread.
        if _resolver is None or _resolver.pid != os.getpid():
            _resolver = _Resolver()
        resolver = _resolver
    return resolver.lookup(host, port)
