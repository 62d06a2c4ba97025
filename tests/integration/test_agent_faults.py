"""What an agent does when an engine hangs, a command is cut off by a kill, the broker moves or wants a password."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outrider.agent.ending import LAST_CALL_S, STUCK
from outrider.agent.memory import read_taken
from outrider.agent.sender import Sender
from outrider.telemetry import Reporter, Sink
from outrider.telemetry.mqtt import Credentials, parse_broker
from outrider_runtimes.errors import AgentError
from support import tinymodels
from support.agents import DEVICE, AgentProcess, Home, board, command, until_heard
from support.broker import Mosquitto, wait_until
from support.certificates import issue
from support.hybrids import EndpointProcess
from support.keys import private_key
from support.ports import free_port
from support.realbundles import INTERFACE, expected, images, make_real_bundle

pytestmark = pytest.mark.slow

ANGRY = np.full((1, 8, 8), 6.0, np.float32)  # makes the model below count to 2^62


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with board(tmp_path) as found:
        yield found


def hanging(home: Home) -> None:
    """The home's bundle becomes one that hangs on ANGRY."""
    endless = tinymodels.endless_onnx(tinymodels.weights(0), above=5.0)
    make_real_bundle(home.folder / "tiny.outrider", files={"onnx": endless})


def test_the_watchdog_is_not_fed_while_a_call_hangs_though_commands_are_heard(home: Home) -> None:
    hanging(home)
    with AgentProcess(home, watchdog_s=0.2) as agent:
        wait_until(lambda: agent.notified.count("WATCHDOG=1") > 2)
        assert command(home, "stats")["data"]["call_s"] is None
        home.put("angry", 0, image=ANGRY)
        wait_until(lambda: command(home, "stats")["data"]["frames"] == 1)
        command(home, "ping")  # what was said before the hang has been heard by now
        fed = agent.notified.count("WATCHDOG=1")
        assert [command(home, "ping")["result"] for _ in range(2)] == ["ok", "ok"]
        assert agent.notified.count("WATCHDOG=1") == fed
        earlier, later = (command(home, "stats")["data"] for _ in range(2))
        assert 0 < earlier["call_s"] < later["call_s"], "the call that hangs is named"
        assert not later["sick"], "without a deadline nothing is late"
        agent.kill()


def test_a_stop_while_a_call_hangs_ends_in_bounded_time_with_what_was_offered_on_the_disk(home: Home) -> None:
    hanging(home)
    home.config.write_text(home.config.read_text().replace("commit_interval_ms = 20", "commit_interval_ms = 600000"))
    with Sink(home.broker_url) as sink, AgentProcess(home) as agent:
        home.put("before", 1)
        home.outputs("before")
        home.put("angry", 0, image=ANGRY)
        wait_until(lambda: command(home, "stats")["data"]["call_s"] is not None)
        assert sink.count().received == 0
        agent.send(signal.SIGTERM)
        assert agent.process is not None
        assert agent.process.wait(timeout=200) == STUCK
        said = agent.wait_for("stop_overdue")
        assert said["call_s"] >= LAST_CALL_S and "isolation" in said["hint"]
        with Reporter(home.broker_url, device=DEVICE, state=home.state) as reporter:
            assert reporter.account().enqueued >= 2, "agent_started and the answer"
            wait_until(lambda: sink.count().received >= 2)


def test_a_worker_that_is_taken_for_stuck_shows_in_the_stats(home: Home) -> None:
    hanging(home)
    home.configure(model="deadline_ms = 200")

    def is_sick_and_nobody_waits() -> bool:
        """One more of them: on a busy machine, what has 200 ms may be given up before it is begun."""
        home.put(f"angry-{len(list(home.inbox.iterdir()))}", 0, image=ANGRY)
        stats = command(home, "stats")["data"]
        return bool(stats["sick"]) and stats["call_s"] is None

    with AgentProcess(home) as agent:
        wait_until(is_sick_and_nobody_waits, what="the caller is let go at its deadline, the worker is not")
        agent.kill()


def test_with_a_deadline_and_a_process_of_its_own_a_hang_costs_one_answer(home: Home) -> None:
    hanging(home)
    home.configure(model='deadline_ms = 1000\nisolation = "process"')

    def answered(prefix: str) -> bool:
        """Whether one of them was: on a busy machine, and while the child is replaced, others may be given up."""
        home.put(f"{prefix}-{len(list(home.inbox.iterdir()))}", 2)
        return any(name.startswith(prefix) for name in home.answers)

    with AgentProcess(home) as agent:
        wait_until(lambda: answered("before"))
        given_up = command(home, "stats")["data"]["failed"].get("DeadlineExceeded", 0)
        home.put("angry", 0, image=ANGRY)
        wait_until(lambda: command(home, "stats")["data"]["failed"].get("DeadlineExceeded", 0) > given_up)
        wait_until(lambda: answered("after"))
        assert "angry" not in home.answers
        agent.stop()


def test_a_kill_in_the_middle_of_an_install_is_told_and_not_done_again(home: Home) -> None:
    operator = Sender(
        broker=parse_broker(home.broker_url), device=DEVICE, key=private_key(1), timeout_s=150.0, expires_s=3600.0
    )
    line = ["install", "tiny-2.outrider", "--key", str(home.key), "--timeout-s", "200", "--expires-s", "3600"]
    for sequence in range(1, 6):
        with AgentProcess(home) as agent:
            until_heard(operator)
            asking = subprocess.Popen(
                [sys.executable, "-m", "outrider.cli", "command", home.broker_url, DEVICE, *line, "--json"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            agent.wait_for("command")
            agent.kill()
        taken = read_taken(home.state / "agent" / DEVICE)[-1]
        assert taken.sequence == sequence, "it was on disk before anything was done"
        if taken.open:
            break
        asking.kill()  # the machine stalled until it was done: once more
        asking.communicate()
    assert taken.open
    with AgentProcess(home) as again:
        assert again.wait_for("command_interrupted")["sequence"] == sequence
        out, _ = asking.communicate(timeout=200)
        assert asking.returncode == 1
        assert b'"reason": "interrupted"' in out
        home.put("1", 1)
        logits = home.outputs("1")
        assert any(np.allclose(logits, expected(images(1, 1), seed), atol=1e-3) for seed in (0, 1)), "old or new"
        assert operator.send("install", {"file": "tiny-2.outrider"}).result == "ok"
        home.put("2", 2)
        assert np.allclose(home.outputs("2"), expected(images(1, 2), 1), atol=1e-3)
        again.stop()


def test_a_fresh_bundle_of_another_interface_that_fails_is_taken_back_and_the_agent_goes_on(home: Home) -> None:
    moody = tinymodels.moody_onnx(tinymodels.weights(1), "error", above=5.0)
    other = dataclasses.replace(INTERFACE, labels=tuple("abcdefghij"))
    fresh = home.folder / "bundles" / "moody.outrider"
    make_real_bundle(fresh, version=2, seed=1, files={"onnx": moody}, interface=other)
    with AgentProcess(home) as agent:
        assert command(home, "install", "moody.outrider", key=home.key)["data"]["bundle_version"] == 2
        home.put("angry", 0, image=ANGRY)
        assert "RolledBack" in agent.wait_for("frame_failed")["error"]
        assert agent.wait_for("model", 2)["bundle_version"] == 1
        home.put("after", 3)
        assert np.allclose(home.outputs("after"), expected(images(1, 3)), atol=1e-3)
        agent.stop()


def test_the_broker_moves_with_a_reload(home: Home, tmp_path: Path) -> None:
    with Mosquitto(tmp_path / "other") as other, AgentProcess(home) as agent:
        assert command(home, "ping")["sequence"] == 0
        home.broker_url = other.url
        home.configure()
        agent.send(signal.SIGHUP)
        assert agent.wait_for("reloaded")["changed"] == ["broker"]
        assert command(home, "pause", key=home.key)["sequence"] == 1
        home.configure(more="enabled = false")
        agent.send(signal.SIGHUP)
        assert agent.wait_for("reloaded", 2)["changed"] == ["commands"]
        mute = Sender(broker=parse_broker(other.url), device=DEVICE, timeout_s=0.5)
        with pytest.raises(AgentError, match="no acknowledgement"):
            mute.send("ping")
        home.configure()
        agent.send(signal.SIGHUP)
        agent.wait_for("reloaded", 3)
        assert command(home, "resume", key=home.key)["sequence"] == 2
        home.put("1", 1)
        assert np.allclose(home.outputs("1"), expected(images(1, 1)), atol=1e-3)
        agent.stop()


def test_a_broker_that_wants_a_password_gets_it_from_a_file_and_no_log_has_it(tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-c", "-b", str(passwords), "pi-07", "hunter2"], check=True, timeout=200)
    (tmp_path / "home").mkdir()
    extra = f"allow_anonymous false\npassword_file {passwords}\n"
    with Mosquitto(tmp_path / "mosquitto", extra=extra) as broker:
        home = Home(tmp_path / "home", broker.url)
        (home.folder / "secret").write_text("hunter2\n")
        home.configure(broker='username = "pi-07"\npassword_file = "secret"')
        with AgentProcess(home) as agent:
            sender = Sender(
                broker=parse_broker(broker.url),
                device=DEVICE,
                credentials=Credentials(username="pi-07", password="hunter2"),
                timeout_s=150.0,
            )
            until_heard(sender)
            agent.stop()
            assert "hunter2" not in str(agent.events)


def test_agent_operator_and_onlooker_show_their_certificates_to_a_broker_that_asks(tmp_path: Path) -> None:
    server, ours = issue(tmp_path, host="localhost"), issue(tmp_path, host="pi-07")
    port = free_port()
    extra = (
        f"listener {port} 127.0.0.1\ncertfile {server.certificate}\nkeyfile {server.key}\n"
        f"cafile {ours.certificate}\nrequire_certificate true\n"
    )
    with Mosquitto(tmp_path / "mosquitto", extra=extra):
        (tmp_path / "home").mkdir()
        home = Home(tmp_path / "home", f"mqtts://localhost:{port}")
        home.configure(
            broker=f'ca_file = "{server.certificate}"\ncert_file = "{ours.certificate}"\nkey_file = "{ours.key}"'
        )
        shown = ["--ca", server.certificate, "--cert", ours.certificate, "--cert-key", ours.key]
        with AgentProcess(home) as agent:
            assert command(home, "stats", *map(str, shown))["data"]["source"] == "reading"
            watch = [sys.executable, "-m", "outrider.cli", "watch", home.broker_url, "--once", "--json"]

            def states() -> list[str]:
                """Of the devices that it sees in the three seconds that it looks, if it gets there."""
                seen = subprocess.run([*watch, *map(str, shown)], capture_output=True, text=True, timeout=200)
                return [row["state"] for row in json.loads(seen.stdout)["devices"]] if seen.returncode == 0 else []

            wait_until(lambda: states() == ["online"])
            refused = subprocess.run([*watch, *map(str, shown[:2])], capture_output=True, text=True, timeout=200)
            assert refused.returncode == 1 and "Traceback" not in refused.stderr
            agent.stop()


def test_the_cloud_answers_what_the_board_is_unsure_of(home: Home, tmp_path: Path) -> None:
    bundle = tmp_path / "large.outrider"
    make_real_bundle(bundle, name="large", seed=1)
    endpoint = EndpointProcess(bundle, model="large", state=tmp_path / "cloud")
    endpoint.start()
    try:
        home.configure(
            more=f'[cloud]\nurl = "{endpoint.url}"\nmodel = "large"\n'
            "[policy]\ndeadline_ms = 100000\nmin_margin = 1.0\n[budget]\nrequests_per_day = 1000"
        )
        with AgentProcess(home) as agent:
            home.put("1", 1)
            assert np.allclose(home.outputs("1"), expected(images(1, 1), 1), atol=1e-3)
            assert home.answers["1"]["source"] == "cloud"
            assert command(home, "set_policy", "min_margin=0.0", key=home.key)["result"] == "ok"
            home.put("2", 2)
            assert np.allclose(home.outputs("2"), expected(images(1, 2)), atol=1e-3)
            agent.stop()
    finally:
        endpoint.stop()
    assert (home.state / "link.json").exists(), "one account for the link"
