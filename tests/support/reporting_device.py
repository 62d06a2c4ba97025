"""A device that reports until it is killed. Arguments: broker url, state directory, device id."""

from __future__ import annotations

import sys

from outrider.telemetry import Reporter
from support.telemetry import Source


def main() -> None:
    url, state, device = sys.argv[1:]
    source = Source()
    with Reporter(url, device=device, state=state, commit_interval_ms=5.0) as reporter:
        reporter.watch(source)
        while True:
            source.predict(50)
            committed = reporter.flush(200.0)
            account = reporter.account()
            print("done", int(committed), account.enqueued, account.delivered, flush=True)


main()
