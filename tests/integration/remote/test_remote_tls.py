"""Remote over TLS: the certificate is always verified, and the deadline holds while hands are shaken."""

from __future__ import annotations

import ssl
import time
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization

from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import ConfigError, DeadlineExceeded, RemoteUnavailable, RunnerClosed
from outrider_runtimes.remote import Remote
from outrider_runtimes.tls import Tls
from support import servers
from support.certificates import issue, serving
from support.servers import Server

X = np.float32([[1.0, 2.0]])


def ask(remote: Remote, milliseconds: float | None = 120_000.0) -> np.ndarray:
    return remote.submit({"x": X}, Deadline.after_ms(milliseconds)).result(200).outputs["y"]


def test_a_trusted_server_is_asked_however_trust_is_given(tmp_path):
    own = issue(tmp_path)
    for trusting in (
        ssl.create_default_context(cafile=own.path),
        own.certificate,
        str(own.path),
        Tls(authority=own.path),
    ):
        with Server(tls=serving(own)) as server, Remote(server.url, model="m", tls=trusting, token="t") as remote:
            np.testing.assert_array_equal(ask(remote), X * 2)


def test_one_connection_serves_many_requests_and_is_replaced(tmp_path):
    own = issue(tmp_path)
    with Server(tls=serving(own)) as server, Remote(server.url, model="m", tls=own.certificate) as remote:
        for _ in range(3):
            np.testing.assert_array_equal(ask(remote), X * 2)
        assert server.connections == 1
        server.drop()
        np.testing.assert_array_equal(ask(remote), X * 2)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("rows", [2_048, 2_049, 2_000_000])
def test_bodies_of_every_size_arrive_whole(tmp_path, version, rows):
    """16 MB is more than the kernel takes at once."""
    own, x = issue(tmp_path), np.random.default_rng(rows).random((rows, 2), np.float32)
    context = serving(own)
    context.maximum_version = version
    with Server(tls=context) as server, Remote(server.url, model="m", tls=own.certificate) as remote:
        for _ in range(2):
            np.testing.assert_array_equal(remote.infer(x, deadline_ms=120_000.0).outputs["y"], x * 2)
        assert server.connections == 1


def test_unasked_bytes_that_tls_has_taken_in_already_are_not_taken_for_a_reply(tmp_path):
    """They are in the last record of a reply that needs two: the socket has nothing more to read."""

    def infer(server, connection, asked):
        connection.sendall(servers.sent(servers.right_reply(server, asked)) + b"HTTP/1.1 500 No\r\n\r\n")

    own, x = issue(tmp_path), np.ones((3000, 2), np.float32)
    with Server(tls=serving(own), infer=infer) as server, Remote(server.url, model="m", tls=own.certificate) as remote:
        for _ in range(3):
            np.testing.assert_array_equal(remote.infer(x, deadline_ms=120_000.0).outputs["y"], x * 2)
        assert server.connections == 3


@pytest.mark.parametrize(
    ("host", "days", "trusted", "match"),
    [
        ("localhost", 1, False, "self.signed"),
        ("other.example", 1, True, "ostname"),
        ("localhost", -1, True, "expired"),
    ],
)
def test_a_certificate_that_does_not_hold_is_refused(tmp_path, host, days, trusted, match):
    own = issue(tmp_path, host=host, days=days)
    tls = own.certificate if trusted else None
    with Server(tls=serving(own)) as server, Remote(server.url, model="m", tls=tls) as remote:
        with pytest.raises(RemoteUnavailable, match=match) as caught:
            ask(remote)
        assert "certificate" in str(caught.value) and caught.value.hint
        assert not server.asked


def test_where_this_machines_clock_is_behind_the_certificate_the_hint_names_the_clock(tmp_path):
    """As on a board that has no battery for its clock and has just started."""
    own = issue(tmp_path, days=20, begins_days=10)
    with Server(tls=serving(own)) as server, Remote(server.url, model="m", tls=own.certificate) as remote:
        with pytest.raises(RemoteUnavailable, match="not yet valid") as caught:
            ask(remote)
        assert "this machine's clock" in caught.value.hint and not caught.value.unsent
        assert not server.asked


def test_a_server_that_never_shakes_hands_is_late_and_close_wakes(tmp_path):
    with Server(hello=lambda server, _: server.stopping.wait() and None) as server:
        remote = Remote(server.url.replace("http://127.0.0.1", "https://localhost"), model="m")
        begun_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            ask(remote, 200.0)
        assert time.monotonic() - begun_s < 120.0  # what a stalled machine may add
        future = remote.submit({"x": X}, Deadline.after_ms(None))
        with pytest.raises(FutureTimeout):
            future.result(0.3)
        remote.close()
        with pytest.raises(RunnerClosed):
            future.result(200)


def test_a_server_without_tls_is_unavailable():
    with Server() as server:
        remote = Remote(server.url.replace("http://127.0.0.1", "https://localhost"), model="m")
        with pytest.raises(RemoteUnavailable, match="TLS: "):
            ask(remote)
        server.hello = lambda server, connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(RemoteUnavailable, match="does not speak TLS"):
            ask(remote)
        remote.close()


def test_a_context_that_does_not_verify_is_refused():
    blind = ssl.create_default_context()
    blind.check_hostname = False
    with pytest.raises(ConfigError, match="does not verify"):
        Remote("https://host", model="m", tls=blind)
    blind.verify_mode = ssl.CERT_NONE
    with pytest.raises(ConfigError, match="does not verify"):
        Remote("https://host", model="m", tls=blind)
    with pytest.raises(ConfigError, match="the URL is http"):
        Remote("http://host", model="m", tls=ssl.create_default_context())


def test_another_authority_is_not_trusted(tmp_path):
    authority, other = issue(tmp_path, host="authority"), issue(tmp_path, host="other")
    server_s = issue(tmp_path, by=authority)
    with Server(tls=serving(server_s)) as server:
        with Remote(server.url, model="m", tls=authority.certificate) as remote:
            np.testing.assert_array_equal(ask(remote), X * 2)
        refused = pytest.raises(RemoteUnavailable, match=r"certificate of localhost:\d+ was refused")
        with Remote(server.url, model="m", tls=other.certificate) as remote, refused:
            ask(remote)


def test_a_server_that_asks_for_a_certificate_gets_ours(tmp_path):
    authority = issue(tmp_path, host="authority")
    server_s, client_s = issue(tmp_path, by=authority), issue(tmp_path, host="pi-07", by=authority)
    stranger = issue(tmp_path, host="stranger")
    pair = Tls(authority=authority.certificate, certificate=client_s.certificate, key=client_s.key)
    one_file = Tls(authority=authority.certificate, certificate=client_s.path)
    own = ssl.create_default_context(cafile=authority.certificate)
    own.load_cert_chain(client_s.path)
    with Server(tls=serving(server_s, clients=authority)) as server:
        for tls in (pair, one_file, own):
            with Remote(server.url, model="m", tls=tls) as remote:
                np.testing.assert_array_equal(ask(remote), X * 2)
        for tls in (authority.certificate, Tls(authority=authority.certificate, certificate=stranger.path)):
            ours = pytest.raises(RemoteUnavailable, match="refused this client's certificate")
            with Remote(server.url, model="m", tls=tls) as remote, ours as caught:
                ask(remote)
            assert "certificate=" in caught.value.hint
        with Remote(server.url, model="m", tls=pair) as remote:
            np.testing.assert_array_equal(ask(remote), X * 2)


def test_files_that_cannot_be_used_are_named(tmp_path):
    own, other = issue(tmp_path), issue(tmp_path, host="other")
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("no certificate")
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        own.private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    for tls, match in (
        (tmp_path / "none.pem", "none.pem: No such file"),
        (rubbish, "rubbish.pem: "),
        (Tls(certificate=rubbish), "rubbish.pem: "),
        (Tls(certificate=own.certificate), "-certificate.pem: "),
        (Tls(certificate=own.certificate, key=other.key), "KEY_VALUES_MISMATCH|key values mismatch"),
        (Tls(certificate=own.certificate, key=locked), "-certificate.pem: "),
        (5, "tls= is a int"),
    ):
        with pytest.raises(ConfigError, match=match) as caught:
            Remote("https://host", model="m", tls=tls)
        assert caught.value.hint
    with pytest.raises(ConfigError, match="a key and no certificate"):
        Tls(key=own.key)
