"""What the trials of telemetry share."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outrider.telemetry import Limits, Reporter
from support.mutants import write_results

QUICK = Limits(receipt_timeout_s=1.0)


class Impatient(random.Random):
    """Draws the shortest wait before a reconnect."""

    def uniform(self, a: float, b: float) -> float:
        return min(a, b)


def open_reporter(url: str, tmp_path: Path, **changes: Any) -> Reporter:
    options: dict[str, Any] = {
        "device": "pi-07",
        "state": tmp_path / "state",
        "commit_interval_ms": 50.0,
        "limits": QUICK,
        "metrics_interval_s": None,
        "rng": Impatient(1),
    }
    return Reporter(url, **(options | changes))


def record_trial(name: str, count: Callable[[], dict[str, Any]]) -> None:
    """Run the full count and keep what it found."""
    begun = time.monotonic()
    found = count()
    write_results(f"telemetry-{name}", {**found, "taken_s": round(time.monotonic() - begun, 1)})
