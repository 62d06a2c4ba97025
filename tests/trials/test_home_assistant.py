"""The agent in a real Home Assistant: found over MQTT, shown, away, back, and removed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outrider._version import __version__
from outrider.telemetry import Reporter
from outrider.telemetry.homeassistant import remove
from outrider_runtimes.heat import Heat
from support.agents import DEVICE, AgentProcess, Home, board
from support.broker import wait_until
from support.homeassistant import PINS, HomeAssistantProcess
from support.listener import Listener
from support.mutants import write_results

pytestmark = [pytest.mark.slow, pytest.mark.trials, pytest.mark.timeout(1800)]

ENTITIES = {"model", "model_version", "latency_p95", "temperature", "offload_share", "problem"}
OTHER = "b.2_x"  # what an object id of Home Assistant cannot hold as it is
# The agent's program on a board that has a sensor, which this machine may not have.
WARM = """
import sys
from functools import partial
from pathlib import Path
from outrider.cli import main
from outrider.telemetry import Reporter
from outrider_runtimes.heat import read_heat
Reporter.__init__.__kwdefaults__["heat"] = partial(read_heat, Path({root!r}))
sys.exit(main())
"""


def warm(root: Path, thousandths: int) -> tuple[str, str]:
    """The program of an agent that reads the board's heat in a sensor below ``root``."""
    zone = root / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text(f"{thousandths}\n")
    return "-c", WARM.format(root=str(root))


def states(ha: HomeAssistantProcess, slug: str = "pi_07") -> dict[str, str]:
    """What the entities of a device show, by their name."""
    found = ha.states(f"{slug}_")
    return {name.removeprefix(f"{slug}_"): str(each["state"]) for name, each in found.items()}


def wait_for(ha: HomeAssistantProcess, condition: Callable[[dict[str, str]], object], what: str) -> None:
    wait_until(lambda: condition(states(ha)), timeout_s=60, what=f"{what}: {states(ha)}")


def is_away(shown: dict[str, str]) -> bool:
    return set(shown) == ENTITIES and set(shown.values()) == {"unavailable"}


def is_there(shown: dict[str, str]) -> bool:
    return shown.get("model") == "tiny" and shown["problem"] in ("on", "off")


def found(ha: HomeAssistantProcess, home: Home) -> dict[str, Any]:
    """It has found the agent, and shows what it answers by, with units; nothing of what it was sent was refused."""
    wait_for(ha, is_there, "found")
    home.put("one", 1)
    home.outputs("one")
    wait_for(ha, lambda shown: shown["latency_p95"] not in ("unknown", "unavailable"), "an answer's latency")
    shown = states(ha)
    assert set(shown) == ENTITIES
    assert (shown["model"], shown["model_version"], shown["offload_share"], shown["problem"]) == (
        "tiny",
        "1",
        "0.0",
        "off",
    )
    assert 0.0 < float(shown["latency_p95"]) < 60_000.0
    assert float(shown["temperature"]) == 51.5
    attributes = {name: each["attributes"] for name, each in ha.states("pi_07_").items()}
    assert attributes["pi_07_latency_p95"]["unit_of_measurement"] == "ms"
    assert attributes["pi_07_temperature"]["device_class"] == "temperature"
    assert attributes["pi_07_temperature"]["unit_of_measurement"] == "\N{DEGREE SIGN}C"
    assert (attributes["pi_07_problem"]["problems"], attributes["pi_07_problem"]["failures"]) == ([], 0)
    told = "{{ device_attr(device_id('sensor.pi_07_model'), 'FIELD') }}"
    device = {field: ha.rendered(told.replace("FIELD", field)) for field in ("name", "manufacturer", "sw_version")}
    assert device == {"name": DEVICE, "manufacturer": "Outrider", "sw_version": __version__}
    return {"states": shown, "device": device}


def another(ha: HomeAssistantProcess, home: Home, state: Path) -> dict[str, str]:
    """A second device, of which nothing is known but that something failed; and it can be taken out again."""
    options: dict[str, Any] = {"state": state, "home_assistant": True, "metrics_interval_s": 0.2, "heat": Heat}
    with Reporter(home.broker_url, device=OTHER, **options) as reporter:
        reporter.failure(RuntimeError("it failed"))
        wait_until(lambda: states(ha, "b_2_x").get("problem") == "on", what="a problem is on")
        shown = states(ha, "b_2_x")
        assert set(shown) == ENTITIES
        assert {shown[name] for name in ENTITIES - {"problem"}} == {"unknown"}
    remove(home.broker_url, device=OTHER)
    wait_until(lambda: not states(ha, "b_2_x"), what="removed")
    assert is_there(states(ha)), "the other is where it was"
    return shown


def test_the_agent_in_a_real_home_assistant(tmp_path: Path) -> None:
    begun_s = time.monotonic()
    with board(tmp_path) as home, HomeAssistantProcess(tmp_path / "ha") as ha:
        home.configure(broker="home_assistant = true\nmetrics_interval_s = 1")
        ha.add_broker(int(home.broker_url.rsplit(":", 1)[1]))
        with AgentProcess(home, program=warm(tmp_path / "board", 51_500)) as agent:
            seen = found(ha, home)
            nothing_known = another(ha, home, tmp_path / "other")
            agent.stop()
            wait_for(ha, is_away, "away after SIGTERM")
        with AgentProcess(home) as agent:
            wait_for(ha, is_there, "back")
            agent.kill()
            wait_for(ha, is_away, "away after kill -9")
        with AgentProcess(home):
            wait_for(ha, is_there, "back again")
            ha.stop()
            ha.start()
            wait_for(ha, is_there, "there after Home Assistant's own restart")
        remove(home.broker_url, device=DEVICE)
        wait_for(ha, lambda shown: not shown, "removed")
        complaints = ha.complaints()
        with Listener(int(home.broker_url.rsplit(":", 1)[1]), "nothing") as stranger:
            stranger.say("homeassistant/device/stranger/config", b'{"device": {}, "components": {}}')
        wait_until(ha.complaints, what="that it complains of what it refuses")
    assert complaints == []
    figures = {"home_assistant": PINS[0], **seen, "nothing_known": nothing_known, "complaints": complaints}
    write_results("home-assistant", {**figures, "taken_s": round(time.monotonic() - begun_s, 1)})
