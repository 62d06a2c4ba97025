"""The Open Inference Protocol v2 over HTTP, from the client's side: see ``remote``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from outrider_runtimes import oip
from outrider_runtimes._transport import (
    MAX_METADATA_BYTES,
    Described,
    Exchanged,
    bearer,
    check_time_to_decode,
    described,
    printable,
    timeout_us,
)
from outrider_runtimes._wire import Body, HttpReply
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import DeadlineExceeded, OutriderError, RemoteRefused, ReplyError
from outrider_runtimes.http import HttpClient, Origin
from outrider_runtimes.tensors import Tensors
from outrider_runtimes.tls import AnyTls

MAX_RETRY_AFTER_DIGITS = 6
# As a reply's headers are spelled here.
LENGTH_HEADER = oip.LENGTH_HEADER.lower()


class HttpTransport:
    """Raises ConfigError for a token or TLS that cannot be used."""

    def __init__(
        self, origin: Origin, *, model: str, tls: AnyTls | None, token: str | None, max_reply_bytes: int, threads: int
    ) -> None:
        self._where = f"{origin.url}, model {model!r}"
        self._path = f"/v2/models/{quote(model, safe='')}"
        authorization = bearer(origin, token)
        self._headers = {} if authorization is None else {"Authorization": authorization}
        self._max_reply_bytes = max_reply_bytes
        self._limits = oip.Limits(body_bytes=max_reply_bytes)
        self._client = HttpClient(origin, tls=tls, max_idle=threads)
        self._head = self._client.head("POST", f"{self._path}/infer", self._headers)

    def describe(self, deadline: Deadline) -> Described:
        """As Transport says."""
        extensions = self._get("/v2", deadline).get("extensions")
        binary = isinstance(extensions, list) and oip.BINARY_EXTENSION in extensions
        return described(self._get(self._path, deadline), binary=binary)

    def infer(
        self, inputs: Tensors, *, id: str, outputs: Sequence[str] | None, described: Described, deadline: Deadline
    ) -> Exchanged:
        """As Transport says."""
        message = oip.encode_request(
            inputs, id=id, timeout_us=timeout_us(deadline), binary=described.binary, outputs=outputs
        )
        body = Body(*message.parts)
        sent_ns = time.perf_counter_ns()
        head = self._head + message.head(body.size)
        http = self._client.send(head, body, deadline, self._max_reply_bytes)
        received_ns = time.perf_counter_ns()
        return Exchanged(self._decoded(http, deadline), sent_ns, received_ns)

    def close(self) -> None:
        """As Transport says."""
        self._client.close()

    def _decoded(self, http: HttpReply, deadline: Deadline) -> oip.Reply:
        if http.status != 200:
            raise self._refused(http, deadline)
        length = http.headers.get(LENGTH_HEADER)
        if length is not None and not (length.isascii() and length.isdigit() and len(length) < 16):
            raise ReplyError(f"{oip.LENGTH_HEADER} of the reply is {length[:32]!r}")
        json_bytes = None if length is None else int(length)
        document_bytes = len(http.body) if json_bytes is None else json_bytes
        check_time_to_decode(http.body, document_bytes, deadline)
        return oip.decode_reply(http.body, json_bytes, limits=self._limits)

    def _refused(self, http: HttpReply, deadline: Deadline) -> OutriderError:
        said = _message(http, deadline)
        hint = "redirects are not followed: use the address it names" if 300 <= http.status < 400 else ""
        return RemoteRefused(
            f"{self._where}: status {http.status}" + (f": {said}" if said else ""),
            status=http.status,
            retry_after_s=_retry_after_s(http.headers),
            hint=hint,
        )

    def _get(self, target: str, deadline: Deadline) -> Mapping[str, Any]:
        http = self._client.get(target, headers=self._headers, deadline=deadline, max_reply_bytes=MAX_METADATA_BYTES)
        if http.status != 200:
            raise self._refused(http, deadline)
        check_time_to_decode(http.body, len(http.body), deadline)
        return oip.decode_json(http.body, ReplyError)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds only: a date would have to be compared with a clock that is the server's."""
    value = headers.get("retry-after", "")
    usable = value.isascii() and value.isdigit() and len(value) <= MAX_RETRY_AFTER_DIGITS
    return float(value) if usable else None


def _message(http: HttpReply, deadline: Deadline) -> str:
    """What the server says of its refusal; empty when that cannot be told, or not in time."""
    try:
        check_time_to_decode(http.body, len(http.body), deadline)
        return printable(oip.decode_json(http.body, ReplyError).get("error"))
    except (ReplyError, DeadlineExceeded):
        return ""
