"""The payloads of docs/telemetry.md: what is written is read back, and nothing else is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import uuid
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.telemetry.record import (
    MAX_BATCH_RECORDS,
    MAX_PAYLOAD_BYTES,
    MAX_RECORD_BYTES,
    MAX_RECORD_DEPTH,
    MAX_SEQ,
    Range,
    Receipt,
    Record,
    Row,
    check_device,
    decode_batch,
    decode_receipt,
    decode_record,
    decode_status,
    device_of,
    encode_batch,
    encode_receipt,
    encode_record,
    encode_row,
    encode_status,
    to_ranges,
    topics,
)
from outrider_runtimes.errors import ConfigError, TelemetryError
from support.telemetry import BOOT, STREAM, a_record

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def a_row(seq: int = 1, **body: object) -> Row:
    return Row(seq, encode_row(kind="event", boot_id=BOOT, wall_s=1.5, monotonic_s=2.5, body=body))


def a_batch(**changes: object) -> dict[str, object]:
    payload = encode_batch(device="pi-07", stream=STREAM, after_seq=0, rows=[a_row(1), a_row(3)])
    return {**json.loads(payload), **changes}


def dump(value: object) -> bytes:
    return json.dumps(value).encode()


@given(seq=st.integers(1, MAX_SEQ), body=st.dictionaries(st.text(), json_values, max_size=4))
def test_a_record_survives_its_encoding(seq: int, body: dict[str, object]) -> None:
    record = a_record(seq, body=body)
    assert decode_record(encode_record(record), stream=STREAM) == record


@given(seqs=st.sets(st.integers(1, 10_000), max_size=50))
def test_a_batch_gives_back_its_records_in_order(seqs: set[int]) -> None:
    rows = [a_row(seq, number=seq) for seq in sorted(seqs)]
    batch = decode_batch(encode_batch(device="pi-07", stream=STREAM, after_seq=0, rows=rows))
    assert (batch.device, batch.stream, batch.after_seq, batch.malformed) == ("pi-07", STREAM, 0, 0)
    assert [record.seq for record in batch.records] == sorted(seqs)
    assert all(record.body == {"number": record.seq} for record in batch.records)


def test_a_record_has_a_uuid_that_its_stream_and_number_determine() -> None:
    assert a_record(7).uuid == a_record(7, kind="metrics").uuid == str(uuid.uuid5(uuid.UUID(STREAM), "7"))
    assert a_record(7).uuid != a_record(8).uuid


def test_an_unsynced_clock_is_said_where_it_is_so_and_nowhere_else() -> None:
    unsynced = dataclasses.replace(a_record(), clock_unsynced=True)
    assert json.loads(encode_record(unsynced))["clock_unsynced"] is True
    assert decode_record(encode_record(unsynced), stream=STREAM) == unsynced
    assert "clock_unsynced" not in json.loads(encode_record(a_record()))
    with pytest.raises(TelemetryError, match="clock_unsynced"):
        decode_record(dump(json.loads(encode_record(a_record())) | {"clock_unsynced": 1}), stream=STREAM)


def test_keys_that_a_reader_does_not_know_are_ignored() -> None:
    later = json.loads(encode_record(a_record())) | {"x-later": True}
    assert decode_record(dump(later), stream=STREAM) == a_record()
    assert len(decode_batch(dump(a_batch(compression="none"))).records) == 2


def test_a_kind_of_a_later_version_passes() -> None:
    assert decode_record(encode_record(a_record(kind="drift")), stream=STREAM).kind == "drift"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seq", 0),
        ("seq", -1),
        ("seq", True),
        ("seq", 1.0),
        ("seq", MAX_SEQ + 1),
        ("seq", None),
        ("kind", "No"),
        ("kind", 3),
        ("kind", ""),
        ("boot_id", "x"),
        ("boot_id", None),
        ("wall_s", "now"),
        ("wall_s", True),
        ("wall_s", 10**400),
        ("monotonic_s", None),
        ("body", []),
        ("body", None),
    ],
)
def test_a_wrong_field_of_a_record_is_named(key: str, value: object) -> None:
    fields = json.loads(encode_record(a_record())) | {key: value}
    with pytest.raises(TelemetryError, match=rf"record\.{key}"):
        decode_record(dump(fields), stream=STREAM)


@pytest.mark.parametrize("key", ["seq", "kind", "boot_id", "wall_s", "monotonic_s", "body"])
def test_a_missing_field_of_a_record_is_named(key: str) -> None:
    fields = json.loads(encode_record(a_record()))
    del fields[key]
    with pytest.raises(TelemetryError, match=rf"record\.{key}"):
        decode_record(dump(fields), stream=STREAM)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("v", 2),
        ("v", True),
        ("v", None),
        ("device", "a/b"),
        ("device", 7),
        ("stream", STREAM.upper().replace("0", "A")),
        ("stream", None),
        ("after_seq", -1),
        ("after_seq", False),
        ("after_seq", "1"),
        ("records", {}),
        ("records", [{}] * (MAX_BATCH_RECORDS + 1)),
    ],
)
def test_a_wrong_field_of_a_batch_is_named(key: str, value: object) -> None:
    with pytest.raises(TelemetryError, match=rf"batch\.{key}"):
        decode_batch(dump(a_batch(**{key: value})))


def test_one_bad_record_does_not_take_the_others_with_it() -> None:
    good = json.loads(encode_record(a_record(5)))
    batch = decode_batch(
        dump(a_batch(records=[good, {**good, "seq": 6, "body": 1}, 3, {**good, "seq": 5}, {**good, "seq": 9}]))
    )
    assert [record.seq for record in batch.records] == [5, 9]
    assert batch.malformed == 3


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"v":1,"v":1}',
        b'{"v":NaN}',
        b'{"v":1e999}',
        b"[" * 100_000,
        b'{"v":' + b"1" * 10_000 + b"}",
        b" " * (MAX_PAYLOAD_BYTES + 1),
    ],
    ids=["empty", "cut", "list", "null", "not-utf8", "twice", "nan", "infinite", "deep", "long-number", "too-large"],
)
def test_hostile_bytes_are_refused_by_every_decoder(payload: bytes) -> None:
    for decode in (decode_batch, decode_receipt, decode_status):
        with pytest.raises(TelemetryError):
            decode(payload)
    with pytest.raises(TelemetryError):
        decode_record(payload, stream=STREAM)


@given(payload=st.binary(max_size=200) | json_values.map(dump))
def test_a_decoder_raises_nothing_else(payload: bytes) -> None:
    for decode in (decode_batch, decode_receipt, decode_status):
        with contextlib.suppress(TelemetryError):
            decode(payload)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), object(), {1, 2}, b"bytes", "x" * MAX_RECORD_BYTES],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_form_in_json_or_is_too_large_is_refused(value: object) -> None:
    with pytest.raises(TelemetryError, match="event record"):
        encode_row(kind="event", boot_id=BOOT, wall_s=0.0, monotonic_s=0.0, body={"value": value})


def test_a_receipt_survives_its_encoding() -> None:
    receipt = Receipt(stream=STREAM, ranges=(Range(1, 3), Range(7, 7)))
    assert json.loads(encode_receipt(receipt)) == {"v": 1, "stream": STREAM, "ranges": [[1, 3], [7, 7]]}
    assert decode_receipt(encode_receipt(receipt)) == receipt


@pytest.mark.parametrize("ranges", [None, [[3, 1]], [[0, 1]], [[1]], [[1, 2, 3]], [1], [["1", "2"]], [[1, 2]] * 1001])
def test_a_wrong_receipt_is_refused(ranges: object) -> None:
    with pytest.raises(TelemetryError, match=r"receipt\.ranges"):
        decode_receipt(dump({"v": 1, "stream": STREAM, "ranges": ranges}))


def test_a_status_says_who_and_whether() -> None:
    birth = encode_status("online", device="pi-07", stream=STREAM, boot_id=BOOT, reason="connected", wall_s=12.3456)
    will = encode_status("offline", device="pi-07", stream=STREAM, boot_id=BOOT, reason="lost", wall_s=None)
    assert decode_status(birth)["wall_s"] == 12.346
    assert decode_status(will)["state"] == "offline"
    assert "wall_s" not in decode_status(will)
    with pytest.raises(TelemetryError, match=r"status\.state"):
        decode_status(dump(json.loads(birth) | {"state": "asleep"}))


@given(seqs=st.sets(st.integers(1, 200)))
def test_ranges_cover_exactly_the_numbers(seqs: set[int]) -> None:
    ranges = to_ranges(sorted(seqs))
    assert {seq for first, last in ranges for seq in range(first, last + 1)} == seqs
    assert all(earlier.last + 1 < later.first for earlier, later in pairwise(ranges))


def test_topics_are_of_the_device_and_lead_back_to_it() -> None:
    mine = topics("pi-07")
    assert (mine.status, mine.records, mine.receipt) == (
        "outrider/v1/pi-07/status",
        "outrider/v1/pi-07/records",
        "outrider/v1/pi-07/receipt",
    )
    assert device_of(mine.records) == "pi-07"
    assert device_of("outrider/v2/pi-07/records") is device_of("outrider/v1/a b/records") is device_of("x") is None


@pytest.mark.parametrize("device", ["", "-a", ".a", "a/b", "a+", "#", "a b", "ä", "a" * 65, "a\n", None, 7])
def test_a_device_id_that_a_topic_or_a_file_cannot_hold_is_refused(device: object) -> None:
    with pytest.raises(ConfigError, match="device id") as caught:
        check_device(device)
    assert "pi-07" in caught.value.hint


@pytest.mark.parametrize("device", ["a", "7", "pi-07", "Line_3.cam", "a" * 64])
def test_usual_device_ids_are_taken(device: str) -> None:
    assert check_device(device) == device


def test_a_record_that_a_message_could_not_carry_is_refused_where_it_is_made() -> None:
    """Else it would stand at the head of the spool for ever: no reader takes the message that it is in."""

    def row(depth: int) -> bytes:
        body: object = 1
        for _ in range(depth - 1):
            body = {"a": body}
        return encode_row(kind="event", boot_id=BOOT, wall_s=0.0, monotonic_s=0.0, body=body)  # type: ignore[arg-type]

    message = encode_batch(device="pi", stream=STREAM, after_seq=0, rows=[Row(1, row(MAX_RECORD_DEPTH))])
    assert decode_batch(message).malformed == 0
    with pytest.raises(TelemetryError, match="nested deeper than 32"):
        row(MAX_RECORD_DEPTH + 1)
    with pytest.raises(TelemetryError, match="Unicode"):
        encode_row(kind="event", boot_id=BOOT, wall_s=0.0, monotonic_s=0.0, body={"file": "caf\udce9"})


def read_plainly(item: object) -> Record | None:
    """A record as the specification says it, rule by rule and without a short cut; None where it is refused."""

    def number(value: object) -> bool:
        return type(value) in (int, float) and abs(value) <= 1e15  # type: ignore[arg-type]

    if not isinstance(item, dict):
        return None
    uuid_like = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
    right = {
        "kind": lambda value: isinstance(value, str) and re.fullmatch("[a-z][a-z0-9_]{0,31}", value) is not None,
        "body": lambda value: isinstance(value, dict),
        "seq": lambda value: type(value) is int and 1 <= value <= MAX_SEQ,
        "boot_id": lambda value: isinstance(value, str) and uuid_like.fullmatch(value) is not None,
        "wall_s": number,
        "monotonic_s": number,
    }
    unsynced = item.get("clock_unsynced", False)
    if type(unsynced) is not bool or not all(is_right(item.get(key)) for key, is_right in right.items()):
        return None
    return Record(stream=STREAM, clock_unsynced=unsynced, **{key: item[key] for key in right})


odd = json_values | st.sampled_from(
    [True, 0, 1, 2, -1, MAX_SEQ, MAX_SEQ + 1, 10**400, 1e15, 1.1e15, -1e16, BOOT, "x", {}]
)
items = st.lists(
    st.builds(
        lambda changes, dropped: {
            key: value
            for key, value in {**json.loads(encode_record(a_record(1))), **changes}.items()
            if key not in dropped
        },
        st.dictionaries(
            st.sampled_from(["seq", "kind", "boot_id", "wall_s", "clock_unsynced", "body"]), odd, max_size=2
        )
        | st.builds(lambda seq: {"seq": seq}, st.integers(1, 9)),
        st.sets(st.sampled_from(["seq", "kind", "body", "monotonic_s"]), max_size=1) | st.just(set()),
    )
    | odd,
    max_size=6,
)


@given(items=items)
def test_a_batch_is_refused_and_taken_record_by_record_exactly_as_the_rules_say(items: list[object]) -> None:
    expected: list[Record] = []
    for item in items:
        record = read_plainly(item)
        if record is not None and (not expected or record.seq > expected[-1].seq):
            expected.append(record)
    batch = decode_batch(json.dumps(a_batch(records=items)).encode())
    assert list(batch.records) == expected
    assert batch.malformed == len(items) - len(expected)
    assert all(type(record.wall_s) is float and type(record.monotonic_s) is float for record in batch.records)


@pytest.mark.parametrize(
    "fields", [{1: "a", "1": "b"}, {"deep": [{True: 1, "true": 2}]}, {"deep": ({None: 1, "null": 2},)}]
)
def test_keys_that_are_one_in_json_are_refused_where_they_are_made(fields: dict[object, object]) -> None:
    """No reader would take a message with such a record in it, nor what else is in that message."""
    with pytest.raises(TelemetryError, match="stands twice") as raised:
        encode_row(kind="event", boot_id=BOOT, wall_s=0.0, monotonic_s=0.0, body={"name": "x", "fields": fields})
    assert "strings as keys" in raised.value.hint


def test_a_key_that_is_a_number_is_written_as_its_text() -> None:
    body = {"name": "x", "fields": {1: "a", 2.5: "b"}}
    row = encode_row(kind="event", boot_id=BOOT, wall_s=0.0, monotonic_s=0.0, body=body)
    assert decode_record(b'{"seq":1,' + row[1:], stream=STREAM).body["fields"] == {"1": "a", "2.5": "b"}


@pytest.mark.parametrize("name", [5, None, ["x"]])
def test_an_event_has_a_name(name: object) -> None:
    with pytest.raises(TelemetryError, match="expected a string"):
        encode_row(kind="event", boot_id=BOOT, wall_s=0.0, monotonic_s=0.0, body={"name": name, "fields": {}})
