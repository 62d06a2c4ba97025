"""A Sparkplug node whose connection is cut again and again while it tells, judged by the specification's rules."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from outrider.telemetry.sparkplug import SparkplugNode
from outrider.telemetry.vitals import Vitals
from support import sparkplug
from support.broker import Mosquitto, wait_until
from support.listener import Listener
from support.mutants import write_results
from support.relay import Relay

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

FULL, SHARE = 300, 12  # cuts: for `make trials`, where bdSeq wraps by itself, and for `make test`
BIRTH, DEATH, COMMAND = (f"spBv1.0/plant/{kind}/pi-07" for kind in ("NBIRTH", "NDEATH", "NCMD"))


class Prompt(random.Random):
    """Connections are tried again soon."""

    def uniform(self, a: float, b: float) -> float:
        return 0.02


def last_born(host: Listener) -> int | None:
    """The bdSeq of the last birth that a host saw."""
    births = host.on(BIRTH)
    return int(sparkplug.decode(births[-1].payload).metrics[0].long_value) if births else None


def cut_again_and_again(folder: Path, cuts: int) -> dict[str, Any]:
    """What a host saw of it."""
    rng = random.Random(17)
    with (
        Mosquitto(folder / "broker") as broker,
        Relay(broker.port) as relay,
        Listener(broker.port, "spBv1.0/#") as host,
    ):
        url = f"mqtt://127.0.0.1:{relay.port}"
        with SparkplugNode(url, group="plant", device="pi-07", state=folder, rng=Prompt()) as node:
            for number in range(cuts):
                wait_until(lambda: len(host.on(DEATH)) == number, what=f"death {number}")  # noqa: B023
                wait_until(lambda: last_born(host) == number % 256, what=f"birth {number}")  # noqa: B023
                births = len(host.on(BIRTH))
                host.say(COMMAND, sparkplug.rebirth_command())
                wait_until(lambda: len(host.on(BIRTH)) > births, what=f"rebirth {number}")  # noqa: B023
                for _ in range(rng.randrange(20)):
                    node.tell(Vitals(predictions=rng.randrange(2**40)))
                    time.sleep(rng.random() * 0.002)  # the cut comes at another point of what is being told each time
                relay.cut()
            wait_until(lambda: len(host.on(DEATH)) == cuts, what="the last death")
            wait_until(lambda: last_born(host) == cuts % 256, what="the last birth")
        wait_until(lambda: len(host.on(DEATH)) == cuts + 1, what="the goodbye")
        deaths = [sparkplug.decode(seen.payload).metrics[0].long_value for seen in host.on(DEATH)]
        assert deaths == [number % 256 for number in range(cuts + 1)]
        return {
            "messages": len(host.heard),
            "births": len(host.on(BIRTH)),
            "violations": sparkplug.violations(host.heard),
        }


def test_a_share_of_the_cuts(tmp_path: Path) -> None:
    assert cut_again_and_again(tmp_path, SHARE)["violations"] == []


@pytest.mark.trials
def test_all_cuts(tmp_path: Path) -> None:
    begun = time.monotonic()
    seen = cut_again_and_again(tmp_path, FULL)
    write_results("sparkplug-cuts", {"cuts": FULL, **seen, "taken_s": round(time.monotonic() - begun)})
    assert seen["violations"] == []
