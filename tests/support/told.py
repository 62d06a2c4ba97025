"""A program whose reporter tells its metrics several times a second until it is killed: URL, state, device."""

from __future__ import annotations

import sys
import threading

from outrider.telemetry import Reporter
from support.telemetry import Source

if __name__ == "__main__":
    url, state, device = sys.argv[1:]
    source = Source()
    with Reporter(url, device=device, state=state, commit_interval_ms=50.0, metrics_interval_s=0.1) as reporter:
        reporter.watch(source)
        while True:
            source.predict(10, start=1)
            threading.Event().wait(0.1)
