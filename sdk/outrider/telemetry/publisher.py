"""Sends what the spool holds and takes the receipts: a bounded window of batches, each kept until it has its own."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from outrider.telemetry.mqtt import Broker, Connection, Credentials, Handlers, Message
from outrider.telemetry.record import (
    Range,
    State,
    decode_receipt,
    encode_batch,
    encode_status,
    to_ranges,
    topics,
)
from outrider.telemetry.spool import Spool
from outrider_runtimes.errors import TelemetryError

log = logging.getLogger(__name__)

MAX_RECEIPT_TIMEOUT_S: Final = 60.0
# A failing disk is not asked again at once.
_READ_RETRY_S: Final = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much is under way at once.

    Attributes:
        window_batches: messages without a receipt. Below the 20 that paho and brokers allow in flight.
        batch_records, batch_bytes: what one message holds at most.
        receipt_timeout_s: after so long without a receipt a batch is sent again; doubles, up to a minute, while
            none comes.
    """

    window_batches: int = 8
    batch_records: int = 250
    batch_bytes: int = 128 * 1024
    receipt_timeout_s: float = 10.0


@dataclass(kw_only=True, slots=True, eq=False)
class _Flight:
    """One batch between the spool and its receipt."""

    payload: bytes
    first_seq: int
    remaining: set[int]
    mid: int | None = None
    sent_at_s: float = 0.0
    confirmed: bool = False


class Publisher:
    """The way out of one spool. All its work is done on the connection's thread.

    Attributes:
        connection: to the broker.
        confirmed_through: all records up to this number have left the spool, or the broker has confirmed them once.
    """

    def __init__(
        self,
        spool: Spool,
        broker: Broker,
        *,
        device: str,
        boot_id: str,
        on_receipt: Callable[[tuple[Range, ...]], None],
        credentials: Credentials | None = None,
        limits: Limits | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.confirmed_through = 0
        self._spool = spool
        self._device = device
        self._boot_id = boot_id
        self._topics = topics(device)
        self._on_receipt = on_receipt
        self._limits = limits if limits is not None else Limits()
        self._clock = clock
        self._wall_clock = wall_clock
        self._cursor = 0  # the last record that was put into a batch
        self._looked_through = 0  # nothing above the cursor was there up to this number
        self._read_again_at_s = 0.0
        self._patience_s = self._limits.receipt_timeout_s
        self._flights: dict[int, _Flight] = {}  # by first_seq; in the order of the stream
        self.connection = Connection(
            broker,
            client_id=f"outrider-{device}",
            handlers=Handlers(up=self._up, message=self._message, confirmed=self._confirmed, pump=self._pump),
            subscriptions=(self._topics.receipt,),
            will=self._status("offline", reason="lost", wall_s=None),
            credentials=credentials,
            rng=rng,
            clock=clock,
        )

    def start(self) -> None:
        """Begin to connect and to send."""
        self.connection.start()

    def wake(self) -> None:
        """There is something new in the spool. From any thread."""
        self.connection.wake()

    def close(self) -> None:
        """Say goodbye and disconnect. What is under way stays in the spool."""
        farewell = self._status("offline", reason="closed", wall_s=self._wall_clock())
        if not self.connection.close(farewell):
            log.warning("%s: the connection's thread did not end in time", self.connection.broker)

    def _status(self, state: State, *, reason: str, wall_s: float | None) -> Message:
        payload = encode_status(
            state, device=self._device, stream=self._spool.stream, boot_id=self._boot_id, reason=reason, wall_s=wall_s
        )
        return Message(topic=self._topics.status, payload=payload, retain=True)

    def _up(self) -> None:
        self.connection.publish(self._status("online", reason="connected", wall_s=self._wall_clock()))
        for flight in self._flights.values():
            flight.mid = None
        self._patience_s = self._limits.receipt_timeout_s

    def _pump(self) -> None:
        now = self._clock()
        self._send_again(now)
        while len(self._flights) < self._limits.window_batches and self._spool.last_seq > self._looked_through:
            flight = self._load(now)
            if flight is None:
                break
            self._flights[flight.first_seq] = flight
            self._send(flight, now)
        self._note_confirmed()

    def _send_again(self, now: float) -> None:
        overdue = False
        for flight in self._flights.values():
            # Within one connection TCP loses nothing: only what the broker confirmed can lack its receipt for good.
            late = flight.confirmed and now - flight.sent_at_s >= self._patience_s
            if flight.mid is None or late:
                overdue = overdue or late
                self._send(flight, now)
        if overdue:
            self._patience_s = min(self._patience_s * 2, max(MAX_RECEIPT_TIMEOUT_S, self._limits.receipt_timeout_s))

    def _send(self, flight: _Flight, now: float) -> None:
        flight.mid = self.connection.publish(Message(topic=self._topics.records, payload=flight.payload))
        flight.sent_at_s = now

    def _load(self, now: float) -> _Flight | None:
        """The next batch of the spool, or None where nothing is waiting or the spool cannot be read now."""
        if now < self._read_again_at_s:
            return None
        try:
            last_seq = self._spool.last_seq
            rows = self._spool.claim(
                self._limits.batch_records, after_seq=self._cursor, max_bytes=self._limits.batch_bytes
            )
            if not rows:
                self._looked_through = last_seq
                return None
        except TelemetryError as error:
            log.error("%s", error)
            self._read_again_at_s = now + _READ_RETRY_S
            return None
        payload = encode_batch(device=self._device, stream=self._spool.stream, after_seq=self._cursor, rows=rows)
        self._cursor = self._looked_through = rows[-1].seq
        return _Flight(payload=payload, first_seq=rows[0].seq, remaining={row.seq for row in rows})

    def _confirmed(self, mid: int) -> None:
        for flight in self._flights.values():
            if flight.mid == mid:
                flight.confirmed = True

    def _note_confirmed(self) -> None:
        waiting = [flight.first_seq for flight in self._flights.values() if not flight.confirmed]
        self.confirmed_through = waiting[0] - 1 if waiting else self._looked_through

    def _message(self, topic: str, payload: bytes) -> None:
        if topic != self._topics.receipt:
            return
        try:
            receipt = decode_receipt(payload)
        except TelemetryError as error:
            log.warning("a receipt that cannot be read: %s", error)
            return
        if receipt.stream != self._spool.stream:
            log.info("a receipt for another stream: %s", receipt.stream)
            return
        # Only what was sent in this life of the device counts: a receipt for more than that proves nothing.
        taken: list[int] = []
        for flight in list(self._flights.values()):
            taken.extend(_take(flight.remaining, receipt.ranges))
            if not flight.remaining:
                del self._flights[flight.first_seq]
        if taken:
            self._patience_s = self._limits.receipt_timeout_s
            self._on_receipt(to_ranges(sorted(taken)))


def _take(remaining: set[int], ranges: tuple[Range, ...]) -> set[int]:
    """Remove from ``remaining`` what the ranges cover, and give it."""
    low, high = min(remaining), max(remaining)
    near = [span for span in ranges if span.first <= high and span.last >= low]
    if any(first <= low and high <= last for first, last in near):
        taken = set(remaining)
    else:
        taken = {seq for seq in remaining if any(first <= seq <= last for first, last in near)}
    remaining -= taken
    return taken
