"""One request for an inference from its head to its reply, whatever brings its bytes: ASGI, or the short way."""

from __future__ import annotations

from typing import NamedTuple

from outrider.endpoint.calls import Call, Ended
from outrider.endpoint.faces import MAX_TIME_S, check_rows, check_wanted, told, version_after
from outrider.endpoint.intake import Place, Visit
from outrider.endpoint.models import Served
from outrider.endpoint.refusals import not_finite
from outrider_runtimes import oip
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import NotFiniteError
from outrider_runtimes.runner import Answer


class Reply(NamedTuple):
    """What is sent, with headers as ASGI has them; see ``whole``."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def whole(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> Reply:
    """A reply with its length among its headers."""
    return Reply(status, [(b"content-length", b"%d" % len(body)), *headers], body)


class Exchange:
    """One request for an inference, from its head to its answer, whatever brings its bytes.

    ``close`` is to be called at its end, and may be called from another thread before.
    """

    def __init__(self, call: Call, served: Served, version: str | None, json_bytes: int | None, visit: Visit) -> None:
        """Take what its head said; it is inside from now on. ``version``: the one that was asked for."""
        self.call = call
        self.visit = visit
        self._served = served
        self._version = version or ""
        self._json_bytes = json_bytes
        self._place: Place | None = None
        self._answer: Answer | None = None
        self.ran_here = False
        visit.enter()

    def read(self, body: bytes | bytearray, limits: oip.Limits) -> None:
        """Take its whole body, and a place in the queue. Its time begins when its head is here. Raises what
        ``refusal`` knows.
        """
        call, served = self.call, self._served
        asked = oip.decode_request(body, self._json_bytes, limits=limits, files=served.files)
        if (more := asked.size_bytes - len(body)) > 0:
            self.visit.hold(more)
        check_wanted(served, asked)
        check_rows(served, asked)
        left_s = MAX_TIME_S if asked.timeout_us is None else min(MAX_TIME_S, asked.timeout_us / 1e6)
        deadline = Deadline(call.begun_s + left_s)
        self.visit.check_time(deadline.remaining_s())
        self._place = self.visit.queued()
        self._place.enter()
        call.check()
        self._asked, self._deadline = asked, deadline

    def ask(self, *, here: bool) -> None:
        """Submit it; or have it answered in this thread, where ``here`` allows it and it is quick. Raises what the
        runner does.
        """
        inputs, served = self._asked.inputs, self._served
        if here:
            self._answer = served.run_here(inputs, self._deadline)
        self.ran_here = self._answer is not None
        if not self.ran_here:
            self._future = served.runner.submit(inputs, self._deadline)

    async def wait(self, here: Ended) -> Reply:
        """The reply, when the answer is there. Raises what ``Call.wait`` does."""
        if self._answer is None:
            ended = here.of(self._future)
            self._answer = await self.call.wait(self._future, ended, self._deadline.remaining_s())
        return self._replied(self._answer)

    def reply(self) -> Reply | None:
        """The reply, where the answer is there already."""
        return None if self._answer is None else self._replied(self._answer)

    def _replied(self, answer: Answer) -> Reply:
        served = self._served
        self.call.version = version_after(served, self._version)
        try:
            message = oip.encode_reply(
                answer.outputs,
                model=served.name,
                version=self.call.version,
                request=self._asked,
                parameters=told(served, answer),
            )
        except NotFiniteError as error:
            raise not_finite(error) from None
        return whole(200, message.fields, message.body)

    def close(self) -> Place | None:
        """It is not inside any more. Again is harmless. Returns its place in the queue, still to be left."""
        self.visit.leave()
        return self._place
