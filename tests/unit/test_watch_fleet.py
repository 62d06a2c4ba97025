"""The fleet as a fold over messages: no broker, no clock."""

from __future__ import annotations

import random

import pytest

from outrider.telemetry.vitals import MAX_NAMES, quantile_ms
from outrider.watch import fleet as module
from outrider.watch.fleet import STALE_AFTER_S, Fleet, Row
from support.fleet import START_S, Simulated, a_story, damaged
from support.sparkplug import Seen

NOW_S = START_S + 10.0


def take(fleet: Fleet, *messages: Seen, now_s: float = NOW_S) -> list[str]:
    return [news.text for each in messages for news in fleet.take(each.topic, each.payload, now_s=now_s)]


def row(fleet: Fleet, device: str = "pi-07") -> Row:
    return next(row for row in fleet.rows() if row.device == device)


def test_a_device_from_its_birth_to_its_last_will() -> None:
    fleet, pi = Fleet(), Simulated("pi-07")
    assert take(fleet, pi.status()) == ["online (connected)"]
    assert take(fleet, pi.info()) == ["serves digits 3, onnx-int8"]
    assert take(fleet, pi.metrics([2.0] * 95 + [40.0] * 5, cloud=5)) == ["100 answers, p95 2.089 ms"]
    told = row(fleet).told
    assert (told.model, told.version, told.variant, told.engine) == ("digits", 3, "onnx-int8", "onnxruntime")
    assert (told.predictions, told.offload_share, told.temperature_c) == (100, 0.05, 50.0)
    assert (row(fleet).software, row(fleet).machine, row(fleet).records) == ("0.1.0", "aarch64", 1)
    assert take(fleet, pi.event("rollback", reason="slow")) == ["rollback reason=slow"]
    event = row(fleet).event
    assert event is not None and (event.name, event.detail, event.at_s) == ("rollback", "reason=slow", START_S)
    assert take(fleet, pi.status("offline", reason="lost")) == ["offline (lost)"]
    assert row(fleet).state == "offline"


def test_what_comes_again_counts_once_and_says_nothing() -> None:
    fleet, pi = Fleet(), Simulated("pi-07")
    batches = [pi.metrics([2.0] * 10), pi.metrics([4.0] * 10)]
    take(fleet, pi.status(), *batches)
    before = row(fleet)
    assert take(fleet, pi.status(), *batches, now_s=NOW_S + 60) == []
    assert row(fleet) == before
    assert before.told.predictions == 20


def test_the_window_is_merged_by_adding_histograms() -> None:
    fleet, pi = Fleet(window_s=150.0), Simulated("pi-07")
    for minute, wait in enumerate((100.0, 1.0, 2.0, 4.0)):
        take(fleet, pi.metrics([wait] * 10, at_s=START_S + 60 * minute), now_s=START_S + 200)
    told = row(fleet).told
    assert told.predictions == 30  # the first is older than the window
    assert told.p50_ms == quantile_ms({8: 1}, 0.5)
    assert told.p95_ms == quantile_ms({16: 1}, 0.5)
    assert told.per_second == round(30 / 180, 3)


def test_the_last_interval_is_shown_however_old_it_is() -> None:
    fleet, pi = Fleet(), Simulated("pi-07")
    take(fleet, pi.metrics([3.0] * 7, at_s=START_S), pi.info(), now_s=START_S + 86_400)
    assert row(fleet).told.predictions == 7


def test_records_of_a_backlog_are_put_in_the_order_of_their_time() -> None:
    fleet, pi = Fleet(), Simulated("pi-07")
    late, early = pi.metrics([2.0], at_s=START_S + 60), pi.metrics([1.0], at_s=START_S)
    take(fleet, late, early)
    assert [point.at_s for point in fleet.points("pi-07")] == [START_S, START_S + 60]


def test_an_event_of_a_backlog_does_not_take_the_place_of_a_newer_one() -> None:
    fleet, pi = Fleet(), Simulated("pi-07")
    take(fleet, pi.event("new", at_s=START_S + 5), pi.event("old", at_s=START_S))
    event = row(fleet).event
    assert event is not None and event.name == "new"


def test_a_clock_that_is_far_ahead_is_not_believed() -> None:
    fleet, pi = Fleet(), Simulated("pi-07")
    take(fleet, pi.metrics([2.0], at_s=START_S + 1e9))
    assert [point.at_s for point in fleet.points("pi-07")] == [NOW_S]


def test_who_is_quiet_is_stale_until_it_says_something_new() -> None:
    fleet, pi = Fleet(), Simulated("pi-07")
    take(fleet, pi.status(), now_s=0.0)
    assert [news.text for news in fleet.tick(STALE_AFTER_S)] == []
    assert [news.text for news in fleet.tick(STALE_AFTER_S + 1)] == ["stale"]
    assert fleet.tick(STALE_AFTER_S + 2) == []
    assert row(fleet).state == "stale"
    take(fleet, pi.event("x"), now_s=STALE_AFTER_S + 3)
    assert row(fleet).state == "online"
    take(fleet, pi.status("offline", reason="closed"), now_s=STALE_AFTER_S + 4)
    assert fleet.tick(9 * STALE_AFTER_S) == []


def test_predictions_make_the_numbers_where_a_device_sends_no_metrics() -> None:
    fleet, pi = Fleet(), Simulated("pi-07")
    begins_s = START_S // 60 * 60
    for number in range(12):
        at_s = begins_s + 10.0 * number
        take(fleet, pi.prediction(4.0, source="cloud" if number < 3 else "edge", at_s=at_s), now_s=begins_s + 130)
    told = row(fleet).told
    assert (told.predictions, told.offload_share, told.p50_ms) == (12, 0.25, quantile_ms({16: 1}, 0.5))
    assert [(point.at_s, point.per_second) for point in fleet.points("pi-07")] == [
        (begins_s, 0.1),
        (begins_s + 60, 0.1),
    ]


def test_failures_count_where_a_device_sends_no_metrics_and_not_twice_where_it_does() -> None:
    fleet, pi = Fleet(), Simulated("pi-07")
    take(fleet, *(pi.prediction(4.0) for _ in range(3)), pi.event("inference_failed", error="DeadlineExceeded"))
    take(fleet, pi.event("inference_refused", error="ShapeError"), pi.event("calibrated"))
    told = row(fleet).told
    assert (told.failures, told.refused, told.availability, told.problems) == (1, 1, 0.75, ("failures",))
    take(fleet, pi.metrics([2.0], failures={"DeadlineExceeded": 1}), pi.event("inference_failed", error="QueueFull"))
    assert (row(fleet).told.failures, row(fleet).told.availability) == (1, 0.5)


def test_metrics_take_the_place_of_what_predictions_made() -> None:
    fleet, pi = Fleet(), Simulated("pi-07")
    take(fleet, pi.prediction(900.0), pi.metrics([2.0] * 50), pi.prediction(900.0))
    assert row(fleet).told.predictions == 50
    assert len(fleet.points("pi-07")) == 1


def test_lost_records_are_gaps() -> None:
    fleet, pi = Fleet(), Simulated("pi-07")
    take(fleet, pi.event("a"))
    lost = pi.event("b")
    after = pi.event("c")
    proof = Seen(
        topic=lost.topic, payload=after.payload.replace(b'"after_seq":2', b'"after_seq":1'), qos=1, retain=False
    )
    take(fleet, proof)
    assert (row(fleet).gaps, row(fleet).records) == (1, 2)


def test_only_what_changed_is_given() -> None:
    fleet = Fleet()
    one, two = Simulated("a"), Simulated("b")
    take(fleet, one.status(), two.status(), one.metrics([1.0]))
    number = fleet.number
    assert fleet.rows(after=number) == [] and fleet.points("a", after=number) == []
    take(fleet, two.metrics([1.0]))
    assert [row.device for row in fleet.rows(after=number)] == ["b"]
    assert len(fleet.points("b", after=number)) == 1


def test_a_strangers_text_is_bounded_and_moves_no_cursor() -> None:
    fleet, pi = Fleet(), Simulated("pi-07", model="\x1b[2J<b>\u202e" + "x" * 1000)
    take(fleet, pi.info(), pi.event("\x1b]0;owned\x07", note="a\nb"))
    shown = row(fleet)
    assert shown.told.model is not None and shown.event is not None
    for text in (shown.told.model, shown.event.name, shown.event.detail):
        assert text.isprintable() and len(text) <= 200


def test_one_device_cannot_speak_for_another() -> None:
    fleet, other = Fleet(), Simulated("other")
    for message in (other.status(), other.info(), other.metrics([1.0])):
        topic = message.topic.replace("other", "pi-07")
        assert fleet.take(topic, message.payload, now_s=NOW_S) == []
    assert fleet.malformed == 3 and fleet.rows() == []


@pytest.mark.parametrize(
    "topic", ["outrider/v1/pi-07/receipt", "outrider/v2/pi-07/status", "x", "outrider/v1/ü/status"]
)
def test_other_topics_are_let_pass(topic: str) -> None:
    fleet = Fleet()
    assert fleet.take(topic, Simulated("pi-07").status().payload, now_s=NOW_S) == []
    assert (fleet.malformed, fleet.rows()) == (0, [])


def test_damaged_messages_are_counted_and_break_nothing() -> None:
    rng = random.Random(11)
    pi = Simulated("pi-07")
    sound = [pi.status(), pi.info(), pi.metrics([1.0, 2.0]), pi.event("x", a=1), pi.prediction(3.0)]
    fleet = Fleet()
    for _ in range(3000):
        each = rng.choice(sound)
        fleet.take(each.topic, damaged(each, rng), now_s=NOW_S)
    assert fleet.malformed > 500
    take(fleet, Simulated("other").status())
    assert row(fleet, "other").state == "online"


@pytest.mark.parametrize("interval_s", [1e-300, 5e-324, 0.0, -1.0])
def test_a_rate_that_no_number_tells_is_not_known(interval_s: float) -> None:
    fleet, pi = Fleet(), Simulated("pi-07")
    take(fleet, pi.records(("metrics", {"interval_s": interval_s, "predictions": 9 * 10**15})))
    assert (row(fleet).told.per_second, row(fleet).told.predictions) == (None, 9 * 10**15)
    assert [point.per_second for point in fleet.points("pi-07")] == [None]


@pytest.mark.parametrize("total_ms", [10**400, -(10**400), 1e308, True, "1"], ids=lambda value: repr(value)[:9])
def test_a_wait_that_cannot_be_is_counted_as_malformed(total_ms: object) -> None:
    fleet, pi = Fleet(), Simulated("pi-07")
    take(fleet, pi.records(("prediction", {"source": "edge", "timing_ms": {"total": total_ms}})), pi.prediction(2.0))
    assert (fleet.malformed, row(fleet).told.predictions) == (1, 1)


def test_a_device_that_makes_up_sources_fills_no_memory() -> None:
    fleet, pi = Fleet(), Simulated("pi-07")
    for number in range(300):
        take(fleet, pi.records(("prediction", {"source": f"{number} " * 50, "timing_ms": {"total": 1.0}})))
    (_, own), *_ = fleet._devices["pi-07"].intervals
    counts = [{"source": f"{number} " * 20, "reason": f"{number}", "count": 1} for number in range(300)]
    take(fleet, pi.records(("metrics", {"predictions": 300, "counts": counts})))
    (_, told), *_ = fleet._devices["pi-07"].intervals
    for by in (own.by_source, told.by_source, told.by_reason):
        assert len(by) <= MAX_NAMES + 1
        assert max(map(len, by)) <= 64
        assert sum(by.values()) == 300


def test_there_is_an_end_to_how_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DEVICES", 3)
    fleet = Fleet()
    take(fleet, *(Simulated(f"d{number}").status() for number in range(5)))
    assert (len(fleet.rows()), fleet.refused) == (3, 2)
    pi = Simulated("d0")
    for _ in range(20):
        pi.stream = Simulated("d0").stream
        take(fleet, pi.event("x"))
    assert row(fleet, "d0").records == 20


def test_the_story_ends_as_it_says() -> None:
    fleet = Fleet()
    for message in a_story(until_s=NOW_S):
        take(fleet, message)
    assert fleet.malformed == 0
    states = {each.device: each.state for each in fleet.rows()}
    assert states["gate-south"] == "offline" and states["line-3"] == "online" and len(states) == 8
    assert row(fleet, "press-07").told.problems == ("throttled",)
    assert row(fleet, "yard-gw").told.problems == ("degraded",)
