"""Sparkplug B payloads and the numbers in them, as pure code.

Of the specification (Eclipse Sparkplug 3.0.0, chapters 4 to 6) what one edge node without devices needs: NBIRTH, NDATA,
NDEATH and the one command Node Control/Rebirth. Field numbers are those of its ``sparkplug_b.proto``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from outrider_runtimes import protowire

REBIRTH: Final = "Node Control/Rebirth"
BD_SEQ: Final = "bdSeq"
# seq and bdSeq count from 0 to 255 and begin again.
NUMBERS: Final = 256

Value = bool | int | float | str | None

_TIMESTAMP, _METRICS, _SEQ = 1, 2, 3
_NAME, _ALIAS, _METRIC_TIMESTAMP, _DATATYPE, _IS_NULL = 1, 2, 3, 4, 7
_LONG, _DOUBLE, _BOOLEAN, _STRING = 11, 13, 14, 15


class Datatype(IntEnum):
    """The specification's index of a metric's type."""

    INT64 = 4
    DOUBLE = 10
    BOOLEAN = 11
    STRING = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric of a payload; ``value`` None is null. A birth names it, what comes after names its alias alone."""

    datatype: Datatype
    value: Value
    name: str | None = None
    alias: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Tag:
    """A metric that a node announces."""

    name: str
    datatype: Datatype


class Session:
    """What a node says between one CONNECT and the next, and in which order.

    Attributes:
        bd_seq: the number that ties this session's NDEATH to its NBIRTH.
    """

    def __init__(self, tags: Sequence[Tag], *, bd_seq: int) -> None:
        self.bd_seq = bd_seq
        self._tags = tuple(tags)
        self._aliases = {tag.name: alias for alias, tag in enumerate(self._tags, 1)}
        self._seq = 0
        self._told: dict[str, Value] = {}

    def birth(self, values: Mapping[str, Value], *, now_ms: int) -> bytes:
        """NBIRTH: every metric, by name and alias, those without a value as null. ``seq`` begins again at 0."""
        self._seq = 0
        self._told = {tag.name: values.get(tag.name) for tag in self._tags}
        metrics = [
            Metric(name=BD_SEQ, datatype=Datatype.INT64, value=self.bd_seq),
            # The one metric that must not have an alias: a host that knows none asks for the birth by it.
            Metric(name=REBIRTH, datatype=Datatype.BOOLEAN, value=False),
        ]
        metrics += [
            Metric(name=tag.name, alias=self._aliases[tag.name], datatype=tag.datatype, value=self._told[tag.name])
            for tag in self._tags
        ]
        return encode_payload(metrics, seq=self._seq, now_ms=now_ms)

    def data(self, values: Mapping[str, Value], *, now_ms: int) -> bytes | None:
        """NDATA: what is another value than was told last; None where there is nothing."""
        changed = [tag for tag in self._tags if not _is_same(values.get(tag.name), self._told[tag.name])]
        if not changed:
            return None
        self._seq = (self._seq + 1) % NUMBERS
        self._told.update((tag.name, values.get(tag.name)) for tag in changed)
        metrics = [
            Metric(alias=self._aliases[tag.name], datatype=tag.datatype, value=self._told[tag.name]) for tag in changed
        ]
        return encode_payload(metrics, seq=self._seq, now_ms=now_ms)

    def death(self, *, now_ms: int) -> bytes:
        """NDEATH: bdSeq alone, without ``seq``."""
        metric = Metric(name=BD_SEQ, datatype=Datatype.INT64, value=self.bd_seq)
        return encode_payload([metric], seq=None, now_ms=now_ms)


def _is_same(value: Value, told: Value) -> bool:
    both = (value, told)
    return value == told or all(isinstance(each, float) and math.isnan(each) for each in both)  # NaN is told once too


def encode_payload(metrics: Sequence[Metric], *, seq: int | None, now_ms: int) -> bytes:
    """One payload; each metric has the payload's time."""
    data = protowire.uint_field(_TIMESTAMP, now_ms)
    for metric in metrics:
        data += protowire.bytes_field(_METRICS, _encode_metric(metric, now_ms=now_ms))
    return data if seq is None else data + protowire.uint_field(_SEQ, seq)


def asks_for_rebirth(payload: bytes) -> bool:
    """Whether an NCMD holds Node Control/Rebirth with the value true. What cannot be read asks for nothing."""
    try:
        return any(
            number == _METRICS and isinstance(value, memoryview) and _is_rebirth(value)
            for number, _, value in protowire.fields(memoryview(payload))
        )
    except protowire.Malformed:
        return False


def _is_rebirth(metric: memoryview) -> bool:
    found = {number: value for number, _, value in protowire.fields(metric)}
    name = found.get(_NAME)
    return isinstance(name, memoryview) and bytes(name) == REBIRTH.encode() and found.get(_BOOLEAN) == 1


def _encode_metric(metric: Metric, *, now_ms: int) -> bytes:
    data = b"" if metric.name is None else protowire.bytes_field(_NAME, metric.name.encode())
    if metric.alias is not None:
        data += protowire.uint_field(_ALIAS, metric.alias)
    data += protowire.uint_field(_METRIC_TIMESTAMP, now_ms)
    data += protowire.uint_field(_DATATYPE, metric.datatype)
    return data + _encode_value(metric.datatype, metric.value)


def _encode_value(datatype: Datatype, value: Value) -> bytes:
    if value is None:
        return protowire.uint_field(_IS_NULL, 1)
    if datatype is Datatype.STRING:
        return protowire.bytes_field(_STRING, str(value).encode("utf-8", "replace"))
    if datatype is Datatype.BOOLEAN:
        return protowire.uint_field(_BOOLEAN, bool(value))
    if datatype is Datatype.INT64:
        return protowire.uint_field(_LONG, int(value))
    return protowire.double_field(_DOUBLE, float(value))
