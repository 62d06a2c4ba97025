"""One command at a time, each once, whatever comes and whenever the process dies."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from outrider.agent.commands import Command, Refusal, write_command
from outrider.agent.config import load_config
from outrider.agent.daemon import Agent, run_agent
from outrider.agent.memory import (
    Instance,
    Standing,
    past_of,
    private_folder,
    read_standing,
    read_taken,
    write_standing,
)
from outrider.agent.notify import Notifier
from outrider.bundle import Trust
from outrider_runtimes.errors import AdmissionCrash, AgentError, StoreError
from support.broker import wait_until
from support.commanding import DEVICE, Desk, a_command, forgeries, signed

SHARE = 1000


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_what_is_asked_is_done_and_answered(desk: Desk) -> None:
    said = desk.handle(signed(a_command("install", sequence=1)))
    assert said is not None
    assert (said.result, said.command, said.sequence, said.data) == ("ok", "test-install", 1, {"done": "install"})
    assert desk.hands.actions == [("install", "digits-2.outrider", "ab" * 32)]
    for number, name in enumerate(("rollback", "set_policy", "pause", "resume"), start=2):
        desk.handle(signed(a_command(name, sequence=number)))
    policy = {"deadline_ms": 50.0, "min_margin": 0.25}
    assert desk.hands.actions[1:] == [
        ("rollback",),
        ("set_policy", policy),
        ("set_paused", True),
        ("set_paused", False),
    ]
    assert {each.result for each in desk.answers} == {"ok"}


def test_the_same_once_more_is_answered_and_not_done(desk: Desk) -> None:
    one, two = (signed(a_command("pause", sequence=number)) for number in (1, 2))
    first = desk.handle(one)
    assert desk.handle(one) == first
    desk.handle(two)
    assert desk.handle(one) == first, "a broker may send it again after the next one"
    assert desk.hands.actions == [("set_paused", True)] * 2


def test_over_a_restart_too(tmp_path: Path) -> None:
    one = signed(a_command("pause", sequence=1))
    first = Desk(tmp_path).handle(one)
    again = Desk(tmp_path)
    assert again.control.sequence == 1
    assert again.handle(one) == first
    assert again.hands.actions == []
    assert (refused := again.handle(signed(a_command("rollback", sequence=1)))) is not None
    assert (refused.result, refused.reason, refused.sequence) == ("refused", "old_sequence", 1)


def test_the_number_is_on_disk_before_anything_is_done(tmp_path: Path) -> None:
    desk, seen = Desk(tmp_path), []
    desk.hands.before = lambda: seen.append((read_taken(tmp_path)[-1].sequence, read_taken(tmp_path)[-1].open))
    desk.handle(signed(a_command("pause", sequence=1)))
    assert seen == [(1, True)]
    assert not read_taken(tmp_path)[-1].open


def test_a_process_that_died_in_a_command_says_so_and_does_it_no_more(tmp_path: Path) -> None:
    class Killed(BaseException):
        """As if the power went."""

    desk = Desk(tmp_path)

    def die() -> None:
        raise Killed

    desk.hands.before = die
    one = signed(a_command("install", sequence=1))
    with pytest.raises(Killed):
        desk.handle(one)
    again = Desk(tmp_path)
    again.control.start()
    again.control.close(10.0)
    assert [(each.result, each.reason, each.sequence) for each in again.answers] == [("failed", "interrupted", 1)]
    said = again.handle(one)
    assert said is not None and said.reason == "interrupted"
    assert again.hands.actions == []


def test_nothing_is_done_that_cannot_be_recorded(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "gone")
    said = desk.handle(signed(a_command("pause", sequence=1)))
    assert said is not None and (said.result, said.reason, said.sequence) == ("failed", "not_recorded", 0)
    assert desk.hands.actions == []


@pytest.mark.parametrize(
    "text", ["", "{", '{"format": 2}', '{"format": 1, "taken": [{}]}', '{"format": 1, "taken": [{"sequence": "1"}]}']
)
def test_with_a_damaged_record_no_signed_command_is_taken(tmp_path: Path, text: str) -> None:
    (tmp_path / "commands.json").write_text(text)
    desk = Desk(tmp_path)
    said = desk.handle(signed(a_command("pause", sequence=1)))
    assert said is not None and said.reason == "not_recorded"
    ping = desk.handle(write_command(Command(id="1", device=DEVICE, name="ping")))
    assert ping is not None and ping.result == "ok"
    assert desk.hands.actions == []
    assert (tmp_path / "commands.json").read_text() == text


def test_what_fails_is_answered_without_the_details(desk: Desk) -> None:
    desk.hands.fail = AdmissionCrash("/var/lib/secret died", hint="see /var/lib")
    said = desk.handle(signed(a_command("install", sequence=1)))
    assert said is not None and (said.result, said.reason) == ("failed", "AdmissionCrash")
    assert "/var" not in desk.posted[-1].payload.decode()
    desk.hands.fail = ZeroDivisionError("at /usr/lib/python")
    said = desk.handle(signed(a_command("install", sequence=2)))
    assert said is not None and (said.result, said.reason) == ("failed", "internal")
    assert "/usr" not in desk.posted[-1].payload.decode()
    desk.hands.fail = Refusal("no_such_bundle", "there is none")
    said = desk.handle(signed(a_command("install", sequence=3)))
    assert said is not None and (said.result, said.reason, said.sequence) == ("refused", "no_such_bundle", 3)


def test_who_only_asks_moves_nothing(desk: Desk) -> None:
    said = desk.handle(write_command(Command(id="a", device=DEVICE, name="stats")))
    assert said is not None and said.data == {"answered": 7} and said.sequence == 0
    assert desk.handle(b"nonsense") is None
    assert desk.control.dropped == 1


def test_a_retained_message_is_ignored(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.control.start()
    topic = desk.control.attachment.subscriptions[0]
    desk.control.attachment.message(topic, signed(a_command("pause", sequence=1)), True)
    desk.control.attachment.message(topic, signed(a_command("rollback", sequence=2)), False)
    wait_until(lambda: desk.posted)
    desk.control.close(10.0)
    assert desk.hands.actions == [("rollback",)]


def test_a_flood_is_dropped_and_counted(tmp_path: Path) -> None:
    desk, topic = Desk(tmp_path), f"outrider/v1/{DEVICE}/command"
    for number in range(100):
        desk.control.hear(topic, write_command(Command(id=f"{number}", device=DEVICE, name="ping")), False)
    assert desk.control.dropped == 36
    desk.control.start()
    wait_until(lambda: len(desk.posted) == 64)
    desk.control.close(10.0)
    assert not desk.control.submit(lambda: None)


def test_a_reload_is_not_lost_in_a_flood(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    agent = an_agent(tmp_path)
    agent._control = desk.control
    while desk.control.submit(lambda: None):
        pass
    agent.want_reload()
    agent._beat()
    reloads = threading.Event()
    agent.reload = reloads.set  # type: ignore[method-assign]
    desk.control.start()
    try:
        wait_until(lambda: agent._beat() or reloads.is_set())
    finally:
        desk.control.close(10.0)


def an_agent(folder: Path) -> Agent:
    """One that is not opened."""
    text = f'device = "{DEVICE}"\n[model]\nbundle = "x"\n[source]\nkind = "stdin"\n[broker]\nurl = "mqtt://127.0.0.1"\n'
    path = folder / "agent.toml"
    path.write_text(text)
    return Agent(load_config(path), path, state=folder, folder=folder, notifier=Notifier())


def test_a_reload_that_is_asked_for_before_it_is_ready_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging_as_before: None
) -> None:
    asked: list[Agent] = []

    def opening(agent: Agent) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        asked.append(agent)
        raise AgentError("it cannot be opened after all")

    an_agent(tmp_path)
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setattr(Agent, "open", opening)
    ours: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, _: ours.append(number))
    try:
        with pytest.raises(AgentError, match="after all"):
            run_agent(tmp_path / "agent.toml")
        assert asked[0]._reload and not ours
        os.kill(os.getpid(), signal.SIGHUP)
        assert ours == [signal.SIGHUP], "and what was there before is there again"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_job_that_fails_does_not_end_the_work(tmp_path: Path) -> None:
    desk, done = Desk(tmp_path), threading.Event()

    def fail() -> None:
        raise ZeroDivisionError

    desk.control.start()
    assert desk.control.submit(fail)
    assert desk.control.submit(done.set)
    assert done.wait(60)
    desk.control.close(60.0)


def test_no_forgery_acts(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.handle(signed(a_command("resume", sequence=4)))
    before, actions = (tmp_path / "commands.json").read_bytes(), list(desk.hands.actions)
    for payload in forgeries(SHARE, seed=7):
        desk.handle(payload)
    assert desk.hands.actions == actions
    assert (tmp_path / "commands.json").read_bytes() == before
    assert {each.result for each in desk.answers[1:]} == {"refused"}
    assert len({each.reason for each in desk.answers}) > 6
    said = desk.handle(signed(a_command("pause", sequence=5)))
    assert said is not None and said.result == "ok", "and the next good one is taken"


def test_no_key_no_command(tmp_path: Path) -> None:
    desk = Desk(tmp_path, trust=Trust())
    said = desk.handle(signed(a_command("pause", sequence=1)))
    assert said is not None and said.reason == "no_keys"
    assert desk.hands.actions == []


def test_one_agent_for_a_device(tmp_path: Path) -> None:
    folder = private_folder(tmp_path, DEVICE)
    assert folder.stat().st_mode & 0o777 == 0o700
    with Instance(folder) as first:
        with pytest.raises(AgentError, match=r"another agent \(process \d+\) runs as pi-07"):
            Instance(folder)
        assert first
    Instance(folder).close()
    other = private_folder(tmp_path, "pi-08")
    with Instance(folder), Instance(other):
        pass


def test_the_folder_is_made_private_whoever_made_it_before(tmp_path: Path) -> None:
    (tmp_path / "agent" / DEVICE).mkdir(parents=True)
    for each in (tmp_path / "agent", tmp_path / "agent" / DEVICE):
        each.chmod(0o755)
    folder = private_folder(tmp_path, DEVICE)
    assert [each.stat().st_mode & 0o777 for each in (folder.parent, folder)] == [0o700, 0o700]


def test_what_commands_set_is_kept(tmp_path: Path) -> None:
    assert read_standing(tmp_path) == Standing()
    standing = Standing(paused=True, policy={"deadline_ms": 5.0}, over="ab", seeded="cd")
    write_standing(tmp_path, standing)
    assert read_standing(tmp_path) == standing
    assert (tmp_path / "standing.json").stat().st_mode & 0o777 == 0o600
    for text in (
        "{",
        '{"format": 1}',
        json.dumps({"format": 1, "paused": 1, "policy": None, "over": "", "seeded": ""}),
    ):
        (tmp_path / "standing.json").write_text(text)
        with pytest.raises(StoreError, match=r"standing\.json was damaged"):
            read_standing(tmp_path)


def test_only_the_latest_are_remembered(desk: Desk, tmp_path: Path) -> None:
    for number in range(1, 30):
        desk.handle(signed(a_command("pause", sequence=number)))
    taken = read_taken(tmp_path)
    assert [each.sequence for each in taken] == list(range(14, 30))
    assert past_of(taken).last == 29
