"""What one writes by hand on the libraries that our endpoint stands on, as the mark of what they allow: Starlette over
uvicorn, orjson, one session that runs in the loop itself, and no check, bound, deadline, count or batch.

``python -m benchmarks.plainserver MODEL.onnx THREADS`` serves it on a free port, which it says.
"""

from __future__ import annotations

import socket
import sys

import numpy as np
import onnxruntime
import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from outrider_runtimes.oip import LENGTH_HEADER


def application(path: str, threads: int) -> Starlette:
    """The protocol's ``infer`` for one float32 input and one output, in JSON and in binary."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    async def infer(request: Request) -> Response:
        body, length = await request.body(), request.headers.get(LENGTH_HEADER)
        asked = orjson.loads(body if length is None else body[: int(length)])
        (tensor,) = asked["inputs"]
        if length is None:
            x = np.array(tensor["data"], np.float32)
        else:
            x = np.frombuffer(body, np.float32, offset=int(length))
        (y,) = session.run(None, {tensor["name"]: x.reshape(tensor["shape"])})
        output = {"name": "y", "datatype": "FP32", "shape": y.shape}
        reply = {"model_name": "plain", "id": asked.get("id", ""), "outputs": [output]}
        if length is None:
            output["data"] = y.ravel()
            return Response(orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")
        output["parameters"] = {"binary_data_size": y.nbytes}
        head = orjson.dumps(reply)
        return Response(
            head + y.tobytes(), media_type="application/octet-stream", headers={LENGTH_HEADER: str(len(head))}
        )

    return Starlette(routes=[Route("/v2/models/{model}/infer", infer, methods=["POST"])])


def main(path: str, threads: str) -> None:
    """Serve until a signal."""
    config = uvicorn.Config(application(path, int(threads)), log_level="error", access_log=False)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        print(f"serving on http://127.0.0.1:{sock.getsockname()[1]}", file=sys.stderr, flush=True)
        uvicorn.Server(config).run([sock])


if __name__ == "__main__":
    main(*sys.argv[1:])
