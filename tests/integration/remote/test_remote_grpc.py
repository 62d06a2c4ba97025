"""Remote over gRPC against real servers: what it is over HTTP, and the same typed errors by the deadline."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from concurrent.futures import TimeoutError as FutureTimeout

import grpc
import numpy as np
import pytest

from outrider.cli import main
from outrider_runtimes import oip_grpc
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    InputError,
    RemoteRefused,
    RemoteUnavailable,
    ReplyError,
    RunnerClosed,
)
from outrider_runtimes.remote import Remote
from outrider_runtimes.tls import Tls
from support import grpc_servers, servers
from support.certificates import issue
from support.grpc_servers import GrpcServer
from support.hostile_grpc import WRONG
from support.ports import free_port

pytestmark = pytest.mark.slow

X = np.float32([[1.0, 2.0], [3.0, 4.0]])
DEADLINE_MS = 200.0
LATE_S = 120.0  # what a stalled machine may add
FOREVER_MS = 120_000.0


def ask(remote: Remote, milliseconds: float | None = FOREVER_MS) -> np.ndarray:
    future = remote.submit({"x": X}, Deadline.after_ms(milliseconds))
    try:
        return future.result(200.0 if milliseconds is None else milliseconds / 1000.0 + LATE_S).outputs["y"]
    except DeadlineExceeded:
        raise
    except FutureTimeout:
        pytest.fail("the future did not end by its deadline")


def well(remote: Remote) -> None:
    np.testing.assert_array_equal(ask(remote), X * 2)


@pytest.fixture
def server():
    with GrpcServer() as server:
        yield server


@pytest.fixture
def remote(server):
    with Remote(server.url, model="m", retries=0) as remote:
        yield remote


def test_a_good_server_is_answered(server, remote):
    well(remote)
    well(remote)
    assert (remote.bundle, remote.variant, remote.interface) == ("b" * 64, "v", servers.INTERFACE)
    assert remote.interface_digest == servers.INTERFACE.digest
    answer = remote.submit({"x": X}, Deadline.after_ms(None)).result(200)
    timing = answer.timing_ms
    assert timing.infer == 0.001 and 0 < timing.network < timing.total
    assert answer.outputs["y"].flags.writeable


def test_the_time_left_travels_both_ways(server, remote):
    well(remote)
    left: list[tuple[float, int]] = []

    def infer(server, asked, context):
        left.append((context.time_remaining(), oip_grpc.decode_request(asked).request.timeout_us))
        return grpc_servers.good(server, asked, context)

    server.infer = infer
    ask(remote, 20_000.0)
    assert 0 < left[0][0] < 21.0 and 0 < left[0][1] <= 20_000_000  # gRPC rounds up
    ask(remote, None)
    assert left[1][1] is None


def test_a_foreign_server_has_the_interface_of_its_metadata():
    with GrpcServer(ours={}) as server, Remote(server.url, model="m") as remote:
        well(remote)
        assert (remote.bundle, remote.interface.inputs[0].shape) == ("", (None, 2))


def test_wrong_inputs_are_refused_here(server, remote):
    with pytest.raises(InputError, match="'x'"):
        remote.submit({"x": X.astype(np.float64)}, Deadline.after_ms(FOREVER_MS)).result(200)
    with pytest.raises(InputError, match="'x'"):
        remote.submit({"x": X[0]}, Deadline.after_ms(FOREVER_MS))
    assert not server.asked
    well(remote)


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_a_reply_error(server, remote, fault):
    well(remote)
    server.infer = WRONG[fault]
    with pytest.raises(ReplyError):
        ask(remote)
    server.infer = grpc_servers.good
    well(remote)


@pytest.mark.parametrize("size", [1_000, 200_000_000])
def test_a_compressed_reply_is_refused_and_not_inflated(size):
    """200 MB of zeros are 200 kB on the way."""
    server = GrpcServer(compression=grpc.Compression.Gzip)
    with server, Remote(server.url, model="m", retries=0) as remote:
        server.metadata = grpc_servers.says(b"\0" * size)
        with pytest.raises(ReplyError):
            remote.connect(Deadline.after_ms(FOREVER_MS))


@pytest.mark.parametrize(
    ("behave", "status", "match"),
    [
        (grpc_servers.aborts(grpc.StatusCode.INVALID_ARGUMENT, "input 'x' is wrong"), 400, "input 'x' is wrong"),
        (grpc_servers.aborts(grpc.StatusCode.NOT_FOUND, "no model"), 404, "no model"),
        (grpc_servers.aborts(grpc.StatusCode.UNAUTHENTICATED, "no token"), 401, "no token"),
        (grpc_servers.aborts(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"), 429, "full"),
        (grpc_servers.aborts(grpc.StatusCode.INTERNAL, "a\x1b[31m\nb"), 500, r"a \[31m b"),
        (grpc_servers.aborts(grpc.StatusCode.UNKNOWN, "x" * 5000), 500, "x{300}$"),
        (grpc_servers.aborts(grpc.StatusCode.UNAVAILABLE, "drain", grpc_retry_pushback_ms="1500"), 503, "drain"),
    ],
)
def test_an_error_status_is_refused_with_what_it_says(server, remote, behave, status, match):
    well(remote)
    server.infer = behave
    with pytest.raises(RemoteRefused, match=match) as caught:
        ask(remote)
    assert caught.value.status == status
    assert caught.value.retry_after_s == (1.5 if status == 503 else None)
    server.infer = grpc_servers.good
    well(remote)


def test_a_request_longer_than_the_server_takes_is_no_busy_server():
    """gRPC gives it the code of a full queue; over HTTP it is 413, and it is not sent again."""
    with GrpcServer(max_request_bytes=1000) as server, Remote(server.url, model="m") as remote:
        well(remote)
        with pytest.raises(RemoteRefused, match="larger than max") as caught:
            remote.infer({"x": np.zeros((1000, 2), np.float32)}, deadline_ms=FOREVER_MS)
        assert (caught.value.status, caught.value.busy, len(server.asked)) == (413, False, 1)
        assert "fewer rows" in caught.value.hint
        well(remote)


def test_a_server_that_speaks_of_length_itself_is_heard_as_it_codes_it(server, remote):
    server.infer = grpc_servers.aborts(grpc.StatusCode.INVALID_ARGUMENT, "Received message larger than max of 3 rows")
    with pytest.raises(RemoteRefused) as caught:
        ask(remote)
    assert caught.value.status == 400


def test_a_method_that_is_not_served_is_refused():
    class Nothing(grpc.GenericRpcHandler):
        def service(self, details):
            return None

    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Nothing()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Remote(f"grpc://127.0.0.1:{port}", model="m") as remote, pytest.raises(RemoteRefused) as caught:
        ask(remote)
    assert caught.value.status == 501
    server.stop(0).wait()


def test_what_is_too_slow_ends_by_the_deadline(server, remote):
    well(remote)
    server.infer = grpc_servers.silent
    begun_s = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        ask(remote, DEADLINE_MS)
    assert time.monotonic() - begun_s < DEADLINE_MS / 1000 + LATE_S
    server.infer = grpc_servers.good
    well(remote)


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 4096])
def test_what_does_not_speak_grpc_ends_by_the_deadline(greeting):
    with (
        servers.Server(hello=lambda server, c: (c.sendall(greeting), server.stopping.wait())) as server,
        Remote(server.url.replace("http", "grpc"), model="m") as remote,
    ):
        begun_s = time.monotonic()
        with pytest.raises((DeadlineExceeded, RemoteUnavailable)):
            ask(remote, DEADLINE_MS)
        assert time.monotonic() - begun_s < DEADLINE_MS / 1000 + LATE_S


def test_nothing_listening_is_unavailable_and_a_server_that_comes_back_is_found():
    server = GrpcServer(port=free_port())
    with Remote(server.url, model="m", retries=0) as remote:
        well(remote)
        server.stop()
        with pytest.raises(RemoteUnavailable):
            ask(remote)
        with GrpcServer(port=server.port):
            give_up_s = time.monotonic() + 120
            while time.monotonic() < give_up_s:
                try:
                    well(remote)
                    return
                except RemoteUnavailable as error:
                    assert error.unsent or "Socket closed" in str(error) or "GOAWAY" in str(error), error
            pytest.fail("it was not found again")


def test_a_busy_endpoint_is_asked_again_when_it_says(server):
    answers = iter([False, False, True])
    busy = grpc_servers.aborts(grpc.StatusCode.UNAVAILABLE, "busy", grpc_retry_pushback_ms="0")
    server.infer = lambda *asked: grpc_servers.good(*asked) if next(answers) else busy(*asked)
    with Remote(server.url, model="m") as remote:
        well(remote)
    assert len(server.asked) == 3


def test_a_closed_remote_does_not_connect(server):
    remote = Remote(server.url, model="m")
    remote.close()
    with pytest.raises(RunnerClosed):
        remote.connect(Deadline.after_ms(FOREVER_MS))


def test_a_token_goes_to_this_machine(server):
    with Remote(server.url, model="m", token="s3cret") as remote:
        well(remote)
    assert server.asked[-1]["authorization"] == "Bearer s3cret"


def test_tls_is_verified_and_certificates_are_shown(tmp_path):
    authority = issue(tmp_path, host="authority")
    server_s, client_s = issue(tmp_path, by=authority), issue(tmp_path, host="pi", by=authority)
    with GrpcServer(tls=server_s, clients=authority) as server:
        good = Tls(authority=authority.certificate, certificate=client_s.certificate, key=client_s.key)
        for tls in (good, Tls(authority=authority.path, certificate=client_s.path)):
            with Remote(server.url, model="m", tls=tls, token="t") as remote:
                well(remote)
        with Remote(server.url, model="m", tls=authority.certificate) as remote, pytest.raises(RemoteUnavailable):
            ask(remote)


@pytest.mark.parametrize(
    ("host", "days", "trusted"), [("localhost", 1, False), ("other.example", 1, True), ("localhost", -1, True)]
)
def test_a_certificate_that_does_not_hold_is_refused(tmp_path, host, days, trusted):
    own = issue(tmp_path, host=host, days=days)
    tls = own.certificate if trusted else None
    with GrpcServer(tls=own) as server, Remote(server.url, model="m", tls=tls) as remote:
        with pytest.raises(RemoteUnavailable, match="certificate") as caught:
            ask(remote)
        assert "tls=" in caught.value.hint and not server.asked


@pytest.mark.parametrize(
    ("url", "options", "match"),
    [
        ("grpc://host/path", {}, "no paths"),
        ("grpc://host", {"token": "secret"}, "in the clear"),
        ("grpc://host", {"tls": Tls()}, "the URL is grpc"),
        ("grpcs://host", {"tls": __import__("ssl").create_default_context()}, "no SSLContext"),
        ("grpcx://host", {}, "not the URL"),
    ],
)
def test_what_cannot_be_used_is_refused_when_it_is_named(url, options, match):
    with pytest.raises(ConfigError, match=match) as caught:
        Remote(url, model="m", **options)
    assert "secret" not in str(caught.value) and caught.value.hint


def test_http_does_not_import_grpc_and_a_missing_one_is_named():
    """In a fresh process where grpc cannot be imported."""
    code = (
        "import sys, json; sys.modules['grpc'] = None\n"
        "from outrider_runtimes.errors import MissingExtra\n"
        "from outrider_runtimes.remote import Remote\n"
        "Remote('http://127.0.0.1:9', model='m').close()\n"
        "loaded = sorted(name for name in sys.modules if name.startswith(('google', 'grpc')) and name != 'grpc')\n"
        "try:\n    Remote('grpc://127.0.0.1:9', model='m')\n"
        "except MissingExtra as error:\n    print(json.dumps([loaded, str(error), error.hint]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    loaded, message, hint = json.loads(run.stdout)
    assert loaded == [] and "'grpcio'" in message and hint == "pip install 'outrider[grpc]'"


def test_metadata_is_bounded_and_decoded_only_where_there_is_time(server):
    now = [0.0]

    def moves(server, asked, context):
        now[0] += 29.8
        return grpc_servers.good_metadata(server, asked, context)

    server.ours = {"pad": [[]] * 150_000}
    server.metadata = moves
    with Remote(server.url, model="m") as remote:
        with pytest.raises(DeadlineExceeded, match="to decode its"):
            remote.connect(Deadline(30.0, clock=lambda: now[0]))
        assert remote.connect(Deadline.after_ms(FOREVER_MS)) == servers.INTERFACE
    server.ours = {"pad": " " * (1 << 20)}
    with Remote(server.url, model="m") as remote, pytest.raises(ReplyError, match="more than 1048576 bytes"):
        remote.connect(Deadline.after_ms(FOREVER_MS))


def test_the_command_takes_its_url(server, tmp_path, capsys):
    asked, answered = tmp_path / "asked.npz", tmp_path / "answered.npz"
    np.savez(asked, x=X)
    assert main(["infer", f"{server.url}/m", "--input", str(asked), "--output", str(answered)]) == 0
    with np.load(answered) as file:
        np.testing.assert_array_equal(file["y"], X * 2)
    assert main(["infer", "ftp://127.0.0.1/m", "--input", str(asked), "--output", str(answered)]) != 0
    assert "grpc://host:port" in capsys.readouterr().err


def test_a_name_that_does_not_exist_is_unavailable():
    typed = pytest.raises((RemoteUnavailable, DeadlineExceeded), match="no-such-host")
    with Remote("grpc://no-such-host.invalid:8001", model="m") as remote, typed:
        ask(remote)


def test_a_port_where_nobody_listens_is_tried_again_and_then_unavailable():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"grpc://127.0.0.1:{taken.getsockname()[1]}"
        with Remote(url, model="m") as remote, pytest.raises(RemoteUnavailable, match="refused") as caught:
            ask(remote)
        assert caught.value.unsent
