"""The lines of the telemetry benchmark: kept or missed by the figures alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from benchmarks import shown, telemetry

GOOD = {"value": 0.9, "low": 0.8, "high": 1.0}


def figures(**changes: float) -> dict[str, Any]:
    found = {"us": 0.4, "raw": 1.2, "queue": 0.9, "groups": 100_000.0, "broker": 9.0, "consumer": 9.0, "both": 9.0}
    found |= {"start": 1.0, "killed": 1.0, "p99": 1.0}
    found |= changes
    path = {"us": {"Reporter": found["us"]}, "valid": True}
    append = {
        "ratios": {"Spool.append": GOOD | {"value": found["raw"]}, shown.ALIKE: GOOD},
        "over_persist_queue": GOOD | {"value": found["queue"]},
        "rows_a_second": {"groups": found["groups"], "persist-queue": 4000.0},
        "valid": True,
    }
    drain = {
        "records_a_second": dict.fromkeys(("ours", "paho", "ours, to a consumer", "paho, to a consumer"), 1e4),
        "times_paho": {
            "to the broker": GOOD | {"value": found["broker"]},
            "to a consumer": GOOD | {"value": found["consumer"]},
            "to a consumer over to the broker": GOOD | {"value": found["both"]},
        },
        "valid": True,
    }
    stopped = {"ratio": GOOD | {"value": found["p99"]}, "valid": False}
    start = {
        "added_ms": {"clean": found["start"], "killed": found["killed"], "draining": 1.0},
        "added_ms_interval": {name: [0.0, 2.0] for name in ("clean", "killed", "draining")},
        "twin_ms_interval": [-2.0, 1.0],
        "valid": True,
    }
    return {"path": path, "append": append, "drain": drain, "stopped": stopped, "start": start}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"us": 1.1}, ["a callback on the inference path, us"]),
        ({"raw": 1.31}, ["one append over a raw row"]),
        ({"queue": 1.01}, ["one append over persist-queue"]),
        ({"groups": 39_000.0}, ["rows of groups over persist-queue's"]),
        ({"broker": 7.9}, ["drain over paho, to the broker"]),
        ({"consumer": 7.9}, ["drain over paho, to a consumer"]),
        ({"both": 7.9}, ["drain over paho, to a consumer over to the broker"]),
        ({"start": 2.1}, ["30000 waiting records (clean), ms to the first answer"]),
        ({"killed": 2.1}, ["30000 waiting records (killed), ms to the first answer"]),
        ({"p99": 1.2}, ["p99 in a minute of a stopped broker over one of a running one"]),
    ],
)
def test_a_promise_is_missed_by_its_own_figure(changes: dict[str, float], missed: list[str]) -> None:
    lines = telemetry._promises(**figures(**changes))
    assert [line["promise"] for line in lines if not line["met"]] == missed


def test_the_section_says_what_was_missed_and_what_was_too_noisy() -> None:
    found = figures(us=2.0)
    result = {
        **found,
        "stopped_broker": found["stopped"],
        "bytes_written_a_record": {"record": 392.0, "one a commit": 13_000.0, "groups of 64": 700.0},
        "promises": telemetry._promises(**found),
    }
    text = shown.telemetry(result)
    assert (
        "settings an append takes 1.33 of its time. **INVALID**, the machine was too noisy: stopped_broker.\n" in text
    )
    assert text.count("missed") == 1
    assert text.endswith("\n- missed: a callback on the inference path, us: 2, 1 was asked")


def test_the_p99_is_over_all_of_a_stretch_and_not_a_median_of_its_blocks() -> None:
    calm, hung = np.full(100, 1e5), np.full(100, 5e5)
    found = telemetry.p99_ratio([calm, calm, calm, hung], [calm] * 4, np.random.default_rng(1))
    assert found.value == 5.0
    assert found.low <= found.value <= found.high
