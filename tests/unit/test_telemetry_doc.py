"""docs/telemetry.md says what the code does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import jsonschema
import pytest

from outrider.telemetry import publisher, record, spool
from outrider.telemetry.sink import StreamCount
from outrider_runtimes.errors import TelemetryError
from support.telemetry_schema import SCHEMA, complaints

PAGE = (Path(__file__).parents[2] / "docs" / "telemetry.md").read_text()
WATCH = (Path(__file__).parents[2] / "docs" / "watch.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```json\n(.*?)```", PAGE + WATCH, re.DOTALL))


def example(name: str) -> tuple[bytes, dict[str, object]]:
    return EXAMPLES[name].encode(), json.loads(EXAMPLES[name])


def mutations(value: object) -> Iterator[object]:
    """The same with one thing taken away or turned into something else, at every depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {name: kept for name, kept in value.items() if name != key}
            yield from ({**value, key: other} for other in mutations(inner))
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from ([*value[:at], other, *value[at + 1 :]] for other in mutations(inner))
        yield {}
    else:
        yield []


def test_there_is_an_example_of_every_payload() -> None:
    assert {"status", "info", "vitals", "batch", "metrics", "input", "receipt"} <= set(EXAMPLES)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert {"status", "info", "vitals", "batch", "record", "prediction", "event", "metrics", "input", "receipt"} <= set(
        SCHEMA["$defs"]
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_schema_takes_every_example_and_keys_that_it_does_not_know(name: str) -> None:
    said = json.loads(EXAMPLES[name])
    assert complaints(name, said) == []
    assert complaints(name, {**said, "x-new": {"deep": [1]}}) == []


# So many may be otherwise: a last will has no time; an event has any fields; there may be no failures and none refused.
FREE = {"status": 1, "info": 0, "batch": 4, "metrics": 2, "input": 0, "receipt": 0, "vitals": 0}


@pytest.mark.parametrize("name", sorted(FREE))
def test_the_schema_refuses_what_is_missing_or_of_another_type(name: str) -> None:
    said = json.loads(EXAMPLES[name])
    accepted = [each for each in mutations(said) if not complaints(name, each)]
    assert len(accepted) == FREE[name], accepted


@pytest.mark.parametrize(("name", "decode"), [("status", record.decode_status), ("info", record.decode_info)])
def test_what_the_implementation_refuses_the_schema_refuses_too(name: str, decode: Callable[[bytes], object]) -> None:
    for each in mutations(json.loads(EXAMPLES[name])):
        try:
            decode(json.dumps(each).encode())
        except TelemetryError:
            assert complaints(name, each)


def test_the_example_of_an_info_is_what_a_device_writes() -> None:
    payload, said = example("info")
    assert record.decode_info(payload) == said
    kept = {name: value for name, value in said.items() if name != "v"}
    assert json.loads(record.encode_info(**kept)) == said


def test_the_example_of_a_batch_is_read_and_written_back() -> None:
    payload, said = example("batch")
    batch = record.decode_batch(payload)
    assert batch.malformed == 0
    rows = [
        record.Row(
            item.seq,
            record.encode_row(
                kind=item.kind,
                boot_id=item.boot_id,
                wall_s=item.wall_s,
                monotonic_s=item.monotonic_s,
                body=item.body,
            ),
        )
        for item in batch.records
    ]
    written = record.encode_batch(device=batch.device, stream=batch.stream, after_seq=batch.after_seq, rows=rows)
    assert json.loads(written) == said


def test_the_example_of_a_receipt_is_read_and_written_back() -> None:
    payload, said = example("receipt")
    assert json.loads(record.encode_receipt(record.decode_receipt(payload))) == said


def test_the_example_of_a_status_is_what_a_device_writes() -> None:
    payload, said = example("status")
    assert record.decode_status(payload) == said
    written = record.encode_status(
        "online",
        device=said["device"],
        stream=said["stream"],
        boot_id=said["boot_id"],
        reason=said["reason"],
        wall_s=said["wall_s"],
    )
    assert json.loads(written) == said


def test_the_topics_and_the_bounds_are_those_of_the_code() -> None:
    mine = record.topics("x")
    for topic in (mine.status, mine.info, mine.records, mine.receipt):
        assert f"`{topic.replace('/x/', '/<device>/')}`" in PAGE
    assert f"{record.MAX_PAYLOAD_BYTES:,} bytes" in PAGE
    assert f"at most {record.MAX_RECORD_BYTES:,} bytes" in PAGE
    assert f"1 to {record.MAX_BATCH_RECORDS}, in rising order" in PAGE
    assert (
        f"({publisher.Limits().receipt_timeout_s:.0f} s, doubling up to {publisher.MAX_RECEIPT_TIMEOUT_S:.0f} s" in PAGE
    )
    assert f"counting {spool.ROW_OVERHEAD_BYTES}\n" in PAGE


@pytest.mark.parametrize("name", [field.name for field in fields(spool.Account)])
def test_every_number_of_the_account_is_explained(name: str) -> None:
    assert f"**{name}**" in PAGE


def test_the_consumers_equation_names_its_numbers() -> None:
    names = {field.name for field in fields(StreamCount)}
    equation = re.search(r"`(last_seq - .*?)`", PAGE)
    assert equation
    assert set(re.findall(r"[a-z_]+", equation[1])) <= names
