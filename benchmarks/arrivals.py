"""Open loops: requests that come when they come, whether or not the last one was answered. Arrivals are seeded.

Time counts from when a request was due: a caller does not care that a generator was late. What a generator takes of
the machine itself is measured, and stored beside what it found.
"""

from __future__ import annotations

import contextlib
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.load import Client

MOST_CONNECTIONS = 256  # of one generator; below what an endpoint takes
DRAIN_S = 5.0
REFUSALS = (429, 503)
CLOSING = b"\r\nconnection: close"


@dataclass(frozen=True, kw_only=True)
class Offered:
    """What became of the requests of one loop.

    Attributes:
        asked: how many were due.
        good: answered in time.
        refused: told to come again.
        late: answered, and too late.
        failed: anything else: another status, a closed connection, an error, no answer at all.
        refused_p99_ms: until a refusal; None where there was none.
        good_p50_ms, good_p99_ms: until a good answer; None where there was none.
        lag_p99_ms: by which the generator itself was late.
        own_share: of one processor, what its process took; with calls in the same process theirs too.
    """

    asked: int
    good: int
    refused: int
    late: int
    failed: int
    refused_p99_ms: float | None
    good_p50_ms: float | None
    good_p99_ms: float | None
    lag_p99_ms: float | None
    own_share: float


def arrivals_s(rate_per_s: float, seconds: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """When requests are due, from 0: exponential gaps, float64 [N]."""
    gaps = rng.exponential(1.0 / rate_per_s, int(rate_per_s * seconds * 2) + 20)
    due = np.cumsum(gaps)
    return due[due < seconds]


def call_openly(call: Callable[[float], str], due_s: Sequence[float] | NDArray[np.float64], *, threads: int,
                deadline_s: float) -> Offered:  # fmt: skip
    """Call from threads of this process.

    Args:
        call: given the seconds that are left of the deadline; says ``"good"``, ``"refused"`` or ``"failed"``.
        threads: calls at once; what finds none free waits, and its time runs.
    """
    due: queue.SimpleQueue[float | None] = queue.SimpleQueue()
    ended: list[tuple[str, float]] = []  # append is atomic
    lags: list[float] = []

    def work() -> None:
        while (at_s := due.get()) is not None:
            said = call(max(0.0, at_s + deadline_s - time.perf_counter()))
            ended.append((said, time.perf_counter() - at_s))

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    begun_cpu_s, begun_s = time.process_time(), time.perf_counter()
    for at_s in due_s:
        wait_s = begun_s + at_s - time.perf_counter()
        if wait_s > 0:
            time.sleep(wait_s)
        lags.append(time.perf_counter() - begun_s - at_s)
        due.put(begun_s + at_s)
    for _ in workers:
        due.put(None)
    for worker in workers:
        worker.join()
    share = (time.process_time() - begun_cpu_s) / (time.perf_counter() - begun_s)
    return _offered(ended, lags, len(due_s), deadline_s=deadline_s, share=share)


def post_openly(
    port: int, request: bytes, due_s: Sequence[float] | NDArray[np.float64], *, deadline_s: float
) -> Offered:
    """Send one request again and again to an endpoint of this machine, from this thread over kept connections."""
    with contextlib.ExitStack() as stack:
        loop = _Loop(port, request, stack)
        begun_cpu_s, begun_s = time.thread_time(), time.perf_counter()
        position = 0
        ends_s = begun_s + float(due_s[-1]) + deadline_s + DRAIN_S
        while (position < len(due_s) or loop.busy) and (now_s := time.perf_counter()) < ends_s:
            while position < len(due_s) and begun_s + due_s[position] <= now_s:
                loop.begin(begun_s + due_s[position], now_s)
                position += 1
            until_s = begun_s + due_s[position] if position < len(due_s) else ends_s
            loop.turn(max(0.0, until_s - time.perf_counter()))
        elapsed_s, cpu_s = time.perf_counter() - begun_s, time.thread_time() - begun_cpu_s
    return _offered(loop.ended, loop.lags, len(due_s), deadline_s=deadline_s, share=cpu_s / elapsed_s)


class _Loop:
    """The connections of ``post_openly``: idle ones, and those on which a request is on its way."""

    def __init__(self, port: int, request: bytes, stack: contextlib.ExitStack) -> None:
        self._port = port
        self._request = request
        self._stack = stack
        self._selector = stack.enter_context(selectors.DefaultSelector())
        self._idle: list[Client] = []
        self._left: dict[Client, memoryview] = {}  # of the request, by connection
        self.ended: list[tuple[str, float]] = []
        self.lags: list[float] = []

    @property
    def busy(self) -> bool:
        return bool(self._left)

    def begin(self, due_s: float, now_s: float) -> None:
        """One more request; a failure where no connection is left."""
        self.lags.append(now_s - due_s)
        if not self._idle and len(self._left) >= MOST_CONNECTIONS:
            self.ended.append(("failed", 0.0))
            return
        client = self._idle.pop() if self._idle else self._connected()
        client.sent_s = due_s
        self._left[client] = memoryview(self._request)
        self._send(client)

    def turn(self, timeout_s: float) -> None:
        """Wait so long at the most for what connections bring."""
        for key, events in self._selector.select(timeout_s):
            client: Client = key.data
            if events & selectors.EVENT_WRITE and client in self._left:
                self._send(client)
            if events & selectors.EVENT_READ:
                self._read(client)

    def _connected(self) -> Client:
        sock = self._stack.enter_context(socket.create_connection(("127.0.0.1", self._port)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        client = Client(sock=sock)
        self._selector.register(sock, selectors.EVENT_READ, client)
        return client

    def _send(self, client: Client) -> None:
        left = self._left[client]
        try:
            left = left[client.sock.send(left) :]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client, "failed")
            return
        self._left[client] = left
        events = selectors.EVENT_READ | selectors.EVENT_WRITE if left else selectors.EVENT_READ
        self._selector.modify(client.sock, events, client)

    def _read(self, client: Client) -> None:
        try:
            whole = client.read()
        except BlockingIOError:
            return
        except (RuntimeError, OSError):
            self._drop(client, "failed")
            return
        if not whole:
            return
        closing = CLOSING in client.taken().partition(b"\r\n\r\n")[0].lower()
        said = "good" if client.status == 200 else "refused" if client.status in REFUSALS else "failed"
        if closing or self._left.get(
            client
        ):  # it was answered before it was sent: what follows would be read as another request
            self._drop(client, said)
        else:
            self._end(client, said)
            self._idle.append(client)

    def _end(self, client: Client, said: str) -> None:
        if self._left.pop(client, None) is not None:
            self.ended.append((said, time.perf_counter() - client.sent_s))

    def _drop(self, client: Client, said: str) -> None:
        self._end(client, said)
        if client in self._idle:
            self._idle.remove(client)
        self._selector.unregister(client.sock)
        client.sock.close()


def _offered(
    ended: Sequence[tuple[str, float]], lags: Sequence[float], asked: int, *, deadline_s: float, share: float
) -> Offered:
    times = {said: np.array([took for word, took in ended if word == said]) for said in ("good", "refused")}
    in_time = times["good"][times["good"] <= deadline_s]
    late = len(times["good"]) - len(in_time)
    refused = times["refused"]
    return Offered(
        asked=asked,
        good=len(in_time),
        refused=len(refused),
        late=late,
        failed=asked - len(in_time) - late - len(refused),
        refused_p99_ms=_percentile_ms(refused, 99),
        good_p50_ms=_percentile_ms(in_time, 50),
        good_p99_ms=_percentile_ms(in_time, 99),
        lag_p99_ms=_percentile_ms(np.array(lags), 99),
        own_share=share,
    )


def _percentile_ms(times_s: NDArray[np.float64], share: float) -> float | None:
    return 1e3 * float(np.percentile(times_s, share)) if len(times_s) else None
