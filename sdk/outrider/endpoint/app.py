"""The endpoint as an ASGI application: routes, and which error becomes which status.

| status | when |
|---|---|
| 400 | the request is not what the protocol or the model's interface says |
| 401 | a token is required and this is not it |
| 404 | no such route, model or version |
| 413, 415 | the body is too long; the body is compressed |
| 500 | the model failed, or its answer has no JSON form |
| 503 | the queue is full, or too much is on its way: nothing was run; ``Retry-After`` says when to come again |
| 504 | the caller's time (``parameters.timeout``, microseconds) passed first; what had not begun was not run |
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from importlib import metadata

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from outrider_runtimes import oip
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    InferenceError,
    InputError,
    NotFiniteError,
    OutriderError,
    QueueFull,
    RunnerClosed,
)
from outrider_runtimes.runner import Answer, Runner
from outrider_runtimes.tensors import Interface

log = logging.getLogger(__name__)

# A caller that names no time, or more than this, is answered within it or not at all.
MAX_TIME_S = 60.0
# Bodies that are being read or decoded, over all connections, as a multiple of the longest one that is taken.
BODIES_AT_ONCE = 4
RETRY_AFTER_S = 1
CLIENT_CLOSED = 499

_PATH = re.compile(r"(?:[A-Za-z]:)?(?:[/\\][^\s'\"/\\]+){2,}[/\\]?")
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class Served:
    """One model as it is offered: who runs it, and what its metadata says.

    Attributes:
        bundle: the bundle's digest.
    """

    runner: Runner
    interface: Interface
    bundle: str
    version: int
    variant: str
    engine: str


def build_app(
    models: Mapping[str, Served], *, token: str | None = None, limits: oip.Limits = oip.DEFAULT_LIMITS
) -> Starlette:
    """The application that offers ``models`` by name.

    Args:
        token: what callers must send as a bearer token; None asks for none. Health needs no token.
        limits: what a request may cost.

    Raises:
        ConfigError: an empty token.
    """
    if token is not None and not token:
        raise ConfigError("token is empty", hint="leave it out to ask for none")
    endpoint = _Endpoint(models, limits)
    name = "/v2/models/{model}"
    versioned = name + "/versions/{version}"

    def route(path: str, handler: Handler, *, method: str = "GET", secret: str | None = token) -> Route:
        return Route(path, _guarded(handler, secret), methods=[method])

    routes = [
        route("/v2/health/live", endpoint.live, secret=None),
        route("/v2/health/ready", endpoint.live, secret=None),
        route("/v2", endpoint.server),
    ]
    for path in (name, versioned):
        routes += [
            route(path, endpoint.model),
            route(path + "/ready", endpoint.ready),
            route(path + "/infer", endpoint.infer, method="POST"),
        ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})
    app.router.redirect_slashes = False
    return app


class _Endpoint:
    """The handlers over their models, and the bytes of the bodies that are on their way."""

    def __init__(self, models: Mapping[str, Served], limits: oip.Limits) -> None:
        self._models = dict(models)
        self._limits = limits
        self._held_bytes = 0
        self._about = {
            "name": "outrider",
            "version": metadata.version("outrider"),
            "extensions": [oip.BINARY_EXTENSION],
        }

    async def live(self, request: Request) -> Response:
        """``/v2/health/live`` and ``/v2/health/ready``: models are loaded before the first connection is taken."""
        return JSONResponse({"live": True, "ready": True})

    async def server(self, request: Request) -> Response:
        """``/v2``."""
        return JSONResponse(self._about)

    async def model(self, request: Request) -> Response:
        """``/v2/models/M``."""
        name, served = self._named(request)
        parameters = {
            "interface": served.interface.offered(),
            "interface_digest": served.interface.digest,
            "bundle": served.bundle,
            "variant": served.variant,
            "engine": served.engine,
        }
        return JSONResponse(
            oip.model_metadata(
                name, served.interface, versions=[served.version], platform="outrider", parameters=parameters
            )
        )

    async def ready(self, request: Request) -> Response:
        """``/v2/models/M/ready``."""
        name, _ = self._named(request)
        return JSONResponse({"name": name, "ready": True})

    async def infer(self, request: Request) -> Response:
        """``/v2/models/M/infer``. The caller's time begins when its headers are here."""
        arrived_s = time.monotonic()
        name, served = self._named(request)
        asked = await self._received(request)
        _check_wanted(served.interface, asked)
        left_s = math.inf if asked.timeout_us is None else asked.timeout_us / 1e6
        answer = await _answered(served.runner, asked, Deadline(arrived_s + min(left_s, MAX_TIME_S)))
        parameters = {
            "infer_ms": round(answer.timing_ms.infer, 4),
            "queue_ms": round(answer.timing_ms.queue, 4),
            "bundle": served.bundle,
        }
        try:
            message = oip.encode_reply(
                answer.outputs, model=name, version=str(served.version), request=asked, parameters=parameters
            )
        except NotFiniteError as error:
            raise HTTPException(500, f"{error}; {error.hint}") from None
        return Response(message.body, headers=message.headers)

    def _named(self, request: Request) -> tuple[str, Served]:
        name = request.path_params["model"]
        served = self._models.get(name)
        if served is None:
            raise HTTPException(404, f"there is no model {name[:64]!r} here")
        version = request.path_params.get("version", str(served.version))
        if version != str(served.version):
            raise HTTPException(404, f"model {name!r} has version {served.version}, not {version[:16]!r}")
        return name, served

    async def _received(self, request: Request) -> oip.Request:
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise HTTPException(415, "compressed requests are not taken")
        json_bytes = _count(request, oip.LENGTH_HEADER)
        announced = _count(request, "content-length")
        if announced is not None and announced > self._limits.body_bytes:
            raise HTTPException(413, self._too_long(announced))
        body = bytearray()
        try:
            async for part in request.stream():
                self._hold(len(part))
                body += part
                if len(body) > self._limits.body_bytes:
                    raise HTTPException(413, self._too_long(len(body)))
            return oip.decode_request(body, json_bytes, limits=self._limits)
        finally:
            self._held_bytes -= len(body)

    def _hold(self, size: int) -> None:
        if self._held_bytes + size > BODIES_AT_ONCE * self._limits.body_bytes:
            raise QueueFull("too many bytes of requests are on their way")
        self._held_bytes += size

    def _too_long(self, size: int) -> str:
        return f"the body has {size} bytes or more, at most {self._limits.body_bytes} are taken"


async def _answered(runner: Runner, asked: oip.Request, deadline: Deadline) -> Answer:
    """The runner's answer by the deadline; what is not begun by then is not run."""
    timeout_s = deadline.timeout_s()
    future = runner.submit(asked.inputs, deadline)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
    except asyncio.TimeoutError:
        raise DeadlineExceeded("the request's time passed before it was answered") from None
    except CancelledError:
        raise RunnerClosed("the request was cancelled") from None


def _check_wanted(interface: Interface, asked: oip.Request) -> None:
    names = [spec.name for spec in interface.outputs]
    for name in asked.outputs or ():
        if name not in names:
            raise InputError(f"there is no output {name!r}", tensor=name, hint=f"the outputs are {names}")


def _guarded(handler: Handler, token: str | None) -> Handler:
    """The handler behind the token, with every error as JSON and none with a path or a traceback."""
    expected = None if token is None else f"Bearer {token}".encode()

    async def guarded(request: Request) -> Response:
        given = request.headers.get("authorization", "").encode("latin-1")
        if expected is not None and not hmac.compare_digest(given, expected):
            return _error(401, "a bearer token is required", {"WWW-Authenticate": "Bearer"})
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)
        except HTTPException as error:
            return _error(error.status_code, error.detail)
        except OutriderError as error:
            return _refusal(request, error)
        except Exception:
            log.exception("a request to %s failed", request.url.path)
            return _error(500, "internal error")

    return guarded


def _refusal(request: Request, error: OutriderError) -> Response:
    text = f"{error}; {error.hint}" if error.hint else str(error)
    if isinstance(error, InputError):
        return _error(400, text)
    if isinstance(error, (QueueFull, RunnerClosed)):
        return _error(503, str(error), {"Retry-After": str(RETRY_AFTER_S)})
    if isinstance(error, DeadlineExceeded):
        return _error(504, str(error))
    log.error("a request to %s failed: %s", request.url.path, error)
    return _error(500, _PATH.sub("(path)", text) if isinstance(error, InferenceError) else "the model could not answer")


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": text[:1000]}, status_code=status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette refuses itself: an unknown route, a method that a route does not have."""
    if not isinstance(error, HTTPException):
        return _error(500, "internal error")
    return _error(error.status_code, error.detail, error.headers)


def _count(request: Request, header: str) -> int | None:
    """A header that is a number of bytes; None where it was not sent."""
    values = request.headers.getlist(header)
    if not values:
        return None
    if len(values) > 1 or not (values[0].isascii() and values[0].isdigit() and len(values[0]) < 16):
        raise InputError(f"the header {header} is not one number of bytes")
    return int(values[0])
