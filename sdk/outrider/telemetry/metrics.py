"""What happened in an interval, as one record: counts, and histograms that merge by adding (docs/telemetry.md)."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from outrider.telemetry.record import holdable
from outrider.telemetry.vitals import BUCKETS_PER_OCTAVE, MAX_BUCKET, MIN_BUCKET, availability
from outrider_runtimes.heat import Heat
from outrider_runtimes.scores import Score, softmax
from outrider_runtimes.tensors import Interface, TensorSpec

MAX_COUNTS: Final = 64
MAX_FAILURES: Final = 32
MAX_CLASSES: Final = 20
CONFIDENCE_BUCKETS: Final = 20
# Of the judged output of one answer; a network with more classes is not judged, so that a queue stays small.
MAX_JUDGED_BYTES: Final = 4096
_OTHER: Final = "other"
# A class is counted by its number: what a label takes is bounded when it is written. So are the other names, which a
# source may make up: a record has to hold them all.
_MAX_LABEL: Final = 64
# Thirty years: a source that says more says nothing, and sums of such numbers overflow.
_LONGEST_MS: Final = 1e12


def latency_bucket(ms: float) -> int:
    """The k of 2^(k/8) <= ms < 2^((k+1)/8).

    >>> latency_bucket(1.0), latency_bucket(2.0), latency_bucket(0.0), latency_bucket(1e300)
    (0, 8, -80, 191)
    """
    if not ms > 0.0:
        return MIN_BUCKET
    return int(min(MAX_BUCKET, max(MIN_BUCKET, BUCKETS_PER_OCTAVE * math.log2(ms) // 1)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """The output whose classes are counted, and what they are called.

    Attributes:
        output: its name; float [N, classes].
    """

    output: str
    dtype: np.dtype[Any]
    classes: int
    labels: tuple[str, ...]

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.classes * self.dtype.itemsize

    def read(self, data: bytes) -> tuple[float, list[int]]:
        """The probability of the first class of the least sure row, and the first class of each row.

        Args:
            data: the output's bytes; values from 0 to 1 that sum to 1 are probabilities, others logits.

        Returns:
            Not a number and no classes where a value is not finite, or there are no whole rows.
        """
        if len(data) % self.row_bytes:
            return math.nan, []
        rows = np.frombuffer(data, self.dtype).reshape(-1, self.classes).astype(np.float64)
        if not rows.size or not np.isfinite(rows).all():
            return math.nan, []
        classes = [int(number) for number in rows.argmax(axis=1)]
        if rows.min() < 0.0 or not np.allclose(rows.sum(axis=1), 1.0, atol=1e-3):
            rows = softmax(rows)
        return float(rows.max(axis=1).min()), classes

    def label(self, number: int) -> str:
        """What a class is called."""
        return self.labels[number][:_MAX_LABEL] if number < len(self.labels) else str(number)


def judged_of(interface: object, score: object) -> Judged | None:
    """What to count of the answers at an interface: what its offload rule judges, else its only output."""
    if not isinstance(interface, Interface):
        return None
    spec: TensorSpec | None = interface.outputs[0] if len(interface.outputs) == 1 else None
    if isinstance(score, Score) and score.kind != "detection":
        spec = next((each for each in interface.outputs if each.name == score.output), None)
    if spec is None or not spec.dtype.startswith("float") or len(spec.shape) != 2 or (spec.shape[1] or 0) < 2:
        return None
    classes = spec.shape[1] or 0
    labels = tuple(interface.labels) if len(interface.labels) == classes else ()
    return Judged(output=spec.name, dtype=np.dtype(spec.dtype), classes=classes, labels=labels)


@dataclass(kw_only=True, slots=True, eq=False)
class Tally:
    """An interval that is being counted."""

    began_s: float
    predictions: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    latency: Counter[int] = field(default_factory=Counter)
    latency_sum_ms: float = 0.0
    latency_max_ms: float = 0.0
    confidence: Counter[int] = field(default_factory=Counter)
    confidence_sum: float = 0.0
    classes: Counter[str] = field(default_factory=Counter)

    @property
    def empty(self) -> bool:
        """Whether nothing was counted."""
        return not (self.predictions or self.failures or self.refused)

    def predicted(self, source: str, reason: str, variant: str, total_ms: float) -> None:
        """One answer. Raises ValueError for a wait that is none: it would be in every sum from then on."""
        if not 0.0 <= total_ms <= _LONGEST_MS:
            raise ValueError(f"a prediction that took {total_ms} ms")
        self.predictions[source[:_MAX_LABEL], reason[:_MAX_LABEL], variant[:_MAX_LABEL]] += 1
        self.latency[latency_bucket(total_ms)] += 1
        self.latency_sum_ms += total_ms
        self.latency_max_ms = max(self.latency_max_ms, total_ms)

    def judge(self, judged: Judged, data: bytes) -> None:
        """What an answer said."""
        confidence, classes = judged.read(data)
        if math.isnan(confidence):
            return
        self.confidence[min(CONFIDENCE_BUCKETS - 1, max(0, int(confidence * CONFIDENCE_BUCKETS)))] += 1
        self.confidence_sum += confidence
        for number in classes:
            self.classes[judged.label(number)] += 1

    def failed(self, error: str, *, refused: bool = False) -> None:
        """One request that got no answer; ``refused``: for what its caller did."""
        counts, error = self.refused if refused else self.failures, _text(error)
        known = error in counts or len(counts) < MAX_FAILURES
        counts[error if known else _OTHER] += 1

    def body(self, now_s: float, *, heat: Heat, memory_rss_bytes: int | None, drift: float | None) -> dict[str, Any]:
        """The record's body."""
        counts = self.predictions.most_common(MAX_COUNTS)
        total = sum(self.predictions.values())
        offloaded = sum(count for (source, _, _), count in self.predictions.items() if source == "cloud")
        top = self.classes.most_common(MAX_CLASSES)
        return {
            "interval_s": round(max(0.0, now_s - self.began_s), 3),
            "predictions": total,
            "counts": [
                {"source": source, "reason": _text(reason), "variant": _text(variant), "count": count}
                for (source, reason, variant), count in counts
            ],
            "counts_other": total - sum(count for _, count in counts),
            "failures": dict(self.failures),
            "refused": dict(self.refused),
            "availability": availability(total, sum(self.failures.values())),
            "offload_share": round(offloaded / total, 4) if total else None,
            "latency_ms": _histogram(self.latency, self.latency_sum_ms) | {"max": round(self.latency_max_ms, 3)},
            "confidence": _histogram(self.confidence, self.confidence_sum),
            "classes": {
                "top": [[_text(label), count] for label, count in top],
                "other": sum(self.classes.values()) - sum(count for _, count in top),
            },
            "temperature_c": _finite(heat.celsius),
            "throttled": heat.throttled,
            "memory_rss_bytes": memory_rss_bytes,
            "drift": _finite(drift),
        }


def memory_rss_bytes(root: Path = Path("/")) -> int | None:
    """What this process has in memory now; None where nothing says so."""
    try:
        pages = int((root / "proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _text(name: str) -> str:
    return holdable(name[:_MAX_LABEL])


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _histogram(buckets: Mapping[int, int], total: float) -> dict[str, Any]:
    return {
        "count": sum(buckets.values()),
        "sum": round(total, 3),
        "buckets": [[k, buckets[k]] for k in sorted(buckets)],
    }
