"""Where an endpoint listens, for whom, and over what. Loads no server."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from outrider_runtimes.errors import ConfigError

# Longer than any answer of a healthy model, shorter than the 30 s after which service managers kill.
DRAIN_S = 20.0
# Connections that were made and are not taken yet. One more is not answered, and its caller tries again after a second.
BACKLOG = 1024


@dataclass(frozen=True, kw_only=True)
class ServerTls:
    """The files that TLS needs, in PEM.

    Attributes:
        cert: the server's certificate, and those between it and its authority.
        key: its private key, not encrypted.
        client_ca: callers must show a certificate that this authority signed; None asks for none.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """TLS 1.2 or newer with these. Raises ConfigError that names the file."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        pair = f"{self.cert} with the key {self.key}"
        with _named(pair):
            context.load_cert_chain(self.cert, self.key, password=lambda: "")
        if self.client_ca is not None:
            with _named(str(self.client_ca)):
                context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # ssl.SSLError is one
        reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else error.strerror or error
        raise ConfigError(
            f"TLS with {what}: {reason}", hint="both are files in PEM; the key has no passphrase"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where and for whom to listen.

    Attributes:
        port: 0 takes any free one.
        anyone: listen beyond this machine although neither a token nor client certificates are asked for.
        drain_s: how long requests that are inside at the signal to stop may take.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    tls: ServerTls | None = None
    anyone: bool = False
    drain_s: float = DRAIN_S

    def address(self, port: int) -> str:
        """``host:port`` as a URL has it, an IPv6 address in brackets; ``port``: the one that was taken."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"


def listener(listening: Listening, *, secured: bool) -> socket.socket:
    """The socket that listens there; the caller closes it.

    Args:
        secured: whether callers must send a token.

    Raises:
        ConfigError: an address that cannot be used, or one that lets anyone in who was not let in.
    """
    host, port = listening.host, listening.port
    if not 0 <= port <= 65535:  # getaddrinfo takes it modulo 65536
        raise ConfigError(f"cannot listen on port {port}", hint="a port is 0 to 65535; 0 takes any free one")
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    guarded = secured or (listening.tls is not None and listening.tls.client_ca is not None)
    if not (guarded or listening.anyone or _is_loopback(str(where[0]))):
        raise ConfigError(
            f"listening on {host} would let anyone in who can reach this machine",
            hint="set OUTRIDER_TOKEN, ask for certificates with --client-ca, or say --anyone",
        )
    try:
        made = socket.create_server(where, family=family, backlog=BACKLOG)
        # Accepted connections inherit it. asyncio sets it for its own listeners alone, and without it every reply on a
        # kept connection waits 40 ms for the client's delayed acknowledgement.
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}", hint="port 0 takes any free port") from None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
