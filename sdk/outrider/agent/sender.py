"""The other side of a command: signs it, sends it to a device and waits for the acknowledgement."""

from __future__ import annotations

import contextlib
import queue
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from outrider.agent.commands import (
    KINDS,
    Acknowledgement,
    Command,
    Refusal,
    acknowledgement_topic,
    command_topic,
    read_acknowledgement,
    write_command,
)
from outrider.telemetry.mqtt import Broker, Connection, Credentials, Handlers, Message
from outrider_runtimes.errors import AgentError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_TRIES: Final = 3  # somebody else's command may take the number that was asked for


@dataclass(frozen=True, kw_only=True)
class Sender:
    """Who sends commands to one device.

    Attributes:
        key: signs those that change something.
        expires_s: so long after it was sent, a signed command is too late.
        timeout_s: how long an acknowledgement is waited for.
    """

    broker: Broker
    device: str
    credentials: Credentials | None = None
    key: Ed25519PrivateKey | None = None
    expires_s: float = 60.0
    timeout_s: float = 120.0
    wall: Callable[[], float] = time.time

    def send(self, name: str, arguments: Mapping[str, Any] | None = None) -> Acknowledgement:
        """Have the device do it; give what it says of it, which may be that it refused or failed.

        Raises:
            AgentError: no acknowledgement in time; or a command that must be signed, and no key.
            Refusal: what no device would take.
        """
        signed = KINDS[name].signed
        if signed and self.key is None:
            raise AgentError(f"{name} must be signed", hint="--key FILE.key; `outrider keygen` makes one")
        until = time.monotonic() + self.timeout_s
        with _exchange(self) as exchange:
            if not signed:
                return exchange.ask(self._written(name, arguments or {}), until)
            last = exchange.ask(self._written("ping", {}), until).sequence
            for _ in range(_TRIES):
                said = exchange.ask(self._written(name, arguments or {}, sequence=last + 1), until)
                if said.reason != "old_sequence":
                    break
                last = said.sequence
            return said

    def _written(self, name: str, arguments: Mapping[str, Any], sequence: int | None = None) -> tuple[str, bytes]:
        command = Command(
            id=str(uuid.uuid4()),
            device=self.device,
            name=name,
            arguments=arguments,
            sequence=sequence,
            expires_s=None if sequence is None else int(self.wall() + self.expires_s),
        )
        return command.id, write_command(command, None if sequence is None else self.key)


class _Exchange:
    """A connection over which one asks and hears."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._heard: queue.SimpleQueue[Acknowledgement] = queue.SimpleQueue()
        self._asked: Message | None = None
        self._sent: Message | None = None  # in this connection; by which one it is, since two threads see it
        self.connection = Connection(
            sender.broker,
            client_id=f"outrider-command-{uuid.uuid4().hex[:12]}",
            handlers=Handlers(up=self._up, message=self._message, pump=self._pump),
            subscriptions=(acknowledgement_topic(sender.device),),
            credentials=sender.credentials,
        )

    def ask(self, written: tuple[str, bytes], until: float) -> Acknowledgement:
        """Send one command and wait for what is said of it."""
        id_, payload = written
        self._asked = Message(topic=command_topic(self._sender.device), payload=payload)
        self.connection.wake()
        while (left_s := until - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                said = self._heard.get(timeout=left_s)
                if said.command == id_:
                    return said
        raise AgentError(
            f"no acknowledgement from {self._sender.device} within {self._sender.timeout_s:g} s",
            hint=self.connection.last_error or "is the agent running there, with commands enabled?",
        )

    def _up(self) -> None:
        self._sent = None  # a device does the same command once, however often it comes

    def _pump(self) -> None:
        asked = self._asked
        if asked is not None and asked is not self._sent and self.connection.publish(asked) is not None:
            self._sent = asked

    def _message(self, topic: str, payload: bytes, retained: bool) -> None:
        if not retained:
            with contextlib.suppress(Refusal):  # somebody else's nonsense
                self._heard.put(read_acknowledgement(payload))


@contextlib.contextmanager
def _exchange(sender: Sender) -> Iterator[_Exchange]:
    exchange = _Exchange(sender)
    exchange.connection.start()
    try:
        yield exchange
    finally:
        exchange.connection.close()
