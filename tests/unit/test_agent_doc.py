"""docs/agent.md says what the code does, and its configuration works."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from outrider.agent.commands import KINDS
from outrider.agent.config import parse_config
from outrider.agent.sourceconfig import SOURCES, FolderConfig
from outrider.cli import build_parser
from outrider.cli.agent import NAMES, _render, command_arguments
from outrider.cli.options import PASSWORD, login_of
from outrider_runtimes.errors import ConfigError
from support.agentkeys import tables

PAGE = (Path(__file__).parents[2] / "docs" / "agent.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("table", tables())
def test_every_key_is_listed_with_its_default_and_what_it_is(table: str) -> None:
    assert "\n".join(tables()[table]) in PAGE


def test_no_key_is_listed_that_there_is_not() -> None:
    listed = re.findall(r"^\| `(\w+)` \| (?:\*\*needed\*\*|`.*`|) \| ", PAGE, re.MULTILINE)
    assert sorted(listed) == sorted(row.split("`")[1] for rows in tables().values() for row in rows)


def test_every_event_is_in_the_specification() -> None:
    sources = (Path(__file__).parents[2] / "sdk/outrider/agent").glob("*.py")
    told = {name for path in sources for name in re.findall(r'_tell\(\s*"(\w+)"', path.read_text(encoding="utf-8"))}
    page = (Path(__file__).parents[2] / "docs" / "telemetry.md").read_text(encoding="utf-8")
    assert len(told) > 6
    assert not [name for name in told if f"`{name}`" not in page]


def test_every_event_of_the_log_is_listed_and_no_other() -> None:
    sources = (Path(__file__).parents[2] / "sdk/outrider/agent").rglob("*.py")
    said = {name for path in sources for name in re.findall(r'\bsay\(\s*"(\w+)"', path.read_text(encoding="utf-8"))}
    rows = re.findall(
        r"^\| [\w ]+ \| (`ready`.*|`source_\w+`.*|`frame_\w+`.*|`command`.*|`install_\w+`.*) \|$", PAGE, re.M
    )
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed - {"queue"} == said | {"frame_refused", "frame_failed"}


def test_every_kind_of_source_has_its_part() -> None:
    assert re.findall(r'^#### `kind = "(\w+)"`', PAGE, re.MULTILINE) == [
        *("folder", "stdin", "mqtt", "camera", "microphone", "serial", "i2c")
    ]
    assert len(SOURCES) == 7


def test_the_configuration_is_read_as_it_stands() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    config = parse_config(block.encode(), base=Path("/home/board"))
    assert config.source == FolderConfig(path=Path("/home/board/inbox"))


def test_the_commands_are_commands() -> None:
    lines = [line.split("#")[0] for line in re.findall(r"^outrider command .*", PAGE, re.MULTILINE)]
    assert len(lines) == 6
    for line in lines:
        args = build_parser().parse_args(shlex.split(line)[1:])
        assert isinstance(args, argparse.Namespace)
        command_arguments(args.name, args.arguments)
    assert set(NAMES) == set(KINDS)


def test_the_arguments_of_a_command_line() -> None:
    assert command_arguments("install", ["a.outrider"]) == {"file": "a.outrider"}
    assert command_arguments("install", ["a"], "ab") == {"file": "a", "digest": "ab"}
    assert command_arguments("set_policy", ["deadline_ms=50", "output=logits", "obey_certified=false"]) == {
        "policy": {"deadline_ms": 50, "output": "logits", "obey_certified": False}
    }
    assert command_arguments("pause", []) == {}
    for name, words in (("install", []), ("set_policy", []), ("set_policy", ["x"]), ("ping", ["x"])):
        with pytest.raises(ConfigError) as caught:
            command_arguments(name, words)
        assert caught.value.hint


def test_the_password_is_of_the_user_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (["command", "mqtt://broker", "pi-07", "ping"], ["watch", "mqtt://broker"]):
        nobody, anna = build_parser().parse_args(command), build_parser().parse_args([*command, "--user", "anna"])
        monkeypatch.delenv(PASSWORD, raising=False)
        assert (login_of(nobody), login_of(anna)) == (None, ("anna", None))
        monkeypatch.setenv(PASSWORD, "hunter2")
        assert login_of(anna) == ("anna", "hunter2")
        with pytest.raises(ConfigError, match="--user is not given") as caught:
            login_of(nobody)
        assert "hunter2" not in str(caught.value) + caught.value.hint


def test_what_a_person_sees_of_an_acknowledgement() -> None:
    said = {"name": "install", "result": "failed", "reason": "AdmissionHang", "detail": "the log says more", "data": {}}
    assert _render(said).splitlines() == ["install  failed: AdmissionHang", "         the log says more"]
    said = {"name": "pause", "result": "ok", "reason": "", "detail": "", "data": {"paused": True, "since": "now"}}
    assert _render(said).splitlines() == ["pause     ok", "  paused  true", "  since   now"]
