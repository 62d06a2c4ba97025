"""An agent's configuration: what is read, and what is said of what cannot be."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.agent.config import (
    BrokerConfig,
    Config,
    broker_of,
    credentials_of,
    load_config,
    parse_config,
    policy_from,
    read_secret,
)
from outrider.agent.sourceconfig import CameraConfig, FolderConfig, I2cConfig, SerialConfig, TopicConfig
from outrider.agent.sources import is_same_source
from outrider.policy import Budget, Policy
from outrider.telemetry.inputs import InputPolicy
from outrider.telemetry.publisher import Limits
from outrider.telemetry.reporter import Reporter
from outrider_runtimes.errors import ConfigError
from support.effort import effort

HOME = Path("/home/board")
LEAST = """
device = "pi-07"
[model]
bundle = "digits"
[source]
kind = "folder"
path = "inbox"
[broker]
url = "mqtt://broker"
"""
CLOUD = '[cloud]\nurl = "http://cloud:8000"\nmodel = "large"\n'


def test_the_least_that_is_said_is_enough() -> None:
    config = parse_config(LEAST.encode(), base=HOME)
    assert (config.device, config.model.bundle, config.broker.url) == ("pi-07", "digits", "mqtt://broker")
    assert config.source == FolderConfig(path=HOME / "inbox")
    assert (config.output, config.cloud, config.policy, config.state) == (None, None, None, None)
    assert config.commands.enabled and config.commands.keys is None


def test_what_a_file_leaves_out_is_what_the_reporter_takes_for_it() -> None:
    broker = parse_config(LEAST.encode(), base=HOME).broker
    takes = {name: parameter.default for name, parameter in inspect.signature(Reporter).parameters.items()}
    for name in ("commit_interval_ms", "sample", "metrics_interval_s", "home_assistant"):
        assert getattr(broker, name) == takes[name]
    assert (broker.spool_max_bytes, broker.spool_max_age_s) == (takes["max_bytes"], takes["max_age_s"])


def test_paths_are_seen_from_the_file_and_names_are_not_paths() -> None:
    text = LEAST.replace('"digits"', '"models/digits.outrider"\ntrust = "/etc/keys"') + '[output]\nfile = "out.jsonl"'
    config = parse_config(f'state = "var"\n{text}'.encode(), base=HOME)
    assert config.model.bundle == "/home/board/models/digits.outrider"
    assert config.model.trust == Path("/etc/keys")
    assert config.state == HOME / "var"
    assert config.output is not None and config.output.file == "/home/board/out.jsonl"
    assert parse_config((LEAST + '[output]\nfile = "-"').encode(), base=HOME).output.file == "-"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (LEAST.replace('device = "pi-07"', ""), "device is missing", "pi-07"),
        (LEAST.replace("pi-07", "pi 07"), "device id", "letters"),
        (LEAST.replace("device =", "devise ="), "devise: there is no such key", "device"),
        (LEAST.replace('url = "mqtt', 'uri = "mqtt'), "broker.uri", "url"),
        (LEAST.replace("mqtt://", "http://"), "broker url", "mqtt://host:1883"),
        (
            LEAST.replace("[broker]", "[broker]\nspool_max_bytes = 1"),
            "broker.spool_max_bytes: expected a whole",
            "disk",
        ),
        (LEAST + "drain_bytes_per_s = 0", "broker.drain_bytes_per_s: expected a number", "link"),
        (LEAST + "batch_records = 1001", "broker.batch_records: expected a whole number", "message"),
        (LEAST + "[inputs]\nmax_bytes = 45_001", "inputs.max_bytes: expected a whole number", "tensors"),
        (LEAST + "[inputs]\nper_hour = 0", "inputs.per_hour: expected a whole number", "hour"),
        (LEAST + "[inputs]\nflagged_only = 0", "inputs.flagged_only: expected true or false", "unsure"),
        (LEAST + "[inputs]\nper_minute = 1", "inputs.per_minute: [inputs] has no such key", "per_hour"),
        (LEAST + "[sparkplug]", "sparkplug.group is missing", "group id"),
        (LEAST + '[sparkplug]\ngroup = "a/b"', "sparkplug.group: Sparkplug group 'a/b' is not usable", "group id"),
        (LEAST.replace('kind = "folder"', ""), "source.kind is missing", "camera"),
        (LEAST.replace('"folder"', '"radio"'), "source.kind is 'radio'", "folder"),
        (LEAST.replace('path = "inbox"', ""), "source.path is missing", "folder"),
        (LEAST.replace('"inbox"', "7"), "source.path: expected a path, not 7", "folder"),
        (LEAST.replace('path = "inbox"', 'path = "inbox"\nonce = 1'), "source.once: expected true or false", "end"),
        (LEAST.replace('bundle = "digits"', 'bundle = "digits"\nthreads = 0'), "model.threads", "install"),
        (LEAST.replace('[model]\nbundle = "digits"', ""), "model.bundle is missing", "installed"),
        ('model = "digits"\n' + LEAST.replace('[model]\nbundle = "digits"', ""), "model: expected a table", "[model]"),
        (LEAST + "[policy]\ndeadline_ms = 80", "policy stands without [cloud]", "model.deadline_ms"),
        (LEAST + CLOUD + "[policy]\ndeadlin_ms = 80", "policy.deadlin_ms", "deadline_ms"),
        (LEAST + CLOUD + '[policy]\ndeadline_ms = "80"', "policy.deadline_ms", ""),
        (LEAST + CLOUD + "[policy.budget]\nrequests_per_hour = -1", "budget.requests_per_hour", ""),
        (LEAST + "[broker]", "it is not TOML", "TOML"),
        ("\x00", "it is not TOML", "TOML"),
        (LEAST.replace('url = "mqtt', 'password_env = "P"\nurl = "mqtt'), "broker.username is missing", "user"),
        (LEAST.replace('url = "mqtt', 'ca_file = "ca.pem"\nurl = "mqtt'), "not encrypted", "mqtts"),
    ],
)
def test_what_cannot_be_used_is_named(text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text.encode(), base=HOME)
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_what_reports_say_is_as_the_reporter_takes_it() -> None:
    config = parse_config(LEAST.encode(), base=HOME)
    assert (config.inputs, config.sparkplug) == (None, None)
    assert config.broker.batch_records == Limits().batch_records
    assert config.broker.drain_bytes_per_s is Limits().bytes_per_s
    text = LEAST + 'drain_bytes_per_s = 2000\nbatch_records = 10\n[inputs]\n[sparkplug]\ngroup = "plant 3"\n'
    config = parse_config(text.encode(), base=HOME)
    assert (config.broker.drain_bytes_per_s, config.broker.batch_records) == (2000.0, 10)
    assert config.inputs is not None and config.sparkplug is not None
    assert dataclasses.asdict(config.inputs) == dataclasses.asdict(InputPolicy())
    assert config.sparkplug.group == "plant 3"


@pytest.mark.parametrize(
    "more",
    [
        '[broker]\nurl = "mqtt://b"\nusername = "u"\npassword_env = "P"\npassword_file = "p"\n',
        '[broker]\nurl = "mqtts://b"\ncert_file = "c"\n',
        f"[model]\nbundle = 'x'\ndeadline_ms = 5\n{CLOUD}",
        "[model]\nbundle = 'x'\nladder = ['a', 'b']\n",
        f"{CLOUD}token_env = 'T'\ntoken_file = 't'\n",
    ],
)
def test_keys_that_do_not_go_together(more: str) -> None:
    text = LEAST
    for table in ("broker", "model"):
        if f"[{table}]" in more:
            begin = text.index(f"[{table}]")
            end = text.find("[", begin + 1)
            text = text[:begin] + (text[end:] if end >= 0 else "")
    with pytest.raises(ConfigError, match=r"both given|together|beside"):
        parse_config((text + more).encode(), base=HOME)


def test_a_policy_of_the_file_is_a_policy() -> None:
    text = f"{LEAST}{CLOUD}[policy]\ndeadline_ms = 80.0\nmin_margin = 0.25\n[policy.budget]\nbytes_per_day = 1000\n"
    config = parse_config(text.encode(), base=HOME)
    assert config.policy == Policy(deadline_ms=80.0, min_margin=0.25, budget=Budget(bytes_per_day=1000))
    assert parse_config((LEAST + CLOUD).encode(), base=HOME).policy == Policy(deadline_ms=None)


def test_a_policy_goes_through_its_fields_and_back() -> None:
    policy = Policy(deadline_ms=80.0, min_margin=0.25, budget=Budget(bytes_per_day=1000))
    assert policy_from(dataclasses.asdict(policy)) == policy
    with pytest.raises(ConfigError, match=r"policy\.budget: expected a table"):
        policy_from({"budget": 5})


def test_sources_by_kind() -> None:
    def source(text: str) -> object:
        begin = LEAST.index("[source]")
        rest = LEAST[:begin] + LEAST[LEAST.index("[broker]") :]
        return parse_config(f"{rest}[source]\n{text}".encode(), base=HOME).source

    assert source('kind = "mqtt"\ntopic = "plant/+/frames"') == TopicConfig(topic="plant/+/frames")
    assert source('kind = "serial"\nport = "/dev/ttyUSB0"\nwindow = 8') == SerialConfig(port="/dev/ttyUSB0", window=8)
    i2c = source('kind = "i2c"\naddress = 0x68\nregister = 0x3b\nformat = ">hhh"\nwindow = 1\nscale = 0.5')
    assert i2c == I2cConfig(address=0x68, register=0x3B, format=">hhh", window=1, scale=0.5)
    assert source('kind = "camera"\nwidth = 640') == CameraConfig(width=640)
    for wrong in (">s", "P", "", ">hhhhhhhhhhhhhhhhhhhhhhhhhhhhh", "99999999999999999999h"):
        with pytest.raises(ConfigError, match=r"source\.format"):
            source(f'kind = "i2c"\naddress = 0x68\nregister = 0\nwindow = 1\nformat = "{wrong}"')


def test_a_reload_opens_a_source_anew_only_where_it_is_another() -> None:
    def config(source: str, broker: str = "") -> Config:
        begin = LEAST.index("[source]")
        return parse_config(f'{LEAST[:begin]}[broker]\nurl = "mqtt://broker"\n{broker}\n{source}'.encode(), base=HOME)

    folder, other = '[source]\nkind = "folder"\npath = "inbox"', '[source]\nkind = "folder"\npath = "elsewhere"'
    stdin, topic = '[source]\nkind = "stdin"', '[source]\nkind = "mqtt"\ntopic = "frames"'
    less = "sample = 0.5"
    assert is_same_source(config(folder), config(folder, less))
    assert not is_same_source(config(folder), config(other))
    assert not is_same_source(config(folder), config(stdin))
    assert is_same_source(config(stdin), config(stdin + "\nscale = 2", less)), "lines of it may have been read already"
    assert is_same_source(config(topic), config(topic))
    assert not is_same_source(config(topic), config(topic, less)), "it has the broker's address and password"


def test_a_file_that_is_not_there_and_one_that_is_wrong_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml cannot be read: No such file"):
        load_config(tmp_path / "nothing.toml")
    path = tmp_path / "agent.toml"
    path.write_text(LEAST.replace("bundle", "bundel"))
    with pytest.raises(ConfigError, match=r"agent\.toml: model\.bundel") as caught:
        load_config(path)
    assert caught.value.hint == "do you mean bundle?"
    path.write_text("#" * 300_000)
    with pytest.raises(ConfigError, match="more than"):
        load_config(path)


def test_a_secret_is_in_a_file_or_in_the_environment_and_in_no_message(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2\nnot this\n")
    assert read_secret(secret, None) == "hunter2"
    assert read_secret(None, "PASS", {"PASS": "hunter3"}) == "hunter3"
    assert read_secret(None, None) is None
    with pytest.raises(ConfigError, match="PASS is not set"):
        read_secret(None, "PASS", {})
    secret.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_secret(secret, None)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_secret(tmp_path / "none", None)
    broker = BrokerConfig(url="mqtt://b", username="u", password_env="PASS")
    credentials = credentials_of(broker, {"PASS": "hunter3"})
    assert credentials is not None and credentials.password == "hunter3"
    assert "hunter3" not in repr(credentials)
    assert credentials_of(BrokerConfig(url="mqtt://b")) is None


def test_certificates_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    broker = BrokerConfig(url="mqtts://b", cert_file=tmp_path / "cert.pem", key_file=tmp_path / "key.pem")
    with pytest.raises(ConfigError, match=r"cert\.pem"):
        broker_of(broker)
    assert broker_of(BrokerConfig(url="mqtts://b:9")).tls is not None
    assert broker_of(BrokerConfig(url="mqtt://b"), "mqtt://other").host == "other"


@settings(max_examples=effort(150), deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_text_breaks_it(raw: bytes) -> None:
    for text in (raw, LEAST.encode() + raw, raw + LEAST.encode()):
        try:
            parse_config(text, base=HOME)
        except ConfigError as error:
            assert str(error)
