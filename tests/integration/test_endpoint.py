"""The endpoint in a process of its own: the protocol over plain HTTP, its limits, and Remote against it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from outrider.endpoint import Listening, serve
from outrider.endpoint.app import build_app
from outrider.endpoint.listening import listener
from outrider.endpoint.models import Models
from outrider.endpoint.serve import served_models
from outrider_runtimes import oip
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    ConfigError,
    InputError,
    OutriderError,
    RemoteRefused,
    RemoteUnavailable,
    ReplyError,
)
from outrider_runtimes.remote import Remote
from support.endpoint_child import INTERFACES, VERSION, Child, expected, write_models
from support.hybrids import onnx_model
from support.ports import free_port

X = np.random.default_rng(3).standard_normal((5, 4)).astype(np.float32)
LINEAR = "/v2/models/linear"
INFER = f"{LINEAR}/infer"
SLOW = "/v2/models/slow/infer"
# About a second of counting: long enough that what is sent meanwhile meets a busy worker.
MANY_TRIPS = 1_200_000


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def child(models):
    child = Child(models)
    yield child
    assert "Traceback" not in child.stop()


@pytest.fixture
def remote(child):
    with Remote(child.url, model="linear") as remote:
        yield remote


def ask(child: Child, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers in lower case and body, by urllib."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(child.url + path, data=body, headers=names)
    try:
        with urllib.request.urlopen(request, timeout=200) as reply:
            return reply.status, {k.lower(): v for k, v in reply.headers.items()}, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def document(**changes: Any) -> bytes:
    tensor = {"name": "x", "shape": [5, 4], "datatype": "FP32", "data": X.tolist()}
    return json.dumps({"inputs": [tensor | changes.pop("tensor", {})]} | changes).encode()


def error(reply: tuple[int, dict[str, str], bytes], status: int) -> str:
    assert reply[0] == status, reply
    assert reply[1]["content-type"] == "application/json"
    body = json.loads(reply[2])
    assert list(body) == ["error", "request_id"]
    assert body["request_id"] == reply[1]["x-request-id"]
    for leak in ("Traceback", ".py", "site-packages", "/tmp", "/home", "/root"):
        assert leak not in body["error"]
    return body["error"]


def count(trips: int, **parameters: Any) -> bytes:
    tensor = {"name": "trips", "shape": [], "datatype": "INT64", "data": [trips]}
    return json.dumps({"inputs": [tensor], "parameters": parameters}).encode()


def works(child: Child) -> None:
    status, _, body = ask(child, INFER, document())
    assert status == 200
    np.testing.assert_allclose(np.reshape(json.loads(body)["outputs"][0]["data"], (5, 3)), expected(X), rtol=1e-5)


def test_health_and_metadata(child):
    for path in ("/v2/health/live", "/v2/health/ready", f"{LINEAR}/ready", f"{LINEAR}/versions/{VERSION}/ready"):
        assert ask(child, path)[0] == 200
    server = json.loads(ask(child, "/v2")[2])
    assert (server["name"], server["extensions"]) == ("outrider", ["binary_tensor_data"])
    for path in (LINEAR, f"{LINEAR}/versions/{VERSION}"):
        model = json.loads(ask(child, path)[2])
        assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
        assert model["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}]
        assert (model["name"], model["versions"], model["platform"]) == ("linear", [str(VERSION)], "outrider")
        assert oip.interface_from_metadata(model) == INTERFACES["linear"]
        assert model["parameters"]["outrider"]["bundle"] == "linear" * 8


def test_json_in_and_out(child):
    status, _, body = ask(child, f"{LINEAR}/versions/{VERSION}/infer", document(id="seven"))
    reply = json.loads(body)
    assert status == 200
    assert (reply["id"], reply["model_name"], reply["model_version"]) == ("seven", "linear", str(VERSION))
    assert reply["parameters"]["infer_ms"] >= 0
    assert [(o["name"], o["datatype"], o["shape"]) for o in reply["outputs"]] == [("y", "FP32", [5, 3])]
    np.testing.assert_allclose(np.reshape(reply["outputs"][0]["data"], (5, 3)), expected(X), rtol=1e-5)


def test_binary_in_and_out(child):
    message = oip.encode_request({"x": X}, id="b")
    status, headers, body = ask(child, INFER, message.body, **message.headers)
    assert (status, headers["content-type"]) == (200, "application/octet-stream")
    length = int(headers["inference-header-content-length"])
    assert np.frombuffer(body[length:], "<f4").reshape(5, 3) == pytest.approx(expected(X), rel=1e-5)
    assert json.loads(body[:length])["id"] == "b"


@pytest.mark.parametrize("binary", [True, False])
def test_each_output_as_it_was_asked_for(child, binary):
    body = document(outputs=[{"name": "y", "parameters": {"binary_data": binary}}])
    status, headers, _ = ask(child, INFER, body)
    assert status == 200
    assert ("inference-header-content-length" in headers) is binary


BAD_REQUESTS = {
    "no JSON": (b"{", "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "deep": (b"[" * 100_000, "nested deeper"),
    "no inputs": (b"{}", "'inputs'"),
    "another name": (document(tensor={"name": "z"}), "'x' is missing"),
    "another datatype": (document(tensor={"datatype": "FP64"}), "expected float32"),
    "BYTES": (document(tensor={"datatype": "BYTES", "data": ["a"] * 20}), "BYTES"),
    "another shape": (document(tensor={"shape": [4, 5], "data": [0.0] * 20}), "expected [N, 4]"),
    "too few": (document(tensor={"data": [1.0]}), "1 elements"),
    "a huge shape": (document(tensor={"shape": [2**30, 4]}), "is more than"),
    "endless rows": (document(tensor={"shape": [2**31 - 1, 0], "data": []}), "is more than"),
    "NaN": (document().replace(b"[[", b"[[NaN,"), "NaN is not JSON"),
    "unknown output": (document(outputs=[{"name": "z"}]), "no output 'z'"),
    "timeout": (document(parameters={"timeout": "soon"}), "microseconds"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_400_and_say_why(child, name):
    body, says = BAD_REQUESTS[name]
    assert says in error(ask(child, INFER, body), 400)
    works(child)


def test_nan_inside_binary_is_refused(child):
    message = oip.encode_request({"x": X * np.float32("nan")})
    assert "NaN" in error(ask(child, INFER, message.body, **message.headers), 400)


@pytest.mark.parametrize("length", ["-1", "x", "0", "99999999", "1" * 400])
def test_lying_header_lengths_are_400(child, length):
    error(ask(child, INFER, document(), Inference_Header_Content_Length=length), 400)
    works(child)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v2/",
        "/v3",
        "/v2/models/other",
        "/v2/models/other/infer",
        f"{LINEAR}/versions/4",
        f"{LINEAR}/versions/x/ready",
        "/v2/models/..%2F..%2Fetc%2Fpasswd",
        "/v2/models/%2e%2e/infer",
        "/v2/models/" + "x" * 5000,
        "/v2/models/%00",
        "/v2/repository/index",
        "/v2/systemsharedmemory/status",
    ],
)
def test_what_is_not_there_is_404(child, path):
    reply = ask(child, path, document() if path.endswith("infer") else None)
    assert len(error(reply, 404)) < 200


def test_wrong_methods_are_405(child):
    error(ask(child, INFER), 405)
    error(ask(child, LINEAR, b"{}"), 405)


def test_an_answer_without_a_json_form_is_500_and_goes_out_in_binary(child):
    x = np.float32([-1.0, 1.0])
    tensor = {"name": "x", "shape": [2], "datatype": "FP32", "data": x.tolist()}
    text = error(ask(child, "/v2/models/log/infer", json.dumps({"inputs": [tensor]}).encode()), 500)
    assert "binary" in text
    message = oip.encode_request({"x": x})
    assert ask(child, "/v2/models/log/infer", message.body, **message.headers)[0] == 200
    with Remote(child.url, model="log") as remote, pytest.raises(ReplyError, match="NaN"):
        remote.submit({"x": x}, Deadline.after_ms(120_000.0)).result(150)


def test_time_that_has_passed_is_504_and_the_work_is_not_begun(child):
    error(ask(child, SLOW, count(1, timeout=1)), 504)
    error(ask(child, SLOW, count(MANY_TRIPS, timeout=30_000)), 504)
    freed(child)


def freed(child: Child) -> None:
    """The call that nobody waits for may be taken for stuck until it returns."""
    while (reply := ask(child, SLOW, count(5)))[0] != 200:
        assert "stuck" in error(reply, 503)
    assert json.loads(reply[2])["outputs"][0]["data"] == [5]


def test_a_full_queue_is_429_with_retry_after(child):
    statuses = {200}
    trips = MANY_TRIPS // 2
    while statuses == {200}:  # the machine stalled until the first ones had been answered
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda trips: ask(child, SLOW, count(trips)), [trips] * 8))
        statuses = {reply[0] for reply in replies}
        trips *= 2
    assert statuses == {200, 429}
    refused = next(reply for reply in replies if reply[0] == 429)
    assert "4 requests wait for this model" in error(refused, 429)
    assert 1 <= int(refused[1]["retry-after"]) <= 60


def test_compressed_bodies_are_415(child):
    error(ask(child, INFER, document(), Content_Encoding="gzip"), 415)


def test_remote_gives_what_the_model_gives(child, remote):
    deadline = Deadline.after_ms(120_000.0)
    for rows in (5, 1, 0, 5):
        answer = remote.submit({"x": X[:rows]}, deadline).result(150)
        assert answer.outputs["y"].shape == (rows, 3)
        np.testing.assert_allclose(answer.outputs["y"], expected(X[:rows]), rtol=1e-5)
    assert remote.interface == INTERFACES["linear"]
    assert (remote.bundle, remote.variant) == ("linear" * 8, "onnx-float32")
    assert answer.timing_ms.infer > 0
    with pytest.raises(InputError):
        remote.submit({"x": X.astype(np.float64)}, deadline)


def test_remote_is_told_that_there_is_no_such_model(child):
    with Remote(child.url, model="other") as remote, pytest.raises(RemoteRefused, match="no model 'other'") as caught:
        remote.connect(Deadline.after_ms(120_000.0))
    assert caught.value.status == 404


def test_a_token_is_asked_for_everywhere_but_at_health(models):
    child = Child(models, token="right")
    try:
        assert ask(child, "/v2/health/ready")[0] == 200
        for path, body in (("/v2", None), (LINEAR, None), (INFER, document()), ("/v2/models/other", None)):
            reply = ask(child, path, body)
            error(reply, 401)
            assert reply[1]["www-authenticate"] == "Bearer"
            error(ask(child, path, body, Authorization="Bearer wrong"), 401)
            error(ask(child, path, body, Authorization="Bearer r\xefght"), 401)
        assert ask(child, INFER, document(), Authorization="Bearer right")[0] == 200
        with Remote(child.url, model="linear", token="right") as remote:
            remote.submit({"x": X}, Deadline.after_ms(120_000.0)).result(150)
        with Remote(child.url, model="linear", token="wrong") as remote, pytest.raises(RemoteRefused, match="401"):
            remote.connect(Deadline.after_ms(120_000.0))
    finally:
        child.stop()


def test_sigterm_finishes_what_was_begun_and_leaves_nothing_on_stderr(models):
    child = Child(models)
    body = count(MANY_TRIPS)
    with child.connection() as busy, child.connection() as idle:
        busy.settimeout(200)
        busy.sendall(f"POST {SLOW} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        # One loop reads both connections: an answer here says that what came earlier over there has been read.
        idle.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in idle.recv(4096)
        errors = child.stop()
        assert b" 200 " in busy.recv(4096)
    assert errors == ""


def test_remote_recovers_when_the_endpoint_comes_back(models):
    first = Child(models, port=free_port())
    with Remote(first.url, model="linear") as remote:
        remote.submit({"x": X}, Deadline.after_ms(120_000.0)).result(150)
        first.kill()
        for _ in range(3):
            with pytest.raises(RemoteUnavailable):
                remote.submit({"x": X}, Deadline.after_ms(120_000.0)).result(150)
        second = Child(models, port=first.port)
        try:
            answer = remote.submit({"x": X}, Deadline.after_ms(120_000.0)).result(150)
            np.testing.assert_allclose(answer.outputs["y"], expected(X), rtol=1e-5)
        finally:
            second.stop()


def test_a_port_that_is_taken_is_a_config_error():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot listen"):
        listener(Listening(port=taken.getsockname()[1]), secured=False)
    with pytest.raises(ConfigError, match="cannot listen"):
        listener(Listening(port=70_000), secured=False)
    with pytest.raises(ConfigError, match="token is empty"):
        build_app(Models(), token="")


def test_bundles_are_served_by_their_names(tmp_path):
    with onnx_model(tmp_path, seed=0) as one, onnx_model(tmp_path, seed=1) as other:
        served = served_models([one]).find("tiny")
        assert (served.runner, served.bundle, served.version) == (one, one.bundle.digest, 1)
        with pytest.raises(ConfigError, match="two bundles are named 'tiny'"):
            served_models([one, other])


def test_a_bundle_that_is_not_there_is_an_error_before_anything_listens(tmp_path):
    called: list[str] = []
    with pytest.raises(OutriderError, match="missing"):
        serve([tmp_path / "missing.outrider"], state=tmp_path / "state", ready=called.append)
    assert not called


def test_the_client_loads_no_server_and_the_package_loads_lazily():
    code = (
        "import sys, outrider_runtimes.remote, outrider.endpoint;"
        "print([m for m in ('starlette', 'uvicorn', 'httptools', 'onnxruntime', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.strip() == "[]"
