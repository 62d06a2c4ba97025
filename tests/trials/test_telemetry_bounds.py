"""What is dropped, and when: the byte cap's exact set, clocks that jump; and when devices come back to their broker.

A share of each count always runs; the full one with ``make trials``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider.telemetry.mqtt import Connection, Handlers, Message, backoff_s, parse_broker
from outrider.telemetry.spool import HIGH, LOW, LOWEST, NORMAL, ROW_OVERHEAD_BYTES, Spool
from support.broker import Mosquitto, wait_until
from support.telemetry import Source, a_draft
from support.telemetry_trials import open_reporter, record_trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "mosquitto") as running:
        yield running


def cap_bytes(tmp_path: Path, *, runs: int) -> dict[str, Any]:
    """What the byte cap drops is exactly what the stated order says: lowest class first, then the oldest."""
    dropped = 0
    for seed in range(runs):
        rng = random.Random(seed)
        max_bytes = rng.randrange(1000, 20_000)
        pending: dict[int, tuple[int, int]] = {}
        held: set[int] = set()
        with Spool(tmp_path / f"{seed}.sqlite", max_bytes=max_bytes) as spool:
            for _ in range(rng.randrange(5, 40)):
                drafts = [
                    a_draft(size_bytes=rng.randrange(600), priority=rng.choice((LOWEST, LOW, NORMAL, HIGH)))
                    for _ in range(rng.randrange(1, 8))
                ]
                if rng.random() < 0.3:
                    held |= {row.seq for row in spool.claim(rng.randrange(1, 4), after_seq=0, max_bytes=10**6)}
                for seq, draft in zip(spool.append(drafts), drafts, strict=True):
                    pending[seq] = (draft.priority, len(draft.body) + ROW_OVERHEAD_BYTES)
                excess = sum(size for _, size in pending.values()) - max_bytes
                for seq in sorted(pending, key=lambda seq: (pending[seq][0], seq)):
                    if excess <= 0:
                        break
                    if seq not in held:
                        excess -= pending.pop(seq)[1]
                        dropped += 1
                assert [row.seq for row in spool.peek(10**6)] == sorted(pending)
            account = spool.account()
            assert account.enqueued == account.pending + account.dropped
    assert dropped > runs
    return {"runs": runs, "dropped": dropped, "dropped_wrongly": 0}


def test_the_byte_cap_drops_exactly_what_it_says_a_share(tmp_path: Path) -> None:
    cap_bytes(tmp_path, runs=30)


@pytest.mark.trials
def test_the_byte_cap_drops_exactly_what_it_says(tmp_path: Path) -> None:
    record_trial("byte-cap", lambda: cap_bytes(tmp_path, runs=1000))


TEN_YEARS_S = 10 * 365.25 * 86_400
CLOCKS = {"right": 0.0, "10 years ahead": TEN_YEARS_S, "10 years back": -TEN_YEARS_S, "1970": None}


class Wall:
    """A clock that someone turns."""

    is_: str = "right"

    def __call__(self) -> float:
        shift = CLOCKS[self.is_]
        return 3600.0 if shift is None else time.time() + shift


def turn_clocks(tmp_path: Path, *, turns: int) -> dict[str, Any]:
    """The wall clock jumps between lives and within them; with an age bound of an hour nothing of minutes expires."""
    source, offered, wall, rng = Source(), 0, Wall(), random.Random(5)
    for _ in range(turns):
        with open_reporter("mqtt://127.0.0.1:1", tmp_path, max_age_s=3600.0, wall_clock=wall) as reporter:
            reporter.watch(source)
            for wall.is_ in rng.sample(list(CLOCKS), 3):
                source.predict(50)
                offered += 50
                assert reporter.flush(30.0)
                reporter.spool.expire()
            account = reporter.account()
            assert (account.enqueued, account.pending, account.expired) == (offered, offered, 0)
    return {"lives": turns, "jumps": turns * 3, "records": offered, "expired": 0}


def test_clocks_that_jump_expire_nothing_a_share(tmp_path: Path) -> None:
    turn_clocks(tmp_path, turns=3)


@pytest.mark.trials
def test_clocks_that_jump_expire_nothing(tmp_path: Path) -> None:
    record_trial("clocks", lambda: turn_clocks(tmp_path, turns=100))


# Fifty devices lose their broker together.


def reconnect_fleet(*, seeds: int, devices: int = 50) -> dict[str, Any]:
    """The attempts of devices whose broker is back after so long, by the rule of the connection; a simulation."""
    worst = dict.fromkeys((0.0, 1.0, 5.0, 60.0, 600.0), 0.0)
    for outage_s in worst:
        for seed in range(seeds):
            attempts: list[float] = []
            for device in range(devices):
                rng, now_s, attempt = random.Random(seed * 1000 + device), 0.0, 0
                while not attempt or now_s < outage_s:
                    attempt += 1
                    now_s += backoff_s(attempt, rng)
                    attempts.append(now_s)
            worst[outage_s] = max(worst[outage_s], busiest(attempts, span_s=0.1) / len(attempts))
    assert max(worst.values()) <= 0.2
    return {"devices": devices, "fleets": seeds, "busiest_100_ms": {f"{s:g} s": round(w, 3) for s, w in worst.items()}}


def busiest(times_s: list[float], *, span_s: float) -> int:
    """How many of them lie in the span that holds most."""
    times_s, first, most = sorted(times_s), 0, 0
    for last, time_s in enumerate(times_s):
        while time_s - times_s[first] >= span_s:
            first += 1
        most = max(most, last - first + 1)
    return most


def test_a_fleet_does_not_come_back_at_once_a_share() -> None:
    reconnect_fleet(seeds=20)


@pytest.mark.trials
def test_a_fleet_does_not_come_back_at_once() -> None:
    record_trial("fleet", lambda: reconnect_fleet(seeds=300))


def reconnect_connections(broker: Mosquitto, *, restarts: int, devices: int = 50) -> dict[str, Any]:
    """Real connections whose real broker is killed and is back: when they try again, by the clock."""
    attempts: list[float] = []  # appended to by all their threads

    def will() -> Message:  # asked for at each attempt
        attempts.append(time.monotonic())
        return Message(topic="gone", payload=b"")

    connections = [
        Connection(
            parse_broker(broker.url),
            client_id=f"pi-{number}",
            handlers=Handlers(),
            will=will,
            rng=random.Random(number),
        )
        for number in range(devices)
    ]
    shares: list[float] = []
    try:
        for connection in connections:
            connection.start()
        wait_until(lambda: all(connection.connected for connection in connections), timeout_s=120.0)
        for _ in range(restarts):
            attempts.clear()
            broker.kill()
            wait_until(lambda: not any(connection.connected for connection in connections))
            broker.start()
            wait_until(lambda: all(connection.connected for connection in connections), timeout_s=120.0)
            assert len(attempts) >= devices
            shares.append(busiest(list(attempts), span_s=0.1) / len(attempts))
    finally:
        for connection in connections:
            connection.close()
    assert max(shares) <= 0.2
    return {"devices": devices, "restarts": restarts, "busiest_100_ms": round(max(shares), 3)}


def test_50_real_connections_do_not_come_back_at_once_a_share(broker: Mosquitto) -> None:
    reconnect_connections(broker, restarts=1)


@pytest.mark.trials
def test_50_real_connections_do_not_come_back_at_once(broker: Mosquitto) -> None:
    record_trial("reconnects", lambda: reconnect_connections(broker, restarts=20))


def test_real_devices_come_back_after_their_broker(broker: Mosquitto, tmp_path: Path) -> None:
    reporters = [
        open_reporter(broker.url, tmp_path, device=f"pi-{number}", rng=random.Random(number)) for number in range(8)
    ]
    try:
        wait_until(lambda: all(reporter.connected for reporter in reporters))
        broker.kill()
        wait_until(lambda: not any(reporter.connected for reporter in reporters))
        broker.start()
        wait_until(lambda: all(reporter.connected for reporter in reporters), timeout_s=60.0)
    finally:
        for reporter in reporters:
            reporter.close()
