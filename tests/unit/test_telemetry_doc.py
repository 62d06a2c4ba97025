"""docs/telemetry.md says what the code does."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from outrider.telemetry import publisher, record, spool
from outrider.telemetry.sink import StreamCount

PAGE = (Path(__file__).parents[2] / "docs" / "telemetry.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```json\n(.*?)```", PAGE, re.DOTALL))


def example(name: str) -> tuple[bytes, dict[str, object]]:
    return EXAMPLES[name].encode(), json.loads(EXAMPLES[name])


def test_there_is_an_example_of_every_payload() -> None:
    assert set(EXAMPLES) == {"status", "batch", "receipt"}


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
    for topic in (record.topics("x").status, record.topics("x").records, record.topics("x").receipt):
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
