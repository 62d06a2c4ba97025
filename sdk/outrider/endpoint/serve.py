"""``outrider serve``: bundles, loaded and offered until the process is told to stop."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider_runtimes.errors import MissingExtra
from outrider_runtimes.worker import WORKER_THREAD

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from outrider.bundle import Trust
    from outrider.endpoint.listening import Listening
    from outrider.endpoint.models import BundleRunner, Models
    from outrider.endpoint.server import Ready
    from outrider.model import Model


def serve(
    paths: Sequence[Path | str],
    *,
    listening: Listening | None = None,
    state: Path | str | None = None,
    trust: Path | str | Trust | None = None,
    token: str | None = None,
    queue: int | None = None,
    grpc_port: int | None = None,
    access_log: bool = False,
    ready: Ready | None = None,
) -> dict[str, Any]:
    """Load bundles and answer requests for them until SIGTERM, SIGINT or SIGHUP; then finish what was begun.

    Args:
        paths: bundle files or installed names; each is offered under its bundle's name and version. Several versions
            of one name stand side by side, each in a store of its own under the state directory.
        listening: where; by default port 8000 of this machine alone.
        state, trust: as ``outrider.load`` takes them.
        token: what callers must send as a bearer token; None asks for none.
        queue: requests that may wait for one model; beyond them the answer is 429. By default ``intake.QUEUE``.
        grpc_port: speak gRPC too, on this port of the same address; 0 takes any free one. Needs the extra ``[grpc]``.
        access_log: write a line of JSON to standard error for every request over HTTP.
        ready: called with the URL, and then with gRPC's where there is one, when connections are taken.

    Returns:
        Service quality over the whole time, as ``Metrics.quality`` tells it.

    Raises:
        BundleError, StoreError, AdmissionError, EngineError: a bundle that cannot be loaded; nothing is served.
        ConfigError: two bundles of one name and version, an address that cannot be listened on, or one beyond this
            machine that neither a token nor certificates guard.
        MissingExtra: the extra ``[serve]`` is not installed.
    """
    _require_extra()
    from outrider.endpoint.app import build_app
    from outrider.endpoint.faces import LIMITS
    from outrider.endpoint.intake import QUEUE, Intake
    from outrider.endpoint.listening import Listening
    from outrider.endpoint.server import serve_app

    queue = QUEUE if queue is None else queue
    intake = Intake(queue=queue, body_bytes=LIMITS.body_bytes)
    with contextlib.ExitStack() as stack:
        if access_log:
            stack.enter_context(_access_log())
        models = stack.enter_context(opened(paths, state=state, trust=trust, queue=queue))
        app = build_app(models, token=token, intake=intake)
        listening = listening or Listening()
        if grpc_port is not None:
            ready = stack.enter_context(_also_over_grpc(app, replace(listening, port=grpc_port), token, queue, ready))
        serve_app(app, listening, secured=token is not None, ready=ready)
        quality: dict[str, Any] = app.state.endpoint.metrics.quality()
    return quality


@contextlib.contextmanager
def _also_over_grpc(
    app: Starlette, listening: Listening, token: str | None, queue: int, ready: Ready | None
) -> Iterator[Ready]:
    """Serve gRPC while the block runs; gives what to call when HTTP is ready too."""
    from outrider.endpoint.grpc_server import GrpcServer
    from outrider.endpoint.heap import give_back_large_blocks

    give_back_large_blocks()
    endpoint = app.state.endpoint
    with GrpcServer(endpoint.models, endpoint.intake, endpoint.metrics, listening, queue=queue, token=token) as server:

        def both(url: str) -> None:
            if ready is not None:
                ready(url)
                ready(f"{'grpc' if listening.tls is None else 'grpcs'}://{listening.address(server.port)}")

        yield both


@contextlib.contextmanager
def opened(
    paths: Sequence[Path | str], *, state: Path | str | None, trust: Path | str | Trust | None, queue: int
) -> Iterator[Models]:
    """The models of ``serve``, batched where that pays, until the block ends. Raises as ``serve`` for bundles."""
    from outrider.endpoint.batching import batched
    from outrider.endpoint.places import places

    with contextlib.ExitStack() as stack:
        models = [
            stack.enter_context(_loaded(source, where, trust, queue))
            for source, where in stack.enter_context(places(paths, state=state, trust=trust))
        ]
        yield served_models(
            [stack.enter_context(contextlib.closing(batched(model, queue_size=queue))) for model in models]
        )


def served_models(models: Sequence[BundleRunner]) -> Models:
    """Loaded models by the names of their bundles. Raises ConfigError for two of one name and version."""
    from outrider.endpoint.models import Models, Served

    return Models(Served(name=model.bundle.name, runner=model) for model in models)


def _loaded(source: Path | str, state: Path, trust: Path | str | Trust | None, queue: int) -> Model:
    from outrider.model import load

    return load(source, state=state, trust=trust, queue_size=queue)


@contextlib.contextmanager
def _access_log() -> Any:
    """Lines of the access log on standard error while the block runs."""
    from outrider.endpoint.calls import access

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = access.level, access.propagate
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    access.propagate = False
    try:
        yield
    finally:
        access.removeHandler(handler)
        access.level, access.propagate = before


def leave_stuck_calls() -> None:
    """End the process with exit code 0 as soon as it is about to end, where a call is still inside an engine.

    Such a call cannot be interrupted, and one that returns while the interpreter shuts down aborts the process.
    """
    if any(thread.name == WORKER_THREAD for thread in threading.enumerate()):
        atexit.register(_leave)


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _require_extra() -> None:
    for package in ("uvicorn", "starlette", "httptools", "prometheus_client"):
        try:
            __import__(package)
        except ImportError:
            raise MissingExtra(package, extra="serve", purpose="serving bundles") from None
