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
# One that hangs takes half a minute: so many names may hang before the next one waits for them.
MAX_THREADS = 4

Address = tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]


def literals(host: str, port: int) -> list[Address]:
    """The addresses of a host that needs no resolver: a number, or ``localhost``, which RFC 6761 (6.3) fixes."""
    hosts = ("::1", "127.0.0.1") if host == "localhost" else (host,)
    try:
        return [_address(each, port) for each in hosts]
    except ValueError:
        return []


def _address(host: str, port: int) -> Address:
    number = ipaddress.ip_address(host)
    if isinstance(number, ipaddress.IPv4Address):
        return socket.AF_INET, (host, port)
    return socket.AF_INET6, (host.partition("%")[0], port, 0, _interface(number.scope_id))


def _interface(scope: str | None) -> int:
    """The number of what a link-local address is on. Raises ValueError where there is none of that name."""
    if scope is None or scope.isdigit():
        return int(scope or 0)
    try:
        return socket.if_nametoindex(scope)
    except OSError:
        raise ValueError(scope) from None


class _Resolver:
    """``getaddrinfo`` in daemon threads: it cannot be interrupted, so nobody may have to wait for its return.

    Another thread is started where all are busy, up to MAX_THREADS; they stay.
    """

    def __init__(self) -> None:
        self._threads = 0
        self._lock = threading.Lock()
        self._waiting: dict[tuple[str, int], Future[list[Address]]] = {}
        self._queue: SimpleQueue[tuple[str, int]] = SimpleQueue()

    def lookup(self, host: str, port: int) -> Future[list[Address]]:
        """The addresses, some time; callers that ask for the same name share one answer."""
        with self._lock:
            future = self._waiting.get((host, port))
            if future is None:
                if len(self._waiting) >= MAX_LOOKUPS:
                    raise RemoteUnavailable(f"{host}: {MAX_LOOKUPS} other names are still being resolved")
                future = self._waiting[host, port] = Future()
                self._queue.put((host, port))
                if len(self._waiting) > self._threads and self._threads < MAX_THREADS:
                    self._threads += 1
                    threading.Thread(target=self._work, name="outrider-dns", daemon=True).start()
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


_resolver = _Resolver()


def lookup(host: str, port: int) -> Future[list[Address]]:
    """The addresses, some time, or the OSError. Raises RemoteUnavailable when too many names are being resolved."""
    return _resolver.lookup(host, port)


def _in_child() -> None:
    global _resolver  # noqa: PLW0603 - the parent's threads are not in the child
    _resolver = _Resolver()


os.register_at_fork(after_in_child=_in_child)
