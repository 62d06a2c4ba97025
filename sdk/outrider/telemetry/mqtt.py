"""One connection to an MQTT broker that comes back by itself. paho-mqtt is imported when a connection is made.

Everything of a connection happens on one thread of its own: paho's callbacks, the owner's, and the owner's ``pump``.
So a PUBACK never overtakes the note of what was published. Each attempt is a new paho client with a clean start: what
was not confirmed is the owner's to send again, and paho never holds more than the owner gave it in this connection.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from outrider_runtimes.errors import ConfigError, MissingExtra
from outrider_runtimes.tls import AnyTls, verifying_context

if TYPE_CHECKING:
    from paho.mqtt.client import Client

log = logging.getLogger(__name__)

KEEPALIVE_S: Final = 30
# A broker answers CONNECT and SUBSCRIBE within this, or the attempt has failed. A broker that knows 3.1.1 alone may
# leave the newer greeting without an answer: that one is given up sooner.
HANDSHAKE_TIMEOUT_S: Final = 10.0
MQTT5_GREETING_TIMEOUT_S: Final = 2.0
# The first wait after a failure is anything between these two: of 50 devices that lose the same broker, which is back
# at once, no 100 ms sees more than a fifth.
SHORTEST_BACKOFF_S, FIRST_BACKOFF_S = 0.1, 3.0
MAX_BACKOFF_S: Final = 30.0
# A connection that held this long was a good one: the next attempt begins again with the shortest wait.
STABLE_AFTER_S: Final = 10.0
# Together below what the owner's close waits for the thread.
_FAREWELL_S, _LAST_READ_S = 1.0, 0.5
CLOSE_TIMEOUT_S: Final = 2.0
_TICK_MS: Final = 250

_MAX_TEXT_BYTES: Final = 65_535  # MQTT 5, section 1.5.4

# Messages without a PUBACK, where the broker does not ask for fewer.
_UNDER_WAY: Final = 20

_MQTT5: Final = 5
_MQTT311: Final = 4
# So many greetings without an answer, where MQTT 5 was answered before: another broker may be in its place.
_DOUBTS_OF_5: Final = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """What a broker may ask for. The password is not shown in a repr.

    Raises:
        ConfigError: not text, or none that MQTT can carry.
    """

    username: str
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("user", self.username), ("password", self.password)):
            if not isinstance(value, str) and (value is not None or name == "user"):
                raise ConfigError(f"the {name} of credentials is no text", hint="pass credentials=(user, password)")
            if value is not None and (len(value.encode(errors="replace")) > _MAX_TEXT_BYTES or not _is_text(value)):
                raise ConfigError(
                    f"the {name} of credentials cannot be sent over MQTT",
                    hint=f"at most {_MAX_TEXT_BYTES} bytes of UTF-8, without a null character",
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Broker:
    """Where a broker is. ``tls`` is None for a plain connection."""

    host: str
    port: int
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtt' if self.tls is None else 'mqtts'}://{host}:{self.port}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One MQTT message."""

    topic: str
    payload: bytes
    retain: bool = False
    qos: int = 1


# A message that is made when it is needed, on the connection's thread: what it says depends on the attempt.
MessageSource = Message | Callable[[], Message]


@dataclass(frozen=True, kw_only=True, slots=True)
class Handlers:
    """What the owner of a connection does; all are called on the connection's thread.

    Attributes:
        opened: the greeting, with the last will in it, is on its way to the broker.
        up: connected and subscribed.
        down: the connection is gone; what was published and not confirmed may be lost.
        message: topic, payload, and whether the broker had kept it (retained) from before the subscription.
        confirmed: the PUBACK of the number that ``publish`` gave.
        refused: a PUBACK that says that the broker did not take it, and why.
        pump: called after everything that happened and several times a second while connected.
    """

    opened: Callable[[], None] = lambda: None
    up: Callable[[], None] = lambda: None
    down: Callable[[], None] = lambda: None
    message: Callable[[str, bytes, bool], None] = lambda topic, payload, retained: None
    confirmed: Callable[[int], None] = lambda mid: None
    refused: Callable[[int, str], None] = lambda mid, reason: None
    pump: Callable[[], None] = lambda: None


def parse_broker(url: str, *, tls: AnyTls | None = None) -> Broker:
    """``mqtt://host[:1883]`` or ``mqtts://host[:8883]``.

    Args:
        url: nothing but scheme, host and port.
        tls: for mqtts: the path of the CA certificates to trust, a Tls with this client's own too, or an SSLContext
            that verifies; None trusts the system's.

    Raises:
        ConfigError: another form, or CA certificates that cannot be read.
    """
    hint = "write mqtt://host:1883, or mqtts://host:8883 for TLS"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"broker url {url!r}: {error}", hint=hint) from error
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            "the broker url holds a user name or password",
            hint="pass them by credentials=(user, password), to a command by --user and the environment",
        )
    more = parts.path not in ("", "/") or parts.query or parts.fragment
    if parts.scheme not in ("mqtt", "mqtts") or not host or more:
        raise ConfigError(f"broker url {url!r} is not of the form mqtt://host:port", hint=hint)
    if port == 0 or any(character.isspace() for character in host):
        raise ConfigError(f"broker url {url!r} has no usable host and port", hint=hint)
    if parts.scheme == "mqtt" and tls is not None:
        raise ConfigError(f"certificates are given, and {url!r} is not encrypted", hint="write mqtts:// in the url")
    if parts.scheme == "mqtt":
        return Broker(host=host, port=port or 1883)
    return Broker(host=host, port=port or 8883, tls=verifying_context(tls))


def to_credentials(credentials: Credentials | tuple[str, str | None] | None) -> Credentials | None:
    """A pair of user name and password as Credentials. Raises ConfigError for what is neither."""
    if credentials is None or isinstance(credentials, Credentials):
        return credentials
    if not (isinstance(credentials, tuple) and len(credentials) == 2 and isinstance(credentials[0], str)):
        raise ConfigError("credentials is not a pair", hint="pass credentials=(user, password)")
    return Credentials(username=credentials[0], password=credentials[1])


def _is_text(value: str) -> bool:
    """Whether MQTT has a form for it."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _made(message: MessageSource) -> Message:
    return message if isinstance(message, Message) else message()


def backoff_s(attempt: int, rng: random.Random) -> float:
    """How long to wait after the ``attempt``-th failure in a row (from 1): anything up to a ceiling that doubles."""
    ceiling = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(attempt - 1, 16))
    return rng.uniform(SHORTEST_BACKOFF_S, ceiling)


class Connection:
    """A connection that is tried again until it is closed.

    Attributes:
        connected: whether it is up now: connected, and subscribed where subscriptions were asked for.
        last_error: why it is not, or was not last time; empty before anything failed.
        max_packet_bytes: the largest message that the broker takes, by what it said at the last connect; None where
            it said nothing.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        client_id: str,
        handlers: Handlers,
        subscriptions: tuple[str, ...] = (),
        optional_subscriptions: tuple[str, ...] = (),
        will: MessageSource | None = None,
        credentials: Credentials | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is connected before ``start``.

        A broker that refuses one of ``subscriptions`` is none that can be used; one that refuses an optional one is,
        and the refusal is logged.

        Raises:
            MissingExtra: without paho-mqtt.
        """
        try:
            import paho.mqtt.client  # noqa: F401
        except ImportError as error:
            raise MissingExtra("paho-mqtt", extra="mqtt", purpose="reporting over MQTT") from error
        self.broker = broker
        self.connected, self.last_error = False, ""
        self.max_packet_bytes: int | None = None
        self._client_id = client_id
        self._handlers = handlers
        self._subscriptions = subscriptions
        self._optional_subscriptions = tuple(topic for topic in optional_subscriptions if topic not in subscriptions)
        self._will = will
        self._credentials = credentials
        self._rng = rng if rng is not None else random.Random()
        self._clock = clock
        self._protocol = _MQTT5
        self._knows_5, self._unanswered = False, 0  # greetings with it were answered; in a row none was
        self._client: Client | None = None
        self._refusal, self._greeted = "", False
        self._awaited_suback: int | None = None
        self._awaited_puback: int | None = None  # of the farewell
        self._farewell: MessageSource | None = None
        self._closing = threading.Event()
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"outrider-mqtt-{client_id}", daemon=True)

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._thread.start()

    def wake(self) -> None:
        """Have ``pump`` called soon. From any thread."""
        with contextlib.suppress(OSError):  # full: it is about to wake anyway; closed: nothing to wake
            self._wake_w.send(b"\0")

    def is_mine(self, thread: threading.Thread) -> bool:
        """Whether it is the connection's thread."""
        return thread is self._thread

    def publish(self, message: Message) -> int | None:
        """Send; only on the connection's thread. Gives the number that ``confirmed`` names; None if down."""
        if self._client is None:
            return None
        info = self._client.publish(message.topic, message.payload, qos=message.qos, retain=message.retain)
        return info.mid if info.rc == 0 else None

    def close(self, farewell: MessageSource | None = None) -> bool:
        """Send ``farewell`` where there is a connection, disconnect and end the thread.

        Gives False when the thread did not end in time: it hangs in a name look-up or a connect and ends after that.
        """
        self._farewell = farewell
        self._closing.set()
        self.wake()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT_S)
        else:
            self._wake_r.close()
            self._wake_w.close()
        return not self._thread.is_alive()

    def _run(self) -> None:
        attempt = 0
        try:
            while not self._closing.is_set():
                began = self._clock()
                was_up = self._try()
                if self._closing.is_set():
                    break
                attempt = 1 if was_up and self._clock() - began >= STABLE_AFTER_S else attempt + 1
                if was_up and attempt >= 3 and not self._refusal:  # not every broker says that a twin has the place
                    self.last_error += f"; is another client connected as {self._client_id}?"
                delay_s = backoff_s(attempt, self._rng)
                log.warning("%s: %s; next attempt in %.1f s", self.broker, self.last_error, delay_s)
                self._closing.wait(delay_s)
        finally:
            self._wake_r.close()
            self._wake_w.close()

    def _try(self) -> bool:
        """An attempt. Whatever it raises, the thread lives on."""
        try:
            return self._attempt()
        except Exception as error:
            log.exception("%s: an attempt failed", self.broker)
            self.last_error = f"an attempt failed: {error!r}"
            was_up, self.connected, self._client = self.connected, False, None
            return was_up

    def _attempt(self) -> bool:
        """One connection from beginning to end. Gives whether it was up."""
        self._refusal, self._greeted, self._awaited_suback = "", False, None
        client = self._make_client()
        try:
            client.connect(self.broker.host, self.broker.port, keepalive=KEEPALIVE_S)
        except (OSError, ValueError) as error:  # ValueError: a certificate that does not match
            self.last_error = f"cannot connect: {error}"
            return False
        self._client = client
        try:
            self._handlers.opened()
            self._serve(client)
        except Exception as error:
            # An owner's handler failed. The thread has to live on: the records are on disk and wait for it.
            log.exception("%s: a handler failed", self.broker)
            self.last_error = f"a handler failed: {error!r}"
        was_up, self.connected = self.connected, False
        self._client = None
        self._drop_socket(client)
        if was_up:
            self._handlers.down()
        self._choose_protocol()
        return was_up

    def _choose_protocol(self) -> None:
        """Of the next attempt. A broker that knows 3.1.1 alone refuses the newer greeting, or hangs up on it."""
        if self._greeted or self._closing.is_set():
            self._unanswered, self._knows_5 = 0, self._knows_5 or self._protocol == _MQTT5
            return
        self._unanswered += 1
        if not self._knows_5 or self._unanswered >= _DOUBTS_OF_5:  # else it was the link, or the broker was ending
            self._protocol = _MQTT311 if self._protocol == _MQTT5 else _MQTT5

    def _serve(self, client: Client) -> None:
        opened = self._clock()
        while not self._closing.is_set():
            if not self._turn(client):
                self.last_error = self._refusal or "the connection broke"
                return
            if not self.connected and self._greeted and self._awaited_suback is None:
                self._come_up()
            if self.connected:
                self._handlers.pump()
            elif self._clock() - opened > self._patience_s():
                self.last_error = "no answer from the broker"
                return
        self._say_goodbye(client)

    def _patience_s(self) -> float:
        newer = self._protocol == _MQTT5 and not (self._greeted or self._knows_5)
        return MQTT5_GREETING_TIMEOUT_S if newer else HANDSHAKE_TIMEOUT_S

    def _come_up(self) -> None:
        self.connected = True
        self.last_error = ""
        log.info("%s: connected as %s", self.broker, self._client_id)
        self._handlers.up()

    def _turn(self, client: Client) -> bool:
        """Wait until something happens, and let paho do it. False when the connection is gone."""
        sock = client.socket()
        if sock is None:
            return False
        buffered = isinstance(sock, ssl.SSLSocket) and sock.pending() > 0
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN | (select.POLLOUT if client.want_write() else 0))
        poll.register(self._wake_r.fileno(), select.POLLIN)
        ready = dict(poll.poll(0 if buffered else _TICK_MS))
        if ready.pop(self._wake_r.fileno(), 0):
            with contextlib.suppress(BlockingIOError):
                self._wake_r.recv(4096)
        events = ready.get(sock.fileno(), 0)
        if (buffered or events & ~select.POLLOUT) and client.loop_read() != 0:
            return False
        if events & select.POLLOUT and client.loop_write() != 0:
            return False
        return client.loop_misc() == 0 and client.socket() is not None and not self._refusal

    def _say_goodbye(self, client: Client) -> None:
        """The farewell and, when the broker has it, DISCONNECT. Where it does not answer, the last will follows."""
        until = self._clock() + _FAREWELL_S
        if self.connected and self._farewell is not None:
            farewell = _made(self._farewell)
            sent = client.publish(farewell.topic, farewell.payload, qos=farewell.qos, retain=farewell.retain)
            # It may still wait in paho, behind what is under way: a DISCONNECT would overtake it.
            self._awaited_puback = sent.mid if farewell.qos else None
            while self._awaited_puback is not None:
                if self._clock() >= until or not self._turn(client):
                    return
        sock = client.socket()
        if sock is None:
            return
        # paho closes when DISCONNECT is written. Were something unread then, the system would reset the connection, and
        # a broker that sees that before it has read the rest gives the last will.
        with socket.socket(fileno=os.dup(sock.fileno())) as held:
            client.disconnect()
            while client.want_write() and self._clock() < until and self._turn(client):
                pass
            self._read_to_the_end(held)

    def _read_to_the_end(self, sock: socket.socket) -> None:
        """Until the other side closes, which a broker does after DISCONNECT."""
        until = self._clock() + _LAST_READ_S
        sock.settimeout(_LAST_READ_S)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65_536) and self._clock() < until:
                pass

    def _make_client(self) -> Client:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            protocol=MQTTProtocolVersion(self._protocol),
            reconnect_on_failure=False,
        )
        client.connect_timeout = 5.0
        if self.broker.tls is not None:
            client.tls_set_context(self.broker.tls)
        if self._credentials is not None:
            client.username_pw_set(self._credentials.username, self._credentials.password)
        if self._will is not None:
            will = _made(self._will)
            client.will_set(will.topic, will.payload, qos=will.qos, retain=will.retain)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        return client

    def _on_connect(self, client: Client, _data: Any, _flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._refusal = f"the broker refused: {reason}"
            # Any answer but this one says that the protocol is understood.
            self._greeted = "protocol version" not in str(reason).lower()
            return
        self._greeted = True
        self.max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
        # paho asks for its bound before the connection, where the broker's is not known; from here on it holds back
        # what is beyond, in order. Nothing was published yet.
        most = getattr(properties, "ReceiveMaximum", _UNDER_WAY)
        client._max_inflight_messages = min(_UNDER_WAY, most)
        if topics := (*self._subscriptions, *self._optional_subscriptions):
            self._awaited_suback = client.subscribe([(topic, 1) for topic in topics])[1]

    def _on_subscribe(self, _client: Client, _data: Any, mid: int, reasons: list[Any], _properties: Any) -> None:
        if mid != self._awaited_suback:
            return
        self._awaited_suback = None
        topics = (*self._subscriptions, *self._optional_subscriptions)
        for position, (topic, reason) in enumerate(zip(topics, reasons, strict=False)):
            if not reason.is_failure:
                continue
            refusal = f"the broker refused a subscription to {topic}: {reason}"
            if position < len(self._subscriptions):
                self._refusal = refusal
                return
            log.warning("%s: %s", self.broker, refusal)

    def _on_disconnect(self, _client: Client, _data: Any, flags: Any, reason: Any, _properties: Any) -> None:
        if flags.is_disconnect_packet_from_server and not self._refusal:
            self._refusal = f"the broker disconnected: {reason}"

    def _on_message(self, _client: Client, _data: Any, message: Any) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            return
        self._handlers.message(topic, bytes(message.payload), bool(message.retain))

    def _on_publish(self, _client: Client, _data: Any, mid: int, reason: Any, _properties: Any) -> None:
        if mid == self._awaited_puback:
            self._awaited_puback = None
        if reason.is_failure:
            self._handlers.refused(mid, str(reason))
        else:
            self._handlers.confirmed(mid)

    @staticmethod
    def _drop_socket(client: Client) -> None:
        sock = client.socket()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.close()  # type: ignore[no-untyped-call,unused-ignore]
