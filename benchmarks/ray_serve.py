"""Our application under Ray Serve beside a plain handler of Ray's over the same file, by both of Ray's proxies.

The promise: at least 0.9 of the plain handler's rate, by the proxy that Ray starts with; what its HAProxy gives is
printed. Neither replica logs its requests, as Ray's do by default: that takes as long as all that ours does more. Ray
runs in a namespace with no network but loopback, as it listens on every address; that needs root.

``python -m benchmarks.ray_serve BUNDLE STATE`` is the inside of it: it starts Ray, measures, prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import outrider
from benchmarks.endpoint import CLIENTS, SMALL_SIZES, TWIN, Contender, compared, contender, dense, example, interleaved
from benchmarks.load import Loaded, run_load
from benchmarks.measure import say
from benchmarks.promise import at_least

MODES = {"Ray's proxy": {}, "HAProxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1"}}
STARTS_AND_RUNS_WITHIN_S = 240.0
SETTLES_WITHIN = 20  # loads of a second
SETUP = 'ip link set lo up && mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && exec "$@"'
ISOLATED = ("unshare", "--net", "--pid", "--fork", "--mount-proc", "sh", "-c", SETUP, "sh")
PLAIN = "a plain handler, JSON"


def run(folder: Path) -> dict[str, Any]:
    """Measure. Returns what is stored as ``results/ray_serve.json``."""
    bundle = dense("small", SMALL_SIZES, folder)
    state = folder / "state"
    outrider.install(bundle, state=state)
    modes = {}
    for name, variables in MODES.items():
        say(f"ray_serve: {name}")
        loads = _inside(bundle, state, variables)
        modes[name] = compared(loads, base=PLAIN, twin=(TWIN, "ours, JSON"))
        rates = ", ".join(f"{which} {rate:.0f}/s" for which, rate in modes[name]["rate_per_s"].items())
        say(f"ray_serve: {name}: {rates}")
    ratio = modes["Ray's proxy"]["ratios"]["ours, JSON"]["value"]
    return {"modes": modes, "promises": [at_least("JSON over a plain handler's, under Ray", ratio, 0.9)]}


def _inside(bundle: Path, state: Path, variables: dict[str, str]) -> dict[str, list[Loaded]]:
    with tempfile.TemporaryFile() as errors:
        done = subprocess.run(
            [*ISOLATED, sys.executable, "-m", "benchmarks.ray_serve", str(bundle), str(state)],
            env={**os.environ, **variables, "HOME": str(state.parent)},  # Ray keeps its token there
            stdout=subprocess.PIPE,
            stderr=errors,
            timeout=STARTS_AND_RUNS_WITHIN_S,
            check=False,
        )
        if done.returncode != 0:
            errors.seek(0)
            raise RuntimeError(errors.read().decode(errors="replace")[-3000:])
    told = json.loads(done.stdout.splitlines()[-1])
    return {name: [Loaded(**each) for each in rows] for name, rows in told.items()}


class Plain:
    """What one writes by hand: JSON in, the session, JSON out, and no check of anything."""

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    async def __call__(self, request: Any) -> Any:
        """One request, as Ray gives it: Starlette's."""
        from starlette.responses import JSONResponse

        asked = await request.json()
        (tensor,) = asked["inputs"]
        x = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
        (y,) = self._session.run(None, {tensor["name"]: x})
        output = {"name": "y", "datatype": "FP32", "shape": list(y.shape), "data": y.ravel().tolist()}
        return JSONResponse({"model_name": "small", "id": asked.get("id", ""), "outputs": [output]})


def main(bundle: str, state: str) -> None:
    """Start both deployments, one replica each, and measure them against each other."""
    from ray import serve

    from outrider.endpoint.listening import Listening
    from outrider.endpoint.ray_serve import QUIET, Offer, Replicas, cluster, deployment

    port = 8123  # this network is ours alone
    report = outrider.install(bundle, state=state)
    offer = Offer(paths=(bundle,), state=state, trust=None, token=None, queue=64)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(cluster(Replicas(most=2), Listening(), port))  # a processor for each of the two
        plain = serve.deployment(max_ongoing_requests=1000, logging_config=QUIET)(Plain)
        onnx = str(Path(bundle).with_suffix(".onnx"))
        serve.run(plain.bind(onnx, report.choice.threads), name="plain", route_prefix="/plain")
        serve.run(deployment(Replicas(), 5.0).bind(offer), name="ours", route_prefix="/ours")
        x = example((SMALL_SIZES[0],))
        ours = contender(port, "small", x, binary=False, prefix="/ours")
        by_hand = contender(port, "small", x, binary=False, prefix="/plain")
        for each in (ours, by_hand):
            _settle(each)
        loads = interleaved({"ours, JSON": ours, TWIN: ours, PLAIN: by_hand})
        told = json.dumps({name: [asdict(load) for load in found] for name, found in loads.items()})
        print(told, file=sys.__stdout__, flush=True)
        os._exit(0)  # the kernel ends the rest of this namespace: HAProxy's own end may take half a minute


def _settle(each: Contender) -> None:
    """Send until no connection is closed: HAProxy closes some while it takes over what was just deployed."""
    for left in reversed(range(SETTLES_WITHIN)):
        try:
            run_load(each.port, each.request, clients=CLIENTS, seconds=1.0, warm_up_s=0.0, check=each.check)
            return
        except (RuntimeError, OSError):
            if not left:
                raise


if __name__ == "__main__":
    main(*sys.argv[1:])
