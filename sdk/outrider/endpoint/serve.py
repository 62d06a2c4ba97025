"""``outrider serve``: bundles, loaded and offered until the process is told to stop."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider_runtimes.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from outrider.bundle import Trust
    from outrider.endpoint.app import Served
    from outrider.model import Model

Ready = Callable[[str], None]

# A request takes no longer than app.MAX_TIME_S; whoever waits longer than this for its answer is let go.
DRAIN_S = 10
# Longer than a device's usual pause between two requests: a new connection costs it a round trip.
KEEP_ALIVE_S = 75
# File descriptors and buffers for one process; further connections get 503.
MAX_CONNECTIONS = 512


def serve(
    paths: Sequence[Path | str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    state: Path | str | None = None,
    trust: Path | str | Trust | None = None,
    token: str | None = None,
    ready: Ready | None = None,
) -> None:
    """Load bundles and answer requests for them until SIGTERM or SIGINT; then finish what was begun.

    Args:
        paths: bundle files or installed names; each is offered under its bundle's name.
        port: 0 takes any free one.
        state, trust: as ``outrider.load`` takes them.
        token: what callers must send as a bearer token; None asks for none.
        ready: called with the URL when connections are taken.

    Raises:
        BundleError, StoreError, AdmissionError, EngineError: a bundle that cannot be loaded; nothing is served.
        ConfigError: two bundles of one name, or an address that cannot be listened on.
        MissingExtra: the extra ``[serve]`` is not installed.
    """
    _require_extra()
    from outrider.endpoint.app import build_app

    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(_loaded(path, state=state, trust=trust)) for path in paths]
        serve_app(build_app(served_models(models), token=token), host=host, port=port, ready=ready)


def served_models(models: Sequence[Model]) -> dict[str, Served]:
    """Loaded models by the names of their bundles. Raises ConfigError for two of one name."""
    from outrider.endpoint.app import Served

    served: dict[str, Served] = {}
    for model in models:
        if model.bundle.name in served:
            raise ConfigError(f"two bundles are named {model.bundle.name!r}", hint="serve one version of each model")
        served[model.bundle.name] = Served(
            runner=model,
            interface=model.interface,
            bundle=model.bundle.digest,
            version=model.bundle.version,
            variant=model.variant,
            engine=model.engine,
        )
    return served


def serve_app(app: Starlette, *, host: str, port: int, ready: Ready | None = None) -> None:
    """Run the application until SIGTERM or SIGINT, in this thread. Raises ConfigError, MissingExtra."""
    _require_extra()
    import uvicorn

    from outrider.endpoint.protocol import BoundedProtocol

    listener = _listener(host, port)
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{listener.getsockname()[1]}"
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="error",
        proxy_headers=False,
        server_header=False,
        date_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
    )

    class Server(uvicorn.Server):
        """uvicorn's, which says when it is ready and does not raise the signal that ended it once more."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if ready is not None:
                ready(url)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            with _on_stop(self.handle_exit):
                yield

    with contextlib.closing(listener):
        Server(config).run(sockets=[listener])


@contextlib.contextmanager
def _on_stop(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Call ``handler`` on SIGTERM and SIGINT; only the main thread can be asked to."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _listener(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:  # getaddrinfo takes it modulo 65536
        raise ConfigError(f"cannot listen on port {port}", hint="a port is 0 to 65535; 0 takes any free one")
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(where, family=family, backlog=512)
        # Accepted connections inherit it. asyncio sets it for its own listeners alone, and without it every reply on a
        # kept connection waits 40 ms for the client's delayed acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}", hint="port 0 takes any free port") from None


def _loaded(path: Path | str, **options: Any) -> Model:
    from outrider.model import load

    return load(path, **options)


def _require_extra() -> None:
    for package in ("uvicorn", "starlette", "httptools"):
        try:
            __import__(package)
        except ImportError:
            raise MissingExtra(package, extra="serve", purpose="serving bundles") from None
