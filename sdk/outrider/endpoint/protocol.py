"""uvicorn's HTTP protocol with the bounds that it lacks: on heads, chunks and pipelines, and on how slowly all come.

What breaks a bound is answered in JSON where nothing else is being answered on that connection, and the connection is
closed: not at once, but when what the caller still sends has been dropped for a moment, because a socket that is closed
over unread bytes is reset, and the caller would not see the answer.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from outrider.endpoint.calls import KEY, Call
from outrider.endpoint.corked import Corked
from outrider.endpoint.direct import Direct
from outrider.endpoint.exchange import Reply
from outrider.endpoint.inference import SOON_SENT_BYTES

MAX_HEAD_BYTES = 32 << 10
MAX_HEADERS = 100
MAX_PIPELINE = 16
# 64 MiB in pieces of 4 KiB. Each chunk costs a call into Python; what carries one byte is there for that cost alone.
MAX_CHUNKS = 16384
# Connections that are answered, and those that may be open at all: one more takes the place of one that waits for its
# caller's next request; where there is none such, those up to the second bound are told 503, the rest nothing.
# Together they stay under the 1024 files that a process may usually have open.
MAX_CONNECTIONS = 512
MAX_OPEN = 768


class _Refused(Exception):
    """Raised inside the parser's callbacks, which ends the parse; the protocol then sends the refusal."""


class _Answered:
    """Stands where uvicorn has the cycle of the last request, for one that was answered without a cycle."""

    scope: ClassVar[dict[str, Any]] = {}
    response_started = response_complete = keep_alive = True
    disconnected = False
    message_event = asyncio.Event()  # nobody waits for it


class _Waiting(_Answered):
    """The same for one that is whole and waits for its answer."""

    def __init__(self, scope: dict[str, Any]) -> None:
        self.scope = scope  # type: ignore[misc]
        self.response_started = self.response_complete = False


class BoundedProtocol(HttpToolsProtocol):
    """Refuses a head beyond its bounds with 431, a request that does not come to its end with 408.

    Args:
        turned_away: called with the status of each request that is refused here, before it is a request.
        direct: the short way, for a POST on a connection on which no other waits for its reply; None: there is none.
    """

    head_timeout_s = 10.0
    body_timeout_s = 60.0  # 64 MiB at a little over 1 MB/s
    linger_s = 2.0
    read_timeout_s = 30.0  # for a caller to read on where it has stopped
    unread_timeout_s = 5.0  # for a body that was refused before it was read

    def __init__(
        self,
        *args: Any,
        turned_away: Callable[[int], None] = lambda status: None,
        direct: Direct | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._turned_away = turned_away
        self._direct = direct
        self._parts: list[bytes] | None = None  # of a body that may be whole when this read ends
        self._refusal: tuple[int, str] | None = None
        self._lingering = False
        self._in_head = False
        self._whole = True
        self._events = 0
        self._parsed_bytes = 0
        self._quiet_bytes = 0
        self._chunks = 0
        self._due_s = math.inf
        self._timer: asyncio.TimerHandle | None = None  # looks at that point, or before it and then once more
        self._reading_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection; its first head must come in time."""
        super().connection_made(cast("asyncio.Transport", Corked(transport, self.loop)))
        if len(self.connections) > MAX_OPEN:
            transport.abort()
        self._expect(self.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it, and do not run what nobody waits for."""
        self._expect(None)
        if self._timer is not None:
            self._timer.cancel()
        self._expect_reading(None)
        call = None if self.cycle is None else cast("dict[str, Any]", self.cycle.scope).get(KEY)
        if isinstance(call, Call):
            call.hang_up()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, then bound what the parser keeps to itself: a head, a trailer or a chunk's header without an end."""
        if self._lingering or self.transport.is_closing():
            return
        events = self._events
        super().data_received(data)
        if self._parts is not None:
            self._go_on()
        self._quiet_bytes = 0 if self._events != events else self._quiet_bytes + len(data)
        if self._quiet_bytes > MAX_HEAD_BYTES and not (self._lingering or self.transport.is_closing()):
            self._refusal = (431, "the request's head, or what stands between its chunks, is too long")
            self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong as JSON, unless an earlier request on this connection waits for its reply, and close."""
        status, text = self._refusal or (400, "not a valid HTTP request")
        self._turned_away(status)
        body = json.dumps({"error": text}).encode()
        head = [
            STATUS_LINE[status],
            b"content-type: application/json\r\n",
            b"content-length: %d\r\n" % len(body),
            b"retry-after: 1\r\n" if status == 503 else b"",
            b"connection: close\r\n\r\n",
        ]
        cycle = self.cycle
        idle = cycle is None or cycle.response_complete
        own_body = not (idle or self._in_head or self._whole or self.pipeline or cycle.response_started)
        if idle or own_body:
            self.transport.write(b"".join([*head, body]))
        if own_body:  # who reads that body is told that it ends here, and may not answer any more
            cycle.disconnected = True
            cycle.message_event.set()
        self._linger(answered=idle or own_body)

    @property
    def unread(self) -> bool:
        """Whether its caller has yet to read what was written for it."""
        return self.flow.write_paused

    def give_up(self) -> None:
        """The endpoint is being stopped: refuse the request that has not come to its end, drop what is not read."""
        if self.unread:
            self.transport.abort()
        elif not (self._whole or self._lingering or self.transport.is_closing()):
            self._refusal = (503, "the endpoint was stopped before the request was whole")
            self.send_400_response("")

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._in_head, self._whole = True, False
        self._parsed_bytes = self._chunks = 0
        self._events += 1
        self._expect(self.head_timeout_s)

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        self._parsed_bytes += len(url)
        if self._parsed_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A whole header; or one of a trailer, which is counted and dropped: it would come too late to be obeyed."""
        self._parsed_bytes += len(name) + len(value) + 4
        if self._parsed_bytes > MAX_HEAD_BYTES:
            self._refuse_head()
        if len(self.headers) >= MAX_HEADERS:
            self._refuse(431, f"the request has more than {MAX_HEADERS} headers")
        if not self._in_head:
            return
        name = name.lower()
        value = value.rstrip(b" \t")  # no part of it, and the parser takes off only what stands before
        if name == b"transfer-encoding" and value.strip().lower() != b"chunked":
            self._refuse(501, "a body comes with its length or in chunks, in no other coding")
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head ends; the body must come in time."""
        if len(self.pipeline) >= MAX_PIPELINE:
            self._refuse(400, f"more than {MAX_PIPELINE} requests were sent ahead of their replies")
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            self._refuse(505, "HTTP 1.0 and 1.1 are spoken here")
        if len(self.connections) > MAX_CONNECTIONS and not self._made_room():
            self._refuse(503, f"more than {MAX_CONNECTIONS} connections are open")
        self._in_head = False
        self._events += 1
        self._expect(self.body_timeout_s)
        if self._direct is None or not self._may_go_direct(self._direct):
            super().on_headers_complete()
        elif (refusal := self._direct.refusal(self.url, cast("dict[str, Any]", self.scope))) is None:
            self._parts = []
        else:
            self.cycle = cast("Any", _Answered)
            self._reply(refusal)
            self.on_response_complete()

    def on_chunk_header(self) -> None:
        """A chunk begins."""
        self._events += 1
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            self._refuse(413, f"the body comes in more than {MAX_CHUNKS} chunks")

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._events += 1
        if self._parts is None:
            super().on_body(body)
        else:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._whole = True
        self._events += 1
        if self._parts is not None and self._direct is not None:
            parts, self._parts = self._parts, None
            self._take(self._direct, parts[0] if len(parts) == 1 else b"".join(parts))
            return
        answered = self.cycle is not None and self.cycle.response_complete  # before it was whole
        self._expect(self.timeout_keep_alive if answered else None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A reply is whole; where it came before its request was, the rest of that is read for a while and dropped.

        uvicorn's makes a timer here and ends it when the next request comes; ours runs already.
        """
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._whole:
            self._expect(self.timeout_keep_alive)
        elif not self._in_head:
            self._expect(self.unread_timeout_s)

    def pause_writing(self) -> None:
        """The caller does not read what it asked for."""
        super().pause_writing()
        self._expect_reading(self.read_timeout_s)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        self._expect_reading(None)

    def _may_go_direct(self, direct: Direct) -> bool:
        """Only where nothing but the reply is left to be done for a request, and it can be written at once."""
        parser = self.parser
        idle = (self.cycle is None or self.cycle.response_complete) and not self.flow.write_paused
        plain = parser.should_keep_alive() and not parser.should_upgrade() and not self.expect_100_continue
        ours = idle and plain and parser.get_method() == b"POST" and parser.get_http_version() == "1.1"
        return ours and direct.knows(self.url)

    def _go_on(self) -> None:
        """The rest of its body is still to come: what is here of it goes the application's way."""
        parts, self._parts = self._parts or [], None
        if self._lingering or self.transport.is_closing():
            return
        super().on_headers_complete()
        for part in parts:
            super().on_body(part)

    def _take(self, direct: Direct, body: bytes) -> None:
        """A request is here whole."""
        scope = cast("dict[str, Any]", self.scope)
        waiting = _Waiting(scope)
        self.cycle = cast("Any", waiting)
        self._expect(None)
        answer = direct.answer(self.url, scope, body)
        if isinstance(answer, Reply) and len(answer.body) <= SOON_SENT_BYTES:
            self._reply(answer)
            self._complete(waiting, answer)
            return
        task = self.loop.create_task(self._later(direct, waiting, answer))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    async def _later(self, direct: Direct, waiting: _Waiting, answer: Reply | Coroutine[None, None, Reply]) -> None:
        reply = answer if isinstance(answer, Reply) else await answer
        if waiting.disconnected:
            return
        waiting.response_started = True
        self._reply(reply)
        if len(reply.body) > SOON_SENT_BYTES:
            with direct.intake.sending(len(reply.body)):
                await self.flow.drain()
        self._complete(waiting, reply)

    def _complete(self, waiting: _Waiting, reply: Reply) -> None:
        """Its reply was written."""
        waiting.response_started = waiting.response_complete = True
        if not waiting.keep_alive or (b"connection", b"close") in reply.headers:
            self.transport.close()
        self.on_response_complete()

    def _reply(self, reply: Reply) -> None:
        """What of the request still comes is read and dropped, as after any reply that is sooner than its request."""
        parts = [STATUS_LINE[reply.status]]
        for name, value in (*self.server_state.default_headers, *reply.headers):
            parts += (name, b": ", value, b"\r\n")
        self.transport.write(b"".join([*parts, b"\r\n", reply.body]))

    def _made_room(self) -> bool:
        """Close a connection that waits for its caller's next request; false where none does."""
        for other in self.connections:
            if isinstance(other, BoundedProtocol) and other._waits_for_more() and not other.transport.is_closing():
                other.transport.close()
                return True
        return False

    def _waits_for_more(self) -> bool:
        return self._whole and not self._lingering and self.cycle is not None and self.cycle.response_complete

    def _expect_reading(self, timeout_s: float | None) -> None:
        if self._reading_timer is not None:
            self._reading_timer.cancel()
        self._reading_timer = None if timeout_s is None else self.loop.call_later(timeout_s, self.transport.abort)

    def _refuse_head(self) -> None:
        self._refuse(431, f"the request's head has more than {MAX_HEAD_BYTES} bytes")

    def _refuse(self, status: int, text: str) -> None:
        self._refusal = (status, text)
        raise _Refused(text)

    def _expect(self, timeout_s: float | None) -> None:
        """Something must come within so long; None: nothing must. Mostly a timer of an earlier request runs still."""
        self._due_s = math.inf if timeout_s is None else self.loop.time() + timeout_s
        if timeout_s is None or (self._timer is not None and self._timer.when() <= self._due_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(timeout_s, self._look)

    def _look(self) -> None:
        self._timer = None
        left_s = self._due_s - self.loop.time()
        if left_s <= 0.0:
            self._too_slow()
        elif left_s < math.inf:
            self._timer = self.loop.call_later(left_s, self._look)

    def _too_slow(self) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        if self._lingering or (not self._in_head and self.cycle is not None and self.cycle.response_complete):
            self.transport.close()
            return
        self._refusal = (408, "the request did not come in time")
        self.send_400_response("")

    def _linger(self, *, answered: bool) -> None:
        """Drop what comes, and close when the caller does, or in a moment, in which an earlier reply may still go."""
        self._lingering = True
        self.pipeline.clear()
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        if answered and self.transport.can_write_eof():
            self.transport.write_eof()
        self._expect(self.linger_s)
