"""The consumer: what a receipt says was handed over, whoever sends what."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import uuid
from pathlib import Path

import pytest

from outrider.telemetry import Sink
from outrider.telemetry import ledger as ledger_module
from outrider.telemetry import sink as sink_module
from outrider.telemetry.ledger import Ledger
from outrider.telemetry.mqtt import Message
from outrider.telemetry.record import Row, decode_receipt, encode_batch, topics
from support.telemetry import STREAM, a_draft

NOBODY = "mqtt://127.0.0.1:9"


class Heard:
    """A sink that nobody is connected to: batches are put into it, what it hands on and sends is noted."""

    def __init__(self, state: Path | None = None) -> None:
        self.handed: list[tuple[str, int]] = []
        self.receipts: list[tuple[str, int]] = []
        self.sink = Sink(NOBODY, on_record=lambda device, record: self.handed.append((device, record.seq)), state=state)
        self.sink._connection.publish = self._published  # type: ignore[method-assign,assignment]

    def _published(self, message: Message) -> None:
        for first, last in decode_receipt(message.payload).ranges:
            self.receipts += [(message.topic, seq) for seq in range(first, last + 1)]

    def batch(self, first: int, last: int, *, device: str = "pi-07", stream: str = STREAM, after: int = -1) -> None:
        rows = [Row(seq, a_draft(seq).body) for seq in range(first, last + 1)]
        after_seq = first - 1 if after < 0 else after
        payload = encode_batch(device=device, stream=stream, after_seq=after_seq, rows=rows)
        self.sink._message(topics(device).records, payload, False)

    def numbers(self, device: str = "pi-07") -> list[int]:
        return [seq for each, seq in self.handed if each == device]

    def has_receipts_for_what_it_handed_on(self) -> bool:
        return set(self.receipts) == {(topics(device).receipt, seq) for device, seq in self.handed}


@pytest.fixture
def heard() -> Heard:
    with contextlib.ExitStack() as stack:
        found = Heard()
        stack.callback(found.sink.close)
        yield found  # type: ignore[misc]


def test_a_sink_that_came_in_the_middle_takes_what_was_before_it_too(heard: Heard) -> None:
    heard.batch(251, 260)
    heard.batch(1, 10)
    heard.batch(1, 10)
    assert heard.numbers() == [*range(251, 261), *range(1, 11)]
    assert heard.has_receipts_for_what_it_handed_on()
    count = heard.sink.count()
    assert (count.received, count.duplicates, count.gaps, count.missing) == (20, 10, 0, 240)
    assert (count.streams[0].since_seq, count.streams[0].last_seq) == (1, 260)
    heard.batch(261, 261, after=10)
    assert (heard.sink.count().gaps, heard.sink.count().missing) == (240, 0)


def test_what_was_given_up_is_handed_over_when_it_comes(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_HOLES", 5)
    for seq in range(1, 40, 2):
        heard.batch(seq, seq)
    heard.batch(2, 2)
    assert heard.handed[-1] == ("pi-07", 2)
    assert heard.has_receipts_for_what_it_handed_on()


def test_a_device_that_sends_the_stream_of_another_hinders_nobody(heard: Heard) -> None:
    heard.batch(1, 5, device="evil")
    heard.batch(1, 10)
    assert heard.numbers() == list(range(1, 11))
    assert heard.numbers("evil") == [1, 2, 3, 4, 5]
    assert heard.has_receipts_for_what_it_handed_on()
    assert [(each.device, each.received) for each in heard.sink.count().streams] == [("evil", 5), ("pi-07", 10)]
    assert heard.sink.count().malformed == 0


def test_ever_new_streams_and_devices_are_forgotten_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_module, "MAX_DEVICES", 6)
    heard = Heard(tmp_path)
    with contextlib.closing(heard.sink):
        for number in range(40):
            heard.batch(1, 2, device="evil", stream=str(uuid.UUID(int=number)))
            heard.batch(number + 1, number + 1)
        own = [each for each in heard.sink.count().streams if each.device == "pi-07"]
        assert [each.received for each in own] == [40], "nothing of another device is forgotten"
        assert len(heard.sink.count().streams) == 1 + sink_module.MAX_STREAMS
        for number in range(40):
            heard.batch(1, 1, device=f"d{number}")
        streams = heard.sink.count().streams
        assert [each.device for each in streams] == [f"d{number}" for number in range(34, 40)]
    with Sink(NOBODY, state=tmp_path) as again:
        assert again.count().streams == streams, "in the same order, and no more"


def test_the_state_of_an_older_version_is_read(tmp_path: Path) -> None:
    ledger = Ledger(1)
    ledger.add(1)
    with contextlib.closing(sqlite3.connect(tmp_path / "sink.sqlite", isolation_level=None)) as db:
        db.execute("CREATE TABLE streams(stream TEXT PRIMARY KEY, device TEXT, duplicates INTEGER, ledger TEXT)")
        db.execute("INSERT INTO streams VALUES (?,?,?,?)", (STREAM, "pi-07", 3, json.dumps(ledger.to_json())))
    for _ in range(2):
        heard = Heard(tmp_path)
        with contextlib.closing(heard.sink):
            heard.batch(1, 2)
    (stream,) = heard.sink.count().streams
    assert (stream.device, stream.received, stream.duplicates) == ("pi-07", 2, 6)
