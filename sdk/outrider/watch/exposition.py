"""The fleet in Prometheus's text exposition format, version 0.0.4. Pure.

Written by hand: ``prometheus_client`` keeps the counters of its own process; these are other machines' numbers, made
anew at each scrape, and what it would do for them is this page of text. docs/adr/0022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from outrider.watch.fleet import Row

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_Value = float | int | bool | None

# name, help, and the value of a device; all are gauges: a counter here would fall when the watch starts again.
_GAUGES: Final[tuple[tuple[str, str, Callable[[Row], _Value]], ...]] = (
    ("outrider_device_up", "1 while the device is connected.", lambda row: row.state in ("online", "stale")),
    (
        "outrider_device_stale",
        "1 while it is connected and has been quiet for too long.",
        lambda row: row.state == "stale",
    ),
    ("outrider_device_heard_timestamp_seconds", "When something new came from it.", lambda row: row.heard_s or None),
    ("outrider_device_problems", "How many things someone should look at.", lambda row: len(row.told.problems)),
    ("outrider_predictions_per_second", "Answers a second, over the window.", lambda row: row.told.per_second),
    ("outrider_latency_p50_seconds", "Half of the answers took no longer.", lambda row: _seconds(row.told.p50_ms)),
    ("outrider_latency_p95_seconds", "19 of 20 answers took no longer.", lambda row: _seconds(row.told.p95_ms)),
    ("outrider_offload_ratio", "Share of the answers from the cloud.", lambda row: row.told.offload_share),
    (
        "outrider_degraded_ratio",
        "Share that the cloud should have given and did not.",
        lambda row: row.told.degraded_share,
    ),
    ("outrider_failures", "Requests that failed, over the window.", lambda row: row.told.failures),
    ("outrider_refused", "Requests refused for their caller's inputs, over the window.", lambda row: row.told.refused),
    (
        "outrider_availability_ratio",
        "Share that was answered, of the requests that should have been.",
        lambda row: row.told.availability,
    ),
    ("outrider_temperature_celsius", "Of the board.", lambda row: row.told.temperature_c),
    ("outrider_throttled", "1 while the board holds itself back for its heat.", lambda row: row.told.throttled),
    ("outrider_memory_bytes", "Resident memory of the reporting process.", lambda row: row.told.memory_rss_bytes),
    ("outrider_drift", "The last score of the drift monitor.", lambda row: row.told.drift),
    ("outrider_record_gaps", "Records that are proven to be lost.", lambda row: row.gaps),
)


def expose(rows: Sequence[Row], *, connected: bool, malformed: int) -> str:
    """One scrape: what is not known of a device has no line.

    Args:
        rows: of all devices.
        connected: whether the watch has its broker; what it says of the devices is old where not.
        malformed: messages that it could not read.
    """
    lines = _family("outrider_watch_connected", "1 while the watch has its broker.", "gauge", [("", connected)])
    lines += _family("outrider_watch_malformed_total", "Unreadable messages.", "counter", [("", malformed)])
    serving = [(_labels(device=row.device, **_model(row)), True) for row in rows if row.told.model is not None]
    lines += _family("outrider_model_info", "What the device serves.", "gauge", serving)
    for name, text, value_of in _GAUGES:
        lines += _family(name, text, "gauge", [(_labels(device=row.device), value_of(row)) for row in rows])
    return "\n".join(lines) + "\n"


def _family(name: str, text: str, kind: str, samples: Sequence[tuple[str, _Value]]) -> list[str]:
    lines = [f"{name}{labels} {float(value):.10g}" for labels, value in samples if value is not None]
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *lines] if lines else []


def _model(row: Row) -> dict[str, str]:
    told = row.told
    return {
        "model": told.model or "",
        "version": str(told.version),
        "variant": told.variant or "",
        "engine": told.engine or "",
    }


def _labels(**labels: str) -> str:
    escaped = (f'{name}="{_escape(value)}"' for name, value in labels.items())
    return "{" + ",".join(escaped) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _seconds(value_ms: float | None) -> float | None:
    return None if value_ms is None else value_ms / 1000.0
