"""Servers in processes of their own: ours, ours without batching, a plain handler, and MLServer in an environment made
on demand.

``python -m benchmarks.serving BUNDLE STATE`` serves a bundle as ``outrider serve`` does, but never batched.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.measure import say

MLSERVER = "1.7.1"
STARTS_WITHIN_S = 120.0
STOPS_WITHIN_S = 30.0

# An ordinary custom runtime: NumPy's codec in and out, one session, its threads and spinning as ours has them.
RUNTIME = """
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

class Onnx(MLModel):
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(self.settings.parameters.extra["threads"])
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            self.settings.parameters.uri, options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        inputs = {each.name: NumpyCodec.decode_input(each) for each in payload.inputs}
        names = [each.name for each in self._session.get_outputs()]
        outputs = self._session.run(names, inputs)
        return InferenceResponse(
            id=payload.id, model_name=self.name, model_version=self.version,
            outputs=[NumpyCodec.encode_output(name, y) for name, y in zip(names, outputs)])
"""


def ours(bundle: Path, state: Path, *, batching: bool) -> contextlib.AbstractContextManager[int]:
    """Our endpoint over one bundle; gives its port."""
    command = (
        [sys.executable, "-m", "outrider.cli", "serve", str(bundle), "--state", str(state), "--port", "0"]
        if batching
        else [sys.executable, "-m", "benchmarks.serving", str(bundle), str(state)]
    )
    return _told(command)


def plain(model: Path, *, threads: int) -> contextlib.AbstractContextManager[int]:
    """A handler written by hand over one ``.onnx`` file; gives its port. See ``plainserver``."""
    return _told([sys.executable, "-m", "benchmarks.plainserver", str(model), str(threads)])


@contextlib.contextmanager
def _told(command: list[str]) -> Iterator[int]:
    """A server that says on which port it serves."""
    with _process(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"on http://127\.0\.0\.1:(\d+)", line.decode()):
                yield int(found[1])
                return
        raise RuntimeError(f"{' '.join(command)} ended before it served")


@contextlib.contextmanager
def mlserver(model: Path, name: str, *, threads: int, workers: int, folder: Path) -> Iterator[int]:
    """MLServer over one ``.onnx`` file, in its own processes; gives its HTTP port.

    Args:
        workers: of its pool for inference; 0 runs the model in the process that serves.
        folder: an empty one, for its settings.
    """
    python = environment()
    folder.mkdir(parents=True)
    ports = {key: _free_port() for key in ("http_port", "grpc_port", "metrics_port")}
    settings = {"host": "127.0.0.1", "parallel_workers": workers, "debug": False, **ports}
    parameters = {"uri": str(model), "version": "1", "extra": {"threads": threads}}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(
        json.dumps({"name": name, "implementation": "runtime.Onnx", "parameters": parameters})
    )
    (folder / "runtime.py").write_text(RUNTIME)
    variables = {**os.environ, "PYTHONPATH": str(folder)}
    command = [str(python.with_name("mlserver")), "start", str(folder)]
    with _process(command, env=variables, cwd=folder, stderr=subprocess.DEVNULL) as process:
        _await(f"http://127.0.0.1:{ports['http_port']}/v2/models/{name}/ready", process)
        yield ports["http_port"]


def environment() -> Path:
    """The Python of an environment with MLServer and this ONNX Runtime, made once in the user's cache."""
    import onnxruntime

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "outrider" / "benchmarks" / f"mlserver-{MLSERVER}"
    python, ready = folder / "bin" / "python", folder / "ready"
    # Its worker processes do not start on a newer uvloop.
    wanted = f"mlserver=={MLSERVER} onnxruntime=={onnxruntime.__version__} uvloop<0.22"
    if ready.is_file() and ready.read_text() == wanted:
        return python
    say(f"endpoint: installing {wanted}")
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted.split()], check=True)
    ready.write_text(wanted)
    return python


@contextlib.contextmanager
def _process(command: list[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None,
             stderr: int | None = None) -> Iterator[subprocess.Popen[bytes]]:  # fmt: skip
    """A process with a session of its own; all of it is gone after the block."""
    process = subprocess.Popen(
        command, env=env, cwd=cwd, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOPS_WITHIN_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    ends_s = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < ends_s and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as reply:
            if reply.status == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{url} does not answer")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def _unbatched(bundle: str, state: str) -> None:
    from outrider.endpoint import Listening
    from outrider.endpoint.app import build_app
    from outrider.endpoint.serve import served_models
    from outrider.endpoint.server import serve_app
    from outrider.model import load

    with load(bundle, state=state, queue_size=64) as model:
        serve_app(
            build_app(served_models([model])),
            Listening(port=0),
            secured=False,
            ready=lambda url: print(f"serving on {url}", file=sys.stderr, flush=True),
        )


if __name__ == "__main__":
    _unbatched(*sys.argv[1:])
