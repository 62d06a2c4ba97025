"""What an endpoint did, counted once and told in three ways: for Prometheus, as JSON, and in words when it ends.

Availability is the share of requests that were answered among those that the endpoint should have answered: what the
caller did wrong (``CALLER_STATUSES``) counts for neither side, a refusal for want of room or time counts against it.
"""

from __future__ import annotations

import math
import platform
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from outrider._version import __version__
from outrider_runtimes.deadline import Clock

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from outrider.endpoint.intake import Intake
    from outrider.endpoint.models import Models

# 499: the caller hung up. 429 is not among them: that it has no room is the endpoint's doing.
CALLER_STATUSES = frozenset({400, 401, 404, 405, 408, 413, 415, 431, 499})

# Buckets of time: the first ends at 0.1 ms, eight double it, the last ends at 105 s; one more for what took longer. A
# percentile read from them is off by at most 9 %.
FIRST_MS = 0.1
PER_DOUBLING = 8
DOUBLINGS = 20
_LAST = PER_DOUBLING * DOUBLINGS + 1

Key = tuple[str, str, int, str]


class _Tally:
    """How often, how long: one (model, version, status, reason), or the sum of several."""

    __slots__ = ("buckets", "count", "max_ms", "sum_ms")

    def __init__(self) -> None:
        self.count = 0
        self.sum_ms = 0.0
        self.max_ms = 0.0
        self.buckets = [0] * (_LAST + 1)

    def add(self, ms: float) -> None:
        at = 0 if ms <= FIRST_MS else min(_LAST, math.ceil(PER_DOUBLING * math.log2(ms / FIRST_MS)))
        self.buckets[at] += 1
        self.count += 1
        self.sum_ms += ms
        self.max_ms = max(self.max_ms, ms)

    def merge(self, other: _Tally) -> None:
        self.count += other.count
        self.sum_ms += other.sum_ms
        self.max_ms = max(self.max_ms, other.max_ms)
        self.buckets = [mine + its for mine, its in zip(self.buckets, other.buckets, strict=True)]

    def percentile_ms(self, share: float) -> float:
        """The end of the bucket in which that share of all is reached, or the longest time where that is less."""
        reached = enumerate(accumulate(self.buckets))
        at = next((at for at, seen in reached if seen and seen >= share * self.count), _LAST)
        return self.max_ms if at == _LAST else min(self.max_ms, FIRST_MS * 2 ** (at / PER_DOUBLING))

    def told(self) -> dict[str, Any]:
        if not self.count:
            return {"mean_ms": None, "p50_ms": None, "p90_ms": None, "p99_ms": None, "max_ms": None}
        times = {f"p{share}_ms": self.percentile_ms(share / 100) for share in (50, 90, 99)}
        times = {"mean_ms": self.sum_ms / self.count, **times, "max_ms": self.max_ms}
        return {name: round(ms, 3) for name, ms in times.items()}


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What one process counted until now. It can be pickled, for another process of the same endpoint to tell.

    Attributes:
        seconds: since its start.
        served: names and versions of its models, as they are now.
        families: what Prometheus is told.
    """

    seconds: float
    served: tuple[tuple[str, str], ...]
    tallies: dict[Key, _Tally]
    turned_away: int
    families: tuple[Metric, ...]


class Metrics:
    """Counts of one endpoint's process, over HTTP and gRPC. Safe from several threads.

    Args:
        models: whose bundles, variants and readiness are told beside the counts.
        intake: who is inside.
        clock: seconds, monotonic.
    """

    def __init__(self, models: Models, intake: Intake, *, clock: Clock = time.monotonic) -> None:
        self._models = models
        self._intake = intake
        self._clock = clock
        self._begun_s = clock()
        self._lock = threading.Lock()
        self._tallies: dict[Key, _Tally] = {}
        self._turned_away: dict[int, int] = {}

    def observe(self, model: str, version: str, status: int, reason: str, seconds: float) -> None:
        """Count one request for an inference.

        Args:
            model, version: as the endpoint knows them, never as a caller spells them: empty where it knows none.
            status: the HTTP status, also of what came over gRPC.
            reason: one of a fixed set of words; see ``refusals``.
            seconds: from its head to its reply.
        """
        key = (model, version, status, reason)
        with self._lock:
            tally = self._tallies.get(key)
            if tally is None:
                tally = self._tallies[key] = _Tally()
            tally.add(seconds * 1e3)

    def turned_away(self, status: int) -> None:
        """Count one request that was refused before it was a request: its head or its framing broke a bound."""
        with self._lock:
            self._turned_away[status] = self._turned_away.get(status, 0) + 1

    def counted(self) -> Counted:
        """What was counted since the start, and what goes on now."""
        with self._lock:
            tallies = {key: _sum([tally]) for key, tally in sorted(self._tallies.items())}
            turned_away = sum(self._turned_away.values())
        return Counted(
            seconds=self._clock() - self._begun_s,
            served=tuple((each.name, str(each.version)) for each in self._models),
            tallies=tallies,
            turned_away=turned_away,
            families=tuple(self.families()),
        )

    def quality(self) -> dict[str, Any]:
        """Service quality of this process; see ``quality_of``."""
        return quality_of([self.counted()])

    def exposition(self) -> tuple[bytes, str]:
        """What Prometheus scrapes of this process; see ``exposition_of``."""
        return exposition_of({"": self.counted()})

    def families(self) -> Iterator[Metric]:
        """What Prometheus is told."""
        with self._lock:
            tallies = {key: _sum([tally]) for key, tally in self._tallies.items()}
            turned_away = dict(self._turned_away)
        yield from _requests(tallies)
        yield from _state(self._models, self._intake)
        yield from _process(turned_away)


def quality_of(processes: Collection[Counted]) -> dict[str, Any]:
    """Service quality since the start, of all that these processes counted:
    ``{"seconds", "processes", "total", "models": [...], "turned_away"}``.

    ``seconds`` is of the oldest of the ``processes``. ``total`` and each model have ``requests``, ``answered``,
    ``availability`` (0 to 1, None before a request counts), ``mean_ms``, ``p50_ms``, ``p90_ms``, ``p99_ms`` and
    ``max_ms`` of what was answered; a model has ``reasons`` too: for each of them its ``status``, ``requests`` and the
    same times.
    """
    keys = sorted({key for each in processes for key in each.tallies})
    tallies = {key: _sum(each.tallies[key] for each in processes if key in each.tallies) for key in keys}
    names = dict.fromkeys([*(name for each in processes for name in each.served), *(key[:2] for key in keys)])
    return {
        "seconds": round(max((each.seconds for each in processes), default=0.0), 3),
        "processes": len(processes),
        "total": _quality(tallies),
        "models": [
            {"model": model, "version": version, **_quality(part), "reasons": _reasons(part)}
            for model, version in names
            for part in [{key: tally for key, tally in tallies.items() if key[:2] == (model, version)}]
        ],
        "turned_away": sum(each.turned_away for each in processes),
    }


def exposition_of(processes: Mapping[str, Counted]) -> tuple[bytes, str]:
    """The text that Prometheus scrapes, and its content type.

    Args:
        processes: by name. Each series says by the label ``replica`` whose it is, unless the name is empty. They are
            not summed: a sum from which one process has gone would look like one that began again at zero.
    """
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(processes))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Families:
    """The face that prometheus_client asks for."""

    def __init__(self, processes: Mapping[str, Counted]) -> None:
        self._processes = processes

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import Metric

        joined: dict[str, Metric] = {}
        for name, counted in self._processes.items():
            label = {"replica": name} if name else {}
            for each in counted.families:
                family = joined.setdefault(each.name, Metric(each.name, each.documentation, each.type))
                family.samples += [sample._replace(labels={**sample.labels, **label}) for sample in each.samples]
        return joined.values()


def shown(quality: dict[str, Any]) -> str:
    """``Metrics.quality`` in words, one line a model and reason."""
    total = quality["total"]
    if not total["requests"]:
        return f"no request in {quality['seconds']:.0f} s"
    lines = [f"in {quality['seconds']:.0f} s: {_in_words(total)}"]
    for model in quality["models"]:
        if model["model"] and model["requests"]:
            lines.append(f"  {model['model']} version {model['version']}: {_in_words(model)}")
        for row in model["reasons"]:
            if row["reason"] != "ok":
                where = "" if model["model"] else "no model: "
                lines.append(f"    {where}{row['reason']} ({row['status']}): {row['requests']}")
    if quality["turned_away"]:
        lines.append(f"  turned away before they were requests: {quality['turned_away']}")
    return "\n".join(lines)


def _in_words(row: dict[str, Any]) -> str:
    text = f"{row['answered']} of {row['requests']} requests answered"
    if row["availability"] is not None:
        text += f", availability {100 * row['availability']:.2f} %"
    if row["mean_ms"] is not None:
        text += f", mean {row['mean_ms']:.1f} ms, p50 {row['p50_ms']:.1f}, p99 {row['p99_ms']:.1f}"
    return text


def _sum(tallies: Iterable[_Tally]) -> _Tally:
    total = _Tally()
    for tally in tallies:
        total.merge(tally)
    return total


def _quality(tallies: dict[Key, _Tally]) -> dict[str, Any]:
    answered = _sum(tally for (_, _, status, _), tally in tallies.items() if status == 200)
    due = sum(tally.count for (_, _, status, _), tally in tallies.items() if status not in CALLER_STATUSES)
    return {
        "requests": sum(tally.count for tally in tallies.values()),
        "answered": answered.count,
        "availability": round(answered.count / due, 6) if due else None,
        **answered.told(),
    }


def _reasons(tallies: dict[Key, _Tally]) -> list[dict[str, Any]]:
    return [
        {"reason": reason, "status": status, "requests": tally.count, **tally.told()}
        for (_, _, status, reason), tally in tallies.items()
    ]


def _requests(tallies: dict[Key, _Tally]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

    labels = ("model", "version", "status", "reason")
    count = CounterMetricFamily(
        "outrider_requests", "Requests for an inference, by what became of them.", labels=labels
    )
    times = HistogramMetricFamily("outrider_request_seconds", "From a request's head to its reply.", labels=labels)
    for (model, version, status, reason), tally in sorted(tallies.items()):
        values = (model, version, str(status), reason)
        count.add_metric(values, tally.count)
        times.add_metric(values, _cumulated(tally), tally.sum_ms / 1e3)
    yield count
    yield times


def _cumulated(tally: _Tally) -> list[tuple[str, float]]:
    """Buckets that double: each eighth of ours."""
    rows: list[tuple[str, float]] = []
    for doubling in range(DOUBLINGS + 1):
        end = doubling * PER_DOUBLING
        rows.append((repr(round(FIRST_MS * 2**doubling / 1e3, 7)), float(sum(tally.buckets[: end + 1]))))
    return [*rows, ("+Inf", float(tally.count))]


def _state(models: Models, intake: Intake) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    labels = ("model", "version")
    inside = GaugeMetricFamily("outrider_requests_inflight", "Requests between head and reply.", labels=["model"])
    queued = GaugeMetricFamily("outrider_queue_depth", "Requests that wait for the model or run.", labels=["model"])
    ready = GaugeMetricFamily("outrider_model_ready", "Whether the model can answer.", labels=labels)
    serving = GaugeMetricFamily(
        "outrider_model_info",
        "What answers now; the value is always 1.",
        labels=(*labels, "bundle", "variant", "engine"),
    )
    for name in models.names():
        inside.add_metric([name], intake.inside(name))
        queued.add_metric([name], intake.queued(name))
    for each in models:
        where = (each.name, str(each.version))
        ready.add_metric(where, each.ready)
        serving.add_metric((*where, each.bundle, each.variant, each.engine), 1)
    stopping = GaugeMetricFamily("outrider_stopping", "Whether nothing new is taken.", value=intake.stopping)
    held = GaugeMetricFamily("outrider_body_bytes", "Bytes of bodies, from arrival to reply.", value=intake.held_bytes)
    return iter((inside, queued, ready, serving, stopping, held))


def _process(turned_away: dict[int, int]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    away = CounterMetricFamily(
        "outrider_turned_away", "Requests whose head or framing broke a bound, by status.", labels=["status"]
    )
    for status, count in sorted(turned_away.items()):
        away.add_metric([str(status)], count)
    build = GaugeMetricFamily("outrider_build_info", "The value is always 1.", labels=["version", "python", "machine"])
    build.add_metric([__version__, platform.python_version(), platform.machine()], 1)
    return iter((away, build))
