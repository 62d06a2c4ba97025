"""Service quality: counts, percentiles against numpy's, availability, and the same text as Prometheus reads it."""

from __future__ import annotations

import json
import pickle
import threading

import numpy as np
import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from outrider.endpoint.intake import Intake
from outrider.endpoint.metrics import CALLER_STATUSES, Metrics, exposition_of, quality_of, shown
from outrider.endpoint.models import Models
from support.endpoints import served


def made(models: Models | None = None, now_s: list[float] | None = None) -> Metrics:
    now_s = [0.0] if now_s is None else now_s
    return Metrics(models or Models([served(3)]), Intake(body_bytes=1000), clock=lambda: now_s[0])


def scraped(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text, kind = metrics.exposition()
    assert kind.startswith("text/plain")
    families = text_string_to_metric_families(text.decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_before_any_request_nothing_is_claimed():
    quality = made().quality()
    assert quality["total"]["availability"] is None and quality["total"]["p99_ms"] is None
    assert [(row["model"], row["version"], row["requests"]) for row in quality["models"]] == [("digits", "3", 0)]
    assert shown(quality) == "no request in 0 s"


@given(st.lists(st.floats(1e-5, 100.0), min_size=1, max_size=200))
def test_percentiles_are_within_nine_percent_of_the_exact_ones(seconds):
    metrics = made()
    for each in seconds:
        metrics.observe("digits", "3", 200, "ok", each)
    row = metrics.quality()["models"][0]
    assert row["mean_ms"] == pytest.approx(1e3 * np.mean(seconds), rel=1e-3, abs=1e-3)
    assert row["max_ms"] == pytest.approx(1e3 * max(seconds), rel=1e-3, abs=1e-3)
    for share in (50, 90, 99):
        exact_ms = 1e3 * np.percentile(seconds, share, method="inverted_cdf")
        assert exact_ms * 0.999 - 1e-3 <= row[f"p{share}_ms"] <= max(exact_ms * 1.092, 0.1) + 1e-3


def test_what_took_longer_than_the_last_bucket_is_told_by_the_longest():
    metrics = made()
    for seconds in (1e4, 2e4):
        metrics.observe("digits", "3", 200, "ok", seconds)
    assert metrics.quality()["total"]["p99_ms"] == 2e7


def test_availability_is_of_what_should_have_been_answered():
    metrics = made(now_s=(now_s := [100.0]))
    for status, reason, count in (
        (200, "ok", 90),
        (400, "bad_input", 50),
        (429, "queue_full", 8),
        (504, "deadline", 2),
    ):
        for _ in range(count):
            metrics.observe("digits", "3", status, reason, 0.01)
    now_s[0] = 160.0
    metrics.observe("", "", 404, "unknown", 0.001)
    quality = metrics.quality()
    assert (quality["seconds"], quality["total"]["availability"]) == (60.0, 0.9)
    assert (quality["total"]["requests"], quality["total"]["answered"]) == (151, 90)
    digits, nameless = quality["models"]
    assert {row["reason"]: row["requests"] for row in digits["reasons"]} == {
        "ok": 90,
        "bad_input": 50,
        "queue_full": 8,
        "deadline": 2,
    }
    assert (nameless["model"], nameless["availability"]) == ("", None)
    text = shown(quality)
    assert text.startswith("in 60 s: 90 of 151 requests answered, availability 90.00 %")
    assert "    queue_full (429): 8\n" in text and text.endswith("    no model: unknown (404): 1")
    json.dumps(quality, allow_nan=False)


def test_no_refusal_for_want_of_room_or_time_is_the_callers():
    assert not CALLER_STATUSES & {200, 429, 500, 503, 504}


def test_prometheus_reads_the_same_counts():
    metrics = made()
    for seconds in (0.0004, 0.0005, 0.05, 300.0):
        metrics.observe("digits", "3", 200, "ok", seconds)
    metrics.observe('a"b\\', "3", 500, "model_failed", 0.2)
    metrics.turned_away(431)
    found = scraped(metrics)
    ok = (("model", "digits"), ("reason", "ok"), ("status", "200"), ("version", "3"))
    assert found["outrider_requests_total", ok] == 4
    assert found["outrider_request_seconds_count", ok] == 4
    assert found["outrider_request_seconds_sum", ok] == pytest.approx(300.0509)

    def bucket(end: str) -> float:
        return found["outrider_request_seconds_bucket", (("le", end), *ok)]

    assert [bucket(end) for end in ("0.0002", "0.0004", "0.0008", "0.0512", "104.8576", "+Inf")] == [0, 1, 2, 3, 3, 4]
    assert found["outrider_turned_away_total", (("status", "431"),)] == 1
    ours = [value for (name, _), value in found.items() if name == "outrider_model_info"]
    assert ours == [1.0]
    assert found["outrider_model_ready", (("model", "digits"), ("version", "3"))] == 1
    assert any(name == "outrider_build_info" for name, _ in found)
    assert any(dict(labels).get("model") == 'a"b\\' for _, labels in found)


def test_two_endpoints_of_one_process_do_not_share_a_registry():
    before = list(prometheus_client.REGISTRY.collect())
    one, other = made(), made()
    one.observe("digits", "3", 200, "ok", 0.1)
    assert scraped(one) != scraped(other)
    assert len(list(prometheus_client.REGISTRY.collect())) == len(before)


def test_several_processes_of_one_endpoint_are_told_together():
    now_s = [0.0]
    one, other, both = made(), made(now_s=now_s), made()
    for number in range(100):
        for metrics in ((one, other)[number % 2], both):
            metrics.observe("digits", "3", 200, "ok", 0.001 * (1 + number))
    for metrics in (other, both):
        metrics.observe("digits", "3", 503, "no_time", 0.001)
        metrics.turned_away(400)
    now_s[0] = 7.0
    sent = {name: pickle.loads(pickle.dumps(each.counted())) for name, each in (("a", one), ("b", other))}

    told = quality_of(sent.values())
    assert told == {**both.quality(), "processes": 2, "seconds": 7.0}
    assert (told["total"]["requests"], told["total"]["answered"], told["turned_away"]) == (101, 100, 1)

    rows = [
        (sample.name, sample.labels)
        for family in text_string_to_metric_families(exposition_of(sent)[0].decode())
        for sample in family.samples
    ]
    assert {labels["replica"] for _, labels in rows} == {"a", "b"}
    assert len({(name, tuple(sorted(labels.items()))) for name, labels in rows}) == len(rows)
    counted = [labels["replica"] for name, labels in rows if name == "outrider_requests_total"]
    assert sorted(counted) == ["a", "b", "b"]  # and the refusal
    text = exposition_of(sent)[0].decode()
    assert text.count("# TYPE outrider_request_seconds histogram") == 1


def test_nothing_is_lost_between_threads():
    metrics = made()

    def count() -> None:
        for _ in range(2000):
            metrics.observe("digits", "3", 200, "ok", 0.001)
            metrics.turned_away(400)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    quality = metrics.quality()
    assert (quality["total"]["requests"], quality["turned_away"]) == (8000, 8000)
