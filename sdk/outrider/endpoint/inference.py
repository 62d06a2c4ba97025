"""``/v2/models/M/infer`` as an ASGI application of its own, and what it shares with the other routes: token, refusals.

It speaks ASGI itself: Starlette's request and response objects would take as long as reading the tensors does.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import NamedTuple

from starlette.types import Receive, Scope, Send

from outrider.endpoint import callers
from outrider.endpoint.calls import KEY, Call, Ended, values_of
from outrider.endpoint.faces import MAX_TIME_S, check_rows, check_wanted, told, version_after
from outrider.endpoint.intake import Intake, Visit
from outrider.endpoint.models import Models, Served
from outrider.endpoint.refusals import Refused, not_finite, refusal
from outrider_runtimes import oip
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import InputError, NotFiniteError

log = logging.getLogger(__name__)

SOON_SENT_BYTES = 64 << 10  # uvicorn waits for a caller to read on where more than this is unsent

_LENGTH_HEADER = oip.LENGTH_HEADER.lower().encode()


class Reply(NamedTuple):
    """What is sent: whole, and its length is known."""

    status: int
    headers: dict[str, str]
    body: bytes

    def fields(self) -> list[tuple[bytes, bytes]]:
        """The headers as ASGI has them, the body's length among them."""
        fields = [(b"content-length", b"%d" % len(self.body))]
        fields += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in self.headers.items()]
        return fields


class Inference:
    """The handler over the models, and the requests that wait for an answer."""

    def __init__(self, models: Models, limits: oip.Limits, intake: Intake, token: str | None) -> None:
        self._models = models
        self._limits = limits
        self._intake = intake
        self._token = token
        self._waiting: set[Call] = set()
        self._ended: Ended | None = None

    def cut(self, why: Exception) -> None:
        """End what waits for an answer. In the loop's thread."""
        for call in tuple(self._waiting):
            call.cut(why)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request that came through ``Calls``, its route's parameters in ``path_params``."""
        call: Call = scope[KEY]
        call.infers = True
        try:
            check_token(scope, self._token)
            reply = await self._reply(call, scope, receive)
        except Exception as error:
            reply = refused(scope, error)
        await send({"type": "http.response.start", "status": reply.status, "headers": reply.fields()})
        if len(reply.body) <= SOON_SENT_BYTES:
            await send({"type": "http.response.body", "body": reply.body})
            return
        held = self._intake.holding()
        try:
            held.become(len(reply.body), anyway=True)
            await send({"type": "http.response.body", "body": reply.body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})  # waits until nearly all of it was taken
        finally:
            held.free()

    def refusal(self, scope: Scope) -> Reply | None:
        """What a request whose head is here is refused with already, looked at as a call of this would; else None."""
        call: Call = scope[KEY]
        call.infers = True
        try:
            check_token(scope, self._token)
            self._let_in(call, scope)
        except Exception as error:
            return refused(scope, error)
        return None

    def _let_in(self, call: Call, scope: Scope) -> tuple[Served, int | None, Visit]:
        """All that the head is looked at for: the model, the length of the body's JSON, and a visit to be entered."""
        parameters = scope["path_params"]
        served = self._models.find(parameters["model"], parameters.get("version"))
        call.model, call.version = served.name, str(served.version)
        json_bytes = self._announced(scope)
        return served, json_bytes, self._intake.visit(served.name, estimate_ms=served.runner.estimate_ms)

    async def _reply(self, call: Call, scope: Scope, receive: Receive) -> Reply:
        """The caller's time begins when its head is here."""
        served, json_bytes, visit = self._let_in(call, scope)
        with visit:
            body = await self._received(receive, visit)
            asked = oip.decode_request(body, json_bytes, limits=self._limits, files=oip.files_in(served.interface))
            if (more := asked.size_bytes - len(body)) > 0:
                visit.hold(more)
            del body  # its tensors are copies
            return await self._answered(call, served, asked, visit, scope["path_params"].get("version", ""))

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
            if len(body) + len(part) > self._limits.body_bytes:
                raise self._too_long(len(body) + len(part))
            visit.hold(len(part))
            if not body:  # what comes in one piece is not copied
                body = part
            elif isinstance(body, bytearray):
                body += part
            else:
                body = bytearray(body) + part
            more = message.get("more_body", False)
        return body

    def _too_long(self, size: int) -> Refused:
        most = self._limits.body_bytes
        return Refused(413, "too_long", f"the body has {size} bytes or more, at most {most} are taken")

    async def _answered(self, call: Call, served: Served, asked: oip.Request, visit: Visit, version: str) -> Reply:
        """``version``: the one that was asked for; empty for any."""
        check_wanted(served, asked)
        check_rows(served, asked)
        left_s = MAX_TIME_S if asked.timeout_us is None else min(MAX_TIME_S, asked.timeout_us / 1e6)
        deadline = Deadline(call.begun_s + left_s)
        visit.check_time(deadline.remaining_s())
        with visit.queued():
            self._waiting.add(call)
            try:
                if quick := served.quick:
                    await asyncio.sleep(0)  # what came together is asked together
                call.check()
                future = served.runner.submit(asked.inputs, deadline)
                answer = await call.wait(future, self._here().of(future, quick=quick), deadline.remaining_s())
            finally:
                self._waiting.discard(call)
        call.version = version_after(served, version)
        try:
            message = oip.encode_reply(
                answer.outputs, model=served.name, version=call.version, request=asked, parameters=told(served, answer)
            )
        except NotFiniteError as error:
            raise not_finite(error) from None
        return Reply(200, message.headers, message.body)

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
    headers = {"Content-Type": "application/json"}
    if why.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if why.retry_after_s is not None:
        headers["Retry-After"] = str(why.retry_after_s)
    return Reply(why.status, headers, json.dumps({"error": str(why), "request_id": call.id}).encode())


def _count(scope: Scope, header: bytes, spelt: str) -> int | None:
    """A header that is a number of bytes; None where it was not sent. ``spelt``: as an error names it."""
    values = values_of(scope, header)
    if not values:
        return None
    if len(values) > 1 or not (values[0].isdigit() and len(values[0]) < 16):
        raise InputError(f"the header {spelt} is not one number of bytes")
    return int(values[0])
