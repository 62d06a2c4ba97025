"""Which commands a device takes, and that it takes each of them once."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from outrider.agent.commands import (
    DOMAIN,
    KINDS,
    MAX_COMMAND_BYTES,
    MAX_SEQUENCE,
    MAX_STEP,
    Acknowledgement,
    Command,
    Past,
    Received,
    Refusal,
    acknowledgement_topic,
    command_topic,
    judge,
    read_acknowledgement,
    read_command,
    write_acknowledgement,
    write_command,
)
from outrider.bundle import Trust, key_id, public_bytes
from outrider.bundle.sign import SIGNATURE_DOMAIN
from outrider_runtimes.errors import ConfigError
from support.commanding import DEVICE, NOW_S, TRUST, a_command, signed
from support.keys import private_key

DOCS = Path(__file__).parents[2] / "docs"


def verdict(payload: bytes, **changes: Any) -> bool | str:
    options: dict[str, Any] = {"device": DEVICE, "trust": TRUST, "past": Past(last=4), "now_s": NOW_S}
    try:
        return judge(read_command(payload), **(options | changes))
    except Refusal as error:
        assert str(error)
        return error.reason


def test_a_signed_command_in_time_is_taken() -> None:
    for name in KINDS:
        assert verdict(signed(a_command(name))) is True


def test_what_asks_only_needs_no_signature() -> None:
    for name in ("ping", "stats"):
        bare = Command(id="1", device=DEVICE, name=name)
        assert verdict(write_command(bare), trust=Trust()) is True


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.signed])
def test_what_changes_something_is_refused_without_one(name: str) -> None:
    assert verdict(write_command(a_command(name))) == "not_signed"
    assert verdict(signed(a_command(name)), trust=Trust()) == "no_keys"


def test_another_key_is_refused_and_so_is_a_revoked_one() -> None:
    assert verdict(signed(a_command(), key=2)) == "key_not_trusted"
    revoked = dataclasses.replace(TRUST, revoked=frozenset([key_id(public_bytes(private_key(1)))]))
    assert verdict(signed(a_command()), trust=revoked) == "key_not_trusted"


def test_a_signature_of_something_else_is_refused() -> None:
    message = json.loads(signed(a_command()))
    other = json.loads(signed(a_command(sequence=6)))
    message["signature"] = other["signature"]
    assert verdict(json.dumps(message).encode()) == "bad_signature"
    # the same key's signature for a bundle whose digest is the text
    for_bundle = private_key(1).sign(SIGNATURE_DOMAIN + message["command"].encode())
    message["signature"]["value"] = base64.b64encode(for_bundle).decode()
    assert verdict(json.dumps(message).encode()) == "bad_signature"
    # another key's name on a good signature
    message["signature"] = json.loads(signed(a_command()))["signature"] | {"key": "0" * 16}
    assert verdict(json.dumps(message).encode()) == "key_not_trusted"


def test_the_text_is_signed_as_it_stands() -> None:
    received = read_command(signed(a_command()))
    private_key(1).public_key().verify(received.signature, DOMAIN + received.text)
    message = json.loads(signed(a_command()))
    spaced = {**message, "command": message["command"].replace(",", ", ")}
    assert json.loads(spaced["command"]) == json.loads(message["command"])
    assert verdict(json.dumps(spaced).encode()) == "bad_signature"


def test_another_device_is_another() -> None:
    assert verdict(signed(a_command(device="pi-08"))) == "other_device"


def test_sequences_rise_and_not_too_far() -> None:
    assert verdict(signed(a_command(sequence=5))) is True
    assert verdict(signed(a_command(sequence=4))) == "old_sequence"
    assert verdict(signed(a_command(sequence=4 + MAX_STEP))) is True
    assert verdict(signed(a_command(sequence=5 + MAX_STEP))) == "far_sequence"
    assert verdict(signed(a_command(sequence=MAX_SEQUENCE))) == "far_sequence"


def test_the_same_once_more_is_known_and_another_with_its_number_is_not() -> None:
    one = signed(a_command(sequence=4))
    past = Past(last=4, digests={4: read_command(one).digest})
    assert verdict(one, past=past) is False
    assert verdict(one, past=past, now_s=NOW_S + 1e6) is False, "it was taken in time"
    assert verdict(signed(a_command("rollback", sequence=4)), past=past) == "old_sequence"
    assert verdict(one, past=Past(last=5, digests={4: read_command(one).digest})) is False
    assert verdict(one, past=Past(last=5)) == "old_sequence"


def test_it_expires_where_the_clock_is_known_to_be_right() -> None:
    late = signed(a_command(expires_s=int(NOW_S)))
    assert verdict(late) == "expired"
    assert verdict(late, now_s=None) is True
    assert verdict(late, now_s=0.0) is True


def test_a_signed_one_needs_its_numbers() -> None:
    for key in ("sequence", "expires_s"):
        assert verdict(signed(dataclasses.replace(a_command(), **{key: None}))) == "malformed"


def message(change: Mapping[str, Any], **envelope: Any) -> bytes:
    command = {"id": "1", "device": DEVICE, "name": "pause", "arguments": {}, "sequence": 5, "expires_s": 9}
    text = json.dumps({key: value for key, value in {**command, **change}.items() if value is not ...})
    return json.dumps({"v": 1, "command": text, **envelope}).encode()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        message({}, v=2),
        message({}, v=True),
        message({}, more=1),
        message({}, command={"id": "1"}),
        message({}, command="[]"),
        message({}, signature="x"),
        message({}, signature={"key": "0" * 16}),
        message({}, signature={"key": "0" * 16, "value": "AAAA"}),
        message({}, signature={"key": "0" * 16, "value": "*" * 88}),
        message({}, signature={"key": "0" * 16, "value": base64.b64encode(bytes(64)).decode().replace("A==", "B==")}),
        message({}, signature={"key": "x", "value": base64.b64encode(bytes(64)).decode()}),
        message({}, signature={"key": "0" * 16, "value": base64.b64encode(bytes(64)).decode(), "more": 1}),
        message({"id": ...}),
        message({"id": ""}),
        message({"id": "a b"}),
        message({"id": "x" * 65}),
        message({"id": 7}),
        message({"name": "reboot"}),
        message({"name": ["ping"]}),
        message({"device": 7}),
        message({"device": "x" * 65}),
        message({"more": 1}),
        message({"arguments": []}),
        message({"arguments": {"x": 1}}),
        message({"sequence": 0}),
        message({"sequence": -1}),
        message({"sequence": 5.0}),
        message({"sequence": True}),
        message({"sequence": "5"}),
        message({"sequence": MAX_SEQUENCE + 1}),
        message({"sequence": 10**30}),
        message({"expires_s": 1.5}),
        message({"name": "install", "arguments": {}}),
        message({"name": "install", "arguments": {"file": "../x"}}),
        message({"name": "install", "arguments": {"file": ".hidden"}}),
        message({"name": "install", "arguments": {"file": "a/b"}}),
        message({"name": "install", "arguments": {"file": "a\n"}}),
        message({"name": "install", "arguments": {"file": "a", "digest": "xyz"}}),
        message({"name": "set_policy", "arguments": {"policy": []}}),
        message({"name": "set_policy", "arguments": {"policy": {"a": [[[[[[[[1]]]]]]]]}}}),
        message({"name": "set_policy", "arguments": {"policy": {"a": list(range(300))}}}),
        message({"name": "set_policy", "arguments": {"policy": {"a": "x" * MAX_COMMAND_BYTES}}}),
        b'{"v":1,"command":"{\\"id\\":\\"1\\",\\"id\\":\\"2\\",\\"device\\":\\"pi-07\\",\\"name\\":\\"ping\\"}"}',
        b'{"v":1,"v":1,"command":"{}"}',
        b'{"v":1,"command":"{\\"id\\":\\"1\\",\\"device\\":\\"pi-07\\",\\"name\\":\\"ping\\",\\"expires_s\\":NaN}"}',
    ],
)
def test_what_is_not_strictly_a_command_is_not_read(payload: bytes) -> None:
    with pytest.raises(Refusal) as caught:
        read_command(payload)
    assert caught.value.reason == "malformed"


def test_a_command_goes_through_its_bytes() -> None:
    for name in KINDS:
        assert read_command(signed(a_command(name))).command == a_command(name)
        assert read_command(write_command(a_command(name))) == Received(
            command=a_command(name), text=json.loads(write_command(a_command(name)))["command"].encode()
        )


def test_an_acknowledgement_goes_through_its_bytes_and_lets_newer_keys_pass() -> None:
    said = Acknowledgement(
        command="1", device=DEVICE, name="pause", result="refused", reason="expired", detail="late", sequence=7
    )
    payload = write_acknowledgement(said)
    assert read_acknowledgement(payload) == said
    assert read_acknowledgement(payload[:-1] + b',"newer":1}') == said
    infinite = payload.replace(b'"data":{}', b'"data":{"x":1e999}')
    assert infinite != payload
    for wrong in (b"", b"{}", payload.replace(b"refused", b"perhaps"), payload.replace(b":7", b":-7"), infinite):
        with pytest.raises(Refusal):
            read_acknowledgement(wrong)


def test_a_commands_topics_name_the_device_and_a_slash_is_refused() -> None:
    assert command_topic("pi-07") == "outrider/v1/pi-07/command"
    assert acknowledgement_topic("pi-07") == "outrider/v1/pi-07/acknowledgement"
    with pytest.raises(ConfigError):
        command_topic("pi/07")


def fits(name: str, value: object) -> bool:
    """Whether the schema takes it."""
    whole = json.loads((DOCS / "telemetry.schema.json").read_text())
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": whole["$defs"]}).is_valid(value)


def test_the_schema_says_what_the_code_does() -> None:
    for name in KINDS:
        payload = json.loads(signed(a_command(name)))
        assert fits("command", payload)
        assert fits("command_text", json.loads(payload["command"]))
    for wrong in (message({}, v=2), message({}, more=1), message({}, signature={"key": "0"})):
        assert not fits("command", json.loads(wrong))
    for change in ({"name": "reboot"}, {"sequence": 0}, {"more": 1}, {"id": "a b"}, {"arguments": []}):
        assert not fits("command_text", json.loads(json.loads(message(change))["command"]))
    said = Acknowledgement(command="1", device=DEVICE, name="pause", result="ok", sequence=1)
    assert fits("acknowledgement", json.loads(write_acknowledgement(said)))


def test_the_page_has_every_command_and_every_reason() -> None:
    page = (DOCS / "telemetry.md").read_text()
    source = "".join(
        (Path(__file__).parents[2] / "sdk/outrider/agent" / name).read_text()
        for name in ("commands.py", "control.py", "daemon.py")
    )
    reasons = {*re.findall(r'Refusal\(\s*"(\w+)"', source), *re.findall(r'"failed", "(\w+)"', source)}
    assert len(reasons) > 12
    for word in (*KINDS, *reasons):
        assert f"`{word}`" in page, word
