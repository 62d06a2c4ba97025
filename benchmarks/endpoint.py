"""Our endpoint beside MLServer with 16 clients, each of which sends its next request when it has its reply; and what
batching gains where it pays and costs where it does not.

The promises, of rates in one run of interleaved rounds: our JSON at least 1.6 of MLServer's without batching and 2.2
with the default batching, our binary at least 3.5 of MLServer's JSON (it takes no binary); batching at least 2 on a
network of 14M weights, and never below 0.95 on a CNN and a ResNet. What is gained over MLServer depends on what a call
of the network costs beside its request and on how large the request is, so each of four networks has its own three
lines. Beside them stands a handler written by hand on the same libraries, which checks nothing: what they allow.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import outrider
from benchmarks.handmade import Network, write_handmade
from benchmarks.load import Loaded, post, run_load
from benchmarks.measure import say
from benchmarks.promise import at_least
from benchmarks.serving import MLSERVER, mlserver, ours, plain
from benchmarks.stats import TWIN_LIMIT, Ratio, ratio
from outrider.admit.curve import BatchCurve, BatchPlan, plan_batches
from outrider_runtimes import oip
from outrider_runtimes.tensors import Array

if TYPE_CHECKING:
    from torch import nn

CLIENTS = 16
ROUNDS = 11  # five are asked; the speed of a virtual machine wanders more than that many medians hold
BLOCK_S, WARM_UP_S = 1.2, 0.3
# What both serve: with small bodies a network that takes no time, so HTTP and JSON alone; one whose call takes about as
# long as the handling of its request; one that is bound by the reading of its weights; and, with the body of a picture
# of 3 x 32 x 32, a network that takes no time.
SMALL_SIZES = (64, 256, 10)
WEIGHTS_14M = (64, 2624, 2624, 2624, 10)
SERVED = {"small": SMALL_SIZES, "middle": (64, 2048, 2048, 10), "large": WEIGHTS_14M, "image": (3072, 64, 10)}
SIDE = 96  # of the ResNet's images: at 224 a block would hold too few requests to tell 0.95 from 1
MLSERVER_WORKERS = {"MLServer, JSON": 0, "MLServer with a worker process, JSON": 1}
TWIN = "ours, JSON (twin)"
PLAIN_JSON, PLAIN_BINARY = "a plain handler, JSON", "a plain handler, binary"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A port and a request, and how the answer is looked at."""

    port: int
    request: bytes
    check: Callable[[bytes], None]


def run(folder: Path) -> dict[str, Any]:
    """Measure. Returns what is stored as ``results/endpoint.json``."""
    from benchmarks.networks import resnet18

    beside = {name: _beside(name, sizes, folder / name) for name, sizes in SERVED.items()}
    gains = {
        "14M-weight MLP": _gain(dense("mlp-14m", WEIGHTS_14M, folder), (WEIGHTS_14M[0],), folder),
        "CNN": _gain(_packed("cnn", _cnn, (3, 32, 32), folder), (3, 32, 32), folder),
        "ResNet-18": _gain(_packed("resnet18", resnet18, (3, SIDE, SIDE), folder), (3, SIDE, SIDE), folder),
    }
    promises = [
        *(
            at_least(
                f"{what}, {name} network", found["ratios"][whose]["value"], asked,
                note=f"batching {found['plan']}; a plain handler: {found['ratios'][allowed]['value']:.2f}",
            )
            for name, found in beside.items()
            for what, whose, asked, allowed in (
                ("JSON over MLServer's, unbatched", "ours unbatched, JSON", 1.6, PLAIN_JSON),
                ("JSON over MLServer's, default batching", "ours, JSON", 2.2, PLAIN_JSON),
                ("binary over MLServer's JSON", "ours, binary", 3.5, PLAIN_BINARY),
            )
        ),
        *(
            at_least(f"batching over none, {name}", gain["ratio"]["value"], 2.0 if "MLP" in name else 0.95,
                     note=gain["plan"])
            for name, gain in gains.items()
        ),
    ]  # fmt: skip
    return {
        "clients": CLIENTS,
        "rounds": ROUNDS,
        "beside": beside,
        "batching": gains,
        "promises": promises,
    }


def _beside(model: str, sizes: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """Ours and MLServer over one ``.onnx`` file. MLServer is taken as it is faster: with or without its worker."""
    folder.mkdir()
    bundle = dense(model, sizes, folder)
    x = example((sizes[0],))
    report = outrider.install(bundle, state=folder / "state")
    threads = report.choice.threads
    with contextlib.ExitStack() as stack:
        unbatched = stack.enter_context(ours(bundle, folder / "state", batching=False))
        by_hand = stack.enter_context(plain(bundle.with_suffix(".onnx"), threads=threads))
        default = stack.enter_context(ours(bundle, folder / "state", batching=True))
        contenders = {
            "ours, JSON": contender(default, model, x, binary=False),
            TWIN: contender(default, model, x, binary=False),
            "ours unbatched, JSON": contender(unbatched, model, x, binary=False),
            "ours, binary": contender(default, model, x, binary=True),
            PLAIN_JSON: contender(by_hand, model, x, binary=False),
            PLAIN_BINARY: contender(by_hand, model, x, binary=True),
        }
        for name, workers in MLSERVER_WORKERS.items():
            where = mlserver(bundle.with_suffix(".onnx"), model, threads=threads, workers=workers,
                             folder=folder / f"mlserver-{workers}")  # fmt: skip
            contenders[name] = contender(stack.enter_context(where), model, x, binary=False)
        _same_answers(contenders)
        loads = interleaved(contenders)
    peer = max(MLSERVER_WORKERS, key=lambda name: np.median([load.rate_per_s for load in loads[name]]))
    return {
        "peer": peer,
        "mlserver": MLSERVER,
        "network": f"dense {sizes}, float32, {threads} threads",
        "plan": _plan(report.batches),
        **compared(loads, base=peer, twin=(TWIN, "ours, JSON")),
    }


def _gain(bundle: Path, shape: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """The default over no batching, in binary."""
    state = folder / f"state-{bundle.stem}"
    report = outrider.install(bundle, state=state)
    x = example(shape)
    with ours(bundle, state, batching=True) as default, ours(bundle, state, batching=False) as plain:
        contenders = {
            "default": contender(default, report.name, x, binary=True),
            "unbatched": contender(plain, report.name, x, binary=True),
            "unbatched (twin)": contender(plain, report.name, x, binary=True),
        }
        loads = interleaved(contenders)
    found = compared(loads, base="unbatched", twin=("unbatched (twin)", "unbatched"))
    return {"plan": _plan(report.batches), "ratio": found["ratios"]["default"], **found}


def interleaved(contenders: Mapping[str, Contender]) -> dict[str, list[Loaded]]:
    """Blocks of load, in each round in another order."""
    rng = np.random.default_rng(0)
    loads: dict[str, list[Loaded]] = {name: [] for name in contenders}
    for number in range(ROUNDS):
        for name in rng.permutation(list(contenders)):
            each = contenders[name]
            found = run_load(
                each.port, each.request, clients=CLIENTS, seconds=BLOCK_S, warm_up_s=WARM_UP_S, check=each.check
            )
            loads[name].append(found)
            say(f"endpoint: round {number + 1}, {name}: {found.rate_per_s:.0f}/s, {found.failed} failed")
    return loads


def compared(loads: Mapping[str, list[Loaded]], *, base: str, twin: tuple[str, str]) -> dict[str, Any]:
    """Rates over the base's: the median over rounds of the ratio in a round."""
    rng = np.random.default_rng(1)
    taken = {name: np.array([[1.0 / load.rate_per_s] for load in found]) for name, found in loads.items()}

    def over(one: str, other: str) -> Ratio:
        return ratio(taken[other], taken[one], rng)

    same = over(*twin)
    return {
        "base": base,
        "rate_per_s": {name: float(np.median([load.rate_per_s for load in found])) for name, found in loads.items()},
        "p50_ms": {name: float(np.median([load.p50_ms for load in found])) for name, found in loads.items()},
        "p99_ms": {name: float(np.median([load.p99_ms for load in found])) for name, found in loads.items()},
        "failed": {name: sum(load.failed for load in found) for name, found in loads.items()},
        "generator_share": {name: float(np.median([e.own_share for e in found])) for name, found in loads.items()},
        "ratios": {name: asdict(over(name, base)) for name in loads if name not in (base, twin[0])},
        "twin": asdict(same),
        "valid": abs(same.value - 1.0) <= TWIN_LIMIT,
    }


def contender(port: int, model: str, x: Array, *, binary: bool, prefix: str = "") -> Contender:
    """Asks for one row. The protocol is the same for all servers."""
    message = oip.encode_request({"x": x}, id="1", binary=binary)

    def check(reply: bytes) -> None:
        y = answer_of(reply)
        if len(y) != 1 or not np.isfinite(y).all():
            raise RuntimeError(f"not the answer to one row: {y}")

    return Contender(
        port=port, request=post(f"{prefix}/v2/models/{model}/infer", message.body, message.headers), check=check
    )


def answer_of(reply: bytes) -> Array:
    """The only output of a whole reply."""
    head, _, body = reply.partition(b"\r\n\r\n")
    if b"octet-stream" in head:
        length = head.lower().partition(oip.LENGTH_HEADER.lower().encode())[2].split()[1]
        (array,) = oip.decode_reply(body, int(length)).outputs.values()
        return array
    (output,) = json.loads(body)["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def _same_answers(contenders: Mapping[str, Contender]) -> None:
    """All of them give what the first one does, whatever they are asked in. Raises RuntimeError."""
    answers: list[Array] = []
    for name, each in contenders.items():
        run_load(
            each.port, each.request, clients=1, seconds=0.1, warm_up_s=0.0, check=lambda r: answers.append(answer_of(r))
        )
        if not np.allclose(answers[-1], answers[0], atol=1e-4):
            raise RuntimeError(f"{name} answers otherwise: {answers[-1]} is not {answers[0]}")


def _plan(measured: Mapping[str, Any] | None) -> str:
    curve = None if measured is None else BatchCurve.from_dict(measured)
    plan = plan_batches(curve)
    return f"up to {plan.rows} rows" if isinstance(plan, BatchPlan) else f"off: {plan}"


def dense(name: str, sizes: tuple[int, ...], folder: Path) -> Path:
    """A bundle of dense layers of these sizes, its ``.onnx`` beside it."""
    rng = np.random.default_rng(3)
    layers = tuple((rng.standard_normal(shape) * np.sqrt(2 / shape[0])).astype(np.float32) for shape in pairwise(sizes))
    return write_handmade(Network(name=name, width=sizes[0], layers=layers), folder, formats=("onnx",))


def _cnn() -> nn.Module:
    """image: float32 [N, 3, 32, 32] -> logits: float32 [N, 10]."""
    from torch import nn

    layers: list[nn.Module] = []
    for before, after in pairwise((3, 16, 32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))


def _packed(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], folder: Path) -> Path:
    """A network as a bundle of one float32 ONNX file with a free batch, named x to y."""
    import torch

    from benchmarks.networks import seeded, settled
    from outrider_exporters import package

    path = folder / f"{name}.onnx"
    torch.onnx.export(
        settled(seeded(build), shape), (torch.zeros(2, *shape),), str(path), input_names=["x"], output_names=["y"],
        dynamic_axes={"x": {0: "N"}, "y": {0: "N"}}, dynamo=False, opset_version=17,
    )  # fmt: skip
    package(path, output=folder / f"{name}.outrider", name=name)
    return folder / f"{name}.outrider"


def example(shape: tuple[int, ...]) -> Array:
    """One row, the same each time."""
    return np.random.default_rng(4).random((1, *shape), np.float32)
