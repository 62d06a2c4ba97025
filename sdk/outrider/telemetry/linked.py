"""What stands on one connection of its own to a broker: a sink, a watch, a Sparkplug node."""

from __future__ import annotations

import random
from types import TracebackType
from typing import TypeVar

from outrider.telemetry.mqtt import Connection, Credentials, Handlers, MessageSource, parse_broker, to_credentials
from outrider_runtimes.tls import AnyTls

_Own = TypeVar("_Own", bound="Linked")


class Linked:
    """Use it as a context manager, or ``close`` it. Its owner sets ``_connection``, and starts it when all is ready."""

    _connection: Connection

    @property
    def connected(self) -> bool:
        """Whether the broker is there now."""
        return self._connection.connected

    @property
    def last_error(self) -> str:
        """Why it is not, or was not last time; empty while all is well."""
        return self._connection.last_error

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()

    def __enter__(self: _Own) -> _Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connection_to(
    url: str,
    *,
    tls: AnyTls | None,
    credentials: Credentials | tuple[str, str | None] | None,
    client_id: str,
    handlers: Handlers,
    subscriptions: tuple[str, ...],
    will: MessageSource | None = None,
    rng: random.Random | None = None,
) -> Connection:
    """A connection by what a user says, not started.

    Raises:
        ConfigError: the url, the certificates or the credentials are not usable.
        MissingExtra: without paho-mqtt.
    """
    return Connection(
        parse_broker(url, tls=tls),
        client_id=client_id,
        handlers=handlers,
        subscriptions=subscriptions,
        will=will,
        credentials=to_credentials(credentials),
        rng=rng,
    )
