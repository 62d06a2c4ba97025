"""The fleet as a fold over messages: topic, payload and time in, a table out. Pure.

An onlooker's: it sends no receipts, so a device without another consumer keeps its records and sends them again; what
was seen is known by stream and number and counts once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from outrider.telemetry.ledger import Ledger
from outrider.telemetry.metrics import latency_bucket
from outrider.telemetry.record import (
    EVENT,
    METRICS,
    PREDICTION,
    Record,
    decode_batch,
    decode_info,
    decode_status,
    device_of,
)
from outrider.telemetry.vitals import Interval, Vitals, bounded_name, read_metrics, vitals
from outrider_runtimes.errors import TelemetryError

State = Literal["online", "stale", "offline", "unknown"]

# A device tells its metrics every minute where nothing else is set: three of them missed is too quiet.
STALE_AFTER_S: Final = 180.0
# What the table's numbers are about: the last ten minutes, or the last interval where that was longer ago.
WINDOW_S: Final = 600.0
MAX_DEVICES: Final = 5000
MAX_POINTS: Final = 360
# Where a device sends predictions and no metrics, they are put together by this.
OWN_INTERVAL_S: Final = 60.0
_MAX_STREAMS: Final = 4
# The events that count in an Interval, and as what.
_FAILED: Final = {"inference_failed": "failures", "inference_refused": "refused"}
_MAX_TEXT: Final = 200
_MAX_MS: Final = 2**53
_SHOWN_OF_A_BUNDLE: Final = ("name", "version", "variant", "engine")
# A record from later than this is of a clock that is wrong.
_FUTURE_S: Final = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """The last thing that a device said has happened."""

    name: str
    detail: str
    at_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One interval of one device, for a chart. ``at_s`` is its end, in seconds since 1970."""

    at_s: float
    number: int
    per_second: float | None
    p95_ms: float | None
    offload_share: float | None
    temperature_c: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One device in the table.

    Attributes:
        state: ``stale`` is a device that is connected and has not been heard for too long.
        reason: why it is in that state, in the words of its status message.
        heard_s: when something new came from it last; ``told`` is what its numbers say.
        records: how many of its records were seen.
        gaps: how many will never come, of those since the first that was seen.
        number: rises with every change of any row.
    """

    device: str
    state: State = "unknown"
    reason: str = ""
    heard_s: float = 0.0
    told: Vitals = field(default_factory=Vitals)
    event: Event | None = None
    software: str = ""
    machine: str = ""
    records: int = 0
    gaps: int = 0
    number: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class News:
    """What one message brought."""

    device: str
    text: str
    at_s: float


@dataclass(kw_only=True, slots=True, eq=False)
class _Device:
    row: Row
    bundles: Sequence[Mapping[str, Any]] = ()
    intervals: deque[tuple[float, Interval]] = field(default_factory=lambda: deque(maxlen=MAX_POINTS))
    points: deque[Point] = field(default_factory=lambda: deque(maxlen=MAX_POINTS))
    streams: dict[str, Ledger] = field(default_factory=dict)
    has_metrics: bool = False
    grown: set[float] = field(default_factory=set)  # the minutes whose points are not right any more


class Fleet:
    """What is known of every device that was heard. Not safe from several threads.

    Attributes:
        number: rises with every change.
        malformed: messages and records that could not be read.
        refused: messages of devices beyond MAX_DEVICES, of which nothing is kept.
    """

    def __init__(self, *, stale_after_s: float = STALE_AFTER_S, window_s: float = WINDOW_S) -> None:
        self.number = 0
        self.malformed = 0
        self.refused = 0
        self._stale_after_s = stale_after_s
        self._window_s = window_s
        self._devices: dict[str, _Device] = {}

    def take(self, topic: str, payload: bytes, *, now_s: float) -> list[News]:
        """Fold one message in, heard at ``now_s``, in seconds since 1970. What cannot be read is counted."""
        device = device_of(topic)
        kind = topic.rpartition("/")[2]
        takers = {"status": self._take_status, "info": self._take_info, "records": self._take_records}
        if device is None or kind not in takers or not payload:
            return []
        try:
            return takers[kind](device, payload, now_s)
        except TelemetryError:
            self.malformed += 1
            return []

    def tick(self, now_s: float) -> list[News]:
        """Mark who has been quiet for too long."""
        news = []
        for each in self._devices.values():
            if each.row.state == "online" and now_s - each.row.heard_s > self._stale_after_s:
                self._change(each, state="stale", reason=f"nothing for {self._stale_after_s:.0f} s")
                news.append(News(device=each.row.device, text="stale", at_s=now_s))
        return news

    def rows(self, *, after: int = 0) -> list[Row]:
        """The table, by device; those alone that changed after a ``number``."""
        found = (each.row for each in self._devices.values() if each.row.number > after)
        return sorted(found, key=lambda row: row.device)

    def points(self, device: str, *, after: int = 0) -> list[Point]:
        """The intervals of a device in the order of time, or those that came after a ``number``."""
        found = (point for point in self._devices[device].points if point.number > after)
        return sorted(found, key=lambda point: point.at_s)

    def _find(self, device: str) -> _Device:
        found = self._devices.get(device)
        if found is None:
            if len(self._devices) >= MAX_DEVICES:
                self.refused += 1
                raise TelemetryError(f"more than {MAX_DEVICES} devices")
            found = self._devices[device] = _Device(row=Row(device=device))
        return found

    def _change(self, each: _Device, **fields: Any) -> None:
        self.number += 1
        each.row = replace(each.row, number=self.number, **fields)

    def _heard(self, each: _Device, now_s: float, **fields: Any) -> None:
        """Something new came: who was stale is not."""
        state = "online" if each.row.state == "stale" else each.row.state
        self._change(each, **{"heard_s": now_s, "state": state, **fields})

    def _take_status(self, device: str, payload: bytes, now_s: float) -> list[News]:
        fields = decode_status(payload)
        _refuse_stranger(fields, device)
        each = self._find(device)
        reason = _text(fields.get("reason", ""))
        if (each.row.state, each.row.reason) == (fields["state"], reason):
            return []
        self._heard(each, now_s, state=fields["state"], reason=reason)
        return [News(device=device, text=f"{fields['state']} ({reason})", at_s=now_s)]

    def _take_info(self, device: str, payload: bytes, now_s: float) -> list[News]:
        fields = decode_info(payload)
        _refuse_stranger(fields, device)
        each = self._find(device)
        each.bundles = [
            {key: bundle[key] if key == "version" else _text(bundle[key]) for key in _SHOWN_OF_A_BUNDLE}
            for bundle in fields["bundles"][:1]
        ]
        software, machine = fields["software"].get("outrider", ""), fields["board"].get("machine", "")
        self._heard(each, now_s, software=_text(software), machine=_text(machine), told=self._told(each, now_s))
        told = each.row.told
        serves = f"serves {told.model} {told.version}, {told.variant}" if told.model else "serves nothing yet"
        return [News(device=device, text=serves, at_s=now_s)]

    def _take_records(self, device: str, payload: bytes, now_s: float) -> list[News]:
        batch = decode_batch(payload)
        _refuse_stranger({"device": batch.device}, device)
        self.malformed += batch.malformed
        each = self._find(device)
        if not batch.records:
            return []
        ledger = _ledger(each, batch.stream, batch.records[0].seq)
        fresh = [record for record in batch.records if ledger.add(record.seq)]
        if not batch.malformed:
            ledger.settle(batch.after_seq + 1, batch.records[-1].seq)
        if not fresh:  # sent again: nothing new is known of the device, but that it is there
            return []
        news = [told for record in fresh for told in self._take_record(each, record, now_s)]
        if each.grown:
            self._renew_points(each)
        ledgers = each.streams.values()
        self._heard(
            each,
            now_s,
            told=self._told(each, now_s),
            records=each.row.records + len(fresh),
            gaps=sum(ledger.gaps for ledger in ledgers),
        )
        return news

    def _take_record(self, each: _Device, record: Record, now_s: float) -> list[News]:
        at_s = record.wall_s if 0 < record.wall_s <= now_s + _FUTURE_S else now_s
        if record.kind == EVENT:
            event = _event(record, at_s)
            if each.row.event is None or each.row.event.at_s <= at_s:  # a backlog may bring older ones later
                self._change(each, event=event)
            if event.name in _FAILED and not each.has_metrics:
                counted = _FAILED[event.name]
                self._grow(each, at_s, lambda own: replace(own, **{counted: getattr(own, counted) + 1}))
            return [News(device=each.row.device, text=f"{event.name} {event.detail}".rstrip(), at_s=at_s)]
        try:
            if record.kind == METRICS:
                if not each.has_metrics:  # from here on the device counts itself: predictions are but a sample
                    each.has_metrics = True
                    each.intervals.clear()
                    each.points.clear()
                return [self._take_interval(each, read_metrics(record.body), at_s)]
            if record.kind == PREDICTION and not each.has_metrics:
                self._take_prediction(each, record, at_s)
        except TelemetryError:
            self.malformed += 1
        return []

    def _take_interval(self, each: _Device, interval: Interval, at_s: float) -> News:
        each.intervals.append((at_s, interval))
        self._add_point(each, interval, at_s)
        told = vitals([interval])
        text = f"{told.predictions} answers" + (f", p95 {told.p95_ms:g} ms" if told.p95_ms is not None else "")
        return News(device=each.row.device, text=text, at_s=at_s)

    def _take_prediction(self, each: _Device, record: Record, at_s: float) -> None:
        """A device without metrics: its predictions and failures, minute by minute, as if it had counted them."""
        source, total_ms = record.body.get("source"), _total_ms(record)
        if not isinstance(source, str) or total_ms is None:
            raise TelemetryError("a prediction without source or timing")
        self._grow(each, at_s, lambda own: _predicted(own, source, latency_bucket(total_ms)))

    def _grow(self, each: _Device, at_s: float, more: Callable[[Interval], Interval]) -> None:
        """One more of something in the minute of a device without metrics."""
        begins_s = at_s // OWN_INTERVAL_S * OWN_INTERVAL_S
        at = next((at for at in reversed(range(len(each.intervals))) if each.intervals[at][0] == begins_s), None)
        grown = more(each.intervals[at][1] if at is not None else Interval(interval_s=OWN_INTERVAL_S))
        if at is None:
            each.intervals.append((begins_s, grown))
        else:
            each.intervals[at] = (begins_s, grown)
        each.grown.add(begins_s)

    def _renew_points(self, each: _Device) -> None:
        """The points of the minutes that predictions came to."""
        kept = (point for point in each.points if point.at_s not in each.grown)
        each.points = deque(kept, maxlen=MAX_POINTS)
        for begins_s, interval in list(each.intervals):
            if begins_s in each.grown:
                self._add_point(each, interval, begins_s)
        each.grown.clear()

    def _add_point(self, each: _Device, interval: Interval, at_s: float) -> None:
        told = vitals([interval])
        point = Point(
            at_s=round(at_s, 3),
            number=self.number + 1,
            per_second=told.per_second,
            p95_ms=told.p95_ms,
            offload_share=told.offload_share,
            temperature_c=told.temperature_c,
        )
        each.points.append(point)

    def _told(self, each: _Device, now_s: float) -> Vitals:
        ordered = sorted(each.intervals, key=lambda pair: pair[0])
        recent = [interval for at_s, interval in ordered if at_s >= now_s - self._window_s]
        return vitals(recent or [interval for _, interval in ordered[-1:]], each.bundles)


def _predicted(interval: Interval, source: str, bucket: int) -> Interval:
    source = bounded_name(source, interval.by_source)
    return replace(
        interval,
        predictions=interval.predictions + 1,
        by_source={**interval.by_source, source: interval.by_source.get(source, 0) + 1},
        buckets={**interval.buckets, bucket: interval.buckets.get(bucket, 0) + 1},
    )


def _ledger(each: _Device, stream: str, since_seq: int) -> Ledger:
    if stream not in each.streams:
        if len(each.streams) >= _MAX_STREAMS:  # a device that begins a new stream each time: the oldest is over
            del each.streams[next(iter(each.streams))]
        each.streams[stream] = Ledger(since_seq)
    return each.streams[stream]


def _event(record: Record, at_s: float) -> Event:
    fields = record.body.get("fields")
    details = fields.items() if isinstance(fields, dict) else ()
    detail = ", ".join(f"{key}={value}" for key, value in details if isinstance(value, (str, int, float)))
    return Event(name=_text(record.body.get("name", "")), detail=_text(detail), at_s=at_s)


def _total_ms(record: Record) -> float | None:
    timing = record.body.get("timing_ms")
    total = timing.get("total") if isinstance(timing, dict) else None
    if isinstance(total, bool) or not isinstance(total, (int, float)) or not abs(total) <= _MAX_MS:
        return None  # an integer may be beyond what a float holds
    return float(total)


def _text(value: object) -> str:
    """A stranger's text: no longer than a line has use for, and nothing in it that moves a terminal's cursor."""
    text = "".join(character if character.isprintable() else "\ufffd" for character in str(value)[: _MAX_TEXT + 1])
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


def _refuse_stranger(fields: Mapping[str, Any], device: str) -> None:
    if fields["device"] != device:
        raise TelemetryError(f"{device}'s topic holds a message of {_text(fields['device'])}")
