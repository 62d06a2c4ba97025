"""Sparkplug B payloads: what the protobuf library reads in them, and the order of a session's numbers."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.telemetry.sparkplug_payload import (
    Datatype,
    Metric,
    Session,
    Tag,
    Value,
    asks_for_rebirth,
    encode_payload,
)
from support import sparkplug
from support.sparkplug import Seen, decode, violations

TAGS = (
    Tag(name="Model/Name", datatype=Datatype.STRING),
    Tag(name="Requests", datatype=Datatype.INT64),
    Tag(name="Latency/p95", datatype=Datatype.DOUBLE),
    Tag(name="Throttled", datatype=Datatype.BOOLEAN),
)
BIRTH, DATA, DEATH, COMMAND = (f"spBv1.0/plant/{kind}/pi-07" for kind in ("NBIRTH", "NDATA", "NDEATH", "NCMD"))

values: dict[Datatype, st.SearchStrategy[Any]] = {
    Datatype.INT64: st.integers(-(2**63), 2**63 - 1),
    Datatype.DOUBLE: st.floats(allow_nan=False),
    Datatype.BOOLEAN: st.booleans(),
    Datatype.STRING: st.text(alphabet=st.characters(exclude_categories=["Cs"])),
}


@st.composite
def metrics(draw: st.DrawFn) -> Metric:
    datatype = draw(st.sampled_from(Datatype))
    return Metric(
        datatype=datatype,
        value=draw(st.none() | values[datatype]),
        name=draw(st.none() | values[Datatype.STRING]),
        alias=draw(st.none() | st.integers(0, 2**64 - 1)),
    )


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@given(st.lists(metrics(), max_size=5), st.none() | st.integers(0, 255), st.integers(0, 2**63))
def test_the_protobuf_library_reads_what_was_written(written: list[Metric], seq: int | None, now_ms: int) -> None:
    payload = decode(encode_payload(written, seq=seq, now_ms=now_ms))
    assert payload.timestamp == now_ms
    assert (payload.seq if payload.HasField("seq") else None) == seq
    assert len(payload.metrics) == len(written)
    for metric, read in zip(written, payload.metrics, strict=True):
        assert (read.name if read.HasField("name") else None) == metric.name
        assert (read.alias if read.HasField("alias") else None) == metric.alias
        assert (read.datatype, read.timestamp, read.is_null) == (metric.datatype, now_ms, metric.value is None)
        held = read.WhichOneof("value")
        assert held == (None if metric.value is None else sparkplug.VALUE_FIELDS[metric.datatype])
        if metric.value is not None:
            value = getattr(read, held)
            assert (signed(value) if metric.datatype is Datatype.INT64 else value) == metric.value


def test_a_string_that_is_not_unicode_is_written_with_marks() -> None:
    data = encode_payload([Metric(datatype=Datatype.STRING, value="a\ud800b")], seq=0, now_ms=1)
    assert decode(data).metrics[0].string_value == "a?b"


def test_a_rebirth_is_asked_for_by_name_and_true_alone() -> None:
    assert asks_for_rebirth(sparkplug.rebirth_command())
    assert not asks_for_rebirth(sparkplug.rebirth_command(value=False))
    other = sparkplug.payload_class()()
    other.metrics.add(name="Node Control/Reboot", datatype=11, boolean_value=True)
    other.metrics.add(alias=3, datatype=11, boolean_value=True)
    assert not asks_for_rebirth(other.SerializeToString())
    other.metrics.add(name=sparkplug.REBIRTH, datatype=11, boolean_value=True)
    assert asks_for_rebirth(other.SerializeToString())


@given(st.binary(max_size=60))
def test_a_command_of_any_bytes_is_no_error(data: bytes) -> None:
    assert asks_for_rebirth(data) in (True, False)


def test_flipped_and_cut_commands_ask_for_nothing_but_a_rebirth() -> None:
    rng = random.Random(5)
    command = sparkplug.rebirth_command()
    for _ in range(2000):
        mutant = bytearray(command)
        mutant[rng.randrange(len(mutant))] ^= 1 << rng.randrange(8)
        asks_for_rebirth(bytes(mutant[: rng.randrange(len(mutant) + 1)]))


def history(
    *, sessions: int = 3, updates: int = 600, first_bd_seq: int = 254, rebirth_at: int | None = 100
) -> list[Seen]:
    """What a host sees of a node that is born, tells ``updates`` changes and dies, several times."""
    seen = []

    def say(topic: str, payload: bytes | None, qos: int = 0) -> None:
        assert payload is not None
        seen.append(Seen(topic=topic, payload=payload, qos=qos, retain=False))

    for number in range(sessions):
        session = Session(TAGS, bd_seq=(first_bd_seq + number) % 256)
        told: dict[str, Value] = {"Model/Name": "digits", "Requests": -1}
        say(BIRTH, session.birth(told, now_ms=number))
        for count in range(updates):
            told["Requests"] = count
            say(DATA, session.data(told, now_ms=count))
            if count == rebirth_at:
                say(COMMAND, sparkplug.rebirth_command())
                say(BIRTH, session.birth(told, now_ms=count))
        say(DEATH, session.death(now_ms=0), qos=1)
    return seen


def test_sessions_keep_the_rules_over_the_wrap_of_both_numbers() -> None:
    seen = history()
    assert violations(seen) == []
    births = [decode(message.payload) for message in seen if message.kind == "NBIRTH"]
    assert [birth.metrics[0].long_value for birth in births] == [254, 254, 255, 255, 0, 0]
    seqs = [decode(message.payload).seq for message in seen if message.kind in ("NBIRTH", "NDATA")]
    assert max(seqs) == 255 and seqs.count(255) == 3


def test_a_birth_names_everything_and_data_tells_changes_by_alias() -> None:
    session = Session(TAGS, bd_seq=7)
    birth = decode(session.birth({"Model/Name": "digits", "Requests": 3}, now_ms=1))
    assert [metric.name for metric in birth.metrics] == ["bdSeq", sparkplug.REBIRTH, *(tag.name for tag in TAGS)]
    assert [metric.is_null for metric in birth.metrics] == [False, False, False, False, True, True]
    assert session.data({"Model/Name": "digits", "Requests": 3}, now_ms=2) is None
    data = session.data({"Model/Name": "digits", "Requests": 3, "Latency/p95": 1.5}, now_ms=3)
    assert data is not None
    (metric,) = decode(data).metrics
    assert (metric.alias, metric.double_value, metric.HasField("name")) == (3, 1.5, False)
    gone = session.data({"Model/Name": "digits", "Requests": 3}, now_ms=4)
    assert gone is not None and decode(gone).metrics[0].is_null and decode(gone).seq == 2


def test_a_value_that_is_not_a_number_is_told_once() -> None:
    session = Session(TAGS, bd_seq=7)
    session.birth({"Latency/p95": 1.5}, now_ms=1)
    data = session.data({"Latency/p95": math.nan}, now_ms=2)
    assert data is not None and math.isnan(decode(data).metrics[0].double_value)
    assert session.data({"Latency/p95": math.nan}, now_ms=3) is None
    assert session.data({"Latency/p95": 1.5}, now_ms=4) is not None


def dropped(kind: str, number: int = 0) -> Callable[[list[Seen]], list[Seen]]:
    """The history without one message of that kind."""

    def change(seen: list[Seen]) -> list[Seen]:
        at = [index for index, message in enumerate(seen) if message.kind == kind][number]
        return seen[:at] + seen[at + 1 :]

    return change


def altered(kind: str, change: Callable[[Any], object]) -> Callable[[list[Seen]], list[Seen]]:
    """The history with the payload of the second message of that kind changed."""

    def apply(seen: list[Seen]) -> list[Seen]:
        at = [index for index, message in enumerate(seen) if message.kind == kind][1]
        payload = decode(seen[at].payload)
        change(payload)
        return [*seen[:at], dataclasses.replace(seen[at], payload=payload.SerializeToString()), *seen[at + 1 :]]

    return apply


def sent_otherwise(kind: str, **fields: Any) -> Callable[[list[Seen]], list[Seen]]:
    return lambda seen: [dataclasses.replace(m, **fields) if m.kind == kind else m for m in seen]


BREAKS: dict[str, tuple[Callable[[list[Seen]], list[Seen]], str]] = {
    "data before birth": (lambda seen: seen[1:], "payloads-ndata-order"),
    "a lost message": (dropped("NDATA", 2), "payloads-sequence-num-incrementing"),
    "a birth that nobody asked for": (dropped("NCMD"), "payloads-nbirth-bdseq-repeat"),
    "a missed death": (dropped("NDEATH"), "a new session without the death"),
    "a birth with a later seq": (altered("NBIRTH", lambda p: setattr(p, "seq", 1)), "payloads-nbirth-seq"),
    "a birth without bdSeq": (altered("NBIRTH", lambda p: p.metrics.__delitem__(0)), "topics-nbirth-bdseq-included"),
    "a birth without rebirth": (altered("NBIRTH", lambda p: p.metrics.__delitem__(1)), "topics-nbirth-rebirth-metric"),
    "an alias of rebirth": (altered("NBIRTH", lambda p: setattr(p.metrics[1], "alias", 99)), "rebirth-name-aliases"),
    "an alias twice": (altered("NBIRTH", lambda p: setattr(p.metrics[3], "alias", 1)), "payloads-alias-uniqueness"),
    "a nameless metric": (altered("NBIRTH", lambda p: p.metrics[3].ClearField("name")), "payloads-name-birth-data"),
    "a value of another type": (
        altered("NDATA", lambda p: setattr(p.metrics[0], "double_value", 1.0)),
        "payloads-metric-datatype-value",
    ),
    "a name in data": (altered("NDATA", lambda p: setattr(p.metrics[0], "name", "x")), "payloads-alias-data-cmd"),
    "a death with a seq": (altered("NDEATH", lambda p: setattr(p, "seq", 0)), "payloads-ndeath-seq"),
    "a death of another birth": (
        altered("NDEATH", lambda p: setattr(p.metrics[0], "long_value", 9)),
        "topics-nbirth-bdseq-matching",
    ),
    "a number skipped": (altered("NBIRTH", lambda p: setattr(p.metrics[0], "long_value", 9)), "bdseq-increment"),
    "no timestamp": (altered("NDATA", lambda p: p.ClearField("timestamp")), "payloads-timestamp"),
    "a retained birth": (sent_otherwise("NBIRTH", retain=True), "retained"),
    "a birth with QoS 1": (sent_otherwise("NBIRTH", qos=1), "topics-nbirth-mqtt"),
    "a death with QoS 0": (sent_otherwise("NDEATH", qos=0), "payloads-ndeath-will-message-qos"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_judge_of_the_rules_sees_each_break(name: str) -> None:
    change, rule = BREAKS[name]
    found = violations(change(history(sessions=2, updates=4, rebirth_at=1)))
    assert any(rule in violation for violation in found), found
