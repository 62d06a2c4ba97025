"""How late calls with a deadline of 50 ms are when the network, the server, the names or the board's worker misbehave.

The promises: ``Hybrid.infer`` at most 5 ms late at p99 under every fault, a policy decision under 1 us. urllib3 with
``Timeout(total=0.05)`` meets the same faults, which here end after some seconds: it would wait as long as they last.
Between the faults a bare wait of the same length says how late the machine itself is; where that is late at p99 by more
than ``NOISE_MS``, the run is invalid.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import urllib3

import outrider
from benchmarks.faults import FAULTS, GOOD, model_of
from benchmarks.handmade import Network, write_handmade
from benchmarks.measure import say
from benchmarks.promise import at_most
from outrider.policy import Policy, State, Strain, review, route
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import OutriderError
from outrider_runtimes.runner import Answer, wait
from outrider_runtimes.tensors import Array, Interface, Tensors
from outrider_runtimes.worker import Worker

DEADLINE_MS = 50.0
CALLS = 100
PEER_CALLS = 2
LASTS_S = 4.0  # a fault; the peer waits it out
ALLOWED_MS = 5.0
ALLOWED_DECISION_US = 1.0
NOISE_MS = 2.0
WAITS_A_FAULT = 15
NETWORK = Network(name="overshoot", width=64)
HUNG = "hung.invalid"
HUNG_NAMES, SLOW_TLS, STUCK = "hung DNS", "slow TLS", "stuck worker"
# Every call meets the fault: the circuit stays closed, and a round trip is forgotten at once.
ALWAYS = Policy(
    DEADLINE_MS, min_margin=1.0, failures_in_a_row=10**6, window=1024, open_s=1e-6, open_max_s=1e-6,
)  # fmt: skip


def run(folder: Path) -> dict[str, Any]:
    """Measure. Returns what is stored as ``results/overshoot.json``."""
    bundle = write_handmade(NETWORK, folder, formats=("onnx",))
    with (
        outrider.load(bundle, threads=1, state=folder / "state") as model,
        _endpoint(model.interface) as ports,
        _hung_names(),
    ):
        found, waits = {}, []
        for fault, url, name in _subjects(ports):
            say(f"overshoot: {fault}")
            found[fault] = _under(url, name, model)
            waits.append(_late_ms(_bare_wait, WAITS_A_FAULT))
        say("overshoot: stuck worker")
        found |= _stuck_workers(ports, model)
        own_ms = _on_a_good_day(ports, model)
    machine = _figures(np.concatenate(waits))
    say("overshoot: a policy decision")
    decision_ns = _decision_ns()
    return {
        "deadline_ms": DEADLINE_MS,
        "calls": CALLS,
        "fault_lasts_s": LASTS_S,
        "peer": f"urllib3 {version('urllib3')}, Timeout(total={DEADLINE_MS / 1000}), {PEER_CALLS} calls",
        "faults": found,
        "machine": machine,
        "valid": machine["p99_ms"] <= NOISE_MS,
        "no_fault_ms": own_ms,
        "decision_ns": decision_ns,
        "promises": promises(found, decision_ns),
    }


def promises(found: dict[str, Any], decision_ns: dict[str, float]) -> list[dict[str, Any]]:
    """What was promised beside what was measured."""
    worst = max(found, key=lambda fault: found[fault]["Hybrid.infer"]["p99_ms"])
    late_ms = found[worst]["Hybrid.infer"]["p99_ms"]
    return [
        at_most("Hybrid.infer is late at p99 by, ms", late_ms, ALLOWED_MS, note=f"the worst fault: {worst}"),
        at_most("a policy decision takes at p50, us", max(decision_ns.values()) / 1e3, ALLOWED_DECISION_US),
    ]


def section(result: Mapping[str, Any]) -> str:
    """The README's section of the results, as Markdown."""
    noise = "" if result["valid"] else " **INVALID**: the machine was too noisy."
    lines = [
        f"How late a call with a deadline of {result['deadline_ms']:g} ms is under each fault, p50 / p99 of "
        f"{result['calls']} calls, ms; below 0 is early. Beside it {result['peer']}; a fault lasts "
        f"{result['fault_lasts_s']:g} s here.{noise}",
        "",
        "| fault | `Hybrid.infer` | `Remote` alone | urllib3 |",
        "|---|---:|---:|---:|",
    ]
    for fault, found in result["faults"].items():
        cells = [_cell(found.get(who)) for who in ("Hybrid.infer", "Remote", "urllib3")]
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    slowest_us = max(result["decision_ns"].values()) / 1e3
    threads = max(found["threads"] for found in result["faults"].values())
    machine = result["machine"]
    lines += [
        "",
        f"A bare wait of the same length is {machine['p50_ms']:.1f} / {machine['p99_ms']:.1f} ms late on this machine. "
        f"The calls left {threads} threads at most. A policy decision takes {slowest_us:.2f} us.",
    ]
    lines += [
        f"- missed: {line['promise']}: {line['measured']:.2f}, at most {line['asked']:g} was asked ({line['note']})"
        for line in result["promises"]
        if not line["met"]
    ]
    return "\n".join(lines)


def _cell(late: Mapping[str, float] | None) -> str:
    return "" if late is None else f"{late['p50_ms']:.1f} / {late['p99_ms']:.1f}"


def _subjects(ports: dict[str, int]) -> Iterator[tuple[str, str, str]]:
    for fault in FAULTS:
        yield fault, f"http://127.0.0.1:{ports['port']}", model_of(fault)
    yield SLOW_TLS, f"https://localhost:{ports['tls_port']}", GOOD
    yield HUNG_NAMES, f"http://{HUNG}:{ports['port']}", GOOD


def _under(url: str, name: str, model: outrider.Model) -> dict[str, Any]:
    x = {"x": NETWORK.input()}
    with outrider.Remote(url, model=name) as remote:
        hybrid = outrider.Hybrid(model, remote, ALWAYS)
        before = threading.active_count()
        ours = _late_ms(partial(hybrid.infer, x))
        alone = _late_ms(partial(_ask, remote, x))
        threads = threading.active_count() - before
        hybrid.close()
    peer = _late_ms(partial(_peer, f"{url}/v2/models/{name}/infer"), PEER_CALLS)
    return {"Hybrid.infer": _figures(ours), "Remote": _figures(alone), "urllib3": _figures(peer), "threads": threads}


def _stuck_workers(ports: dict[str, int], model: outrider.Model) -> dict[str, Any]:
    """An engine that does not come back, beside a cloud that answers and one that is a black hole."""
    x, found = {"x": NETWORK.input()}, {}
    for name in (GOOD, "black hole"):
        stuck = _Stuck(model.interface)
        worker = Worker(stuck)
        with outrider.Remote(f"http://127.0.0.1:{ports['port']}", model=model_of(name)) as remote:
            hybrid = outrider.Hybrid(worker, remote, ALWAYS)
            before = threading.active_count()
            late = _late_ms(partial(hybrid.infer, x))
            threads = threading.active_count() - before
            hybrid.close()
        stuck.let_go.set()
        worker.close()
        title = STUCK if name == GOOD else f"{STUCK} and {name}"
        found[title] = {"Hybrid.infer": _figures(late), "threads": threads}
    return found


def _on_a_good_day(ports: dict[str, int], model: outrider.Model) -> dict[str, float]:
    """What the same call takes without a fault, with the cloud's answer."""
    x = {"x": NETWORK.input()}
    with outrider.Remote(f"http://127.0.0.1:{ports['port']}", model=GOOD) as remote:
        hybrid = outrider.Hybrid(model, remote, Policy(10_000.0, min_margin=1.0))
        taken = np.array([hybrid.infer(x).timing_ms.total for _ in range(CALLS)])
        hybrid.close()
    return {"p50_ms": float(np.percentile(taken, 50)), "p99_ms": float(np.percentile(taken, 99))}


class _Stuck:
    """An engine whose calls do not come back until ``let_go``."""

    def __init__(self, interface: Interface) -> None:
        self.interface = interface
        self.let_go = threading.Event()

    def check(self, inputs: Tensors) -> list[Array]:
        return list(inputs.values())

    def execute(self, arrays: list[Array], *, check_ms: float = 0.0) -> Answer:
        self.let_go.wait()
        raise RuntimeError("it was stuck")

    def close(self) -> None:
        pass


def _bare_wait() -> object:
    """As a caller waits, for an answer that nobody gives."""
    return wait(Future(), Deadline.after_ms(DEADLINE_MS))


def _ask(remote: outrider.Remote, x: Tensors) -> object:
    deadline = Deadline.after_ms(DEADLINE_MS)
    return wait(remote.submit(x, deadline), deadline)


def _peer(url: str) -> object:
    """A client of its own for each call, as nobody would reuse a connection that has failed."""
    with urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(total=DEADLINE_MS / 1000)) as pool:
        return pool.request("POST", url, body=b"{}", headers={"Content-Type": "application/json"})


def _late_ms(call: Callable[[], object], calls: int = CALLS) -> Array:
    """By how much each call is later than its deadline, float64 [calls]; below 0 where it came before."""
    late = np.empty(calls)
    for at in range(calls):
        begun_ns = time.perf_counter_ns()
        with suppress(OutriderError, urllib3.exceptions.HTTPError, OSError):
            call()
        late[at] = (time.perf_counter_ns() - begun_ns) / 1e6 - DEADLINE_MS
    return late


def _figures(late_ms: Array) -> dict[str, float]:
    p50, p99 = np.percentile(late_ms, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "max_ms": float(late_ms.max())}


def _decision_ns() -> dict[str, float]:
    """The median over 200 rounds of 2,000 decisions, ``route`` and ``review`` together where both are made."""
    now_s, policy = 1000.0, Policy(DEADLINE_MS, min_margin=0.5)
    soon_s = now_s + 0.05
    quiet = State(deadline_s=soon_s, edge_ms=5.0, cloud_ms=10.0, cloud_tried_s=now_s)
    warm = State(deadline_s=soon_s, edge_ms=5.0, cloud_ms=10.0, strain=Strain(celsius=60.0))
    busy = State(deadline_s=soon_s, edge_ms=80.0, edge_tried_s=now_s, cloud_ms=10.0, cloud_tried_s=now_s)
    decisions: dict[str, Callable[[], object]] = {
        "kept": lambda: (route(policy, quiet, now_s), review(policy, quiet, 0.9, now_s)),
        "kept, sensors read": lambda: (route(policy, warm, now_s), review(policy, warm, 0.9, now_s)),
        "offloaded as uncertain": lambda: (route(policy, quiet, now_s), review(policy, quiet, 0.1, now_s)),
        "offloaded for the queue": lambda: route(policy, busy, now_s),
    }
    return {
        name: float(np.median(timeit.repeat(decision, number=2000, repeat=200))) / 2000 * 1e9
        for name, decision in decisions.items()
    }


@contextmanager
def _endpoint(interface: Interface) -> Iterator[dict[str, int]]:
    """The faulty endpoint in its own process."""
    command = [sys.executable, "-m", "benchmarks.faults", str(LASTS_S)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(interface.to_dict()) + "\n")
        process.stdin.flush()
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(10)


@contextmanager
def _hung_names() -> Iterator[None]:
    """A resolver that answers for one name only after the fault has ended."""
    real = socket.getaddrinfo

    def slow(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == HUNG:
            time.sleep(LASTS_S)
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *arguments, **options)

    socket.getaddrinfo = slow
    try:
        yield
    finally:
        socket.getaddrinfo = real
