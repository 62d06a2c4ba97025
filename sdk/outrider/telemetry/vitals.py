"""How a device is doing, in a few numbers: read from the bodies of its ``metrics`` records (docs/telemetry.md). Pure.

One home for what Home Assistant, Sparkplug and ``outrider watch`` show, so that all of them say the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NoReturn

from outrider_runtimes.errors import TelemetryError

# docs/telemetry.md: the bucket k holds what is from 2^(k/8) to 2^((k+1)/8) milliseconds.
BUCKETS_PER_OCTAVE: Final = 8
MIN_BUCKET, MAX_BUCKET = -80, 191
# Above this share of answers that should have come from the cloud and did not, someone should look.
DEGRADED_PROBLEM: Final = 0.1
_MAX_COUNT: Final = 2**53
# Of a record's own names, so many apart; a stranger who makes up more has them counted as one.
MAX_NAMES: Final = 64
_OTHER: Final = "other"
_MAX_NAME: Final = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """What one ``metrics`` record says, checked.

    Attributes:
        predictions: how many answers in ``interval_s``; ``by_source`` splits them by where they came from, the names
            beyond MAX_NAMES as one.
        failures: requests that should have been answered, and were not; ``refused`` are those whose caller erred.
        buckets: of the callers' waits, by the specification's bucket.
        max_ms: the longest of them.
    """

    interval_s: float = 0.0
    predictions: int = 0
    by_source: Mapping[str, int] = field(default_factory=dict)
    by_reason: Mapping[str, int] = field(default_factory=dict)
    failures: int = 0
    refused: int = 0
    buckets: Mapping[int, int] = field(default_factory=dict)
    max_ms: float | None = None
    temperature_c: float | None = None
    throttled: bool | None = None
    memory_rss_bytes: int | None = None
    drift: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Vitals:
    """How a device is doing. What is not known is None; a share is of the predictions, from 0 to 1.

    Attributes:
        model, version, variant, engine: what it serves; of several models, the first.
        availability: of the requests that should have been answered, the share that was.
        problems: what someone should look at: ``throttled``, ``failures``, ``degraded``.
    """

    model: str | None = None
    version: int | None = None
    variant: str | None = None
    engine: str | None = None
    predictions: int = 0
    failures: int = 0
    refused: int = 0
    availability: float | None = None
    per_second: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    offload_share: float | None = None
    degraded_share: float | None = None
    temperature_c: float | None = None
    throttled: bool | None = None
    memory_rss_bytes: int | None = None
    drift: float | None = None
    problems: tuple[str, ...] = ()


def read_metrics(body: Mapping[str, Any]) -> Interval:
    """The body of a ``metrics`` record. A key that is not there is as in Interval; TelemetryError names a wrong one."""
    latency = body.get("latency_ms", {})
    if not isinstance(latency, Mapping):
        _refuse("latency_ms", "an object")
    counts = _items(body, "counts", Mapping)
    return Interval(
        interval_s=_number(body, "interval_s") or 0.0,
        predictions=_count(body.get("predictions", 0), "predictions"),
        by_source=_sums(counts, "source"),
        by_reason=_sums(counts, "reason"),
        failures=_sum(body, "failures"),
        refused=_sum(body, "refused"),
        buckets=_buckets(latency),
        max_ms=_number(latency, "max", where="latency_ms."),
        temperature_c=_number(body, "temperature_c"),
        throttled=_throttled(body),
        memory_rss_bytes=None if body.get("memory_rss_bytes") is None else _count(body["memory_rss_bytes"], "memory"),
        drift=_number(body, "drift"),
    )


def availability(answered: int, failed: int) -> float | None:
    """Of the requests that should have been answered, the share that was; None where there were none.

    >>> availability(999, 1), availability(0, 0)
    (0.999, None)
    """
    return round(answered / (answered + failed), 6) if answered + failed else None


def bounded_name(name: str, known: Collection[str]) -> str:
    """Under what name to count, where so many are known: a stranger who makes up names has no end of them."""
    name = name[:_MAX_NAME]
    return name if name in known or len(known) < MAX_NAMES else _OTHER


def merge_buckets(intervals: Iterable[Interval]) -> dict[int, int]:
    """Histograms as one: counts of equal bucket are added."""
    total: Counter[int] = Counter()
    for interval in intervals:
        total.update(interval.buckets)
    return dict(total)


def quantile_ms(buckets: Mapping[int, int], q: float) -> float | None:
    """The wait that a share ``q`` of the answers stayed within: the middle of its bucket, so right within 5 %.

    >>> quantile_ms({8: 700, 9: 430, 30: 70}, 0.5)
    2.089
    """
    total = sum(buckets.values())
    if not total:
        return None
    wanted = q * total
    seen = 0
    for bucket in sorted(buckets):
        seen += buckets[bucket]
        if seen >= wanted:
            break
    return float(f"{2.0 ** ((bucket + 0.5) / BUCKETS_PER_OCTAVE):.4g}")


def vitals(intervals: Sequence[Interval], bundles: Sequence[Mapping[str, Any]] = ()) -> Vitals:
    """Several intervals as one; temperature, memory and drift are the last's.

    Args:
        intervals: in the order of time; none is a device that has not told yet.
        bundles: those of its info message.
    """
    bundle = bundles[0] if bundles else {}
    predictions = sum(interval.predictions for interval in intervals)
    seconds = sum(interval.interval_s for interval in intervals)
    by_source: Counter[str] = Counter()
    for interval in intervals:
        by_source.update(interval.by_source)
    buckets = merge_buckets(intervals)
    failures = sum(interval.failures for interval in intervals)
    last = intervals[-1] if intervals else Interval()
    told = Vitals(
        model=bundle.get("name"),
        version=bundle.get("version"),
        variant=bundle.get("variant"),
        engine=bundle.get("engine"),
        predictions=predictions,
        failures=failures,
        refused=sum(interval.refused for interval in intervals),
        availability=availability(predictions, failures),
        per_second=_rate(predictions, seconds),
        p50_ms=quantile_ms(buckets, 0.5),
        p95_ms=quantile_ms(buckets, 0.95),
        offload_share=_share(by_source["cloud"], predictions),
        degraded_share=_share(by_source["edge_degraded"], predictions),
        temperature_c=last.temperature_c,
        throttled=last.throttled,
        memory_rss_bytes=last.memory_rss_bytes,
        drift=last.drift,
    )
    return _with_problems(told)


def _with_problems(told: Vitals) -> Vitals:
    found = {
        "throttled": bool(told.throttled),
        "failures": told.failures > 0,
        "degraded": (told.degraded_share or 0.0) > DEGRADED_PROBLEM,
    }
    return replace(told, problems=tuple(name for name, is_so in found.items() if is_so))


def _rate(count: int, seconds: float) -> float | None:
    rate = count / seconds if seconds > 0.0 else math.inf
    return round(rate, 3) if math.isfinite(rate) else None


def _share(part: int, whole: int) -> float | None:
    return round(min(1.0, part / whole), 4) if whole else None


def _sums(counts: Sequence[Mapping[str, Any]], key: str) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for item in counts:
        name = item.get(key)
        if not isinstance(name, str):
            _refuse(f"counts.{key}", "a string")
        sums[bounded_name(name, sums)] += _count(item.get("count"), "counts.count")
    return dict(sums)


def _sum(fields: Mapping[str, Any], key: str) -> int:
    counts = fields.get(key, {})
    if not isinstance(counts, Mapping):
        _refuse(key, "an object of counts")
    return sum(_count(value, key) for value in counts.values())


def _buckets(latency: Mapping[str, Any]) -> dict[int, int]:
    buckets: Counter[int] = Counter()
    for pair in _items(latency, "buckets", list, where="latency_ms."):
        if len(pair) != 2 or type(pair[0]) is not int:
            _refuse("latency_ms.buckets", "pairs of bucket and count")
        buckets[min(MAX_BUCKET, max(MIN_BUCKET, pair[0]))] += _count(pair[1], "latency_ms.buckets")
    return dict(buckets)


def _items(fields: Mapping[str, Any], key: str, kind: type[Any], *, where: str = "") -> list[Any]:
    items = fields.get(key, [])
    if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
        _refuse(where + key, f"a list of {kind.__name__.lower()}s")
    return list(items)


def _count(value: object, key: str) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        _refuse(key, "a count")
    return value


def _number(fields: Mapping[str, Any], key: str, *, where: str = "") -> float | None:
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _MAX_COUNT:
        _refuse(where + key, "a number")
    return float(value)


def _throttled(body: Mapping[str, Any]) -> bool | None:
    value = body.get("throttled")
    if value is not None and not isinstance(value, bool):
        _refuse("throttled", "true, false or null")
    return value


def _refuse(key: str, expected: str) -> NoReturn:
    raise TelemetryError(f"metrics.{key} is not what docs/telemetry.md says, expected {expected}")
