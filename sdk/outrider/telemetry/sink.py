"""The consumer that the project ships: takes records, drops duplicates, proves gaps and sends receipts.

``python -m outrider.telemetry.sink --broker mqtt://127.0.0.1:1883 --json`` counts until SIGTERM, then prints the count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import sqlite3
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from outrider.telemetry.ledger import Ledger
from outrider.telemetry.linked import Linked, connection_to
from outrider.telemetry.mqtt import Credentials, Handlers, Message
from outrider.telemetry.record import (
    ALL_DEVICES,
    Batch,
    Receipt,
    Record,
    decode_batch,
    device_of,
    encode_receipt,
    to_ranges,
    topics,
)
from outrider_runtimes.errors import OutriderError, TelemetryError
from outrider_runtimes.tls import AnyTls

log = logging.getLogger(__name__)

# What is remembered at most, where a device begins ever new streams or someone makes devices up: beyond it the one that
# was heard of longest ago is forgotten. One device has one stream at a time.
MAX_DEVICES: Final = 10_000
MAX_STREAMS: Final = 8

OnRecord = Callable[[str, Record], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamCount:
    """What came of one stream: ``last_seq - since_seq + 1 == received + gaps + missing``.

    Attributes:
        since_seq: the lowest number that came to this sink; it cannot know whether lower ones went to another.
        last_seq: the highest number that is accounted for.
        received: records that the handler took, each counted once.
        duplicates: records that came again and were dropped.
        gaps: numbers that will never come: the device says that they do not wait there.
        missing: numbers below ``last_seq`` that are not here and may still come.
    """

    device: str
    stream: str
    since_seq: int
    last_seq: int
    received: int
    duplicates: int
    gaps: int
    missing: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SinkCount:
    """What a sink has counted: the sums over ``streams``, and what belongs to none.

    Of a device the 8 streams count that were heard of last, and of devices 10,000.

    Attributes:
        malformed: messages and records that could not be read; no receipt is sent for them.
        failed: how often the handler raised; the record comes again.
    """

    received: int
    duplicates: int
    gaps: int
    missing: int
    malformed: int
    failed: int
    streams: tuple[StreamCount, ...]


@dataclass(kw_only=True, slots=True, eq=False)
class _Stream:
    ledger: Ledger
    duplicates: int = 0


# By the device and its stream: no device can say anything of another's.
_Streams = dict[str, dict[str, _Stream]]


class Sink(Linked):
    """A consumer of all devices at a broker. Use it as a context manager, or ``close`` it.

    A receipt is sent when the handler has taken the records and, with ``state``, the note of it is on disk. A sink that
    is killed between the two hands some records to its handler twice, and never loses one.
    """

    def __init__(
        self,
        url: str,
        *,
        on_record: OnRecord | None = None,
        state: str | os.PathLike[str] | None = None,
        tls: AnyTls | None = None,
        credentials: Credentials | tuple[str, str | None] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """Begin to connect; does not wait for the broker.

        Args:
            url: ``mqtt://host:1883`` or ``mqtts://host:8883``.
            on_record: called with the device and each record once, in the order of arrival, on the sink's thread.
            state: a directory; what was seen is kept in ``sink.sqlite`` there, so that a restart still knows it.
            tls, credentials: as for the Reporter.

        Raises:
            ConfigError, MissingExtra: as for the Reporter.
            TelemetryError: the state cannot be read or written.
        """
        self._on_record = on_record if on_record is not None else _ignore
        self._mutex = threading.Lock()
        self._malformed = 0
        self._failed = 0
        self._connection = connection_to(
            url,
            tls=tls,
            credentials=credentials,
            client_id=f"outrider-sink-{uuid.uuid4().hex[:12]}",
            handlers=Handlers(message=self._message),
            subscriptions=(ALL_DEVICES.records,),
            rng=rng,
        )
        self._notes = _Notes(Path(state) / "sink.sqlite") if state is not None else None
        self._streams: _Streams = self._notes.load() if self._notes is not None else {}
        self._connection.start()

    def count(self) -> SinkCount:
        """What was counted so far."""
        with self._mutex:
            streams = tuple(
                _count(device, stream_id, stream)
                for device, own in self._streams.items()
                for stream_id, stream in own.items()
            )
            return SinkCount(
                received=sum(stream.received for stream in streams),
                duplicates=sum(stream.duplicates for stream in streams),
                gaps=sum(stream.gaps for stream in streams),
                missing=sum(stream.missing for stream in streams),
                malformed=self._malformed,
                failed=self._failed,
                streams=streams,
            )

    def close(self) -> None:
        """Disconnect. Records that come meanwhile wait on their devices."""
        super().close()
        if self._notes is not None:
            self._notes.close()

    def _message(self, topic: str, payload: bytes, _retained: bool) -> None:
        device = device_of(topic)
        try:
            batch = decode_batch(payload)
            if batch.device != device:
                raise TelemetryError(f"batch.device is {batch.device!r} on the topic {topic}")
        except TelemetryError as error:
            log.warning("%s: a message that cannot be read: %s", topic, error)
            with self._mutex:
                self._malformed += 1
            return
        with self._mutex:
            self._malformed += batch.malformed
            stream, forgotten = self._stream(batch) if batch.records else (None, [])
        if stream is None:
            return
        taken = self._take(batch, stream)
        if taken and not batch.malformed:  # the number of a record that could not be read is not known
            with self._mutex:
                stream.ledger.settle(batch.after_seq + 1, taken[-1])
        try:
            if self._notes is not None:
                self._notes.save(batch.device, batch.stream, stream, forgotten)
        except TelemetryError as error:
            log.error("%s; no receipt is sent", error)
            return
        if taken:
            receipt = Receipt(stream=batch.stream, ranges=to_ranges(taken))
            self._connection.publish(Message(topic=topics(batch.device).receipt, payload=encode_receipt(receipt)))

    def _stream(self, batch: Batch) -> tuple[_Stream, list[tuple[str, str]]]:
        """The stream of a batch, as the one that was heard of last, and what is forgotten for it."""
        own = self._streams.pop(batch.device, {})
        stream = own.pop(batch.stream, None)
        forgotten: list[tuple[str, str]] = []
        if stream is None:
            stream = _Stream(ledger=Ledger(batch.records[0].seq))
            while len(own) >= MAX_STREAMS:
                own.pop(oldest := next(iter(own)))
                forgotten.append((batch.device, oldest))
            while len(self._streams) >= MAX_DEVICES:
                device = next(iter(self._streams))
                forgotten += [(device, stream_id) for stream_id in self._streams.pop(device)]
        own[batch.stream] = stream
        self._streams[batch.device] = own
        return stream, forgotten

    def _take(self, batch: Batch, stream: _Stream) -> list[int]:
        """Hand on what is new. Gives the numbers that the receipt names: what was taken now or before."""
        taken: list[int] = []
        device, ledger, mutex, hand_on = batch.device, stream.ledger, self._mutex, self._on_record
        for record in batch.records:
            seq = record.seq
            if ledger.seen(seq):
                with mutex:
                    stream.duplicates += 1
            else:
                try:
                    hand_on(device, record)
                except Exception:  # the handler is the user's: whatever it raises, the record has to come again
                    log.exception("%s: the handler failed at record %d", device, seq)
                    with mutex:
                        self._failed += 1
                    return taken
                with mutex:
                    ledger.add(seq)
            taken.append(seq)
        return taken


class _Notes:
    """What a sink has seen, on disk: one row for each stream, the one that was written last at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The connection's thread writes, the one that made the sink reads and closes.
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL").fetchall()
            self._db.execute("PRAGMA synchronous=FULL")
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                self._make()
        except (OSError, sqlite3.Error) as error:
            raise TelemetryError(
                f"the sink's state {path} cannot be opened: {error}", hint="name another state="
            ) from error

    def _make(self) -> None:
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS seen("
            "device TEXT, stream TEXT, duplicates INTEGER, ledger TEXT, PRIMARY KEY(device, stream))"
        )
        if self._db.execute("SELECT 1 FROM sqlite_master WHERE name='streams'").fetchone():  # of an older version
            self._db.execute("INSERT OR IGNORE INTO seen SELECT device, stream, duplicates, ledger FROM streams")
            self._db.execute("DROP TABLE streams")

    def load(self) -> _Streams:
        streams: _Streams = {}
        try:
            query = "SELECT device, stream, duplicates, ledger FROM seen ORDER BY rowid"
            for device, stream_id, duplicates, ledger in self._db.execute(query).fetchall():
                own = streams.pop(device, {})
                own[stream_id] = _Stream(duplicates=duplicates, ledger=Ledger.from_json(json.loads(ledger)))
                streams[device] = own
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise TelemetryError(
                f"the sink's state {self._path} cannot be read: {error}", hint="move it away"
            ) from error
        return streams

    def save(self, device: str, stream_id: str, stream: _Stream, forgotten: Sequence[tuple[str, str]]) -> None:
        try:
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany("DELETE FROM seen WHERE device=? AND stream=?", forgotten)
                self._db.execute(
                    "INSERT OR REPLACE INTO seen VALUES (?,?,?,?)",
                    (device, stream_id, stream.duplicates, json.dumps(stream.ledger.to_json())),
                )
        except sqlite3.Error as error:
            raise TelemetryError(f"the sink's state {self._path} cannot be written: {error}") from error

    def close(self) -> None:
        self._db.close()


def _ignore(device: str, record: Record) -> None:
    """A handler for a sink that only counts."""


def _count(device: str, stream_id: str, stream: _Stream) -> StreamCount:
    ledger = stream.ledger
    return StreamCount(
        device=device,
        stream=stream_id,
        since_seq=ledger.since_seq,
        last_seq=ledger.last_seq,
        received=ledger.received,
        duplicates=stream.duplicates,
        gaps=ledger.gaps,
        missing=ledger.missing,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Count until SIGTERM or SIGINT, then print the count. Gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m outrider.telemetry.sink", description=main.__doc__)
    parser.add_argument("--broker", required=True, metavar="URL", help="such as mqtt://127.0.0.1:1883")
    parser.add_argument("--state", metavar="DIR", help="keep what was seen here, over restarts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    try:
        with Sink(arguments.broker, state=arguments.state) as sink:
            done.wait()
            sink.close()
            count = sink.count()
    except OutriderError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 1
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(asdict(count)) if arguments.json else _as_text(count), flush=True)
    return 0


def _as_text(count: SinkCount) -> str:
    lines = [f"received {count.received}, duplicates {count.duplicates}, gaps {count.gaps}, missing {count.missing}"]
    lines += [
        f"  {stream.device}: {stream.received} of {stream.since_seq}..{stream.last_seq}" for stream in count.streams
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
