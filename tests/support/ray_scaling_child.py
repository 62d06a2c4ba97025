"""An autoscaling deployment whose load comes and goes, in the namespaces of ``ray_child.isolated``.

    python -m support.ray_scaling_child BUNDLE STATE

Before it, one whose bundle the replicas do not find. The deployment is that of `outrider serve --on ray --replicas
1-2`, but for Ray's delays, which are as short as it takes them. What it saw is printed as a line of JSON.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from outrider.endpoint.listening import Listening
from outrider.endpoint.ray_serve import NAME, Offer, Replicas, cluster, deployment
from outrider_runtimes import oip
from outrider_runtimes.errors import RunnerError
from support.ray_child import TIMEOUT_S, replicas
from support.realbundles import images

PORT = 8123  # this network is ours alone
MANY = 8  # clients at once: Ray wants a replica for each two requests that it has
AFTER = 50  # requests, when the second replica is gone
WAIT_S = 200.0
QUICK = {"upscale_delay_s": 0.0, "downscale_delay_s": 0.0, "metrics_interval_s": 0.2, "look_back_period_s": 1.0}
PUSHED = {
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
}


class Clients:
    """So many, each of which sends its next request when it has its reply, until the block ends."""

    def __init__(self, count: int, statuses: list[int]) -> None:
        self._statuses = statuses
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * TIMEOUT_S)

    def _work(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=TIMEOUT_S)
        message = oip.encode_request({"image": images(1)}, id="1", timeout_us=int(TIMEOUT_S * 1e6))
        while not self._stop.is_set():
            status = 0
            try:
                connection.request("POST", "/v2/models/tiny/infer", message.body, message.headers)
                reply = connection.getresponse()
                reply.read()
                status = reply.status
            except (OSError, http.client.HTTPException):
                connection.close()
            self._statuses.append(status)
        connection.close()


def states() -> dict[str, int]:
    """How many replicas Ray says there are, by their state."""
    from ray import serve

    (found,) = serve.status().applications[NAME].deployments.values()
    return dict(found.replica_states)


def wait_until(done: Callable[[], bool], what: str) -> None:
    ends_s = time.monotonic() + WAIT_S
    while not done():
        if time.monotonic() > ends_s:
            raise SystemExit(f"not within {WAIT_S:.0f} s: {what}; there are {states()}")
        time.sleep(0.05)


def quality() -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=TIMEOUT_S)
    connection.request("GET", "/v2/quality")
    told: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return told


def main(bundle: str, state: str) -> None:
    os.environ.update(PUSHED)
    offer = Offer(paths=(bundle,), state=state, trust=None, token=None, queue=64)
    replicas_of = Replicas(least=1, most=2)
    busy: list[int] = []
    quiet: list[int] = []
    told: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr), cluster(replicas_of, Listening(), PORT) as run:
        from ray import serve

        try:
            run(replace(offer, paths=("/nowhere.outrider",)))
        except RunnerError as error:
            told["refused"] = f"{error}; {error.hint}"
        made = deployment(replicas_of, Listening().drain_s)
        quick = made.options(autoscaling_config={"min_replicas": 1, "max_replicas": 2, **QUICK})
        serve.run(quick.bind(offer), name=NAME, route_prefix="/")
        told["at_first"] = (states(), len(replicas()))
        with Clients(MANY, busy):
            wait_until(lambda: states() == {"RUNNING": 2}, "a second replica under load")
            told["under_load"] = (states(), len(replicas()))
            wait_until(lambda: quality()["processes"] == 2, "both replicas in one answer of /v2/quality")
        with Clients(1, quiet):
            wait_until(lambda: states() == {"RUNNING": 1}, "one replica without the load")
            told["at_last"] = (states(), len(replicas()))
            so_far = len(quiet)
            wait_until(lambda: len(quiet) >= so_far + AFTER, "answers from the one that stayed")
        told["processes"] = quality()["processes"]
    print(json.dumps({**told, "busy": busy, "quiet": quiet, "left": len(replicas())}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
