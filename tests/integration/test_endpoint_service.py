"""The endpoint as a service: how it stops, what it says of itself, and bundles of one name side by side."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from outrider.installer import install
from outrider_runtimes import oip
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.remote import Remote
from support import tinymodels
from support.endpoint_child import Child, write_models
from support.realbundles import expected, images, make_real_bundle

pytestmark = pytest.mark.slow

X = [[0.5, -0.5, 0.25, 0.0]]
BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": X}]}).encode()
MANY_TRIPS = 6_000_000  # about four seconds of counting
FOREVER = 10**12  # its call is left inside the engine
LINEAR, SLOW = "/v2/models/linear/infer", "/v2/models/slow/infer"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def ask(url: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=body, headers=names), timeout=200) as reply:
            return reply.status, {k.lower(): v for k, v in reply.headers.items()}, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def count(trips: int) -> bytes:
    tensor = {"name": "trips", "shape": [], "datatype": "INT64", "data": [trips]}
    return json.dumps({"inputs": [tensor]}).encode()


def post(connection: socket.socket, path: str, body: bytes, *, length: int | None = None) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    connection.sendall(head.encode() + body)


def read_to(connection: socket.socket, end: bytes, *, least: int = 0) -> bytes:
    got = b""
    while len(got) < least or not got.endswith(end):
        data = connection.recv(4096)
        assert data, got
        got += data
    return got


def whole(connection: socket.socket) -> bytes:
    connection.settimeout(200)
    got = b""
    while data := connection.recv(65536):
        got += data
    return got


def queued(child: Child, model: str) -> float:
    text = ask(child.url + "/metrics")[2].decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "outrider_queue_depth" and sample.labels["model"] == model:
                return sample.value
    raise AssertionError(text)


def until_queued(child: Child, model: str, wanted: int) -> None:
    for _ in range(10_000):
        if queued(child, model) == wanted:
            return
    raise AssertionError(queued(child, model))


def test_many_connections_at_once_are_made_before_any_of_them_is_taken(models):
    """One that is not is tried again by the kernel a second later: its caller's time is gone."""
    child = Child(models)
    with contextlib.ExitStack() as stack:
        os.kill(child.process.pid, signal.SIGSTOP)
        try:
            for _ in range(400):
                stack.enter_context(child.connection())
        finally:
            os.kill(child.process.pid, signal.SIGCONT)
        assert ask(child.url + "/v2/health/live")[0] == 200
    assert child.stop() == ""


def test_a_drain_finishes_what_is_inside_and_refuses_what_is_new(models):
    child = Child(models, drain_s=3600.0)
    with child.connection() as busy:
        post(busy, SLOW, count(MANY_TRIPS))
        until_queued(child, "slow", 1)
        child.process.send_signal(signal.SIGTERM)
        for _ in range(10_000):
            status, headers, _ = ask(child.url + "/v2/health/ready")
            if status == 503:
                break
        assert (status, headers["connection"]) == (503, "close")
        assert ask(child.url + "/v2/health/live")[0] == 200
        status, headers, body = ask(child.url + LINEAR, BODY)
        assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "1")
        assert json.loads(body)["error"] == "the endpoint is being stopped"
        got = whole(busy)
        assert got.startswith(b"HTTP/1.1 200 ") and b"connection: close" in got
        errors = child.ended()
    assert errors == ""
    reasons = {(m["model"], r["reason"]): r["requests"] for m in child.quality["models"] for r in m["reasons"]}
    assert reasons == {("slow", "ok"): 1, ("linear", "stopping"): 1}


def test_a_drain_is_bounded_and_tells_those_who_are_left(models):
    child = Child(models, drain_s=0.2)
    with child.connection() as busy, child.connection() as half:
        post(half, LINEAR, BODY[:10], length=len(BODY))
        post(busy, SLOW, count(FOREVER))
        until_queued(child, "slow", 1)
        child.process.send_signal(signal.SIGTERM)
        for connection, says in ((busy, b"before the answer"), (half, b"before the request was whole")):
            got = whole(connection)
            assert got.startswith(b"HTTP/1.1 503 ") and says in got
        assert "Traceback" not in child.ended()


def long_reply(connection: socket.socket) -> tuple[bytes, int]:
    """The beginning of a reply that is far longer than what the kernel keeps for a caller, and its body's length."""
    message = oip.encode_request({"x": np.zeros((1_000_000, 4), np.float32)})
    size = len(message.body)
    connection.sendall(f"POST {LINEAR} HTTP/1.1\r\nHost: x\r\n".encode() + message.head(size) + message.body)
    first = read_to(connection, b"", least=1000)
    assert first.startswith(b"HTTP/1.1 200 ")
    return first, int(first.partition(b"content-length: ")[2].partition(b"\r\n")[0])


def test_a_drain_waits_for_a_reply_that_is_still_being_read(models):
    child = Child(models, drain_s=3600.0)
    with child.connection() as slow:
        first, length = long_reply(slow)
        child.process.send_signal(signal.SIGTERM)
        for _ in range(10_000):
            if ask(child.url + "/v2/health/ready")[0] == 503:
                break
        got = first + whole(slow)
        assert len(got.partition(b"\r\n\r\n")[2]) == length
    assert child.ended() == ""


@contextlib.contextmanager
def hang_up(how: signal.Handlers) -> Iterator[None]:
    """What a process that is started in the block has for SIGHUP, whatever this one was started with."""
    before = signal.signal(signal.SIGHUP, how)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_closed_drains_it(models):
    with hang_up(signal.SIG_DFL):
        child = Child(models, drain_s=3600.0)
    with child.connection() as slow:
        first, length = long_reply(slow)
        child.process.send_signal(signal.SIGHUP)
        for _ in range(10_000):
            if ask(child.url + "/v2/health/ready")[0] == 503:
                break
        child.process.send_signal(signal.SIGHUP)  # the shell's, after the kernel's
        got = first + whole(slow)
        assert len(got.partition(b"\r\n\r\n")[2]) == length
    _, errors = child.process.communicate(timeout=200)
    assert (child.process.returncode, errors) == (0, "")


def test_under_nohup_a_terminal_that_is_closed_is_not_heard(models):
    with hang_up(signal.SIG_IGN):
        child = Child(models)
    status = Path(f"/proc/{child.process.pid}/status").read_text()
    ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
    assert child.stop() == ""
    assert ignored >> (signal.SIGHUP - 1) & 1


def test_a_reply_that_nobody_reads_is_cut_at_the_end_of_the_drain(models):
    child = Child(models, drain_s=0.1)
    with child.connection() as deaf:
        long_reply(deaf)
        assert child.stop() == ""


def test_a_second_interrupt_does_not_wait_for_who_does_not_read(models):
    child = Child(models, drain_s=3600.0)
    with child.connection() as deaf:
        long_reply(deaf)
        child.process.send_signal(signal.SIGINT)
        while ask(child.url + "/v2/health/ready")[0] == 200:
            pass
        child.process.send_signal(signal.SIGINT)
        _, errors = child.process.communicate(timeout=200)
        assert (child.process.returncode, errors) == (0, "")


def test_nothing_inside_is_nothing_to_wait_for_and_a_second_interrupt_ends_it(models):
    child = Child(models)
    with child.connection() as idle:
        idle.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_to(idle, b"}").startswith(b"HTTP/1.1 200 ")
        assert child.stop() == "" and idle.recv(100) == b""
    child = Child(models)
    with child.connection() as busy:
        post(busy, SLOW, count(FOREVER))
        until_queued(child, "slow", 1)
        child.process.send_signal(signal.SIGINT)
        while ask(child.url + "/v2/health/ready")[0] == 200:
            pass
        child.process.send_signal(signal.SIGINT)
        assert whole(busy).startswith(b"HTTP/1.1 503 ")
        assert "Traceback" not in child.ended()


def test_what_prometheus_scrapes_is_what_was_asked(models):
    child = Child(models)
    try:
        for _ in range(3):
            assert ask(child.url + LINEAR, BODY)[0] == 200
        assert ask(child.url + LINEAR, b"{}")[0] == 400
        with child.connection() as rude:
            rude.sendall(b"rude\r\n\r\n")
            assert whole(rude).startswith(b"HTTP/1.1 400 ")
        status, headers, body = ask(child.url + "/metrics")
        assert status == 200 and headers["content-type"].startswith("text/plain; version=")
        found = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
        }
        ok = (("model", "linear"), ("reason", "ok"), ("status", "200"), ("version", "3"))
        assert found[("outrider_requests_total", *ok)] == found[("outrider_request_seconds_count", *ok)] == 3
        bad = (("model", "linear"), ("reason", "bad_input"), ("status", "400"), ("version", "3"))
        assert found[("outrider_requests_total", *bad)] == 1
        assert found["outrider_turned_away_total", ("status", "400")] == 1
        assert found["outrider_requests_inflight", ("model", "linear")] == 0
        quality = json.loads(ask(child.url + "/v2/quality")[2])
        assert quality["total"] | {"requests": 4, "answered": 3, "availability": 1.0} == quality["total"]
        assert 0 < quality["total"]["p50_ms"] <= quality["total"]["p99_ms"] <= quality["total"]["max_ms"]
    finally:
        child.stop()
    assert child.quality["total"]["answered"] == 3


class Served:
    """``outrider serve`` over real bundles."""

    def __init__(self, state: Path, *arguments: str | Path, **environment: str) -> None:
        command = [sys.executable, "-m", "outrider.cli", "serve", *map(str, arguments), "--port", "0"]
        env = {**os.environ, "STATE_DIRECTORY": str(state), **environment}
        self.process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
        said = []
        for line in self.process.stderr:
            said.append(line)
            if line.startswith("serving "):
                self.url = line.split()[-1]
                return
        raise AssertionError("".join(said))

    def stop(self) -> tuple[str, str]:
        self.process.terminate()
        out, errors = self.process.communicate(timeout=200)
        assert self.process.returncode == 0, errors
        return out, errors


def test_versions_of_one_name_stand_side_by_side_and_come_back_without_a_new_admission(tmp_path):
    bundles = {}
    for version, seed in ((2, 0), (10, 1)):
        path = tmp_path / f"tiny-{version}.outrider"
        bundles[version] = (path, make_real_bundle(path, version=version, seed=seed), seed)
    other = tmp_path / "other.outrider"
    make_real_bundle(other, name="other", seed=2)
    paths = [path for path, _, _ in bundles.values()]
    state = tmp_path / "state"
    x = images(3)
    tensor = {"name": "image", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
    body = json.dumps({"inputs": [tensor]}).encode()
    admitted = []
    for arguments in ((*paths, other), (other, *reversed(paths), "--json", "--access-log")):
        served = Served(state, *arguments)
        listed = json.loads(ask(served.url + "/v2/models")[2])["models"]
        assert sorted((row["name"], int(row["version"])) for row in listed) == [("other", 1), ("tiny", 2), ("tiny", 10)]
        for version, (_, digest, seed) in bundles.items():
            reply = json.loads(ask(f"{served.url}/v2/models/tiny/versions/{version}/infer", body)[2])
            assert (reply["model_version"], reply["parameters"]["bundle"]) == (str(version), digest)
            got = np.reshape(reply["outputs"][0]["data"], (3, 10))
            np.testing.assert_allclose(got, expected(x, seed), atol=1e-3)
        assert json.loads(ask(f"{served.url}/v2/models/tiny/infer", body)[2])["model_version"] == "10"
        with Remote(served.url, model="other") as remote:
            answer = remote.submit({"image": x}, Deadline.after_ms(120_000.0)).result(150)
            np.testing.assert_allclose(answer.outputs["logits"], expected(x, 2), atol=1e-3)
        out, errors = served.stop()
        admitted.append({path: path.stat().st_mtime_ns for path in state.rglob("names/*.json")})
    result = json.loads(out)
    assert result["quality"]["total"]["answered"] == 4 and result["url"].startswith("http://127.0.0.1:")
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    asked = [(line["path"], line["status"]) for line in lines if line["method"] == "POST"]
    assert len(asked) == 4 and {status for _, status in asked} == {200}
    assert len(admitted[0]) == 3 and admitted[0] == admitted[1]


def test_a_fresh_bundle_that_fails_is_rolled_back_and_the_endpoint_says_so_from_that_very_reply_on(tmp_path):
    state = tmp_path / "state"
    good = make_real_bundle(tmp_path / "1.outrider", version=1, seed=1)
    moody = tinymodels.moody_onnx(tinymodels.weights(2), "nan", above=1.5)
    fresh = make_real_bundle(tmp_path / "2.outrider", version=2, seed=2, files={"onnx": moody})
    for version in (1, 2):
        install(tmp_path / f"{version}.outrider", state=state)
    served = Served(state, "tiny")
    url = served.url + "/v2/models/tiny"
    x = images(3)

    def infer(x: np.ndarray, path: str = "/infer") -> tuple[int, dict]:
        tensor = {"name": "image", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
        status, _, body = ask(url + path, json.dumps({"inputs": [tensor]}).encode())
        return status, json.loads(body)

    for asked, version, digest, seed in ((x, "2", fresh, 2), (x + 2, "1", good, 1), (x, "1", good, 1)):
        status, reply = infer(asked)
        assert (status, reply["model_version"], reply["parameters"]["bundle"]) == (200, version, digest)
        np.testing.assert_allclose(np.reshape(reply["outputs"][0]["data"], (3, 10)), expected(asked, seed), atol=1e-3)
    model = json.loads(ask(url)[2])
    assert (model["versions"], model["parameters"]["outrider"]["bundle"]) == (["1"], good)
    assert infer(x, "/versions/1/infer")[0] == 200
    status, reply = infer(x, "/versions/2/infer")
    assert status == 404 and "it has 1" in reply["error"]
    out, _ = served.stop()
    assert "tiny version 2: 1 of 1" in out and "tiny version 1: 3 of 3" in out


def test_an_installed_name_is_served_and_the_same_bundle_twice_is_refused(tmp_path):
    path, state = tmp_path / "tiny.outrider", tmp_path / "state"
    make_real_bundle(path)
    command = [sys.executable, "-m", "outrider.cli"]
    env = {**os.environ, "STATE_DIRECTORY": str(state)}
    subprocess.run([*command, "install", str(path)], env=env, check=True, capture_output=True, timeout=250)
    served = Served(state, "tiny", OUTRIDER_TOKEN="right")
    assert ask(served.url + "/v2/models/tiny")[0] == 401
    assert ask(served.url + "/v2/models/tiny", Authorization="Bearer right")[0] == 200
    out, _ = served.stop()
    assert out.startswith("stopped; no request in ")
    again = [*command, "serve", str(path), str(path), "--port", "0"]
    done = subprocess.run(again, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 1 and "two bundles are named 'tiny' and have version 1" in done.stderr
    for wrong, says in (
        (["--tls-cert", "cert.pem"], "both --tls-cert and --tls-key"),
        (["--host", "0.0.0.0"], "would let anyone in"),
    ):
        done = subprocess.run(
            [*command, "serve", "tiny", "--port", "0", *wrong], env=env, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
