"""Sparkplug B seen from a host: payloads by the protobuf library, and the specification's rules over what was seen.

The identifiers in what ``violations`` says are those of Sparkplug 3.0.0 itself (``tck-id-...``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FIELD = descriptor_pb2.FieldDescriptorProto
REBIRTH = "Node Control/Rebirth"
# sparkplug_b.proto, as far as scalar metrics go: number, name, type.
_METRIC_FIELDS = (
    (1, "name", _FIELD.TYPE_STRING),
    (2, "alias", _FIELD.TYPE_UINT64),
    (3, "timestamp", _FIELD.TYPE_UINT64),
    (4, "datatype", _FIELD.TYPE_UINT32),
    (5, "is_historical", _FIELD.TYPE_BOOL),
    (6, "is_transient", _FIELD.TYPE_BOOL),
    (7, "is_null", _FIELD.TYPE_BOOL),
    (10, "int_value", _FIELD.TYPE_UINT32),
    (11, "long_value", _FIELD.TYPE_UINT64),
    (12, "float_value", _FIELD.TYPE_FLOAT),
    (13, "double_value", _FIELD.TYPE_DOUBLE),
    (14, "boolean_value", _FIELD.TYPE_BOOL),
    (15, "string_value", _FIELD.TYPE_STRING),
    (16, "bytes_value", _FIELD.TYPE_BYTES),
)
_FIRST_VALUE = 10
# The specification's datatype -> the field of a value of that type.
VALUE_FIELDS = {4: "long_value", 10: "double_value", 11: "boolean_value", 12: "string_value"}


@functools.cache
def payload_class() -> Any:
    """The message class Payload, in a pool of its own."""
    file = descriptor_pb2.FileDescriptorProto(name="spb.proto", package="spb", syntax="proto2")
    payload = file.message_type.add(name="Payload")
    metric = payload.nested_type.add(name="Metric")
    metric.oneof_decl.add(name="value")
    for number, name, kind in _METRIC_FIELDS:
        added = metric.field.add(name=name, number=number, type=kind, label=_FIELD.LABEL_OPTIONAL)
        if number >= _FIRST_VALUE:
            added.oneof_index = 0
    payload.field.add(name="timestamp", number=1, type=_FIELD.TYPE_UINT64, label=_FIELD.LABEL_OPTIONAL)
    payload.field.add(
        name="metrics", number=2, type=_FIELD.TYPE_MESSAGE, type_name=".spb.Payload.Metric", label=_FIELD.LABEL_REPEATED
    )
    payload.field.add(name="seq", number=3, type=_FIELD.TYPE_UINT64, label=_FIELD.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("spb.Payload"))


def decode(data: bytes) -> Any:
    payload = payload_class()()
    payload.ParseFromString(data)
    return payload


def rebirth_command(*, value: bool = True) -> bytes:
    """An NCMD as a host sends it."""
    payload = payload_class()(timestamp=1)
    payload.metrics.add(name=REBIRTH, datatype=11, timestamp=1, boolean_value=value)
    data: bytes = payload.SerializeToString()
    return data


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One message as a host gets it that subscribed with QoS 1."""

    topic: str
    payload: bytes
    qos: int
    retain: bool

    @property
    def kind(self) -> str:
        return self.topic.split("/")[2]


@dataclass
class _Node:
    """What a host knows of a node."""

    alive: bool = False
    bd_seq: int | None = None
    seq: int = 0
    datatypes: dict[int, int] = field(default_factory=dict)
    rebirth_asked: bool = False


def violations(messages: Iterable[Seen]) -> list[str]:
    """What in the messages of one edge node breaks a rule, in their order."""
    node = _Node()
    found = []
    for at, message in enumerate(messages):
        found += [f"{at} {message.kind}: {problem}" for problem in _judge(node, message)]
    return found


def _judge(node: _Node, message: Seen) -> Iterator[str]:
    parts = message.topic.split("/")
    if len(parts) != 4 or parts[0] != "spBv1.0":
        yield "topic-structure: spBv1.0/<group>/<type>/<node>"
        return
    if message.retain:
        yield "payloads-*-retain: retained"
    payload = decode(message.payload)
    if payload.FindInitializationErrors() or not payload.HasField("timestamp"):
        yield "payloads-timestamp-in-UTC: no timestamp"
    judge = {"NBIRTH": _judge_birth, "NDATA": _judge_data, "NDEATH": _judge_death, "NCMD": _judge_command}
    yield from judge[message.kind](node, payload, message)


def _judge_birth(node: _Node, payload: Any, message: Seen) -> Iterator[str]:
    if message.qos != 0:
        yield "topics-nbirth-mqtt: QoS is not 0"
    if not payload.HasField("seq") or payload.seq != 0:
        yield "payloads-nbirth-seq: seq is not 0"
    named = {metric.name: metric for metric in payload.metrics}
    if len(named) != len(payload.metrics) or "" in named:
        yield "payloads-name-birth-data-requirement: a metric without a name of its own"
    aliases = [metric.alias for metric in payload.metrics if metric.HasField("alias")]
    if len(set(aliases)) != len(aliases):
        yield "payloads-alias-uniqueness: two metrics share an alias"
    for metric in payload.metrics:
        yield from _judge_value(metric)
    rebirth = named.get(REBIRTH)
    if rebirth is None or rebirth.datatype != 11 or rebirth.boolean_value:
        yield "topics-nbirth-rebirth-metric: no Node Control/Rebirth that is false"
    elif rebirth.HasField("alias"):
        yield "data-commands-rebirth-name-aliases: Node Control/Rebirth has an alias"
    yield from _judge_bd_seq(node, named.get("bdSeq"))
    node.alive, node.seq, node.rebirth_asked = True, 0, False
    node.datatypes = {metric.alias: metric.datatype for metric in payload.metrics if metric.HasField("alias")}


def _judge_bd_seq(node: _Node, metric: Any) -> Iterator[str]:
    if metric is None or metric.datatype != 4 or metric.long_value > 255:
        yield "topics-nbirth-bdseq-included: no bdSeq from 0 to 255"
        return
    if node.alive and metric.long_value == node.bd_seq:
        if not node.rebirth_asked:
            yield "payloads-nbirth-bdseq-repeat: a second birth in one session that nobody asked for"
    elif node.bd_seq is not None and metric.long_value != (node.bd_seq + 1) % 256:
        yield f"topics-nbirth-bdseq-increment: {metric.long_value} after {node.bd_seq}"
    elif node.alive:
        yield "topics-ndeath: a new session without the death of the one before"
    node.bd_seq = metric.long_value


def _judge_data(node: _Node, payload: Any, message: Seen) -> Iterator[str]:
    if message.qos != 0:
        yield "topics-ndata-mqtt: QoS is not 0"
    if not node.alive:
        yield "payloads-ndata-order: data without a birth"
    if not payload.HasField("seq") or payload.seq != (node.seq + 1) % 256:
        yield f"payloads-sequence-num-incrementing: seq {payload.seq} after {node.seq}"
    node.seq = payload.seq
    for metric in payload.metrics:
        if metric.HasField("name") or metric.alias not in node.datatypes:
            yield "payloads-alias-data-cmd-requirement: not an alias of the birth"
        elif metric.datatype != node.datatypes[metric.alias]:
            yield "payloads-metric-datatype-value: another type than in the birth"
        yield from _judge_value(metric)


def _judge_death(node: _Node, payload: Any, message: Seen) -> Iterator[str]:
    if message.qos != 1:
        yield "payloads-ndeath-will-message-qos: QoS is not 1"
    if payload.HasField("seq"):
        yield "payloads-ndeath-seq: it has a seq"
    if [metric.name for metric in payload.metrics] != ["bdSeq"]:
        yield "topics-ndeath-payload: not bdSeq alone"
    elif payload.metrics[0].long_value != node.bd_seq:
        yield f"topics-nbirth-bdseq-matching: {payload.metrics[0].long_value}, the birth said {node.bd_seq}"
    node.alive = False


def _judge_command(node: _Node, payload: Any, message: Seen) -> Iterator[str]:
    node.rebirth_asked |= any(metric.name == REBIRTH and metric.boolean_value for metric in payload.metrics)
    yield from ()


def _judge_value(metric: Any) -> Iterator[str]:
    held = metric.WhichOneof("value")
    if metric.is_null:
        if held is not None:
            yield f"payloads-metric-is-null: {metric.name or metric.alias} is null and has a value"
    elif metric.datatype not in VALUE_FIELDS or held != VALUE_FIELDS[metric.datatype]:
        yield f"payloads-metric-datatype-value: {metric.name or metric.alias} of type {metric.datatype} in {held}"
