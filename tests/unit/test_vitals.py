"""A device in a few numbers: what is read of metrics records, how they merge, and what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.telemetry.vitals import Interval, Vitals, merge_buckets, quantile_ms, read_metrics, vitals
from outrider_runtimes.errors import TelemetryError

DOC = Path(__file__).resolve().parents[2] / "docs" / "telemetry.md"
BUNDLE = {"name": "digits", "version": 3, "variant": "onnx-int8", "engine": "onnxruntime"}


def example() -> dict[str, Any]:
    found = re.search(r"<!-- example: metrics -->\n```json\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert found
    body: dict[str, Any] = json.loads(found[1])
    return body


def bucket_of(value_ms: float) -> int:
    return min(191, max(-80, math.floor(8 * math.log2(value_ms))))


def test_the_example_of_the_specification() -> None:
    told = vitals([read_metrics(example())], [BUNDLE])
    assert told == Vitals(
        model="digits",
        version=3,
        variant="onnx-int8",
        engine="onnxruntime",
        predictions=1200,
        failures=2,
        refused=3,
        availability=0.998336,
        per_second=20.0,
        p50_ms=2.089,
        p95_ms=14.05,
        offload_share=0.0575,
        degraded_share=0.0008,
        temperature_c=51.5,
        throttled=False,
        memory_rss_bytes=46137344,
        drift=0.125,
        problems=("failures",),
    )
    assert (told.offload_share, told.availability) == (example()["offload_share"], example()["availability"])


def test_a_device_that_has_not_told_yet() -> None:
    assert vitals([]) == Vitals()
    assert vitals([], [BUNDLE]).model == "digits"
    assert read_metrics({}) == Interval()


@given(st.lists(st.lists(st.floats(0.001, 1e6), max_size=50), min_size=1, max_size=6), st.floats(0.01, 0.99))
def test_a_quantile_of_merged_histograms_is_that_of_all_values(parts: list[list[float]], q: float) -> None:
    histograms = []
    for part in parts:
        buckets: dict[int, int] = {}
        for value in part:
            buckets[bucket_of(value)] = buckets.get(bucket_of(value), 0) + 1
        histograms.append(Interval(buckets=buckets))
    found = quantile_ms(merge_buckets(histograms), q)
    everything = [value for part in parts for value in part]
    if not everything:
        assert found is None
    else:
        right = float(np.quantile(everything, q, method="inverted_cdf"))
        assert found == pytest.approx(right, rel=0.05)


def test_merging_two_devices_is_not_the_mean_of_their_quantiles() -> None:
    quick = Interval(predictions=99, by_source={"edge": 99}, buckets={bucket_of(2.0): 99})
    slow = Interval(predictions=1, by_source={"cloud": 1}, buckets={bucket_of(200.0): 1})
    both = vitals([quick, slow])
    assert both.p95_ms == quantile_ms({bucket_of(2.0): 1}, 0.5)
    assert both.offload_share == 0.01


def test_availability_is_of_the_requests_that_should_have_been_answered() -> None:
    good = Interval(predictions=90, failures=0, refused=7)
    bad = Interval(predictions=6, failures=4, refused=1)
    told = vitals([good, bad])
    assert (told.failures, told.refused, told.availability) == (4, 8, 0.96)
    assert vitals([good]).availability == 1.0
    assert vitals([Interval(failures=2)]).availability == 0.0
    assert vitals([Interval(refused=3)]).availability is None
    assert vitals([Interval(refused=3)]).problems == ()


def test_the_newest_interval_says_how_hot_it_is() -> None:
    told = vitals([Interval(temperature_c=80.0, throttled=True), Interval(temperature_c=55.0, throttled=False)])
    assert (told.temperature_c, told.throttled, told.problems) == (55.0, False, ())


@pytest.mark.parametrize(
    ("interval", "problems"),
    [
        (Interval(throttled=True), ("throttled",)),
        (Interval(failures=1), ("failures",)),
        (Interval(predictions=10, by_source={"edge_degraded": 1, "edge": 9}), ()),
        (Interval(predictions=10, by_source={"edge_degraded": 2, "edge": 8}), ("degraded",)),
        (Interval(throttled=True, failures=3), ("throttled", "failures")),
    ],
)
def test_what_someone_should_look_at(interval: Interval, problems: tuple[str, ...]) -> None:
    assert vitals([interval]).problems == problems


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("predictions", -1),
        ("predictions", True),
        ("predictions", 1.5),
        ("predictions", 2**60),
        ("interval_s", "60"),
        ("interval_s", 1e300),
        ("counts", {}),
        ("counts", [3]),
        ("counts", [{"source": 3, "count": 1}]),
        ("counts", [{"source": "edge", "reason": "local", "count": "1"}]),
        ("failures", []),
        ("failures", {"DeadlineExceeded": -1}),
        ("refused", {"ShapeError": 0.5}),
        ("latency_ms", []),
        ("latency_ms", {"buckets": [[1]]}),
        ("latency_ms", {"buckets": [[1.5, 2]]}),
        ("latency_ms", {"buckets": [[1, None]]}),
        ("latency_ms", {"buckets": "12"}),
        ("latency_ms", {"max": []}),
        ("temperature_c", True),
        ("throttled", "no"),
        ("memory_rss_bytes", "much"),
        ("drift", "nan"),
    ],
)
def test_a_wrong_key_is_named(key: str, value: object) -> None:
    with pytest.raises(TelemetryError, match=key.partition("_")[0]):
        read_metrics({**example(), key: value})


def test_buckets_beyond_the_ends_count_in_the_outermost() -> None:
    assert read_metrics({"latency_ms": {"buckets": [[-9999, 1], [-80, 1], [9999, 3]]}}).buckets == {-80: 2, 191: 3}
