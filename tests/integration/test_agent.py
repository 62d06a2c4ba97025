"""The agent as a board has it: its own process, a real mosquitto, real signals, real kills."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as paho
import pytest

import outrider
from outrider.agent.commands import Acknowledgement, acknowledgement_topic, command_topic, read_acknowledgement
from outrider.agent.memory import read_taken
from outrider.agent.sender import Sender
from outrider.telemetry import Record, Sink
from outrider.telemetry.mqtt import parse_broker
from outrider_runtimes.errors import AgentError
from support.agents import DEVICE, AgentProcess, Home, board, command, until_heard
from support.broker import wait_until
from support.commanding import a_command, forgeries, signed
from support.keys import private_key
from support.realbundles import expected, images, make_real_bundle

pytestmark = pytest.mark.slow


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with board(tmp_path) as found:
        yield found


def close_to(logits: np.ndarray, seed: int, *, weights: int = 0) -> bool:
    return bool(np.allclose(logits, expected(images(1, seed), weights), atol=1e-3))


def sender(home: Home, **changes: Any) -> Sender:
    options: dict[str, Any] = {"broker": parse_broker(home.broker_url), "device": DEVICE, "key": private_key(1)}
    return Sender(**(options | {"timeout_s": 150.0, "expires_s": 3600.0} | changes))


def test_it_answers_a_folder_reports_and_ends_on_sigterm(home: Home) -> None:
    records: list[Record] = []
    with (
        Sink(home.broker_url, on_record=lambda device, record: records.append(record)),
        AgentProcess(home) as agent,
    ):
        for seed in range(5):
            home.put(str(seed), seed)
        assert all(close_to(home.outputs(str(seed)), seed) for seed in range(5))
        (home.inbox / "broken.npy").write_bytes(b"nothing")
        (home.inbox / "wrong.npy").write_bytes((home.inbox / "0.npy").read_bytes()[:-8])
        home.put("after", 9)
        assert close_to(home.outputs("after"), 9)
        wait_until(lambda: "WATCHDOG=1" in agent.notified)
        wait_until(lambda: [record.kind for record in records].count("prediction") == 6, what="all are on the disk")
        outcome = agent.stop()
        assert agent.notified[0] == "READY=1"
        wait_until(lambda: agent.notified[-1] == "STOPPING=1")
        assert not agent.named("no json"), "one JSON object a line"
        wait_until(lambda: len(records) >= outcome["account"]["enqueued"])
    assert len(home.lines) == 6, "each once"
    assert (outcome["ended"], outcome["answered"], outcome["refused"]) == ("SIGTERM", 6, {"InputError": 2})
    assert [record.kind for record in records].count("prediction") == 6
    names = [record.body["name"] for record in records if record.kind == "event"]
    assert names.count("agent_started") == 1 and names.count("inference_refused") == 2
    assert "inference_failed" not in names
    folder = home.state / "agent" / DEVICE
    assert {path.stat().st_mode & 0o077 for path in (folder, *folder.iterdir())} == {0}


def test_a_second_agent_of_the_device_is_refused(home: Home) -> None:
    with AgentProcess(home) as agent:
        line = [sys.executable, "-m", "outrider.cli", "agent", str(home.config)]
        second = subprocess.run(line, capture_output=True, text=True, timeout=200)
        assert second.returncode == 1
        assert re.search(r"^error: another agent \(process \d+\) runs as pi-07", second.stderr, re.MULTILINE)
        agent.send(signal.SIGINT)
        assert agent.ended()["ended"] == "SIGINT"


def test_what_it_cannot_start_with_is_an_error_without_a_traceback(home: Home) -> None:
    home.config.write_text(home.config.read_text().replace("tiny.outrider", "none.outrider"))
    line = [sys.executable, "-m", "outrider.cli", "agent", str(home.config)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "error: " in done.stderr and "none.outrider" in done.stderr and "Traceback" not in done.stderr


def test_commands_install_and_roll_back_and_each_answers_from_then_on(home: Home) -> None:
    home.configure(model='trust = "keys"')
    make_real_bundle(home.folder / "bundles" / "unsigned.outrider", version=3, seed=2)
    make_real_bundle(home.folder / "bundles" / "other.outrider", name="other", signing_keys=[private_key(1)])
    with AgentProcess(home) as agent:
        home.put("v1", 1)
        assert close_to(home.outputs("v1"), 1)
        assert command(home, "ping")["result"] == "ok"
        said = command(home, "install", "tiny-2.outrider", "--digest", home.second, key=home.key)
        assert (said["sequence"], said["data"]["bundle_version"], said["data"]["digest"]) == (1, 2, home.second)
        home.put("v2", 2)
        assert close_to(home.outputs("v2"), 2, weights=1)
        said = command(home, "rollback", key=home.key)
        assert (said["sequence"], said["data"]["bundle_version"]) == (2, 1)
        home.put("v1-again", 3)
        assert close_to(home.outputs("v1-again"), 3)
        refused = {
            "no_such_bundle": ("install", "none.outrider"),
            "other_digest": ("install", "tiny-2.outrider", "--digest", "0" * 64),
            "other_model": ("install", "other.outrider"),
            "no_cloud": ("set_policy", "deadline_ms=5"),
            "no_earlier_bundle": ("rollback",),
        }
        for reason, words in refused.items():
            said = command(home, *words, key=home.key, code=1)
            assert (said["result"], said["reason"]) == ("refused", reason)
        (home.folder / "bundles" / "cut.outrider").write_bytes(b"cut")
        for name, reason in (("cut.outrider", "FormatError"), ("unsigned.outrider", "TrustError")):
            said = command(home, "install", name, key=home.key, code=1)
            assert (said["result"], said["reason"]) == ("failed", reason)
            assert str(home.folder) not in json.dumps(said)
        home.put("still", 4)
        assert close_to(home.outputs("still"), 4)
        assert agent.stop()["answered"] == 4
    with AgentProcess(home):
        stats = command(home, "stats")
        assert stats["data"]["model"]["bundle_version"] == 1, "a restart does not undo a rollback"
        assert stats["sequence"] == 9


def test_sighup_changes_what_is_another_and_a_bad_file_changes_nothing(home: Home) -> None:
    with AgentProcess(home) as agent:
        home.put("first", 1)
        home.outputs("first")
        good = home.config.read_text()
        home.config.write_text(good.replace("[broker]", "[brokr]"))
        agent.send(signal.SIGHUP)
        refused = agent.wait_for("reload_refused")
        assert "brokr" in refused["error"]
        wait_until(lambda: agent.notified.count("READY=1") == 2)
        assert any(line.startswith("RELOADING=1\nMONOTONIC_USEC=") for line in agent.notified)
        home.put("second", 2)
        assert close_to(home.outputs("second"), 2)

        (home.folder / "other").mkdir()
        home.config.write_text(good.replace('path = "inbox"', 'path = "other"').replace("answers.jsonl", "more.jsonl"))
        agent.send(signal.SIGHUP)
        assert agent.wait_for("reloaded")["changed"] == ["source", "output"]
        home.inbox, home.answers_path = home.folder / "other", home.folder / "more.jsonl"
        home.put("third", 3)
        assert close_to(home.outputs("third"), 3)
        assert not agent.named("model"), "the model was not opened again"

        (home.folder / "tiny.outrider").write_bytes((home.folder / "bundles" / "tiny-2.outrider").read_bytes())
        agent.send(signal.SIGHUP)
        assert agent.wait_for("reloaded", 2)["changed"] == ["bundle"]
        home.put("fourth", 4)
        assert close_to(home.outputs("fourth"), 4, weights=1)

        make_real_bundle(home.folder / "third.outrider", version=3, seed=2)
        outrider.install(home.folder / "third.outrider", state=home.state)  # on the board itself, beside the agent
        agent.send(signal.SIGHUP)
        assert agent.wait_for("reloaded", 3)["changed"] == ["bundle"]
        home.put("fifth", 5)
        assert close_to(home.outputs("fifth"), 5, weights=2)
        agent.stop()


def test_kill_9_loses_no_account_no_sequence_and_no_place_in_the_folder(home: Home) -> None:
    with Sink(home.broker_url, state=home.folder / "sink") as sink:
        with AgentProcess(home) as agent:
            command(home, "pause", key=home.key)
            command(home, "resume", key=home.key)
            for seed in range(30):
                home.put(f"{seed:02}", seed)
                if seed == 20:
                    wait_until(lambda: len(home.answers) > 8)
                    agent.kill()
        answered = set(home.answers)
        with AgentProcess(home) as agent:
            wait_until(lambda: len(home.answers) == 30)
            assert answered < set(home.answers)
            assert len(home.lines) <= 31, "none of them twice but the one under way"
            assert command(home, "ping")["sequence"] == 2
            old = sender(home)._written("rollback", {}, sequence=2)[1]
            client = paho.Client(paho.CallbackAPIVersion.VERSION2)
            client.connect("127.0.0.1", int(home.broker_url.rsplit(":", 1)[1]))
            client.loop_start()
            client.publish(command_topic(DEVICE), old, qos=1).wait_for_publish(120)
            client.disconnect()
            client.loop_stop()
            assert agent.wait_for("command_refused")["reason"] == "old_sequence"
            account = agent.stop()["account"]
        assert account["enqueued"] == account["delivered"] + account["pending"] + account["dropped"]
        wait_until(lambda: sink.count().received >= account["enqueued"])
        assert sink.count().received == account["enqueued"]
        assert sink.count().missing == 0


def test_a_pause_holds_over_a_restart(home: Home) -> None:
    with AgentProcess(home) as agent:
        assert command(home, "pause", key=home.key)["data"] == {"paused": True}
        agent.stop()
    home.put("waiting", 1)
    with AgentProcess(home) as agent:
        assert command(home, "stats")["data"]["source"] == "paused"
        assert home.answers == {}
        assert command(home, "resume", key=home.key)["result"] == "ok"
        assert close_to(home.outputs("waiting"), 1)
        wait_until(lambda: agent.notified.count("WATCHDOG=1") >= 1)
        agent.stop()


def test_a_policy_that_was_set_holds_until_the_file_says_another(home: Home) -> None:
    cloud = '[cloud]\nurl = "http://127.0.0.1:9"\nmodel = "large"\n[policy]\ndeadline_ms = 50000\n'
    home.configure(more=cloud)
    with AgentProcess(home) as agent:
        home.put("one", 1)
        assert close_to(home.outputs("one"), 1)
        said = command(home, "set_policy", "min_margin=0.99", "offload_when_queued=false", key=home.key)
        assert said["data"]["policy"]["min_margin"] == 0.99
        home.put("two", 2)
        assert close_to(home.outputs("two"), 2)
        assert home.answers["two"]["source"] == "edge_degraded"
        said = command(home, "set_policy", "min_margin=7", key=home.key, code=1)
        assert said["reason"] == "bad_policy" and "min_margin" in said["detail"]
        agent.stop()
    with AgentProcess(home) as agent:
        assert command(home, "stats")["data"]["policy"]["min_margin"] == 0.99
        home.configure(more=cloud.replace("50000", "40000"))
        agent.send(signal.SIGHUP)
        assert agent.wait_for("reloaded")["changed"] == ["policy"]
        policy = command(home, "stats")["data"]["policy"]
        assert (policy["min_margin"], policy["deadline_ms"]) == (0.0, 40000)
        agent.stop()


def test_forged_commands_do_nothing_to_a_real_agent(home: Home) -> None:
    heard: list[bytes] = []
    with AgentProcess(home) as agent:
        operator = sender(home)
        until_heard(operator)
        assert [operator.send("resume").sequence for _ in range(4)] == [1, 2, 3, 4]
        before = read_taken(home.state / "agent" / DEVICE)
        client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        client.on_message = lambda _c, _d, message: heard.append(message.payload)
        client.connect("127.0.0.1", int(home.broker_url.rsplit(":", 1)[1]))
        client.subscribe(acknowledgement_topic(DEVICE), qos=1)
        client.loop_start()
        forged = [payload for payload in forgeries(200, seed=11, clock=False) if b"5" in payload]
        for number, payload in enumerate(forged):
            client.publish(command_topic(DEVICE), payload, qos=1).wait_for_publish(120)
            if number % 40 == 39:  # beyond 64 that wait, it would drop them unread
                assert operator.send("ping").sequence == 4
        assert operator.send("ping").sequence == 4
        retained = signed(a_command("pause", sequence=5, expires_s=2**40))
        client.publish(command_topic(DEVICE), retained, qos=1, retain=True).wait_for_publish(120)
        wait_until(lambda: any(read_acknowledgement(payload).name == "pause" for payload in list(heard)[-1:]))
        agent.stop()
        client.disconnect()
        client.loop_stop()
    said = [read_acknowledgement(payload) for payload in heard]
    done = [each.name for each in said if each.result == "ok" and each.name != "ping"]
    assert done == ["pause"], "the one that was signed, live"
    assert len(said) > 30
    assert before == read_taken(home.state / "agent" / DEVICE)[:-1]
    home.state.joinpath("agent", DEVICE, "standing.json").unlink()
    with AgentProcess(home) as agent:  # the broker has kept the command, and hands it over once more
        assert agent.wait_for("command_ignored")["reason"] == "retained"
        assert command(home, "stats")["data"]["source"] != "paused"
        agent.stop()


def test_two_operators_at_once_take_turns(home: Home) -> None:
    said: list[Acknowledgement] = []

    def work(name: str) -> None:
        said.extend(sender(home).send(name) for _ in range(5))

    with AgentProcess(home) as agent:
        until_heard(sender(home))
        operators = [threading.Thread(target=work, args=(name,)) for name in ("pause", "resume")]
        for operator in operators:
            operator.start()
        for operator in operators:
            operator.join()
        taken = [each for each in said if each.result == "ok"]
        assert len(taken) >= 5 and len(said) == 10
        assert {each.reason for each in said} <= {"", "old_sequence"}
        assert sender(home).send("ping").sequence == len(taken)
        agent.stop()


def test_an_operator_whom_nobody_answers_is_told(home: Home) -> None:
    with pytest.raises(AgentError, match=r"no acknowledgement from pi-07 within 0\.3 s"):
        sender(home, timeout_s=0.3).send("ping")
    with pytest.raises(AgentError, match="must be signed"):
        sender(home, key=None).send("pause")


def test_a_source_that_dies_is_tried_again(home: Home) -> None:
    home.inbox.rename(home.folder / "gone")
    with AgentProcess(home) as agent:
        failed = agent.wait_for("source_failed")
        assert "inbox cannot be read" in failed["error"] and failed["retry_s"] == 1.0
        (home.folder / "gone").rename(home.inbox)
        home.put("back", 1)
        assert close_to(home.outputs("back"), 1)
        assert agent.wait_for("source_reading")["before"] == "failed"
        agent.stop()


def test_messages_on_a_topic_are_answered(home: Home) -> None:
    home.configure(source='kind = "mqtt"\ntopic = "plant/+/frames"')
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    client.connect("127.0.0.1", int(home.broker_url.rsplit(":", 1)[1]))
    client.loop_start()
    client.publish("plant/old/frames", "[1]", qos=1, retain=True).wait_for_publish(120)  # before anyone listens
    with AgentProcess(home) as agent:
        values = json.dumps({"image": images(1, 3).tolist()})

        def answered() -> bool:  # until its connection for the source is there, what is published is for nobody
            client.publish("plant/a/frames", values, qos=1).wait_for_publish(120)
            return home.answers_path.exists() and home.answers_path.read_text().count("\n") > 2

        wait_until(answered)
        client.publish("plant/b/frames", "nonsense", qos=1).wait_for_publish(120)
        assert agent.wait_for("frame_refused")["frame"] == "plant/b/frames"
        client.disconnect()
        client.loop_stop()
        outcome = agent.stop()
    assert outcome["refused"] == {"InputError": 1}
    first = json.loads(home.answers_path.read_text().splitlines()[0])
    assert first["name"] == "plant/a/frames"
    assert close_to(np.float32(first["outputs"]["logits"]), 3)


def test_standard_input_ends_the_agent_with_it(home: Home) -> None:
    home.configure(source='kind = "stdin"')
    home.config.write_text(home.config.read_text().replace('"answers.jsonl"', '"-"'))
    lines = "".join(json.dumps(images(1, seed).tolist()) + "\n" for seed in range(3))
    line = [sys.executable, "-m", "outrider.cli", "agent", str(home.config)]
    done = subprocess.run(line, input=lines, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(each) for each in done.stdout.splitlines()]
    assert [each["name"] for each in answers] == ["line 1", "line 2", "line 3"]
    assert all(close_to(np.float32(each["outputs"]["logits"]), seed) for seed, each in enumerate(answers))
