"""More requests than can be answered: a board with the cloud behind it, and endpoints that must refuse.

The board is on one processor of this machine and the endpoint on another, both processes of their own. Both processors
are equal, so that the board is made the slower side by its network: ResNet-18, where the endpoint serves MobileNetV2 in
int8 at the same interface. Arrivals are seeded and do not wait for answers. The promises:

- at three times the rate at which the board answers, with the cloud at least 99 % of the deadlines are met, where the
  board alone meets fewer than half;
- at four times the rate of an endpoint whose model answers at most 300 requests a second, good answers come at 80 % of
  that rate or more, and refusals, of which there are some, within 50 ms;
- at twice the rate of an endpoint that is bound by HTTP, at 40 % or more, and it lives.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.arrivals import arrivals_s, post_openly
from benchmarks.handmade import Network, write_handmade
from benchmarks.load import post, run_load
from benchmarks.measure import say
from benchmarks.promise import at_least, at_most
from outrider_exporters.demo.processes import Process, answers_http, free_port
from outrider_runtimes import oip
from outrider_runtimes.tensors import Array

if TYPE_CHECKING:
    from torch import nn

    from outrider_exporters import Recipe

SHAPE = (3, 160, 160)
ROWS = 8
SECONDS = 8.0
CLIENTS = 16
DEADLINE_S = 2.0  # of a request to an endpoint: longer than its queue
MOST_EDGE_SHARE, MOST_RATE_PER_S = 1 / 3, 300.0
LEAST_MET, MOST_ALONE = 0.99, 0.5
LEAST_GOODPUT, MOST_REFUSAL_MS, LEAST_HTTP_GOODPUT = 0.8, 50.0, 0.4
TINY = Network(name="tiny", width=64)
PINNED = (
    "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)


def run(folder: Path) -> dict[str, Any]:
    """Make the bundles, then each load in turn. Returns what is stored as ``results/overload.json``."""
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        raise RuntimeError("the board and the endpoint need a processor each")
    slow, quick = _bundles(folder)
    board = _board(slow, quick, folder, others[0])
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {first})  # the generator
    try:
        image = np.random.default_rng(0).random((1, *SHAPE), np.float32)
        slow_endpoint = load_endpoint(slow, {"image": image}, times=4.0, folder=folder, processor=others[0])
        tiny = write_handmade(TINY, folder, formats=("onnx",))
        http_bound = load_endpoint(tiny, {"x": TINY.input()}, times=2.0, folder=folder, processor=others[0])
    finally:
        os.sched_setaffinity(0, before)
    found = {"board": board, "slow_endpoint": slow_endpoint, "http_bound_endpoint": http_bound}
    return {"seconds": SECONDS, **found, "promises": promises(found)}


def promises(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What was asked beside what was measured; of several rounds the worst counts."""
    board, slow, http = found["board"], found["slow_endpoint"], found["http_bound_endpoint"]
    met = {who: [each["good"] / each["asked"] for each in board[who]] for who in ("alone", "together")}
    return [
        at_most("rate of the board over the endpoint's", board["edge_per_s"] / board["cloud_per_s"], MOST_EDGE_SHARE),
        at_least("deadlines met at 3 times the board's rate, with the cloud", min(met["together"]), LEAST_MET),
        at_most("deadlines met at 3 times the board's rate, alone", max(met["alone"]), MOST_ALONE),
        at_most("requests a second that the slow endpoint answers", slow["alone_per_s"], MOST_RATE_PER_S),
        at_least("goodput at 4 times the slow endpoint's rate, of it", slow["goodput"], LEAST_GOODPUT),
        at_least("refusals by the slow endpoint", slow["refused"], 1),
        at_most("ms until a refusal by the slow endpoint, p99", slow["refused_p99_ms"] or 0.0, MOST_REFUSAL_MS),
        at_least(
            "goodput at 2 times the HTTP-bound endpoint's rate, of that rate", http["goodput"], LEAST_HTTP_GOODPUT
        ),
        at_least("endpoints that answer after the load, of 2", slow["lives"] + http["lives"], 2),
    ]


def _board(slow: Path, quick: Path, folder: Path, processor: int) -> dict[str, Any]:
    say("overload: the board at three times its rate, alone and with the cloud")
    with served(quick, folder, processor) as (_, url):
        arguments = [str(slow), str(folder / "board"), url, quick.stem, str(SECONDS)]
        board = Process("board", ["-m", "benchmarks.board", *arguments], folder=folder)
        with board:
            board.wait(60.0 + 10 * SECONDS)
        return board.last_json()


def load_endpoint(
    bundle: Path, inputs: dict[str, Array], *, times: float, folder: Path, processor: int
) -> dict[str, Any]:
    """An endpoint's rate with callers that wait, then the goodput at so many times that rate with ones that do not."""
    say(f"overload: the endpoint of {bundle.stem} at {times:g} times its rate")
    message = oip.encode_request(inputs, timeout_us=int(DEADLINE_S * 1e6))
    request = post(f"/v2/models/{bundle.stem}/infer", message.body, message.headers)
    with served(bundle, folder, processor) as (port, url):
        alone = run_load(port, request, clients=CLIENTS, seconds=SECONDS / 2, warm_up_s=1.0, check=_is_good)
        due_s = arrivals_s(times * alone.rate_per_s, SECONDS, np.random.default_rng(1))
        offered = post_openly(port, request, due_s, deadline_s=DEADLINE_S)
        lives = answers_http(f"{url}/v2/health/ready")()
    return {
        "alone_per_s": alone.rate_per_s,
        "offered_per_s": len(due_s) / SECONDS,
        "goodput": offered.good / SECONDS / alone.rate_per_s,
        "lives": lives,
        **asdict(offered),
    }


@contextlib.contextmanager
def served(bundle: Path, folder: Path, processor: int) -> Iterator[tuple[int, str]]:
    """``outrider serve`` on one processor; its port and URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    serve = ["-m", "outrider.cli", "serve", str(bundle), "--port", str(port), "--state", str(folder / "served")]
    command = ["-c", PINNED, str(processor), *serve]
    with Process(f"endpoint-{bundle.stem}", command, folder=folder, serves=answers_http(f"{url}/v2/health/ready")):
        yield port, url


def _is_good(reply: bytes) -> None:
    if not reply.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"not an answer: {reply[:200]!r}")


def _bundles(folder: Path) -> tuple[Path, Path]:
    """The board's and the endpoint's: of seeded noise, so that what they answer is worthless, and their time is not."""
    from benchmarks.networks import mobilenet_v2, resnet18
    from outrider_exporters import Quantize, Recipe

    return (
        _exported(resnet18, "resnet", folder, Recipe()),
        _exported(mobilenet_v2, "mobilenet", folder, Recipe([Quantize("int8")])),
    )


def _exported(build: Callable[[], nn.Module], name: str, folder: Path, recipe: Recipe) -> Path:
    import torch

    from benchmarks.networks import seeded, settled
    from outrider_exporters import Data, export

    say(f"overload: exporting {name}")
    images = np.random.default_rng(0).random((ROWS, *SHAPE), np.float32)
    module = settled(seeded(build), SHAPE)
    with torch.no_grad():
        wanted = module(torch.from_numpy(images)).argmax(1).numpy()

    def agreement(predict: Any, rows: Array) -> dict[str, float]:
        return {"agreement": float(np.mean(predict({"image": rows})["logits"].argmax(1) == wanted))}

    output = folder / f"{name}.outrider"
    export(
        module, example={"image": images[:1]}, outputs=["logits"],
        data=Data(calibration={"image": images}, test=images), evaluate=agreement, recipe=recipe,
        formats=("onnx",), gates=[], output=output, name=name,
    )  # fmt: skip
    return output
