"""Remote over TLS: the certificate is always verified, and the deadline holds while hands are shaken."""

from __future__ import annotations

import datetime
import ssl
import time
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import ConfigError, DeadlineExceeded, RemoteUnavailable, RunnerClosed
from outrider_runtimes.remote import Remote
from support.servers import Server

X = np.float32([[1.0, 2.0]])
NOW = datetime.datetime.now(datetime.timezone.utc)


def certificate(folder: Path, *, host: str = "localhost", days: int = 1) -> Path:
    """A self-signed certificate for `host` with its key, in one PEM file; expired where `days` is negative."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(days=10))
        .not_valid_after(NOW + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{host}{days}.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + built.public_bytes(serialization.Encoding.PEM)
    )
    return path


def serving(pem: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


def ask(remote: Remote, milliseconds: float | None = 30_000.0) -> np.ndarray:
    return remote.submit({"x": X}, Deadline.after_ms(milliseconds)).result(60).outputs["y"]


def test_a_trusted_server_is_asked_over_one_connection(tmp_path):
    pem = certificate(tmp_path)
    trusting = ssl.create_default_context(cafile=pem)
    with Server(tls=serving(pem)) as server, Remote(server.url, model="m", tls=trusting, token="t") as remote:
        for _ in range(3):
            np.testing.assert_array_equal(ask(remote), X * 2)
        assert server.connections == 1
        server.drop()
        np.testing.assert_array_equal(ask(remote), X * 2)


@pytest.mark.parametrize(
    ("host", "days", "trusted", "match"),
    [
        ("localhost", 1, False, "self.signed"),
        ("other.example", 1, True, "ostname"),
        ("localhost", -1, True, "expired"),
    ],
)
def test_a_certificate_that_does_not_hold_is_refused(tmp_path, host, days, trusted, match):
    pem = certificate(tmp_path, host=host, days=days)
    context = ssl.create_default_context(cafile=pem) if trusted else None
    with Server(tls=serving(pem)) as server, Remote(server.url, model="m", tls=context) as remote:
        with pytest.raises(RemoteUnavailable, match=match) as caught:
            ask(remote)
        assert "certificate" in str(caught.value) and caught.value.hint
        assert not server.asked


def test_a_server_that_never_shakes_hands_is_late_and_close_wakes(tmp_path):
    with Server(hello=lambda server, _: server.stopping.wait() and None) as server:
        remote = Remote(server.url.replace("http://127.0.0.1", "https://localhost"), model="m")
        begun_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            ask(remote, 200.0)
        assert time.monotonic() - begun_s < 1.2
        future = remote.submit({"x": X}, Deadline.after_ms(None))
        with pytest.raises(FutureTimeout):
            future.result(0.3)
        remote.close()
        with pytest.raises(RunnerClosed):
            future.result(5)


def test_a_server_without_tls_is_unavailable():
    with Server() as server:
        remote = Remote(server.url.replace("http://127.0.0.1", "https://localhost"), model="m")
        with pytest.raises(RemoteUnavailable):
            ask(remote, 5000.0)
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
