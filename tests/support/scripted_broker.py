"""The side of an MQTT 5 broker that a test plays by hand, packet by packet (MQTT 5, chapters 2 and 3)."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from types import TracebackType
from typing import IO

CONNECT, PUBLISH, PUBACK, SUBSCRIBE, DISCONNECT = 1, 3, 4, 8, 14
RECEIVE_MAXIMUM = 0x21
MQTT311, MQTT5 = 4, 5


@dataclass(frozen=True, kw_only=True)
class Packet:
    """One control packet: its type, the four bits beside that, and what follows the length."""

    kind: int
    flags: int
    body: bytes

    @property
    def mid(self) -> int:
        """The packet identifier of a SUBSCRIBE, a PUBACK or a PUBLISH with QoS 1."""
        at = 2 + int.from_bytes(self.body[:2], "big") if self.kind == PUBLISH else 0
        return int.from_bytes(self.body[at : at + 2], "big")


class ScriptedBroker:
    """Takes one client at a time; what it does not do by itself, the test does."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(120)
        self.port = int(self._listening.getsockname()[1])
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self._connection: socket.socket | None = None
        self._stream: IO[bytes] | None = None

    def welcome(self, *, receive_maximum: int, subscriptions: int = 1) -> None:
        """Take a client and its subscriptions."""
        assert self.greeted() == MQTT5
        properties = bytes([RECEIVE_MAXIMUM]) + receive_maximum.to_bytes(2, "big")
        self.send(0x20, bytes([0, 0, len(properties)]) + properties)
        subscribe = self.read()
        assert subscribe.kind == SUBSCRIBE
        self.send(0x90, subscribe.body[:2] + bytes([0]) + bytes([1] * subscriptions))

    def greeted(self) -> int:
        """Take a client. Gives the level of the protocol in its greeting, which is not answered."""
        self._connection, _ = self._listening.accept()
        self._connection.settimeout(120)
        self._stream = self._connection.makefile("rb")
        connect = self.read()
        assert connect.kind == CONNECT
        return connect.body[2 + len("MQTT")]

    def hang_up(self) -> None:
        """End the connection that there is."""
        for one in (self._stream, self._connection):
            if one is not None:
                one.close()

    def read(self) -> Packet:
        """The next packet."""
        packet = self.read_or_end()
        assert packet is not None
        return packet

    def read_or_end(self) -> Packet | None:
        """The next packet, None where the client has closed the connection in an orderly way."""
        assert self._stream is not None
        beginning = self._stream.read(1)
        if not beginning:
            return None
        (first,) = beginning
        length = shift = 0
        while True:
            (byte,) = self._stream.read(1)
            length, shift = length | (byte & 0x7F) << shift, shift + 7
            if not byte & 0x80:
                break
        return Packet(kind=first >> 4, flags=first & 0x0F, body=self._stream.read(length))

    def send(self, first: int, body: bytes) -> None:
        """One packet of less than 128 bytes."""
        assert self._connection is not None and len(body) < 128
        self._connection.sendall(bytes([first, len(body)]) + body)

    def confirm(self, mid: int) -> None:
        """PUBACK."""
        self.send(0x40, mid.to_bytes(2, "big"))

    def read_up_to_here(self, topic: str) -> list[Packet]:
        """What the client had sent before it answers a message that it gets now."""
        name, mid = topic.encode(), 7
        self.send(0x32, len(name).to_bytes(2, "big") + name + mid.to_bytes(2, "big") + bytes([0]))
        packets = []
        while (packet := self.read()).kind != PUBACK:
            packets.append(packet)
        return packets

    def __enter__(self) -> ScriptedBroker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hang_up()
        self._listening.close()
