"""Our client beside urllib3 and ``tritonclient`` against one endpoint in a process of its own, a request at a time.

urllib3 is given the least to do that gets an answer: a body made beforehand, and the reply's bytes as they come. Ours
and ``tritonclient`` make the request of an array and give the outputs as arrays; ours also holds a deadline over every
byte and checks inputs and reply. The promise, over HTTP: the median of ``Remote.infer`` at most 1.0 of either's.
``Remote.submit``, which hands the request to a thread so that no caller waits in a socket, is shown beside it; so is
gRPC, where there is no urllib3.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
import urllib3

from benchmarks.handmade import Network, write_handmade
from benchmarks.measure import Call, compare_calls, say
from benchmarks.promise import at_most
from benchmarks.stats import Times, ratio
from outrider_runtimes import oip
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.remote import Remote
from outrider_runtimes.runner import wait
from outrider_runtimes.tensors import Array

BLOCKS = 30
CALLS_A_BLOCK = 60
DEADLINE_MS = 5_000.0
ASKED_RATIO = 1.0
OURS, HANDED, TRITON, RAW = "Remote.infer", "Remote.submit", "tritonclient", "urllib3, bytes alone"
SMALL, LARGE = 64, 3 * 224 * 224  # float32 numbers of the input
PEERS = ("urllib3", "tritonclient", "geventhttpclient", "grpcio")
STOPS_WITHIN_S = 30.0


def run(folder: Path) -> dict[str, Any]:
    """Measure. Returns what is stored as ``results/client.json``."""
    cases: dict[str, dict[str, Any]] = {}
    for width in (SMALL, LARGE):
        network = Network(name=f"slice-{width}", width=width)
        bundle = write_handmade(network, folder, formats=("onnx",))
        x = network.input()
        with _endpoint(bundle, folder / "state") as (http, grpc):
            for binary in (True, False) if width == SMALL else (True,):
                name = f"{'binary' if binary else 'JSON'}, {x.nbytes} bytes"
                cases[name] = _case(name, _http_calls(http, network.name, x, binary=binary), base=RAW)
            name = f"gRPC, {x.nbytes} bytes"
            cases[name] = _case(name, _grpc_calls(grpc, network.name, x), base=TRITON)
    return {
        "blocks": BLOCKS,
        "calls_a_block": CALLS_A_BLOCK,
        "peers": {name: metadata.version(name) for name in PEERS},
        "cases": cases,
        "promises": [line for case in cases.values() for line in case["promises"]],
    }


def _case(name: str, opened: contextlib.AbstractContextManager[dict[str, Call]], *, base: str) -> dict[str, Any]:
    say(f"client: {name}")
    with opened as calls:
        _check_alike(calls)
        found, times = compare_calls(calls, base=base, blocks=BLOCKS, calls_a_block=CALLS_A_BLOCK)
    return {**found.to_dict(), "promises": promises(name, times, valid=found.valid) if base == RAW else []}


def promises(name: str, times: dict[str, Times], *, valid: bool) -> list[dict[str, Any]]:
    """Ours over each peer, by times that are float64 [blocks, calls]."""
    rng = np.random.default_rng(3)
    lines = []
    for peer in (RAW, TRITON):
        found = ratio(times[OURS], times[peer], rng)
        note = f"{found.low:.2f} to {found.high:.2f}" + ("" if valid else "; the machine was too noisy")
        lines.append(at_most(f"{name}: {OURS} over {peer}", found.value, ASKED_RATIO, note=note))
    return lines


@contextlib.contextmanager
def _http_calls(url: str, model: str, x: Array, *, binary: bool) -> Iterator[dict[str, Call]]:
    message = oip.encode_request({"x": x}, id="1", binary=binary)
    body, headers = message.body, message.headers
    target = f"{url}/v2/models/{model}/infer"
    with (
        _remote(url, model, binary=binary) as remote,
        urllib3.PoolManager() as pool,
        tritonclient.http.InferenceServerClient(url.removeprefix("http://")) as triton,
    ):
        wanted = [tritonclient.http.InferRequestedOutput("y", binary_data=binary)]

        def by_triton() -> Array:
            given = tritonclient.http.InferInput("x", x.shape, "FP32")
            given.set_data_from_numpy(x, binary_data=binary)
            return np.asarray(triton.infer(model, [given], outputs=wanted).as_numpy("y"))

        def by_urllib3() -> bytes:
            reply = pool.request("POST", target, body=body, headers=headers)
            if reply.status != 200:
                raise RuntimeError(f"status {reply.status}")
            return reply.data

        yield {RAW: by_urllib3, TRITON: by_triton, **_ours(remote, x)}


@contextlib.contextmanager
def _grpc_calls(url: str, model: str, x: Array) -> Iterator[dict[str, Call]]:
    with (
        _remote(url, model, binary=True) as remote,
        tritonclient.grpc.InferenceServerClient(url.removeprefix("grpc://")) as triton,
    ):

        def by_triton() -> Array:
            given = tritonclient.grpc.InferInput("x", x.shape, "FP32")
            given.set_data_from_numpy(x)
            reply = triton.infer(model, [given], client_timeout=DEADLINE_MS / 1e3)
            return np.asarray(reply.as_numpy("y"))

        yield {TRITON: by_triton, **_ours(remote, x)}


def _remote(url: str, model: str, *, binary: bool) -> Remote:
    remote = Remote(url, model=model, max_reply_bytes=64 << 20)
    remote.connect(Deadline.after_ms(DEADLINE_MS))
    if not binary:
        # As if the endpoint had not named the extension, so that one endpoint serves both cases.
        known = remote._known()
        remote._served = replace(known, described=replace(known.described, binary=False))
    return remote


def _ours(remote: Remote, x: Array) -> dict[str, Call]:
    def handed() -> Array:
        deadline = Deadline.after_ms(DEADLINE_MS)
        return wait(remote.submit({"x": x}, deadline), deadline).outputs["y"]

    return {OURS: lambda: remote.infer({"x": x}, deadline_ms=DEADLINE_MS).outputs["y"], HANDED: handed}


def _check_alike(calls: dict[str, Call]) -> None:
    answers = [answer for answer in (call() for call in calls.values()) if isinstance(answer, np.ndarray)]
    for answer in answers:
        if not np.array_equal(answer, answers[0]):
            raise RuntimeError("the clients do not give one answer")


@contextlib.contextmanager
def _endpoint(bundle: Path, state: Path) -> Iterator[tuple[str, str]]:
    """``outrider serve`` over one bundle; gives its two URLs."""
    command = [sys.executable, "-m", "outrider.cli", "serve", str(bundle), "--state", str(state)]
    process = subprocess.Popen([*command, "--port", "0", "--grpc-port", "0"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        urls: list[str] = []
        for line in process.stderr:
            urls += re.findall(r" on (\w+://127\.0\.0\.1:\d+)", line)
            if len(urls) == 2:
                break
        else:
            raise RuntimeError("the endpoint ended before it served")
        yield urls[0], urls[1]
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOPS_WITHIN_S)
        process.kill()
        process.wait()
        process.stderr.close()
