"""An endpoint in a process of its own, over real sessions of ONNX Runtime, without bundles.

    python -m support.endpoint_child FOLDER SETTINGS

It offers the three models of `write_models`: `linear` (y = x @ w + b), `log` (NaN of what is negative) and `slow`
(counts as far as it is told), and prints its URL when it is ready and its service quality when it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from outrider.endpoint import Listening, ServerTls
from outrider.model import BundleInfo
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.engines import engine_named
from outrider_runtimes.tensors import Binding, Interface, TensorBinding, TensorSpec
from outrider_runtimes.worker import Worker
from support.models import LINEAR_B, LINEAR_W, onnx_linear, write_onnx

INTERFACES = {
    "linear": Interface(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 4), axes="NC", range=(-1.0, 1.0)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(None, 3), axes="NC", meaning="scores"),),
        labels=("a", "b", "c"),
    ),
    "log": Interface(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(None,), axes="N"),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(None,), axes="N"),),
    ),
    "slow": Interface(
        inputs=(TensorSpec(name="trips", dtype="int64", shape=()),),
        outputs=(TensorSpec(name="sum", dtype="int64", shape=()),),
    ),
}
VERSION = 3
QUEUE = 4


def expected(x: np.ndarray) -> np.ndarray:
    return x @ LINEAR_W + LINEAR_B


def write_models(folder: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    onnx_linear(folder / "linear.onnx")
    write_onnx(
        folder / "log.onnx",
        [helper.make_node("Log", ["x"], ["y"])],
        [("x", "float32", ["N"])],
        [("y", "float32", ["N"])],
    )
    scalar = [helper.make_tensor_value_info(name, TensorProto.INT64, []) for name in ("i", "sum_in", "sum_out")]
    go_in, go_out = (helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go_in", "go_out"))
    body = helper.make_graph(
        [helper.make_node("Identity", ["go_in"], ["go_out"]), helper.make_node("Add", ["sum_in", "one"], ["sum_out"])],
        "body",
        [scalar[0], go_in, scalar[1]],
        [go_out, scalar[2]],
        [numpy_helper.from_array(np.array(1, np.int64), "one")],
    )
    write_onnx(
        folder / "slow.onnx",
        [helper.make_node("Loop", ["trips", "true", "zero"], ["sum"], body=body)],
        [("trips", "int64", [])],
        [("sum", "int64", [])],
        [
            numpy_helper.from_array(np.array(True), "true"),
            numpy_helper.from_array(np.array(0, np.int64), "zero"),
        ],
    )


class Child:
    """The process; `url` is where it listens. A second one may be given the first one's port.

    Args:
        settings: `token`, `queue`, `grpc` (speak that too, at `grpc_port`), `head_timeout_s` and
            `message_timeout_s` (in which an HTTP head, a gRPC message has to come), `slow_in_loop` (run that model
            in the loop, as if it were quick), `stuck_looks` (of the guard), and what `Listening` takes.
    """

    def __init__(self, folder: Path, *, port: int = 0, **settings: Any) -> None:
        command = [sys.executable, "-m", "support.endpoint_child", str(folder), json.dumps(settings | {"port": port})]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        said = self.process.stdout.readline().split()
        assert said, self.process.communicate(timeout=120)
        self.url, self.grpc_port = said[0], int(said[1])
        self.port = int(self.url.rpartition(":")[2])
        self.quality: dict[str, Any] = {}

    def rss_bytes(self) -> int:
        """What it holds in memory now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def peak_rss_bytes(self) -> int:
        """The most that it ever held."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def connection(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=120)

    def stop(self) -> str:
        """SIGTERM, and ``ended``."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> str:
        """What it wrote to stderr. Exit code 0 is what a clean stop has. `quality` is what it said last.

        After a signal it gets no other one: that might come when it has no handler for it any more.
        """
        said, errors = self.process.communicate(timeout=200)
        assert self.process.returncode == 0, errors
        self.quality = json.loads(said)
        return errors

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=120)


class Named(Worker):
    """A worker that says which bundle it is over, as a Model does."""

    def __init__(self, session: BoundSession, *, name: str, version: int = VERSION, queue_size: int = 64) -> None:
        super().__init__(session, queue_size=queue_size)
        self.bundle = BundleInfo(name=name, version=version, digest=name * 8, verified=False)
        self.variant, self.engine = "onnx-float32", "onnxruntime"
        self.expected_ms: float | None = 0.01  # what is not told to count far is quick


def bound(folder: Path, name: str) -> BoundSession:
    session = engine_named("onnxruntime").prepare(folder / f"{name}.onnx", threads=1)
    interface = INTERFACES[name]
    binding = Binding(inputs=tuple(map(_bound, interface.inputs)), outputs=tuple(map(_bound, interface.outputs)))
    return BoundSession(session, interface, binding)


def named(folder: Path, name: str, *, quick: bool = True, **options: int) -> Named:
    worker = Named(bound(folder, name), name=name, **options)
    if not quick:
        worker.expected_ms = None
    return worker


def main(folder: str, settings: str) -> None:
    from outrider.endpoint import exchange, guard
    from outrider.endpoint.app import build_app
    from outrider.endpoint.intake import Intake
    from outrider.endpoint.models import Models, Served
    from outrider.endpoint.protocol import BoundedProtocol
    from outrider.endpoint.serve import leave_stuck_calls
    from outrider.endpoint.server import serve_app
    from outrider_runtimes.oip import DEFAULT_LIMITS

    exchange.MAX_TIME_S = 3600.0  # on a busy machine `slow` may count for longer than a minute
    told = json.loads(settings)
    token, queue, also_grpc = told.pop("token", None), told.pop("queue", QUEUE), told.pop("grpc", False)
    BoundedProtocol.head_timeout_s = told.pop("head_timeout_s", BoundedProtocol.head_timeout_s)
    message_timeout_s = told.pop("message_timeout_s", None)
    if "tls" in told:
        told["tls"] = ServerTls(**{key: Path(value) for key, value in told["tls"].items()})
    quick = {name: name != "slow" or told.pop("slow_in_loop", False) for name in INTERFACES}
    guard.STUCK_LOOKS = told.pop("stuck_looks", guard.STUCK_LOOKS)
    models = Models(Served(name=name, runner=named(Path(folder), name, quick=quick[name])) for name in INTERFACES)
    intake = Intake(queue=queue, body_bytes=DEFAULT_LIMITS.body_bytes)
    app = build_app(models, token=token, intake=intake)
    with contextlib.ExitStack() as stack:
        port = 0
        if also_grpc:
            from outrider.endpoint.grpc_server import GrpcServer
            from outrider.endpoint.heap import give_back_large_blocks

            give_back_large_blocks()  # as `outrider serve` does
            GrpcServer.message_timeout_s = message_timeout_s or GrpcServer.message_timeout_s
            metrics = app.state.endpoint.metrics
            server = GrpcServer(models, intake, metrics, Listening(port=0), queue=queue, token=token)
            port = stack.enter_context(server).port
        serve_app(app, Listening(**told), secured=token is not None, ready=lambda url: print(url, port, flush=True))
    for served in models:
        served.runner.close()
    leave_stuck_calls()
    print(json.dumps(app.state.endpoint.metrics.quality()), flush=True)


def _bound(spec: TensorSpec) -> TensorBinding:
    return TensorBinding(name=spec.name, file_name=spec.name, dtype=spec.dtype, shape=spec.shape)


if __name__ == "__main__":
    main(*sys.argv[1:])
