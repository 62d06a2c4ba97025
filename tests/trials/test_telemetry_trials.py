"""Telemetry under kills, full disks, wrong clocks and damage: what is committed arrives, and the account is exact.

Real processes, a real mosquitto. A share of each count always runs; the full one with ``make trials``.
"""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider.model import Model, load
from outrider.telemetry import Limits, Sink
from outrider.telemetry.record import Range
from outrider.telemetry.spool import Draft, Spool
from support.broker import Mosquitto, wait_until
from support.realbundles import close_to, images, make_real_bundle
from support.telemetry import Source, a_draft
from support.telemetry_trials import Impatient, open_reporter, record_trial
from support.tmpfs import fill, small_disk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TESTS = Path(__file__).parents[1]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "mosquitto", extra="max_queued_messages 0\n") as running:
        yield running


# The broker is killed.


def kill_after_puback(broker: Mosquitto, tmp_path: Path, *, rounds: int) -> dict[str, Any]:
    """Each round the broker has confirmed what its consumer has not got yet, and dies."""
    go_on = threading.Event()
    source, taken, confirmed = Source(), Counter[int](), 0

    def handler(_device: str, record: Any) -> None:
        go_on.wait(30.0)
        taken[record.seq] += 1

    with (
        Sink(broker.url, on_record=handler, rng=Impatient(2)),
        open_reporter(broker.url, tmp_path, limits=Limits(receipt_timeout_s=2.0, batch_records=50)) as reporter,
    ):
        reporter.watch(source)
        for _ in range(rounds):
            go_on.set()
            source.predict(1)
            assert reporter.flush(60.0, level="sink"), "the consumer listens"
            go_on.clear()
            source.predict(299)
            assert reporter.flush(60.0, level="broker")
            confirmed += reporter.account().pending
            broker.kill()
            go_on.set()
            broker.start()
            assert reporter.flush(60.0, level="sink")
        account = reporter.account()
    assert account.enqueued == account.delivered == rounds * 300
    assert set(taken) == set(range(1, rounds * 300 + 1))
    return {"kills": rounds, "records": account.enqueued, "confirmed_and_not_taken_at_a_kill": confirmed, "lost": 0}


def test_kill_9_of_the_broker_after_puback_a_share(broker: Mosquitto, tmp_path: Path) -> None:
    kill_after_puback(broker, tmp_path, rounds=2)


@pytest.mark.trials
def test_kill_9_of_the_broker_after_puback(broker: Mosquitto, tmp_path: Path) -> None:
    record_trial("puback", lambda: kill_after_puback(broker, tmp_path, rounds=50))


def restart_broker(broker: Mosquitto, tmp_path: Path, *, restarts: int) -> dict[str, Any]:
    """1,000 records a second, and the broker is killed and started again under them."""
    source, stop, seen = Source(), threading.Event(), list[int]()
    offered = 0

    def produce() -> None:
        nonlocal offered
        begun = time.monotonic()
        while not stop.is_set():
            due = int((time.monotonic() - begun) * 1000.0)
            source.predict(due - offered)
            offered = due
            stop.wait(0.01)

    with (
        Sink(broker.url, on_record=lambda _, record: seen.append(record.seq), rng=Impatient(2)) as sink,
        open_reporter(broker.url, tmp_path) as reporter,
    ):
        reporter.watch(source)
        thread = threading.Thread(target=produce)
        thread.start()
        try:
            for _ in range(restarts):
                received, delivered = sink.count().received, reporter.account().delivered
                wait_until(lambda received=received: sink.count().received > received + 100)
                # What the sink reads is still the last broker's at times. One that is killed three times before
                # anything came through it is not to be told from a batch that ends each connection.
                wait_until(lambda delivered=delivered: reporter.account().delivered > delivered)
                broker.restart()
        finally:
            stop.set()
            thread.join()
        assert reporter.flush(60.0, level="sink")
        account, count = reporter.account(), sink.count()
    assert account.enqueued == account.delivered == offered
    assert (account.pending, account.dropped, account.lost) == (0, 0, 0)
    assert (count.received, count.gaps, count.missing) == (offered, 0, 0)
    assert seen == list(range(1, offered + 1)), "in order, once each"
    return {"restarts": restarts, "records": offered, "lost": 0, "out_of_order": 0, "came_twice": count.duplicates}


def test_restarts_of_the_broker_under_load_a_share(broker: Mosquitto, tmp_path: Path) -> None:
    restart_broker(broker, tmp_path, restarts=4)


@pytest.mark.trials
def test_50_restarts_of_the_broker_under_load(broker: Mosquitto, tmp_path: Path) -> None:
    record_trial("restarts", lambda: restart_broker(broker, tmp_path, restarts=50))


def stop_broker(broker: Mosquitto, tmp_path: Path, *, seconds: float) -> dict[str, Any]:
    """A broker that is there and does not read: what is offered meanwhile goes to the disk, and nobody waits for it."""
    source, done = Source(), 0
    with Sink(broker.url) as sink, open_reporter(broker.url, tmp_path) as reporter:
        reporter.watch(source)
        source.predict(100)
        assert reporter.flush(30.0, level="sink")
        broker.send(signal.SIGSTOP)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            source.predict(100)
            done += 100
            assert reporter.flush(60.0), "the disk does not wait for the network"
            time.sleep(0.05)
        assert reporter.account().pending == done
        broker.send(signal.SIGCONT)
        assert reporter.flush(60.0, level="sink")
        assert sink.count().received == done + 100
    return {"stopped_s": seconds, "records_meanwhile": done, "lost": 0}


def test_a_stopped_broker_stops_nobody_a_share(broker: Mosquitto, tmp_path: Path) -> None:
    stop_broker(broker, tmp_path, seconds=2.0)


@pytest.mark.trials
def test_a_broker_that_is_stopped_for_60_s_stops_nobody(broker: Mosquitto, tmp_path: Path) -> None:
    record_trial("stopped-broker", lambda: stop_broker(broker, tmp_path, seconds=60.0))


def drain_offline(tmp_path: Path, *, records: int) -> dict[str, Any]:
    """All of it is made while there is no broker."""
    broker, source = Mosquitto(tmp_path / "mosquitto"), Source()
    seen: list[int] = []
    with open_reporter(broker.url, tmp_path, queue_size=records) as reporter:
        reporter.watch(source)
        source.predict(records)
        assert reporter.flush(120.0)
        assert reporter.account().pending == records
        with broker, Sink(broker.url, on_record=lambda _, record: seen.append(record.seq)):
            assert reporter.flush(300.0, level="sink")
        assert reporter.account().delivered == records
    assert seen == list(range(1, records + 1))
    return {"records": records, "arrived": len(seen)}


def test_records_of_a_time_offline_arrive_a_share(tmp_path: Path) -> None:
    drain_offline(tmp_path, records=20_000)


@pytest.mark.trials
def test_70000_records_of_a_time_offline_arrive(tmp_path: Path) -> None:
    record_trial("offline", lambda: drain_offline(tmp_path, records=70_000))


# The disk is full, or its bytes change.


def infer_rightly(model: Model, *, calls: int) -> int:
    """Each of them is answered, by the board, with what the model must say."""
    for seed in range(calls):
        prediction = model.infer(images(1, seed))
        assert close_to(prediction.outputs, images(1, seed)) and prediction.source == "edge"
    return calls


def fill_disk(tmp_path: Path, *, rounds: int) -> dict[str, Any]:
    """The disk fills up and has room again, over and over; the model that is installed on it answers all the while."""
    source = Source()  # it fills the queue faster than a model does
    lost = inferred = 0
    make_real_bundle(tmp_path / "tiny.outrider")
    with (
        # A cap that is not reached: a spool at its cap writes over what it dropped and needs no more of the disk.
        small_disk(tmp_path / "disk", size_kib=160 * 1024) as disk,
        open_reporter(
            *("mqtt://127.0.0.1:1", tmp_path),
            **{"state": disk, "queue_size": 500, "commit_interval_ms": 5.0, "max_bytes": 120_000_000},
        ) as reporter,
        load(tmp_path / "tiny.outrider", state=disk) as model,
    ):
        reporter.watch(source)
        reporter.watch(model)
        for _ in range(rounds):
            ballast = fill(disk)
            wait_until(lambda: source.predict(100) or "full" in reporter.spool_error)
            inferred += infer_rightly(model, calls=100)
            source.predict(1000)
            with load("tiny", state=disk) as started:
                inferred += infer_rightly(started, calls=1)
            inferred += infer_rightly(model, calls=100)
            assert "full" in reporter.spool_error, "it was full all the while"
            account = reporter.account()
            assert account.enqueued == account.pending + account.delivered + account.dropped
            assert account.lost > lost, "what found the queue full"
            ballast.unlink()
            reporter.flush(30.0)
            assert reporter.spool_error == "", "it goes on when there is room again"
            account = reporter.account()
            assert account.enqueued + account.lost == account.offered
            lost = account.lost
        assert reporter.spool.last_seq == account.offered, "what was lost are gaps in the numbers"
    counts = {"offered": account.offered, "committed": account.enqueued, "lost_in_memory": lost}
    return {"times_full": rounds, **counts, "inferred_while_full": inferred}


def test_a_full_disk_a_share(tmp_path: Path) -> None:
    fill_disk(tmp_path, rounds=2)


@pytest.mark.trials
def test_a_full_disk(tmp_path: Path) -> None:
    record_trial("full-disk", lambda: fill_disk(tmp_path, rounds=20))


def damage(data: bytearray, rng: random.Random) -> str:
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
        return "cut"
    for _ in range(rng.choice((1, 1, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return "flipped"


def damage_spools(tmp_path: Path, *, count: int) -> dict[str, Any]:
    """A spool as a crash leaves it, half of its records in the journal; bytes flipped or cut off in either file."""
    records = 400
    path = tmp_path / "spool" / "x.sqlite"
    bodies = [a_draft(number, size_bytes=200).body for number in range(records)]
    with Spool(path) as spool:
        spool.append([Draft(body=body) for body in bodies[: records // 2]])
    with Spool(path) as spool:
        for at in range(records // 2, records, 20):
            spool.append([Draft(body=body) for body in bodies[at : at + 20]])
        spool.receive([Range(1, 10)])
        shutil.copytree(path.parent, tmp_path / "image")
    outcomes, kept, known = Counter[str](), list[int](), set(bodies)
    for seed in range(count):
        rng = random.Random(seed)
        folder = tmp_path / f"damaged-{seed}"
        shutil.copytree(tmp_path / "image", folder)
        victim = folder / (path.name + rng.choice(["", "-wal"]))
        data = bytearray(victim.read_bytes())
        how = damage(data, rng)
        victim.write_bytes(data)
        with Spool(folder / path.name) as spool:
            rows = spool.claim(10**6, after_seq=0, max_bytes=10**9)
            account = spool.account()
            assert account.enqueued == account.delivered + account.pending + account.dropped
            assert account.pending == len(rows)
            assert {row.body for row in rows} <= known, "nothing that was never written"
            assert account.enqueued == (records if spool.recovered is None else spool.salvaged)
            spool.append([a_draft()])
            assert spool.account().enqueued == account.enqueued + 1
        outcomes[f"{how}, {'sound' if spool.recovered is None else 'salvaged'}"] += 1
        kept.append(len(rows))
        shutil.rmtree(folder)
    whole = sum(each >= records - 10 for each in kept)
    return {
        "damaged": count,
        "started": count,
        "outcomes": dict(sorted(outcomes.items())),
        "records_each": records - 10,
        "kept_on_average": round(sum(kept) / count, 1),
        "kept_all": whole,
    }


def test_damaged_spools_a_share(tmp_path: Path) -> None:
    found = damage_spools(tmp_path, count=20)
    assert found["kept_on_average"] > 200


@pytest.mark.trials
def test_100_damaged_spools(tmp_path: Path) -> None:
    record_trial("damaged", lambda: damage_spools(tmp_path, count=100))
