"""What a Remote sends requests over: HTTP or gRPC. One request at a time each, from several threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from outrider_runtimes import oip
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import ConfigError, DeadlineExceeded
from outrider_runtimes.http import Origin
from outrider_runtimes.tensors import Interface, Tensors

MAX_SAID = 300
# Twenty thousand labels take half of it.
MAX_METADATA_BYTES = 1 << 20
# Decoding JSON holds the interpreter's lock and cannot be stopped. On a PC numbers and text take up to 50 ns a byte, a
# list or an object up to 400 ns more; a board takes some times as long.
JSON_DECODE_S_PER_BYTE = 100e-9
JSON_DECODE_S_PER_BRACKET = 2e-6


@dataclass(frozen=True, kw_only=True)
class Described:
    """What the endpoint says of the model.

    Attributes:
        digest: the interface's.
        binary: whether it takes raw tensors.
        bundle, variant: what answers; empty when the server is not ours.
    """

    interface: Interface
    digest: str
    binary: bool
    bundle: str
    variant: str


class Exchanged(NamedTuple):
    """A reply that is whole and decoded, and when its request was made and its bytes were there (perf_counter_ns)."""

    reply: oip.Reply
    sent_ns: int
    received_ns: int


class Transport(Protocol):
    """Asks one model of one endpoint."""

    def describe(self, deadline: Deadline) -> Described:
        """Raises DeadlineExceeded, RemoteUnavailable, RemoteRefused, ReplyError, RunnerClosed."""
        ...

    def infer(
        self, inputs: Tensors, *, id: str, outputs: Sequence[str] | None, described: Described, deadline: Deadline
    ) -> Exchanged:
        """One request for ``outputs``, or for all. Raises as ``describe``, and InputError for what cannot be sent."""
        ...

    def close(self) -> None:
        """Calls that wait end with RunnerClosed."""
        ...


def described(metadata: Mapping[str, Any], *, binary: bool) -> Described:
    """A model by its metadata. Raises ReplyError."""
    interface = oip.interface_from_metadata(metadata)
    ours = oip.ours_in(metadata)
    return Described(
        interface=interface,
        digest=interface.digest,
        binary=binary,
        bundle=_said(ours, "bundle"),
        variant=_said(ours, "variant"),
    )


def check_time_to_decode(raw: bytes | bytearray, size: int, deadline: Deadline) -> None:
    """Raise DeadlineExceeded where the first ``size`` bytes, as JSON, could not be decoded in time."""
    left_s = deadline.remaining_s()
    needed_s = size * JSON_DECODE_S_PER_BYTE
    if needed_s <= left_s:  # else counting would take long as well
        needed_s += (raw.count(b"[", 0, size) + raw.count(b"{", 0, size)) * JSON_DECODE_S_PER_BRACKET
    if needed_s > left_s:
        raise DeadlineExceeded(f"the reply came too late to decode its {size} bytes of JSON in time")


def bearer(origin: Origin, token: str | None) -> str | None:
    """The value of the authorization header. Raises ConfigError where the token may not be sent."""
    if token is None:
        return None
    if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError("token= is not one word of printable ASCII characters")
    if not origin.encrypted and not origin.loopback:
        raise ConfigError(
            f"a token would be sent to {origin.address} in the clear",
            hint=f"use {origin.scheme}s, or an endpoint on this machine",
        )
    return f"Bearer {token}"


def timeout_us(deadline: Deadline) -> int | None:
    """The time left, in the microseconds in which the protocol tells it. Raises DeadlineExceeded."""
    left_s = deadline.timeout_s()
    return None if left_s is None else min(max(1, int(left_s * 1e6)), oip.MAX_TIMEOUT_US)


def printable(said: object) -> str:
    """A stranger's text in one short printable line; empty when it is no text."""
    text = said if isinstance(said, str) else ""
    return "".join(c if c.isprintable() else " " for c in text[:MAX_SAID]).strip()


def _said(ours: Mapping[str, Any], key: str) -> str:
    value = ours.get(key, "")
    return value[: oip.MAX_NAME] if isinstance(value, str) else ""
