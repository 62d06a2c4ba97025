"""The gRPC face of an endpoint: the same models, bounds, refusals and counts as over HTTP. Needs the extra ``[grpc]``.

| status | for these of ``refusals`` |
|---|---|
| INVALID_ARGUMENT | 400 |
| UNAUTHENTICATED | 401 |
| NOT_FOUND | 404 |
| RESOURCE_EXHAUSTED | 429, ``no_memory``, ``no_time``; a message beyond its bound, more calls at once than threads |
| CANCELLED | 499; a message that is not whole in time |
| INTERNAL | 500 |
| UNAVAILABLE | ``stopping`` |
| DEADLINE_EXCEEDED | 504 |
| UNIMPLEMENTED | model control, shared memory, trace, streams |

The time that a caller has is that of its gRPC deadline or of the parameter ``timeout``, whichever is shorter. Where it
may be worth to come again, ``grpc-retry-pushback-ms`` in the trailing metadata says when.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from outrider._version import __version__
from outrider.endpoint import callers
from outrider.endpoint.faces import (
    LIMITS,
    MAX_TIME_S,
    check_rows,
    check_wanted,
    described,
    is_ready,
    told,
    version_after,
)
from outrider.endpoint.grpc_reading import AT_ONCE, WITHIN_S, Reading
from outrider.endpoint.intake import Held, Intake
from outrider.endpoint.listening import Listening, listener
from outrider.endpoint.metrics import Metrics
from outrider.endpoint.models import Models, Served
from outrider.endpoint.refusals import RETRY_AFTER_S, Refused, refusal
from outrider_runtimes import oip, oip_grpc
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import ConfigError, DeadlineExceeded, InputError, MissingExtra
from outrider_runtimes.runner import Answer

try:
    import grpc
except ImportError:
    raise MissingExtra("grpcio", extra="grpc", purpose="serving over gRPC") from None

log = logging.getLogger(__name__)

PUSHBACK = "grpc-retry-pushback-ms"
REQUEST_ID = "x-request-id"
SPARE_THREADS = 16  # for health and metadata, while as many requests as may be wait for the models
MAX_THREADS = 256
MAX_METADATA_BYTES = 32 << 10
# grpc hands a message over only when it is whole: room for the longest is taken before it is asked for. What is longer
# goes over HTTP, which counts bytes as they come.
MAX_MESSAGE_BYTES = 8 << 20

_CODES: Mapping[int, str] = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_FULL = ("no_memory", "no_time")  # 503 over HTTP, where 429 is for one caller's many requests

Handler = Callable[[Any, Any], bytes]  # given the message, or what gives it, and grpc's context


class GrpcServer:
    """The service on a port of its own, with a thread for each call that is inside.

    Use it as a context manager around what serves HTTP: when that has drained, and lets nobody new in over either face,
    leaving the block ends what is left here.

    Args:
        models, intake, metrics: those of the HTTP face.
        queue: as many requests for one model as ``intake`` lets in.
        listening: where; TLS and client certificates as over HTTP.
        token: what callers must send as ``authorization: Bearer ...``; None asks for none. Health needs no token.
        limits: what a request may cost; a message has at most 8 MiB, whatever they say.

    Attributes:
        port: where it listens.

    Raises:
        ConfigError: an address or a certificate that cannot be used, or one that lets anyone in who was not let in.
    """

    message_timeout_s = WITHIN_S

    def __init__(
        self,
        models: Models,
        intake: Intake,
        metrics: Metrics,
        listening: Listening,
        *,
        queue: int,
        token: str | None = None,
        limits: oip.Limits = LIMITS,
    ) -> None:
        calls = min(MAX_THREADS - SPARE_THREADS, queue * len(models) + AT_ONCE)
        threads = calls + SPARE_THREADS
        message_bytes = min(MAX_MESSAGE_BYTES, limits.body_bytes)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="outrider-grpc")
        self._server = grpc.server(
            self._pool,
            interceptors=[_Guard(token, models, intake, metrics, message_bytes)],
            options=[
                ("grpc.max_receive_message_length", message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", MAX_METADATA_BYTES),
                ("grpc.so_reuseport", 0),  # else two endpoints share a port, and each gets half of the requests
                ("grpc.http2.bdp_probe", 0),  # else a window grows beyond 64 KiB before its message is asked for
                ("grpc.max_concurrent_streams", threads),  # of one connection
            ],
            maximum_concurrent_rpcs=threads,
        )
        self._reading = Reading(
            message_bytes=message_bytes, within_s=self.message_timeout_s, too_slow=lambda: metrics.turned_away(408)
        )
        methods = _Service(models, intake, metrics, limits, self._reading, calls=calls).methods()
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(oip_grpc.SERVICE, methods),))
        try:
            self.port = _bound(self._server, listening, secured=token is not None)
        except BaseException:
            self._reading.close()
            raise

    def __enter__(self) -> GrpcServer:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, and what is inside: to drain it first is to wait for ``Intake.inside``, which counts a reply too."""
        self._server.stop(grace=None).wait()
        self._pool.shutdown(wait=True)
        self._reading.close()


class _Guard:
    """Turns callers away before their message is read: those without the token, and all while there is no room."""

    def __init__(self, token: str | None, models: Models, intake: Intake, metrics: Metrics, message_bytes: int) -> None:
        self._estimates = {served.name: served.runner.estimate_ms for served in models}
        self._intake = intake
        self._metrics = metrics
        self._message_bytes = message_bytes
        self._token = token
        self._open = tuple(oip_grpc.path(name) for name in ("ServerLive", "ServerReady"))

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """As ``grpc.ServerInterceptor`` has it."""
        infers = details.method == oip_grpc.path("ModelInfer")
        try:
            self._check_token(details)
            if infers:
                self._intake.check_open(self._estimates, size=self._message_bytes)
            return continuation(details)
        except Refused as error:
            why = error

        def refuse(messages: Any, context: Any) -> bytes:
            if infers:  # for which model is not known
                self._metrics.observe("", "", why.status, why.reason, 0.0)
            _end(context, why, _id_of(context))
            return b""

        return grpc.stream_unary_rpc_method_handler(refuse)  # which does not ask for the message

    def _check_token(self, details: Any) -> None:
        if self._token is not None and details.method not in self._open:
            callers.check_token(_values_of(details.invocation_metadata, "authorization"), self._token)


class _Service:
    """The methods. Each takes a message's bytes and gives a message's bytes."""

    def __init__(
        self, models: Models, intake: Intake, metrics: Metrics, limits: oip.Limits, reading: Reading, *, calls: int
    ) -> None:
        """``calls``: of ModelInfer at once; beside them threads are left for health."""
        self._models = models
        self._intake = intake
        self._metrics = metrics
        self._limits = limits
        self._reading = reading
        self._room = threading.BoundedSemaphore(calls)
        self._decoding = threading.Lock()  # decoded, typed contents take ten times their bytes and more for a while

    def methods(self) -> dict[str, Any]:
        """By name, as ``grpc`` takes them."""
        handlers: dict[str, Handler] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ServerMetadata": self._about,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model,
        }
        found = {name: grpc.unary_unary_rpc_method_handler(_guarded(name, each)) for name, each in handlers.items()}
        # A stream of one message is the same on the wire; and grpc asks for a message of a stream when it is told to.
        found["ModelInfer"] = grpc.stream_unary_rpc_method_handler(_guarded("ModelInfer", self._infer))
        return found

    def _live(self, data: bytes, context: Any) -> bytes:
        return oip_grpc.encode("ServerLiveResponse", live=True)

    def _ready(self, data: bytes, context: Any) -> bytes:
        return oip_grpc.encode("ServerReadyResponse", ready=is_ready(self._models, self._intake))

    def _about(self, data: bytes, context: Any) -> bytes:
        return oip_grpc.encode("ServerMetadataResponse", name="outrider", version=__version__)

    def _model_ready(self, data: bytes, context: Any) -> bytes:
        ready = self._found("ModelReadyRequest", data).ready and not self._intake.stopping
        return oip_grpc.encode("ModelReadyResponse", ready=ready)

    def _model(self, data: bytes, context: Any) -> bytes:
        served = self._found("ModelMetadataRequest", data)
        return oip_grpc.encode_model_metadata(described(self._models, served))

    def _found(self, message: str, data: bytes) -> Served:
        asked = oip_grpc.decode(message, data, InputError, limits=self._limits)
        return self._models.find(asked.name, asked.version or None)

    def _infer(self, messages: Iterator[bytes], context: Any) -> bytes:
        seen = _Seen()
        try:
            if not self._room.acquire(blocking=False):
                raise Refused(429, "queue_full", "as many calls as may be are inside", retry_after_s=RETRY_AFTER_S)
            try:
                return self._answered(messages, context, seen)
            finally:
                self._room.release()
        except Exception as error:
            why = refusal(error)
            seen.status, seen.reason = why.status, why.reason
            raise
        finally:
            self._metrics.observe(*seen.served, seen.status, seen.reason, time.monotonic() - seen.begun_s)

    def _answered(self, messages: Iterator[bytes], context: Any, seen: _Seen) -> bytes:
        held = self._intake.holding()
        try:
            return self._reply(messages, context, seen, held)
        except BaseException:
            held.free()
            raise

    def _reply(self, messages: Iterator[bytes], context: Any, seen: _Seen, held: Held) -> bytes:
        """What is held is the message, then its tensors, which are copies, then the reply until it was sent."""
        ends_s = seen.begun_s + min(MAX_TIME_S, context.time_remaining())  # infinity where there is no deadline
        data = self._reading.read(messages, context, held)
        model, version = oip_grpc.called(data)
        served = self._models.find(model, version or None)
        seen.served = (served.name, str(served.version))
        with self._intake.visit(served.name, estimate_ms=served.runner.estimate_ms) as visit:
            with self._decoding:
                call = oip_grpc.decode_request(data, limits=self._limits, files=served.files)
            held.become(max(len(data), call.request.size_bytes))
            del data
            if (call.model, call.version) != (model, version):
                raise InputError("the message names its model or version twice")
            asked_s = MAX_TIME_S if call.request.timeout_us is None else call.request.timeout_us / 1e6
            deadline = Deadline(min(ends_s, seen.begun_s + asked_s))
            check_wanted(served, call.request)
            check_rows(served, call.request)
            visit.check_time(deadline.remaining_s())
            with visit.queued():
                answer = _waited(served, call.request, deadline, context)
            call.request.inputs.clear()
            self._until_sent(context, self._intake.stay(served.name), held)
        seen.served = (served.name, version_after(served, version))
        name, answered_by = seen.served
        reply = oip_grpc.encode_reply(
            answer.outputs, model=name, version=answered_by, request=call.request, parameters=told(served, answer)
        )
        held.become(len(reply), anyway=True)
        return reply

    @staticmethod
    def _until_sent(context: Any, leave: Callable[[], None], held: Held) -> None:
        def sent() -> None:
            leave()
            held.free()

        if not context.add_callback(sent):  # called when the reply was sent, however slowly it is read
            sent()


class _Seen:
    """What is counted of one call."""

    def __init__(self) -> None:
        self.begun_s = time.monotonic()
        self.served = ("", "")
        self.status, self.reason = 200, "ok"


def _waited(served: Served, asked: oip.Request, deadline: Deadline, context: Any) -> Answer:
    """The runner's answer; where the caller goes away first, or its time passes, what has not begun is not run."""
    future = served.runner.submit(asked.inputs, deadline)
    if not context.add_callback(future.cancel):
        future.cancel()
    try:
        return future.result(deadline.remaining_s())
    except CancelledError:
        gone = Refused(499, "gone", "the caller went away")
        raise DeadlineExceeded("the request's time passed first") if deadline.passed else gone from None
    except DeadlineExceeded:
        raise
    except (FutureTimeout, TimeoutError):  # two classes before Python 3.11
        future.cancel()
        raise DeadlineExceeded("the request's time passed before it was answered") from None


def _guarded(name: str, handler: Handler) -> Handler:
    """The handler with every error as a status, and none with a path or a traceback."""

    def guarded(given: Any, context: Any) -> bytes:
        id_ = _id_of(context)
        context.set_trailing_metadata(((REQUEST_ID, id_),))
        try:
            return handler(given, context)
        except Exception as error:
            why = refusal(error)
            if why.status == 500:
                log.error("a call of %s failed: %s", name, error, exc_info=why.reason == "fault")
        _end(context, why, id_)
        return b""

    return guarded


def _id_of(context: Any) -> str:
    """The caller's request id, or a new one."""
    return callers.id_of(_values_of(context.invocation_metadata(), REQUEST_ID)) or secrets.token_hex(8)


def _values_of(sent: Iterable[tuple[str, str | bytes]] | None, key: str) -> list[bytes]:
    """A key's values in the caller's metadata, as often as it was sent."""
    return [value.encode() for name, value in sent or () if name == key and isinstance(value, str)]


def _end(context: Any, why: Refused, id_: str) -> None:
    """End the call with a status; grpc does that by raising."""
    trailing = [(REQUEST_ID, id_)]
    if why.retry_after_s is not None:
        trailing.append((PUSHBACK, str(why.retry_after_s * 1000)))
    context.set_trailing_metadata(tuple(trailing))
    code = "RESOURCE_EXHAUSTED" if why.reason in _FULL else _CODES.get(why.status, "INTERNAL")
    context.abort(getattr(grpc.StatusCode, code), str(why))


def _bound(server: Any, listening: Listening, *, secured: bool) -> int:
    """The port that the server listens on. Raises ConfigError."""
    listener(listening, secured=secured).close()  # what it says of an address that cannot be used, grpc does not
    where = listening.address(listening.port)
    try:
        if listening.tls is None:
            return int(server.add_insecure_port(where))
        listening.tls.context()  # the same
        client_ca = listening.tls.client_ca
        credentials = grpc.ssl_server_credentials(
            [(listening.tls.key.read_bytes(), listening.tls.cert.read_bytes())],
            root_certificates=None if client_ca is None else client_ca.read_bytes(),
            require_client_auth=client_ca is not None,
        )
        return int(server.add_secure_port(where, credentials))
    except RuntimeError:
        raise ConfigError(f"cannot listen on {where} for gRPC", hint="port 0 takes any free port") from None
