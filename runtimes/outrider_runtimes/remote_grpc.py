"""The Open Inference Protocol v2 over gRPC, from the client's side, behind the extra ``[grpc]``: see ``remote``.

gRPC holds the deadline over name, connect, TLS and every byte. What it does on its own is switched off: its retries,
the proxies of the environment, configuration from DNS, and decompression, which has no bound.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from outrider_runtimes import oip, oip_grpc
from outrider_runtimes._forked import made_before_fork, tell_of_fork
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
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    MissingExtra,
    OutriderError,
    RemoteRefused,
    RemoteUnavailable,
    ReplyError,
    RunnerClosed,
)
from outrider_runtimes.http import Origin, check_tls
from outrider_runtimes.tensors import Tensors
from outrider_runtimes.tls import AnyTls, pem_of

# A server that comes back is found again within the second: its absence is the circuit breaker's business.
RECONNECT_MS = (50, 1000)
PUSHBACK = "grpc-retry-pushback-ms"
# With the code of a full queue, and "SERVER:" before it where that is who says it: a message that is longer than taken.
TOO_LONG = "Received message larger than max"
# How gRPC says here, or in its older versions, that it took a reply for too long or compressed.
BAD_REPLY = ("Stream removed", "Compression algorithm")
# https://grpc.io/docs/guides/status-codes, as https://cloud.google.com/apis/design/errors writes them in HTTP.
HTTP_STATUS = {
    "CANCELLED": 499,
    "UNKNOWN": 500,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "UNAUTHENTICATED": 401,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DATA_LOSS": 500,
}


class GrpcTransport:
    """Raises ConfigError for a URL, token or TLS that cannot be used, and MissingExtra."""

    def __init__(
        self, origin: Origin, *, model: str, tls: AnyTls | None, token: str | None, max_reply_bytes: int
    ) -> None:
        if origin.prefix:
            raise ConfigError(f"{origin.url}: gRPC has no paths", hint=f"write {origin.scheme}://{origin.address}")
        authorization = bearer(origin, token)
        check_tls(origin, tls)
        self._grpc = _imported()
        self._where = f"{origin.url}, model {model!r}"
        self._address = origin.address
        self._model = model
        self._metadata = () if authorization is None else (("authorization", authorization),)
        self._limits = oip.Limits(body_bytes=max_reply_bytes)
        self._closed = False
        self._forked = False
        self._channel = _channel(self._grpc, origin, tls, max_reply_bytes)
        self._describe = self._channel.unary_unary(oip_grpc.path("ModelMetadata"))
        self._infer = self._channel.unary_unary(oip_grpc.path("ModelInfer"))
        tell_of_fork(self)

    def describe(self, deadline: Deadline) -> Described:
        """As Transport says."""
        asked = oip_grpc.encode("ModelMetadataRequest", name=self._model)
        data = self._call(self._describe, asked, deadline)
        if len(data) > MAX_METADATA_BYTES:
            raise ReplyError(f"{self._where}: the metadata has more than {MAX_METADATA_BYTES} bytes")
        check_time_to_decode(data, len(data), deadline)
        return described(oip_grpc.decode_model_metadata(data), binary=True)

    def infer(
        self, inputs: Tensors, *, id: str, outputs: Sequence[str] | None, described: Described, deadline: Deadline
    ) -> Exchanged:
        """As Transport says."""
        asked = oip_grpc.encode_request(
            inputs, model=self._model, id=id, timeout_us=timeout_us(deadline), outputs=outputs
        )
        sent_ns = time.perf_counter_ns()
        data = self._call(self._infer, asked, deadline)
        received_ns = time.perf_counter_ns()
        return Exchanged(oip_grpc.decode_reply(data, limits=self._limits), sent_ns, received_ns)

    def close(self) -> None:
        """As Transport says."""
        self._closed = True
        if not self._forked:
            self._channel.close()

    def forked(self) -> None:
        """As ``Forked`` says. A channel's threads are not in the child, and gRPC would wait for them."""
        self._forked = True

    def _call(self, method: Any, asked: bytes, deadline: Deadline) -> bytes:
        if self._forked:
            raise made_before_fork(f"the gRPC client of {self._address}")
        timeout_s = deadline.timeout_s()
        try:
            data: bytes = method(asked, timeout=timeout_s, metadata=self._metadata)
        except self._grpc.RpcError as error:
            raise self._typed(error) from None
        except ValueError:  # how a closed channel refuses a call
            raise RunnerClosed(f"the client of {self._address} is closed") from None
        return data

    def _typed(self, error: Any) -> OutriderError:
        """What went wrong, as the caller is told. gRPC says in words alone whether it or the server is speaking."""
        if self._closed:
            return RunnerClosed(f"the connection to {self._address} was closed here")
        code, said = error.code().name, printable(error.details())
        if code == "DEADLINE_EXCEEDED":
            return DeadlineExceeded(f"no whole reply from {self._address} in time")
        trailing = dict(error.trailing_metadata() or ())
        if code == "UNAVAILABLE" and not trailing:
            return _unreachable(self._address, said)
        too_long = code == "RESOURCE_EXHAUSTED" and TOO_LONG in said
        bad = too_long or any(words in said for words in BAD_REPLY)
        if bad and not said.startswith("SERVER:") and not trailing:
            return ReplyError(f"{self._where}: {said}")
        return RemoteRefused(
            f"{self._where}: {code}" + (f": {said}" if said else ""),
            status=413 if too_long else HTTP_STATUS.get(code, 500),
            retry_after_s=_pushback_s(trailing.get(PUSHBACK)),
            hint="send fewer rows at once, or over HTTP, where the server may take more" if too_long else "",
        )


def _imported() -> Any:
    try:
        import grpc
    except ImportError:
        raise MissingExtra("grpcio", extra="grpc", purpose="an endpoint over gRPC") from None
    return grpc


def _channel(grpc: Any, origin: Origin, tls: AnyTls | None, max_reply_bytes: int) -> Any:
    options = [
        ("grpc.max_receive_message_length", max_reply_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.per_message_decompression", 0),
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.min_reconnect_backoff_ms", RECONNECT_MS[0]),
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS[0]),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_MS[1]),
    ]
    if not origin.encrypted:
        return grpc.insecure_channel(origin.address, options=options)
    pem = pem_of(tls)
    credentials = grpc.ssl_channel_credentials(pem.authority, pem.key, pem.certificate)
    return grpc.secure_channel(origin.address, credentials, options=options)


def _unreachable(address: str, said: str) -> RemoteUnavailable:
    if "CERTIFICATE" in said or "Hostname" in said or "handshake" in said.lower():
        return RemoteUnavailable(
            f"the certificate of {address} or of this client was refused: {said}",
            hint="pass tls=outrider.Tls(...) with the authority that signed it; check this machine's clock",
        )
    return RemoteUnavailable(f"{address}: {said}", unsent=said.startswith("failed to connect"))


def _pushback_s(value: object) -> float | None:
    """Milliseconds, of https://github.com/grpc/proposal/blob/master/A6-client-retries.md; negative is never."""
    text = value if isinstance(value, str) else ""
    return int(text) / 1000 if text.isascii() and text.isdigit() and len(text) < 10 else None
