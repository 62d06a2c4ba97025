"""An endpoint in a process of its own, over real sessions of ONNX Runtime, without bundles.

    python -m support.endpoint_child FOLDER PORT [TOKEN]

It offers the three models of `write_models`: `linear` (y = x @ w + b), `log` (NaN of what is negative) and `slow`
(counts as far as it is told, on a worker with room for one that waits), and prints its URL when it is ready.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from outrider_runtimes.tensors import Binding, Interface, TensorBinding, TensorSpec
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
    """The process; `url` is where it listens. A second one may be given the first one's port."""

    def __init__(self, folder: Path, *, port: int = 0, token: str = "") -> None:
        command = [sys.executable, "-m", "support.endpoint_child", str(folder), str(port), token]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), self.process.communicate(timeout=30)
        self.port = int(self.url.rpartition(":")[2])

    def connection(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def stop(self) -> str:
        """SIGTERM; what it wrote to stderr. Exit code 0 is what a clean stop has."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, errors
        return errors

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)


def main(folder: str, port: str, token: str) -> None:
    from outrider.endpoint.app import Served, build_app
    from outrider.endpoint.serve import serve_app
    from outrider_runtimes.bound import BoundSession
    from outrider_runtimes.engines import engine_named
    from outrider_runtimes.worker import Worker

    models = {}
    for name, interface in INTERFACES.items():
        session = engine_named("onnxruntime").prepare(Path(folder, f"{name}.onnx"), threads=1)
        binding = Binding(
            inputs=tuple(map(_bound, interface.inputs)),
            outputs=tuple(map(_bound, interface.outputs)),
        )
        worker = Worker(BoundSession(session, interface, binding), queue_size=1 if name == "slow" else 64)
        models[name] = Served(
            runner=worker,
            interface=interface,
            bundle=name * 8,
            version=VERSION,
            variant="onnx-float32",
            engine="onnxruntime",
        )
    app = build_app(models, token=token or None)
    serve_app(app, host="127.0.0.1", port=int(port), ready=lambda url: print(url, flush=True))
    for served in models.values():
        served.runner.close()


def _bound(spec: TensorSpec) -> TensorBinding:
    return TensorBinding(name=spec.name, file_name=spec.name, dtype=spec.dtype, shape=spec.shape)


if __name__ == "__main__":
    main(*sys.argv[1:])
