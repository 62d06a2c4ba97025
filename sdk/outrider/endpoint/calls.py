"""One request over HTTP as the endpoint knows it: its id, what became of it, and how it is cut short."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import re
import secrets
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from datetime import datetime, timezone

from starlette.types import Message, Scope, Send

from outrider.endpoint.callers import id_of
from outrider.endpoint.intake import Intake
from outrider.endpoint.metrics import Metrics
from outrider.endpoint.refusals import Refused
from outrider_runtimes.deadline import Clock
from outrider_runtimes.errors import DeadlineExceeded, RunnerClosed
from outrider_runtimes.runner import Answer

KEY = "outrider.call"  # in the ASGI scope
ID_HEADER = "X-Request-ID"

# Between two answers of a model that is quick: others wait for less than its call takes.
FAST_S = 0.0003
LOOK_S = 0.001

# One JSON object a line at INFO, for every request; nobody hears it unless this logger is given a level and a handler.
access = logging.getLogger("outrider.endpoint.access")

_ID_HEADER = ID_HEADER.lower().encode()
# An encoded slash parts no segments; an encoded end of line ends no path, which the patterns of routes would let pass.
_PARTING = re.compile(rb"%(?:2f|0a)", re.IGNORECASE)


class Call:
    """What is known of one request. Its loop's thread alone touches it."""

    __slots__ = ("_cut", "_waiting", "begun_s", "id", "infers", "model", "reason", "status", "taken_s", "version")

    def __init__(self, id: str, begun_s: float) -> None:
        self.id = id
        self.begun_s = begun_s
        self.status = 0
        self.taken_s = 0.0
        self.reason = "ok"
        self.model = self.version = ""
        self.infers = False
        self._waiting: asyncio.Future[None] | None = None
        self._cut: Exception | None = None

    def check(self) -> None:
        """Raises what it was cut with before there was anything to wait for."""
        if self._cut is not None:
            raise self._cut

    async def wait(self, future: Future[Answer], ended: asyncio.Future[None], timeout_s: float) -> Answer:
        """The runner's answer, unless time passes or ``cut`` is called first; then what has not begun is not run.

        Args:
            ended: what ``Ended.of(future)`` gave.
        """
        timer = ended.get_loop().call_later(timeout_s, self._late)
        self._waiting = ended
        try:
            await ended
        except asyncio.CancelledError:
            future.cancel()
            raise self._cut or RunnerClosed("the request was cancelled") from None
        finally:
            self._waiting = None
            timer.cancel()
        if future.cancelled():
            raise RunnerClosed("the request was cancelled")
        return future.result()

    def cut(self, why: Exception) -> None:
        """End the wait for the answer with ``why``: the one there is, or the one that may follow."""
        if self._cut is None:
            self._cut = why
        if self._waiting is not None:
            self._waiting.cancel()

    def hang_up(self) -> None:
        """Its connection was lost: nobody will read the answer."""
        self.cut(Refused(499, "gone", "the caller hung up"))

    def _late(self) -> None:
        self.cut(DeadlineExceeded("the request's time passed before it was answered"))


class Ended:
    """Tells one loop which futures of other threads have ended: one call into the loop for all that end together.

    To wake the loop for each of many answers takes longer than to make them. So while answers come fast and more are
    waited for, those that are there are left for the last of them to tell, or for the loop, which looks of its own.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, clock: Clock = time.monotonic) -> None:
        self.loop = loop
        self._clock = clock
        self._ended: deque[asyncio.Future[None]] = deque()  # append and popleft are atomic, as a set's methods are
        self._waited: set[asyncio.Future[None]] = set()
        self._called = False
        self._looks = False
        self._fast = False
        self._last_s = -math.inf

    def of(self, future: Future[Answer]) -> asyncio.Future[None]:
        """Done in the loop as soon as ``future`` is, or a millisecond later, in whatever thread that ends."""
        waiting: asyncio.Future[None] = self.loop.create_future()
        self._waited.add(waiting)
        if self._fast and not self._looks:
            self._look_soon()
        future.add_done_callback(lambda _: self._tell(waiting))
        return waiting

    def _tell(self, waiting: asyncio.Future[None]) -> None:
        now_s = self._clock()
        self._fast, self._last_s = now_s - self._last_s < FAST_S, now_s
        self._waited.discard(waiting)
        self._ended.append(waiting)
        if self._called:  # it is unset before the loop looks
            return
        if self._fast and self._looks and self._waited:  # so is this
            return
        self._called = True
        with suppress(RuntimeError):  # the loop was closed: nobody waits in it
            self.loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        self._called = False
        while self._ended:
            waiting = self._ended.popleft()
            if not waiting.done():
                waiting.set_result(None)

    def _look_soon(self) -> None:
        self._looks = True
        self.loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        """As long as a look finds something, another follows."""
        self._looks = False
        if self._ended:
            self._take()
            self._look_soon()


class Calls:
    """Makes a Call of each request, counts it, logs it and marks its reply.

    Replies carry ``X-Request-ID``: the caller's own where ``id_of`` takes it, else a new one.
    Once the endpoint is being stopped they say ``Connection: close`` too.
    """

    def __init__(
        self,
        *,
        metrics: Metrics,
        intake: Intake,
        new_id: Callable[[], str] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """``now`` is seconds since 1970, for the log alone."""
        self._metrics = metrics
        self._intake = intake
        self._new_id = new_id or numbered()
        self._now = now

    def begin(self, scope: Scope) -> Call:
        """The call of a request over HTTP whose head is here."""
        call = Call(id_of(values_of(scope, _ID_HEADER)) or self._new_id(), time.monotonic())
        scope[KEY] = call
        raw = scope.get("raw_path") or b""
        if b"%" in raw and _PARTING.search(raw):
            scope["path"] = raw.decode("latin-1")
        return call

    def marking(self, call: Call, send: Send) -> Send:
        """``send`` for its reply."""

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.mark(call, message["status"], message["headers"])
            await send(message)

        return marked

    def mark(self, call: Call, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Its reply begins, with these headers, to which those of every reply are added."""
        call.status = status
        call.taken_s = time.monotonic() - call.begun_s  # however slowly the caller reads it
        headers.append((_ID_HEADER, call.id.encode()))
        if self._intake.stopping:
            headers.append((b"connection", b"close"))

    def end(self, call: Call, scope: Scope) -> None:
        """It was answered, or nobody waits for that any more."""
        seconds = call.taken_s
        if call.infers:
            self._metrics.observe(call.model, call.version, call.status, call.reason, seconds)
        if not access.isEnabledFor(logging.INFO):
            return
        client = scope.get("client")
        line = {
            "time": datetime.fromtimestamp(self._now(), timezone.utc).isoformat(timespec="milliseconds"),
            "request_id": call.id,
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": call.status,
            "reason": call.reason,
            "model": call.model or None,
            "version": call.version or None,
            "ms": round(seconds * 1e3, 3),
        }
        access.info("%s", json.dumps(line))

    def give_up(self, call: Call) -> None:
        """Count it as one that no answer came to; what comes of it after all is not counted. In any thread."""
        if call.infers:
            call.infers = False
            self._metrics.observe(call.model, call.version, 503, "stuck", time.monotonic() - call.begun_s)


def numbered() -> Callable[[], str]:
    """Makes ids that no other process makes: a random part drawn once, and a count. A draw for each would cost more."""
    begin, count = secrets.token_hex(4), itertools.count()
    return lambda: f"{begin}{next(count):08x}"


def values_of(scope: Scope, name: bytes) -> list[bytes]:
    """A header's values, as often as it was sent. ``name``: in lower case."""
    return [value for given, value in scope["headers"] if given == name]
