"""The HTTP server under the application: where it listens, over what, and how it comes to an end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import math
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import uvicorn

from outrider.endpoint.guard import run_guarded
from outrider.endpoint.listening import BACKLOG, Listening, listener
from outrider.endpoint.protocol import BoundedProtocol

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from outrider.endpoint.app import Endpoint

Ready = Callable[[str], None]

# Longer than a device's usual pause between two requests: a new connection costs it a round trip.
KEEP_ALIVE_S = 75
# Until what is abandoned at the end of the drain has been told so.
LAST_WORDS_S = math.ceil(BoundedProtocol.linger_s) + 1
TLS_HANDSHAKE_S = 10.0


def serve_app(app: Starlette, listening: Listening, *, secured: bool, ready: Ready | None = None) -> None:
    """Run ``build_app``'s application in this thread until one of ``stop_signals``, then drain.

    From the signal on ``/v2/health/ready`` says no, new requests get 503 and ``Connection: close``, and those that are
    inside are finished and read. It ends with the last of them, or after ``drain_s``, when those that are left get 503
    too. A second SIGINT ends it at once. The loop has a thread of its own; see ``guard``.

    Args:
        secured: whether the application asks for a token.
        ready: called with the URL when connections are taken.

    Raises:
        ConfigError: an address or a certificate that cannot be used, or one that lets anyone in who was not let in.
    """
    context = None if listening.tls is None else listening.tls.context()
    with contextlib.closing(listener(listening, secured=secured)) as sock:
        scheme = "http" if context is None else "https"
        url = f"{scheme}://{listening.address(sock.getsockname()[1])}"
        endpoint: Endpoint = app.state.endpoint
        protocol = functools.partial(BoundedProtocol, turned_away=endpoint.metrics.turned_away, direct=endpoint.direct)
        config = uvicorn.Config(
            app,
            http=protocol,  # type: ignore[arg-type]
            ws="none",
            loop=_loop(),
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="error",
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=LAST_WORDS_S,
        )
        told: list[Callable[[], None]] = [] if ready is None else [functools.partial(ready, url)]
        stops = _Stops()

        def server() -> _Server:
            """The first one says that it is ready."""
            made = _Server(config, endpoint, context, drain_s=listening.drain_s, ready=told)
            stops.now_stop(made)
            return made

        with stops:
            run_guarded(server, sock, endpoint)


def stop_signals() -> tuple[signal.Signals, ...]:
    """SIGTERM, Ctrl-C and that of a terminal which was closed; under ``nohup`` the last is not heard."""
    hung_up = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGTERM, signal.SIGINT, *hung_up)


class _Server(uvicorn.Server):
    """uvicorn's, which drains before it closes, bounds the TLS handshake and does not raise its signal once more."""

    def __init__(
        self,
        config: uvicorn.Config,
        endpoint: Endpoint,
        context: ssl.SSLContext | None,
        *,
        drain_s: float,
        ready: list[Callable[[], None]],
    ) -> None:
        """``ready``: what is told once that connections are taken."""
        super().__init__(config)
        self._endpoint = endpoint
        self._context = context
        self._drain_s = drain_s
        self._ready = ready
        self._abandoned = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections, then say so."""
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {}
        if self._context is not None:
            options = {"ssl": self._context, "ssl_handshake_timeout": TLS_HANDSHAKE_S}
        protocol: Any = self.config.http_protocol_class
        make = functools.partial(
            protocol, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        await self.lifespan.startup()
        self.servers = [
            await loop.create_server(make, sock=each, backlog=BACKLOG, **options)  # it listens anew
            for each in sockets or ()
        ]
        self.started = True
        while self._ready:
            self._ready.pop()()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what is new, wait for what is inside, close."""
        if self._abandoned:  # what is new and what is inside is another's
            await super().shutdown(sockets)
            return
        self._endpoint.intake.stop()
        end_s = asyncio.get_running_loop().time() + self._drain_s
        while self._unfinished() and not self.force_exit and asyncio.get_running_loop().time() < end_s:
            await asyncio.sleep(0.02)
        self._endpoint.abandon()
        for connection in self._connections():
            connection.give_up()
        await super().shutdown(sockets)

    def abandon(self) -> list[socket.socket]:
        """As ``guard.Loop`` says."""
        self._abandoned = self.should_exit = self.force_exit = True
        sockets = [each.transport.get_extra_info("socket") for each in self._connections()]
        return [each for each in sockets if each is not None]

    def _unfinished(self) -> bool:
        """Whether a request is inside, or a reply is still being read."""
        return self._endpoint.intake.inside() > 0 or any(connection.unread for connection in self._connections())

    def _connections(self) -> list[BoundedProtocol]:
        return [each for each in self.server_state.connections if isinstance(each, BoundedProtocol)]

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """They come to the main thread: see ``_Stops``."""
        yield


class _Stops:
    """While a ``with`` of it runs, ``stop_signals`` stop the server; only the main thread can be asked to."""

    def __init__(self) -> None:
        self._server: _Server | None = None
        self._came: list[int] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in stop_signals()}

    def __exit__(self, *_: object) -> None:
        for number, earlier in self._before.items():
            signal.signal(number, earlier)

    def now_stop(self, server: _Server) -> None:
        """This one from now on, also for what came before: a loop that was stuck has not heard of it."""
        self._server = server
        for number in tuple(self._came):
            server.handle_exit(number, None)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)
        if self._server is not None:
            self._server.handle_exit(number, frame)


def _loop() -> Literal["uvloop", "asyncio"]:
    """uvloop where it is installed: a request then takes a fifth to a third less of the processor.

    It has no wheel for 32-bit ARM, so that nothing may depend on it; the tests run both.
    """
    return "asyncio" if importlib.util.find_spec("uvloop") is None else "uvloop"
