"""The endpoint as an ASGI application: its routes, and the way of a request through them.

What a request costs is bounded before it is paid: who may ask, which model, how many are inside and how long the body
says it is are all looked at before the body is read; how deep and how large its JSON is, before that is parsed. Which
refusal has which status is in ``refusals``.

``/v2/health/*``, ``/docs`` and ``/openapi.json`` need no token: a load balancer and a browser have none, and what they
say names no model. ``/metrics`` and ``/v2/quality`` do name models, and need it; Prometheus sends bearer tokens.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from outrider._version import __version__
from outrider.endpoint.calls import Call, Calls
from outrider.endpoint.direct import Direct
from outrider.endpoint.faces import LIMITS, described, is_ready
from outrider.endpoint.inference import Inference, check_token, refused
from outrider.endpoint.intake import Intake
from outrider.endpoint.metrics import Counted, Metrics, exposition_of, quality_of
from outrider.endpoint.models import Models, Served
from outrider.endpoint.openapi import describe, page
from outrider.endpoint.refusals import Refused, refusal
from outrider_runtimes import oip
from outrider_runtimes.errors import ConfigError, RunnerClosed

Handler = Callable[[Request], Awaitable[Response]]
# What each process of the endpoint counted, by its name; the name is empty where there is but one.
Processes = Callable[[], Awaitable[Mapping[str, Counted]]]


def build_app(
    models: Models,
    *,
    token: str | None = None,
    limits: oip.Limits = LIMITS,
    intake: Intake | None = None,
    metrics: Metrics | None = None,
    processes: Processes | None = None,
) -> Starlette:
    """The application that offers ``models``. ``app.state.endpoint`` is its Endpoint.

    Args:
        token: what callers must send as a bearer token; None asks for none.
        limits: what a request may cost.
        intake, metrics: those of another face of the same models, gRPC's; by default new ones.
        processes: asked for ``/metrics`` and ``/v2/quality``; by default this process alone is told of.

    Raises:
        ConfigError: an empty token.
    """
    if token is not None and not token:
        raise ConfigError("token is empty", hint="leave it out to ask for none: unset OUTRIDER_TOKEN")
    intake = intake or Intake(body_bytes=limits.body_bytes)
    metrics = metrics or Metrics(models, intake)
    endpoint = Endpoint(models, limits, intake, metrics, token)
    if processes is not None:
        endpoint.processes = processes
    routes = _routes(endpoint, token)
    endpoint.describe(routes, secured=token is not None)
    app = _App(routes, endpoint.calls)
    app.state.endpoint = endpoint
    return app


class _App(Starlette):
    """Starlette's, except that a request for an inference goes straight to its route: the way there through the layers
    for all kinds of applications takes as long as reading the request.
    """

    def __init__(self, routes: list[Route], calls: Calls) -> None:
        super().__init__(routes=routes, exception_handlers={HTTPException: _http_error})
        self.router.redirect_slashes = False
        self._calls = calls
        self._straight = [route for route in routes if isinstance(route.endpoint, Inference)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        call = self._calls.begin(scope)
        send = self._calls.marking(call, send)
        try:
            route = self._straight_to(scope)
            await (super().__call__ if route is None else route.app)(scope, receive, send)
        finally:
            self._calls.end(call, scope)

    def _straight_to(self, scope: Scope) -> Route | None:
        """The route of an inference, its parameters in the scope; None where Starlette is to find the route."""
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["method"] != "POST" or not path.endswith("/infer"):
            return None
        for route in self._straight:
            if found := route.path_regex.match(path):
                scope["path_params"] = found.groupdict()
                return route
        return None


def _routes(endpoint: Endpoint, token: str | None) -> list[Route]:
    def route(path: str, handler: Handler, *, secret: str | None = token, name: str = "") -> Route:
        return Route(path, _guarded(handler, secret), methods=["GET"], name=name or handler.__name__)

    versions = (("/v2/models/{model}", ""), ("/v2/models/{model}/versions/{version}", "_version"))
    # What is asked most stands first: routes are tried in their order.
    routes = [
        Route(f"{path}/infer", endpoint.inference, methods=["POST"], name=f"infer{version}")
        for path, version in versions
    ]
    for path, version in versions:
        routes += [
            route(path, endpoint.model, name=f"model{version}"),
            route(f"{path}/ready", endpoint.model_ready, name=f"model_ready{version}"),
        ]
    return [
        *routes,
        route("/v2/health/live", endpoint.live, secret=None),
        route("/v2/health/ready", endpoint.ready, secret=None),
        route("/openapi.json", endpoint.openapi, secret=None),
        route("/docs", endpoint.docs, secret=None),
        route("/v2", endpoint.server),
        route("/v2/models", endpoint.index),
        route("/v2/quality", endpoint.quality),
        route("/metrics", endpoint.exposition),
    ]


class Endpoint:
    """The handlers over their models."""

    def __init__(self, models: Models, limits: oip.Limits, intake: Intake, metrics: Metrics, token: str | None) -> None:
        self.inference = Inference(models, limits, intake, token)
        self.calls = Calls(metrics=metrics, intake=intake)
        self.direct = Direct(models, self.inference, self.calls, intake)
        self.intake = intake
        self.metrics = metrics
        self.processes: Processes = self._this_process
        self.models = models
        self._limits = limits
        self._description: dict[str, object] = {}
        self._page = ""
        self._about = {
            "name": "outrider",
            "version": __version__,
            "extensions": [oip.BINARY_EXTENSION],
        }

    def describe(self, routes: list[Route], *, secured: bool) -> None:
        """Make the description of these routes, once."""
        self._description = describe(routes, limits=self._limits, secured=secured, version=__version__)
        self._page = page(self._description)

    def abandon(self) -> None:
        """End what still waits for an answer with 503. In the loop's thread."""
        self.inference.cut(RunnerClosed("the endpoint was stopped before the answer"))

    @property
    def here(self) -> Call | None:
        """What the loop runs itself at this moment, for other threads to see."""
        exchange = self.inference.here
        return None if exchange is None else exchange.call

    def guard(self) -> None:
        """As ``guard.Guarded`` says, with what follows."""
        self.inference.guarded = True

    def give_up(self) -> None:
        """Its loop is stuck: count what is inside as not answered, and take it for gone. In any thread."""
        for call in self.inference.leave_all():
            self.calls.give_up(call)

    async def live(self, request: Request) -> Response:
        """``/v2/health/live``: the process answers."""
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """``/v2/health/ready``: every model can answer and new requests are taken."""
        ready = is_ready(self.models, self.intake)
        return JSONResponse({"ready": ready}, status_code=200 if ready else 503)

    async def openapi(self, request: Request) -> Response:
        """``/openapi.json``."""
        return JSONResponse(self._description)

    async def docs(self, request: Request) -> Response:
        """``/docs``: the same as a page, which loads nothing from anywhere."""
        headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return Response(self._page, media_type="text/html", headers=headers)

    async def quality(self, request: Request) -> Response:
        """``/v2/quality``."""
        return JSONResponse(quality_of((await self.processes()).values()))

    async def exposition(self, request: Request) -> Response:
        """``/metrics``."""
        text, kind = exposition_of(await self.processes())
        return Response(text, headers={"Content-Type": kind})

    async def server(self, request: Request) -> Response:
        """``/v2``."""
        return JSONResponse(self._about)

    async def index(self, request: Request) -> Response:
        """``/v2/models``: what there is."""
        rows = [{"name": each.name, "version": str(each.version), "ready": each.ready} for each in self.models]
        return JSONResponse({"models": rows})

    async def model(self, request: Request) -> Response:
        """``/v2/models/M``."""
        return JSONResponse(described(self.models, self._named(request)))

    async def model_ready(self, request: Request) -> Response:
        """``/v2/models/M/ready``."""
        served = self._named(request)
        ready = served.ready and not self.intake.stopping
        return JSONResponse({"name": served.name, "ready": ready}, status_code=200 if ready else 503)

    async def _this_process(self) -> Mapping[str, Counted]:
        return {"": self.metrics.counted()}

    def _named(self, request: Request) -> Served:
        return self.models.find(request.path_params["model"], request.path_params.get("version"))


def _guarded(handler: Handler, token: str | None) -> Handler:
    """The handler behind the token, with every error as JSON and none with a path or a traceback."""

    async def guarded(request: Request) -> Response:
        try:
            check_token(request.scope, token)
            return await handler(request)
        except Exception as error:
            return _refused(request, error)

    return guarded


def _refused(request: Request, why: Exception) -> Response:
    reply = refused(request.scope, why)
    response = Response(reply.body, reply.status)
    response.raw_headers = reply.headers
    return response


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette refuses itself: an unknown route, a method that a route does not have."""
    if not isinstance(error, HTTPException):
        return _refused(request, refusal(error))
    reason = {404: "unknown", 405: "bad_method"}.get(error.status_code, "bad_input")
    reply = _refused(request, Refused(error.status_code, reason, error.detail))
    reply.headers.update(error.headers or {})
    return reply
