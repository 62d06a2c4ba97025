"""The endpoint over TLS, with and without certificates of its callers, and whom it listens for."""

from __future__ import annotations

import socket
import ssl
import urllib.request

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization

from outrider.endpoint import Listening, ServerTls
from outrider.endpoint.listening import listener
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import ConfigError, RemoteUnavailable
from outrider_runtimes.remote import Remote
from outrider_runtimes.tls import Tls
from support.certificates import issue
from support.endpoint_child import Child, expected, write_models

pytestmark = pytest.mark.slow

X = np.float32([[0.5, -0.5, 0.25, 0.0]])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def files(issued, **more) -> dict[str, str]:
    return {"cert": str(issued.certificate), "key": str(issued.key)} | {key: str(path) for key, path in more.items()}


def https(child: Child) -> str:
    return child.url.replace("127.0.0.1", "localhost")


def infer(url: str, **options) -> np.ndarray:
    with Remote(url, model="linear", **options) as remote:
        return remote.submit({"x": X}, Deadline.after_ms(120_000.0)).result(150).outputs["y"]


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_tls_a_token_and_what_is_not_tls(models, tmp_path):
    own = issue(tmp_path)
    child = Child(models, tls=files(own), token="right")
    try:
        assert child.url.startswith("https://127.0.0.1:")
        np.testing.assert_allclose(infer(https(child), tls=own.certificate, token="right"), expected(X), rtol=1e-5)
        with pytest.raises(RemoteUnavailable, match="refused"):
            infer(https(child), token="right")
        with child.connection() as plain:
            plain.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert not plain.recv(100).startswith(b"HTTP")
        old = ssl.create_default_context(cafile=own.certificate)
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with child.connection() as connection, pytest.raises(OSError):
            old.wrap_socket(connection, server_hostname="localhost")
        trusting = ssl.create_default_context(cafile=own.certificate)
        with urllib.request.urlopen(https(child) + "/v2/health/ready", context=trusting, timeout=120) as reply:
            assert reply.status == 200
    finally:
        assert "Traceback" not in child.stop()


def test_certificates_of_callers(models, tmp_path):
    authority, other = issue(tmp_path, host="authority"), issue(tmp_path, host="other")
    server = issue(tmp_path, by=authority)
    device, late = issue(tmp_path, host="pi-07", by=authority), issue(tmp_path, host="pi-08", days=-1, by=authority)
    stranger = issue(tmp_path, host="pi-09", by=other)
    child = Child(models, tls=files(server, client_ca=authority.certificate))
    try:
        for shown in (device, late, stranger, None):
            own = {} if shown is None else {"certificate": shown.certificate, "key": shown.key}
            tls = Tls(authority=authority.certificate, **own)
            if shown is device:
                np.testing.assert_allclose(infer(https(child), tls=tls), expected(X), rtol=1e-5)
            else:
                with pytest.raises(RemoteUnavailable):
                    infer(https(child), tls=tls)
    finally:
        assert "Traceback" not in child.stop()
    assert child.quality["total"]["requests"] == 1


def test_a_drain_over_tls_ends_with_exit_code_0_while_a_handshake_hangs(models, tmp_path):
    own = issue(tmp_path)
    child = Child(models, tls=files(own))
    with child.connection() as silent:
        silent.sendall(b"\x16\x03\x01")
        np.testing.assert_allclose(infer(https(child), tls=own.certificate), expected(X), rtol=1e-5)
        assert "Traceback" not in child.stop()


@pytest.mark.parametrize("broken", ["cert", "key", "client_ca", "another key", "passphrase", "missing"])
def test_files_that_do_not_serve_are_named_before_anything_listens(tmp_path, broken):
    own, other = issue(tmp_path), issue(tmp_path, host="other")
    junk = tmp_path / "junk.pem"
    junk.write_text("-----BEGIN CERTIFICATE-----\nnot base64\n-----END CERTIFICATE-----\n")
    locked = tmp_path / "locked.pem"
    lock = serialization.BestAvailableEncryption(b"secret")
    locked.write_bytes(own.private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock))
    given = {"cert": own.certificate, "key": own.key, "client_ca": own.certificate} | {
        "cert": {"cert": junk},
        "key": {"key": junk},
        "client_ca": {"client_ca": junk},
        "another key": {"key": other.key},
        "passphrase": {"key": locked},
        "missing": {"cert": tmp_path / "none.pem"},
    }[broken]
    with pytest.raises(ConfigError) as caught:
        ServerTls(**given).context()
    changed = next(path for path in given.values() if path not in (own.certificate, own.key))
    assert str(changed) in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_beyond_this_machine_somebody_has_to_say_who_may_come(tmp_path, host):
    with pytest.raises(ConfigError, match=f"listening on {host} would let anyone in") as caught:
        listener(Listening(host=host, port=0), secured=False)
    assert all(word in caught.value.hint for word in ("OUTRIDER_TOKEN", "--client-ca", "--anyone"))
    own = issue(tmp_path)
    tls = ServerTls(cert=own.certificate, key=own.key)
    with pytest.raises(ConfigError, match="anyone"):
        listener(Listening(host=host, port=0, tls=tls), secured=False)
    for listening, secured in (
        (Listening(host=host, port=0), True),
        (Listening(host=host, port=0, anyone=True), False),
        (Listening(host=host, port=0, tls=ServerTls(cert=own.certificate, key=own.key, client_ca=own.path)), False),
    ):
        listener(listening, secured=secured).close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_alone_needs_no_guard(host):
    with listener(Listening(host=host, port=0), secured=False) as made:
        assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_host_that_has_no_address_is_a_config_error():
    with pytest.raises(ConfigError, match=r"cannot listen on no\.such\.host\.invalid:8000"):
        listener(Listening(host="no.such.host.invalid"), secured=True)
