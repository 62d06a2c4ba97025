"""The bytes of telemetry: topics and payloads of docs/telemetry.md, as pure functions.

A record is written to the spool as a JSON object without its ``seq``; a batch is made by joining such objects, so
that nothing is decoded and encoded again on the way out. Readers ignore keys that they do not know; a key that they
know has to be right.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, NoReturn, cast

from outrider_runtimes import strictjson
from outrider_runtimes.errors import ConfigError, TelemetryError

VERSION: Final = 1
PREDICTION: Final = "prediction"
EVENT: Final = "event"
METRICS: Final = "metrics"
INPUT: Final = "input"

# What one reader must be able to hold for one message; a small board's consumer may be a small board too.
MAX_RECORD_BYTES: Final = 64 * 1024
MAX_PAYLOAD_BYTES: Final = 1024 * 1024
MAX_BATCH_RECORDS: Final = 1000
# A record has to stay readable inside a message: one that is not would hold up all that come after it.
MAX_RECORD_DEPTH: Final = 32
MAX_DEPTH: Final = 64
MAX_SEQ: Final = 2**63 - 1
# Kinds whose keys are this package's own.
_BUILT_HERE: Final = (PREDICTION, METRICS, INPUT)

State = Literal["online", "offline"]

_encode_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KIND = re.compile(r"[a-z][a-z0-9_]{0,31}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Range(NamedTuple):
    """Sequence numbers from ``first`` to ``last``, both included."""

    first: int
    last: int


class Row(NamedTuple):
    """One record as the spool holds it: its sequence number, and its JSON object without it."""

    seq: int
    body: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One thing that a device reports.

    Attributes:
        stream: the spool that it came through, a UUID; made with the spool's file.
        seq: its number in the stream, from 1, strictly increasing; a number that never comes is a lost record.
        kind: ``prediction``, ``metrics``, ``event`` or ``input``; readers let pass what they do not know.
        boot_id: the boot of the device in which it was made, a UUID.
        wall_s: when, in seconds since 1970 by the device's clock.
        monotonic_s: when, in seconds of the device's monotonic clock; comparable within one ``boot_id``.
        body: what it says, by kind.
        clock_unsynced: nothing kept the device's clock right, so that ``wall_s`` says nothing.
    """

    stream: str
    seq: int
    kind: str
    boot_id: str
    wall_s: float
    monotonic_s: float
    body: Mapping[str, Any]
    clock_unsynced: bool = False

    @property
    def uuid(self) -> str:
        """Its name among all records: the UUID (version 5) of ``seq`` in the namespace ``stream``."""
        return str(uuid.uuid5(uuid.UUID(self.stream), str(self.seq)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One message on the topic of records.

    Attributes:
        device, stream: whose, and which stream.
        after_seq: of the numbers after this one, up to that of the last record, only those of the message's records
            wait on the device: another number in that span that the consumer does not have will not come.
        records: in rising order of ``seq``.
        malformed: how many of the message's records could not be read and are not in ``records``.
    """

    device: str
    stream: str
    after_seq: int
    records: tuple[Record, ...]
    malformed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What a consumer has taken of one stream."""

    stream: str
    ranges: tuple[Range, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Topics:
    """The topics of one device, or of all with ``+`` in its place."""

    status: str
    info: str
    records: str
    receipt: str


def _topics(device: str) -> Topics:
    base = f"outrider/v1/{device}"
    return Topics(status=f"{base}/status", info=f"{base}/info", records=f"{base}/records", receipt=f"{base}/receipt")


ALL_DEVICES: Final = _topics("+")


def topics(device: str) -> Topics:
    """The topics of ``device``. Raises ConfigError for an id that a topic or a file name cannot hold."""
    return _topics(check_device(device))


def check_device(device: object) -> str:
    """``device`` itself: 1 to 64 of A-Z a-z 0-9 . _ - first a letter or digit. Raises ConfigError."""
    if not isinstance(device, str) or not _DEVICE.fullmatch(device):
        raise ConfigError(
            f"device id {device!r} is not usable",
            hint="use 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or a digit, such as pi-07",
        )
    return device


def holdable(text: str) -> str:
    """The text as a record can hold it: half of a surrogate pair has no form in it, and is a question mark."""
    return text.encode(errors="replace").decode()


def device_of(topic: str) -> str | None:
    """The device that a topic of this specification belongs to; None for another topic."""
    parts = topic.split("/")
    if len(parts) == 4 and parts[:2] == ["outrider", "v1"] and _DEVICE.fullmatch(parts[2]):
        return parts[2]
    return None


def encode_row(
    *,
    kind: str,
    boot_id: str,
    wall_s: float,
    monotonic_s: float,
    body: Mapping[str, Any],
    clock_unsynced: bool = False,
) -> bytes:
    """A record's JSON object without ``stream`` and ``seq``, as the spool stores it.

    Raises:
        TelemetryError: a value that JSON has no form for, more than MAX_RECORD_BYTES, deeper than MAX_RECORD_DEPTH,
            keys that are one and the same in JSON, or an event whose name is no string.
    """
    fields: dict[str, Any] = {
        "kind": kind,
        "boot_id": boot_id,
        "wall_s": round(wall_s, 3),
        "monotonic_s": round(monotonic_s, 6),
        **({"clock_unsynced": True} if clock_unsynced else {}),
        "body": body,
    }
    data = _dump(fields, what=f"{kind} record")
    if len(data) > MAX_RECORD_BYTES:
        raise TelemetryError(
            f"a {kind} record of {len(data)} bytes; at most {MAX_RECORD_BYTES} are allowed",
            hint="report less in one record",
        )
    if strictjson.deeper_than(data, MAX_RECORD_DEPTH):
        raise TelemetryError(f"a {kind} record is nested deeper than {MAX_RECORD_DEPTH}", hint="report it flatter")
    if strictjson.has_lone_surrogate(data):
        raise TelemetryError(
            f"a string of a {kind} record is not Unicode text",
            hint='text.encode(errors="replace").decode() makes it so',
        )
    if kind not in _BUILT_HERE:
        _check_own(kind, body, data)
    return data


def _check_own(kind: str, body: Mapping[str, Any], data: bytes) -> None:
    """What a program says in words of its own."""
    if kind == EVENT and not isinstance(body.get("name", ""), str):
        raise TelemetryError(f"an event's name is {body['name']!r:.80}, expected a string")
    if not _has_text_keys(body):  # 1 and "1" are one key in JSON: no reader would take the message
        try:
            _load(data, cap=MAX_RECORD_BYTES, what=f"{kind} record")
        except TelemetryError as error:
            raise TelemetryError(str(error), hint="use strings as keys") from error


def _has_text_keys(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _has_text_keys(inner) for key, inner in value.items())
    return not isinstance(value, (list, tuple)) or all(map(_has_text_keys, value))


def encode_record(record: Record) -> bytes:
    """The record's JSON object as it stands in a batch: with its ``seq``. Raises TelemetryError as encode_row does."""
    row = encode_row(
        kind=record.kind,
        boot_id=record.boot_id,
        wall_s=record.wall_s,
        monotonic_s=record.monotonic_s,
        body=record.body,
        clock_unsynced=record.clock_unsynced,
    )
    return b'{"seq":%d,%b' % (record.seq, row[1:])


def decode_record(data: bytes, *, stream: str) -> Record:
    """The inverse of encode_record. Raises TelemetryError that names the key."""
    return _record(_load(data, cap=MAX_RECORD_BYTES + 32, what="record"), stream=stream)


def encode_batch(*, device: str, stream: str, after_seq: int, rows: Sequence[Row]) -> bytes:
    """One message of records; ``rows`` in rising order of seq."""
    head = _dump({"v": VERSION, "device": device, "stream": stream, "after_seq": after_seq}, what="batch")
    return head[:-1] + b',"records":[' + b",".join([b'{"seq":%d,%b' % (seq, body[1:]) for seq, body in rows]) + b"]}"


def decode_batch(data: bytes) -> Batch:
    """Read one message of records. A record that cannot be read is counted, the others stand.

    Raises:
        TelemetryError: the message is too large, not JSON, or its envelope is not what the specification says.
    """
    fields = _versioned(data, "batch")
    device = _device(fields, "batch")
    stream = _uuid(fields, "stream", "batch")
    items = fields.get("records")
    if not isinstance(items, list) or len(items) > MAX_BATCH_RECORDS:
        _refuse("batch", "records", f"a list of at most {MAX_BATCH_RECORDS} records", type(items).__name__)
    records: list[Record] = []
    malformed = 0
    last_seq = 0
    for item in items:
        try:
            record = _record(item, stream=stream)
            if record.seq <= last_seq:
                _refuse("record", "seq", f"a number above {last_seq}", record.seq)
            records.append(record)
            last_seq = record.seq
        except TelemetryError:
            malformed += 1
    after_seq = fields.get("after_seq")
    if after_seq != 0 or isinstance(after_seq, bool):
        after_seq = _seq(fields, "after_seq", "batch")
    return Batch(device=device, stream=stream, after_seq=after_seq, records=tuple(records), malformed=malformed)


def encode_receipt(receipt: Receipt) -> bytes:
    """One message on a device's receipt topic."""
    return _dump({"v": VERSION, "stream": receipt.stream, "ranges": receipt.ranges}, what="receipt")


def decode_receipt(data: bytes) -> Receipt:
    """The inverse of encode_receipt. Raises TelemetryError."""
    fields = _versioned(data, "receipt")
    items = fields.get("ranges")
    if not isinstance(items, list) or len(items) > MAX_BATCH_RECORDS:
        _refuse("receipt", "ranges", f"a list of at most {MAX_BATCH_RECORDS} ranges", type(items).__name__)
    ranges = []
    for item in items:
        if not (isinstance(item, list) and len(item) == 2 and all(map(_is_seq, item)) and item[0] <= item[1]):
            _refuse("receipt", "ranges", "pairs [first, last] of sequence numbers", item)
        ranges.append(Range(item[0], item[1]))
    return Receipt(stream=_uuid(fields, "stream", "receipt"), ranges=tuple(ranges))


def encode_status(state: State, *, device: str, stream: str, boot_id: str, reason: str, wall_s: float | None) -> bytes:
    """The retained message on a device's status topic. ``wall_s`` is None in a last will: it is written beforehand."""
    fields = {"v": VERSION, "state": state, "device": device, "stream": stream, "boot_id": boot_id, "reason": reason}
    return _dump(fields if wall_s is None else {**fields, "wall_s": round(wall_s, 3)}, what="status")


def decode_status(data: bytes) -> dict[str, Any]:
    """The fields of a status message, checked. Raises TelemetryError."""
    fields = _versioned(data, "status")
    if fields.get("state") not in ("online", "offline"):
        _refuse("status", "state", "'online' or 'offline'", fields.get("state"))
    _device(fields, "status")
    _uuid(fields, "stream", "status")
    _uuid(fields, "boot_id", "status")
    return fields


def encode_info(
    *,
    device: str,
    stream: str,
    boot_id: str,
    wall_s: float,
    software: Mapping[str, str],
    board: Mapping[str, Any],
    bundles: Sequence[Mapping[str, Any]],
) -> bytes:
    """The retained message on a device's info topic."""
    fields = {
        "v": VERSION,
        "device": device,
        "stream": stream,
        "boot_id": boot_id,
        "wall_s": round(wall_s, 3),
        "software": software,
        "board": board,
        "bundles": bundles,
    }
    return _dump(fields, what="info")


def decode_info(data: bytes) -> dict[str, Any]:
    """The fields of an info message, checked as far as a reader relies on them. Raises TelemetryError."""
    fields = _versioned(data, "info")
    _device(fields, "info")
    _uuid(fields, "stream", "info")
    _uuid(fields, "boot_id", "info")
    for key in ("software", "board"):
        if not isinstance(fields.get(key), dict):
            _refuse("info", key, "an object", fields.get(key))
    bundles = fields.get("bundles")
    if not isinstance(bundles, list) or not all(isinstance(bundle, dict) for bundle in bundles):
        _refuse("info", "bundles", "a list of objects", bundles)
    for bundle in cast("list[dict[str, Any]]", bundles):
        for key in ("name", "digest", "interface", "variant", "engine"):
            if not isinstance(bundle.get(key), str):
                _refuse("info.bundles", key, "a string", bundle.get(key))
        if isinstance(bundle.get("version"), bool) or not isinstance(bundle.get("version"), int):
            _refuse("info.bundles", "version", "an integer", bundle.get("version"))
        if not isinstance(bundle.get("verified"), bool):
            _refuse("info.bundles", "verified", "true or false", bundle.get("verified"))
    return fields


def to_ranges(seqs: Iterable[int]) -> tuple[Range, ...]:
    """Rising numbers as the fewest ranges.

    >>> to_ranges([1, 2, 3, 7])
    (Range(first=1, last=3), Range(first=7, last=7))
    """
    ranges: list[Range] = []
    first = last = 0
    for seq in seqs:
        if seq != last + 1 or not first:
            if first:
                ranges.append(Range(first, last))
            first = seq
        last = seq
    if first:
        ranges.append(Range(first, last))
    return tuple(ranges)


def _record(item: object, *, stream: str) -> Record:
    if not isinstance(item, dict):
        _refuse("record", "", "an object", item)
    fields: dict[str, Any] = item
    kind, body, seq = fields.get("kind"), fields.get("body"), fields.get("seq")
    if not isinstance(kind, str) or not _is_kind(kind):
        _refuse("record", "kind", "a lower-case name", kind)
    if not isinstance(body, dict):
        _refuse("record", "body", "an object", body)
    unsynced = fields.get("clock_unsynced", False)
    if not isinstance(unsynced, bool):
        _refuse("record", "clock_unsynced", "true or false", unsynced)
    if type(seq) is not int or not 1 <= seq <= MAX_SEQ:
        _refuse("record", "seq", "an integer from 1", seq)
    boot_id, wall_s, monotonic_s = fields.get("boot_id"), fields.get("wall_s"), fields.get("monotonic_s")
    if type(boot_id) is not str or not _is_uuid(boot_id):
        _refuse("record", "boot_id", "a lower-case UUID", boot_id)
    if type(wall_s) is not float or not -1e15 <= wall_s <= 1e15:
        wall_s = _number(fields, "wall_s")
    if type(monotonic_s) is not float or not -1e15 <= monotonic_s <= 1e15:
        monotonic_s = _number(fields, "monotonic_s")
    # Record(...) itself takes twice as long as all of this: it passes each field through object.__setattr__.
    made = _new_record(Record)
    _put_stream(made, stream)
    _put_seq(made, seq)
    _put_kind(made, kind)
    _put_boot_id(made, boot_id)
    _put_wall_s(made, wall_s)
    _put_monotonic_s(made, monotonic_s)
    _put_body(made, body)
    _put_clock_unsynced(made, unsynced)
    return made


_new_record = Record.__new__
_put_stream, _put_seq, _put_kind, _put_boot_id, _put_wall_s, _put_monotonic_s, _put_body, _put_clock_unsynced = (
    getattr(Record, each.name).__set__ for each in dataclass_fields(Record)
)


# The records of a batch share theirs: looked at once.
@lru_cache(64)
def _is_kind(text: str) -> bool:
    return _KIND.fullmatch(text) is not None


@lru_cache(64)
def _is_uuid(text: str) -> bool:
    return _UUID.fullmatch(text) is not None


def _is_seq(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SEQ


def _seq(fields: dict[str, Any], key: str, what: str) -> int:
    value = fields.get(key)
    if not _is_seq(value):
        _refuse(what, key, "an integer from 1", value)
    return cast(int, value)


def _number(fields: dict[str, Any], key: str) -> float:
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e15:
        _refuse("record", key, "a number of seconds", value)
    return float(value)


def _device(fields: dict[str, Any], what: str) -> str:
    value = fields.get("device")
    if not isinstance(value, str) or not _DEVICE.fullmatch(value):
        _refuse(what, "device", "a device id", value)
    return value


def _uuid(fields: dict[str, Any], key: str, what: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or not _is_uuid(value):
        _refuse(what, key, "a lower-case UUID", value)
    return value


def _versioned(data: bytes, what: str) -> dict[str, Any]:
    fields = _load(data, cap=MAX_PAYLOAD_BYTES, what=what)
    version = fields.get("v")
    if isinstance(version, bool) or version != VERSION:
        _refuse(what, "v", str(VERSION), version)
    return fields


def _refuse(what: str, key: str, expected: str, got: object) -> NoReturn:
    shown = repr(got)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise TelemetryError(f"{what}{'.' + key if key else ''} is {shown}, expected {expected}")


def _dump(value: object, *, what: str) -> bytes:
    try:
        return _encode_json(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TelemetryError(
            f"{what}: {error}", hint="use strings, finite numbers, booleans, None, and lists and dicts of them"
        ) from error


def _load(data: bytes, *, cap: int, what: str) -> dict[str, Any]:
    return strictjson.parse(
        data,
        lambda problem: TelemetryError(f"{what}: {problem}"),
        max_bytes=cap,
        max_depth=MAX_DEPTH,
        parse_float=strictjson.finite_float,
    )
