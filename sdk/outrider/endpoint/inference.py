"""``/v2/models/M/infer`` as an ASGI application of its own, and what it shares with the other routes: token, refusals.

It speaks ASGI itself: Starlette's request and response objects would take as long as reading the tensors does.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine

from starlette.types import Receive, Scope, Send

from outrider.endpoint import callers
from outrider.endpoint.calls import KEY, Call, Ended, values_of
from outrider.endpoint.exchange import Exchange, Reply, whole
from outrider.endpoint.intake import Intake, Place, Visit
from outrider.endpoint.models import Models
from outrider.endpoint.refusals import Refused, refusal
from outrider_runtimes import oip
from outrider_runtimes.errors import InputError

log = logging.getLogger(__name__)

SOON_SENT_BYTES = 64 << 10  # uvicorn waits for a caller to read on where more than this is unsent

_LENGTH_HEADER = oip.LENGTH_HEADER.lower().encode()


class Inference:
    """The handler over the models, and the requests that are inside.

    Attributes:
        guarded: whether somebody sees to it that the loop is replaced where a call is stuck in it; only then are quick
            models run in it.
        here: the one that the loop submits, or runs itself, at this moment; for other threads to see.
    """

    def __init__(self, models: Models, limits: oip.Limits, intake: Intake, token: str | None) -> None:
        self._models = models
        self._limits = limits
        self._intake = intake
        self._token = token
        self._inside: set[Exchange] = set()
        self._leaving: list[Place] = []
        self.guarded = False
        self.here: Exchange | None = None
        self._ended: Ended | None = None

    def cut(self, why: Exception) -> None:
        """End what waits for an answer. In the loop's thread."""
        for exchange in tuple(self._inside):
            exchange.call.cut(why)

    def leave_all(self) -> list[Call]:
        """Take what is inside for gone: the loop that it belongs to is stuck. In any thread."""
        inside, self._inside, self.here = self._inside, set(), None
        for exchange in tuple(inside):
            self._close(exchange)
        self._leave()
        return [exchange.call for exchange in inside]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request that came through ``Calls``, its route's parameters in ``path_params``."""
        try:
            exchange = self._opened(scope)
            try:
                self._ask(exchange, await self._received(receive, exchange.visit))
                reply = await exchange.wait(self._here())
            finally:
                self._close(exchange)
        except Exception as error:
            reply = refused(scope, error)
        await send({"type": "http.response.start", "status": reply.status, "headers": reply.headers})
        if len(reply.body) <= SOON_SENT_BYTES:
            await send({"type": "http.response.body", "body": reply.body})
            return
        with self._intake.sending(len(reply.body)):
            await send({"type": "http.response.body", "body": reply.body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})  # waits until nearly all of it was taken

    def at_once(self, scope: Scope, body: bytes) -> Reply | Coroutine[None, None, Reply]:
        """The reply to one whose body is here whole; where that has to wait for an answer, what waits for it."""
        try:
            exchange = self._opened(scope)
        except Exception as error:
            return refused(scope, error)
        try:
            self._take(len(body), exchange.visit)
            self._ask(exchange, body)
            if (reply := exchange.reply()) is None:
                return self._later(exchange, scope)
        except Exception as error:
            reply = refused(scope, error)
        self._close(exchange)
        return reply

    def refusal(self, scope: Scope) -> Reply | None:
        """What a request whose head is here is refused with already, looked at as a call of this would; else None."""
        try:
            exchange = self._opened(scope)
        except Exception as error:
            return refused(scope, error)
        self._close(exchange)
        return None

    async def _later(self, exchange: Exchange, scope: Scope) -> Reply:
        try:
            return await exchange.wait(self._here())
        except Exception as error:
            return refused(scope, error)
        finally:
            self._close(exchange)

    def _opened(self, scope: Scope) -> Exchange:
        """All that the head is looked at for. Raises Refused, UnknownModel."""
        call: Call = scope[KEY]
        call.infers = True
        check_token(scope, self._token)
        parameters = scope["path_params"]
        version = parameters.get("version")
        served = self._models.find(parameters["model"], version)
        call.model, call.version = served.name, str(served.version)
        json_bytes = self._announced(scope)
        visit = self._intake.visit(served.name, estimate_ms=served.runner.estimate_ms)
        exchange = Exchange(call, served, version, json_bytes, visit)
        self._inside.add(exchange)
        return exchange

    def _ask(self, exchange: Exchange, body: bytes | bytearray) -> None:
        exchange.read(body, self._limits)
        self.here = exchange
        try:
            exchange.ask(here=self.guarded)
        finally:
            self.here = None

    def _close(self, exchange: Exchange) -> None:
        """What is answered in the turn in which it was read keeps its place until that ends: what else was read then
        has waited beside it, and as many as may wait are answered in one turn.
        """
        self._inside.discard(exchange)
        if (place := exchange.close()) is None:
            return
        if not exchange.ran_here:
            place.leave()
            return
        if not self._leaving:
            asyncio.get_running_loop().call_soon(self._leave)
        self._leaving.append(place)

    def _leave(self) -> None:
        while self._leaving:
            self._leaving.pop().leave()

    def _announced(self, scope: Scope) -> int | None:
        """The length of the body's JSON, as its head says it. Raises Refused for what the head alone rules out."""
        if any(value.lower() != b"identity" for value in values_of(scope, b"content-encoding")):
            raise Refused(415, "compressed", "compressed requests are not taken")
        json_bytes = _count(scope, _LENGTH_HEADER, oip.LENGTH_HEADER)
        announced = _count(scope, b"content-length", "content-length")
        if announced is not None and announced > self._limits.body_bytes:
            raise self._too_long(announced)
        return json_bytes

    async def _received(self, receive: Receive, visit: Visit) -> bytes | bytearray:
        body: bytes | bytearray = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(499, "gone", "the caller hung up")
            part = message.get("body", b"")
            self._take(len(part), visit)
            if not body:  # what comes in one piece is not copied
                body = part
            elif isinstance(body, bytearray):
                body += part
            else:
                body = bytearray(body) + part
            more = message.get("more_body", False)
        return body

    def _take(self, more: int, visit: Visit) -> None:
        """So many bytes of its body came. Raises Refused."""
        if visit.held_bytes + more > self._limits.body_bytes:
            raise self._too_long(visit.held_bytes + more)
        visit.hold(more)

    def _too_long(self, size: int) -> Refused:
        most = self._limits.body_bytes
        return Refused(413, "too_long", f"the body has {size} bytes or more, at most {most} are taken")

    def _here(self) -> Ended:
        """That of the loop that runs."""
        loop = asyncio.get_running_loop()
        if self._ended is None or self._ended.loop is not loop:
            self._ended = Ended(loop)
        return self._ended


def check_token(scope: Scope, token: str | None) -> None:
    """Raises Refused (401) unless the request brings the token, where one is asked for."""
    if token is not None:
        callers.check_token(values_of(scope, b"authorization"), token)


def refused(scope: Scope, error: Exception) -> Reply:
    """The reply to a request that is not answered: JSON, with no path and no traceback in it."""
    call: Call = scope[KEY]
    why = refusal(error)
    if why.status == 500:
        log.error("a request to %s failed: %s", scope["path"], error, exc_info=why.reason == "fault" and error)
    call.reason = why.reason
    headers = [(b"content-type", b"application/json")]
    if why.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if why.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % why.retry_after_s))
    return whole(why.status, headers, json.dumps({"error": str(why), "request_id": call.id}).encode())


def _count(scope: Scope, header: bytes, spelt: str) -> int | None:
    """A header that is a number of bytes; None where it was not sent. ``spelt``: as an error names it."""
    values = values_of(scope, header)
    if not values:
        return None
    if len(values) > 1 or not (values[0].isdigit() and len(values[0]) < 16):
        raise InputError(f"the header {spelt} is not one number of bytes")
    return int(values[0])
