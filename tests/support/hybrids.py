"""A hybrid's two sides as a board and a server have them: a Model on ONNX Runtime, an endpoint in its own process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from outrider.model import BundleInfo, Model
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.engines import engine_named
from outrider_runtimes.errors import DeadlineExceeded, RunnerError
from outrider_runtimes.remote import Remote
from outrider_runtimes.tensors import Binding, Interface, TensorBinding
from support import tinymodels
from support.ports import free_port
from support.realbundles import INTERFACE

START_S = 200.0  # an endpoint admits its bundles in child processes before it listens


def onnx_model(folder: Path, *, seed: int = 0, interface: Interface = INTERFACE) -> Model:
    """The tiny classifier with that seed's weights, by default at ``realbundles.INTERFACE``; no bundle, no store."""
    path = folder / f"tiny-{seed}.onnx"
    path.write_bytes(tinymodels.classifier_onnx(tinymodels.weights(seed)))
    image, logits = interface.inputs[0], interface.outputs[0]
    binding = Binding(
        inputs=(TensorBinding(name=image.name, file_name="x", dtype="float32", shape=image.shape),),
        outputs=(TensorBinding(name=logits.name, file_name="y", dtype="float32", shape=logits.shape),),
    )
    session = BoundSession(engine_named("onnxruntime").prepare(path, threads=1), interface, binding)
    info = BundleInfo(name="tiny", version=1, digest=f"{seed:064x}", verified=False)
    return Model(session, bundle=info, variant="onnx-float32", engine="onnxruntime", threads=1)


class EndpointProcess:
    """``outrider serve BUNDLE`` on a port of its own; ``kill`` is SIGKILL, and ``start`` brings it back.

    With ``grpc`` it speaks that too, at ``grpc_port``.
    """

    def __init__(self, bundle: Path, *, model: str, state: Path, grpc: bool = False) -> None:
        self.model = model
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "outrider.cli", "serve", str(bundle)]
        self._command += ["--port", str(self.port), "--state", str(state)]
        self.grpc_port = free_port() if grpc else 0
        self._command += ["--grpc-port", str(self.grpc_port)] if grpc else []
        self._log = state.parent / "endpoint.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when the model answers for its metadata."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=os.environ)
        end_s = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end_s:
                raise AssertionError(f"the endpoint did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.05)

    @property
    def process_id(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def _answers(self) -> bool:
        with Remote(self.url, model=self.model) as remote:
            try:
                remote.connect(Deadline.after_ms(2000.0))
            except (RunnerError, DeadlineExceeded):
                return False
            return True
