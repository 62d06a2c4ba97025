"""Sends what the spool holds and takes the receipts: a bounded window of batches, each kept until it has its own."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from outrider.telemetry.attachment import Attachment, Attachments, Outbox
from outrider.telemetry.mqtt import Broker, Connection, Credentials, Handlers, Message
from outrider.telemetry.numbers import check_number
from outrider.telemetry.record import (
    MAX_BATCH_RECORDS,
    Range,
    State,
    decode_receipt,
    encode_batch,
    encode_status,
    to_ranges,
    topics,
)
from outrider.telemetry.spool import Spool
from outrider.telemetry.window import DOUBTS, Rate, Window
from outrider_runtimes.errors import ConfigError, StoreError, TelemetryError

if TYPE_CHECKING:
    from outrider.spending import Meter

log = logging.getLogger(__name__)

MAX_RECEIPT_TIMEOUT_S: Final = 60.0
# A failing disk is not asked again at once.
_READ_RETRY_S: Final = 1.0
# Of a PUBLISH beside topic and payload, and of the PUBACK.
_PUBLISH_BYTES: Final = 14
# Of a batch beside its records, with its topic; and what of the rest the bodies may take, beside number and comma: no
# record's body is below 120 bytes.
_BATCH_BYTES: Final = 400
_BODIES_SHARE: Final = 0.75
# A batch that is larger than what is left of an hour's or a day's budget waits for the next one: at most so much does.
_BATCHES_OF_A_BUDGET: Final = 16

DEFAULT_BATCH_RECORDS: Final = 250


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much is under way at once.

    Attributes:
        window_batches: messages without a receipt. Below the 20 that paho and brokers allow in flight.
        batch_records, batch_bytes: what one message holds at most.
        receipt_timeout_s: after so long without a receipt a batch is sent again; doubles, up to a minute, while
            none comes.
        bytes_per_s: what a drain may take of the link, on average; None for all of it.
        max_tries: so often a record alone fails while others come through; then it is set aside. See ``window``.

    Raises:
        ConfigError: naming the field.
    """

    window_batches: int = 8
    batch_records: int = DEFAULT_BATCH_RECORDS
    batch_bytes: int = 128 * 1024
    receipt_timeout_s: float = 10.0
    bytes_per_s: float | None = None
    max_tries: int = 8

    def __post_init__(self) -> None:
        for name, most in (("window_batches", 20), ("batch_records", MAX_BATCH_RECORDS), ("batch_bytes", 10**6)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ConfigError(f"limits.{name} is {value!r}, expected a whole number from 1 to {most}")
        check_number("limits.receipt_timeout_s", self.receipt_timeout_s)
        if self.bytes_per_s is not None:
            check_number("limits.bytes_per_s", self.bytes_per_s)
        if isinstance(self.max_tries, bool) or not isinstance(self.max_tries, int) or self.max_tries < DOUBTS:
            raise ConfigError(f"limits.max_tries is {self.max_tries!r}, expected a whole number of {DOUBTS} or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class Calls:
    """What the owner of a publisher does; all are called on the connection's thread.

    Attributes:
        receipt: the consumer has these; and up to which number nothing that was sent waits for its receipt.
        poisoned: a record was set aside: its number, and after how many tries.
        info: gives what is published on the info topic.
    """

    receipt: Callable[[tuple[Range, ...], int], None]
    poisoned: Callable[[int, int], None]
    info: Callable[[], bytes]


class Publisher:
    """The way out of one spool. All its work is done on the connection's thread.

    Attributes:
        connection: to the broker.
        confirmed_through: all records up to this number have left the spool, or the broker has confirmed them once.
        held_back: why nothing is sent although the broker is there; empty where nothing waits for that.
    """

    _spool: Spool  # from ``start`` on

    def __init__(
        self,
        broker: Broker,
        *,
        device: str,
        boot_id: str,
        calls: Calls,
        attachments: Sequence[Attachment] = (),
        credentials: Credentials | None = None,
        limits: Limits | None = None,
        meter: Meter | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.confirmed_through = 0
        self._device = device
        self._boot_id = boot_id
        self._topics = topics(device)
        self._unpaid = ""  # why nothing may be sent
        self._refused = ""  # why the broker did not take the last batch that it answered
        self._calls = calls
        self._info_due = False
        self._attachments = Attachments(attachments)
        self._outbox = Outbox()
        self._limits = limits if limits is not None else Limits()
        self._clock = clock
        self._wall_clock = wall_clock
        self._cursor = 0  # the last record that was put into a batch
        self._looked_through = 0  # nothing above the cursor was there up to this number
        self._read_again_at_s = 0.0
        self._patience_s = self._limits.receipt_timeout_s
        self._window = Window(size=self._limits.window_batches, max_tries=self._limits.max_tries)
        self._rate = Rate(self._limits.bytes_per_s, clock=clock)
        self._meter = meter
        self._untold_seq: int | None = None  # of a record that was set aside: consumers do not know of the gap yet
        self.connection = Connection(
            broker,
            client_id=f"outrider-{device}",
            handlers=Handlers(
                up=self._up,
                down=self._down,
                message=self._message,
                confirmed=self._confirmed,
                refused=self._not_taken,
                pump=self._pump,
            ),
            subscriptions=(self._topics.receipt,),
            optional_subscriptions=self._attachments.subscriptions,
            will=lambda: self._status("offline", reason="lost", wall_s=None),
            credentials=credentials,
            rng=rng,
            clock=clock,
        )

    @property
    def held_back(self) -> str:
        """See the class."""
        return self._unpaid or self._refused

    def start(self, spool: Spool) -> None:
        """Begin to connect, and to send what is there."""
        self._spool = spool
        self.connection.start()

    def wake(self) -> None:
        """There is something new in the spool. From any thread."""
        self.connection.wake()

    def post(self, message: Message) -> bool:
        """Send a message beside the records. From any thread; False when too many wait."""
        taken = self._outbox.offer(message)
        self.connection.wake()
        return taken

    def tell_info(self) -> None:
        """What ``info`` says has changed. From any thread."""
        self._info_due = True
        self.connection.wake()

    def close(self) -> None:
        """Say goodbye and disconnect. What is under way stays in the spool."""
        if not self.connection.close(lambda: self._status("offline", reason="closed", wall_s=self._wall_clock())):
            log.warning("%s: the connection's thread did not end in time", self.connection.broker)

    def _status(self, state: State, *, reason: str, wall_s: float | None) -> Message:
        payload = encode_status(
            state, device=self._device, stream=self._spool.stream, boot_id=self._boot_id, reason=reason, wall_s=wall_s
        )
        return Message(topic=self._topics.status, payload=payload, retain=True)

    def _up(self) -> None:
        self.connection.publish(self._status("online", reason="connected", wall_s=self._wall_clock()))
        self._refused = ""
        self._window.up()
        self._patience_s = self._limits.receipt_timeout_s
        self._info_due = True
        self._outbox.up()
        self._attachments.up()

    def _down(self) -> None:
        self._window.lost()
        self._set_aside()

    def _pump(self) -> None:
        now = self._clock()
        if self._info_due:
            self._info_due = False
            self.connection.publish(Message(topic=self._topics.info, payload=self._calls.info(), retain=True))
        self._outbox.send(self.connection.publish)
        if self._window.overdue(now, self._patience_s):
            most_s = max(MAX_RECEIPT_TIMEOUT_S, self._limits.receipt_timeout_s)
            self._patience_s = min(self._patience_s * 2, most_s)
            self._set_aside()
        while self._send(now) and self._window.has_room() and self._spool.last_seq > self._looked_through:
            if not self._load(now):
                break
        self._note_confirmed()

    def _send(self, now: float) -> bool:
        """Send what is to be sent. False where something of it has to wait."""
        more = self._untold_seq is None and self._spool.last_seq > self._looked_through
        for flight in self._window.to_send(more=more):
            payload = encode_batch(
                device=self._device, stream=self._spool.stream, after_seq=flight.after_seq, rows=flight.rows
            )
            if not self._may_send(len(payload)):
                return False
            mid = self.connection.publish(Message(topic=self._topics.records, payload=payload))
            self._window.sent(flight, mid, now)
            if mid is None:
                return False
        return self._rate.allows()

    def _may_send(self, size_bytes: int) -> bool:
        if not self._rate.allows():
            return False
        size_bytes += len(self._topics.records) + _PUBLISH_BYTES
        try:
            self._unpaid = "" if self._meter is None or self._meter.take_bytes(size_bytes) else "the budget is spent"
        except StoreError as error:
            log.error("what a message costs cannot be written down: %s", error)
            self._unpaid = "the budget cannot be written"
        if self._unpaid:
            return False
        self._rate.spend(size_bytes)
        return True

    def _load(self, now: float) -> bool:
        """The next batch of the spool into the window. False where nothing is waiting or cannot be read now."""
        if now < self._read_again_at_s or (self._untold_seq is not None and self._window):
            return False
        try:
            last_seq = self._spool.last_seq
            rows = self._spool.claim(self._limits.batch_records, after_seq=self._cursor, max_bytes=self._most_bytes())
            if not rows:
                self._looked_through = last_seq
                return False
        except TelemetryError as error:
            log.error("%s", error)
            self._read_again_at_s = now + _READ_RETRY_S
            return False
        # With nothing under way, no number from a record that was set aside up to here waits any more.
        after_seq = self._cursor if self._untold_seq is None else min(self._cursor, self._untold_seq - 1)
        self._untold_seq = None
        self._window.add(rows, after_seq=after_seq)
        self._cursor = self._looked_through = rows[-1].seq
        return True

    def _most_bytes(self) -> int:
        """Of the bodies of the next batch: within what the broker said that it takes, what broke no connection, and
        what a budget covers."""
        bounds = [self._limits.batch_bytes]
        if (packet_bytes := self.connection.max_packet_bytes) is not None:
            bounds.append(_bodies_bytes(packet_bytes))
        if self._meter is not None and (most_bytes := self._meter.most_bytes) is not None:
            bounds.append(_bodies_bytes(most_bytes // _BATCHES_OF_A_BUDGET))
        if self._window.most_bytes is not None:
            bounds.append(self._window.most_bytes)
        return min(bounds)

    def _confirmed(self, mid: int) -> None:
        self._outbox.confirmed(mid)
        if self._window.confirmed(mid):
            self._refused = ""

    def _not_taken(self, mid: int, reason: str) -> None:
        """The broker refused a message. A post is lost with that; a batch is sent again, later and later."""
        self._outbox.confirmed(mid)
        if self._window.refused(mid):
            if not self._refused:
                log.warning("%s: refused a batch of records: %s", self.connection.broker, reason)
            self._refused = f"the broker refused a batch: {reason}"

    def _note_confirmed(self) -> None:
        waiting = self._window.first_unconfirmed_seq
        self.confirmed_through = self._looked_through if waiting is None else waiting - 1

    def _set_aside(self) -> None:
        """What the window has given up leaves the spool."""
        for seq, tries in [(poison.seq, poison.tries) for poison in self._window.poisoned]:
            log.error("record %d did not come through in %d tries while others did: it is set aside", seq, tries)
            try:
                self._spool.set_aside(seq)
            except TelemetryError as error:
                log.error("%s", error)  # it is in the spool still, and comes again with the next start
                continue
            self._untold_seq = seq if self._untold_seq is None else min(seq, self._untold_seq)
            self._calls.poisoned(seq, tries)
        self._window.poisoned.clear()

    def _message(self, topic: str, payload: bytes, retained: bool) -> None:
        self._attachments.message(topic, payload, retained)
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
        if taken := self._window.take(receipt.ranges):
            self._patience_s = self._limits.receipt_timeout_s
            first = self._window.first_seq
            self._calls.receipt(to_ranges(taken), self._cursor if first is None else first - 1)


def _bodies_bytes(message_bytes: int) -> int:
    """What the records of a message of that size may take."""
    return max(1, int((message_bytes - _BATCH_BYTES) * _BODIES_SHARE))
