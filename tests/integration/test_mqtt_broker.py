"""The connection to a broker: TLS, passwords, an old protocol, a twin, a full disk and a slow one."""

from __future__ import annotations

import datetime
import gc
import ipaddress
import random
import subprocess
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from outrider.prediction import Prediction
from outrider.telemetry import Reporter, Sink
from outrider_runtimes.tls import Tls
from support.amqtt_broker import running_amqtt
from support.broker import Mosquitto, wait_until
from support.ports import free_port
from support.telemetry import Source, a_prediction


def make_certificate(folder: Path, *, host: str) -> tuple[Path, Path]:
    """A certificate that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "the broker")])
    now = datetime.datetime.now(datetime.timezone.utc)
    alternative: x509.GeneralName = x509.DNSName(host)
    if host[0].isdigit():
        alternative = x509.IPAddress(ipaddress.ip_address(host))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    cert_path, key_path = folder / f"{host}.pem", folder / f"{host}.key"
    cert_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_path, key_path


def tls_broker(tmp_path: Path, *, host: str) -> tuple[Mosquitto, str, Path]:
    cert, key = make_certificate(tmp_path / "tls", host=host)
    port = free_port()
    extra = f"listener {port} 127.0.0.1\ncertfile {cert}\nkeyfile {key}\n"
    return Mosquitto(tmp_path / "mosquitto", extra=extra), f"mqtts://127.0.0.1:{port}", cert


def test_records_go_over_tls(tmp_path: Path) -> None:
    broker, url, cert = tls_broker(tmp_path, host="127.0.0.1")
    source = Source()
    with (
        broker,
        Sink(url, tls=cert) as sink,
        Reporter(url, device="pi-07", state=tmp_path, tls=str(cert), commit_interval_ms=20.0) as reporter,
    ):
        reporter.watch(source)
        source.predict(3000)
        assert reporter.flush(200.0, level="sink")
        assert sink.count().received == 3000


def test_a_broker_that_asks_for_a_certificate_gets_one(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path / "tls", host="127.0.0.1")
    mine, my_key = make_certificate(tmp_path / "tls", host="pi-07.example")
    port = free_port()
    extra = f"listener {port} 127.0.0.1\ncertfile {cert}\nkeyfile {key}\ncafile {mine}\nrequire_certificate true\n"
    url = f"mqtts://127.0.0.1:{port}"
    mutual = Tls(authority=cert, certificate=mine, key=my_key)
    source = Source()
    with Mosquitto(tmp_path / "mosquitto", extra=extra):
        with Reporter(url, device="pi-08", state=tmp_path, tls=cert) as stranger:
            wait_until(lambda: stranger.last_error)
            assert not stranger.connected
        with (
            Sink(url, tls=mutual) as sink,
            Reporter(url, device="pi-07", state=tmp_path, tls=mutual, commit_interval_ms=20.0) as reporter,
        ):
            reporter.watch(source)
            source.predict(100)
            assert reporter.flush(200.0, level="sink")
            assert sink.count().received == 100


@pytest.mark.parametrize(("host", "trusted"), [("other.example", True), ("127.0.0.1", False)])
def test_a_broker_that_cannot_prove_who_it_is_gets_nothing(tmp_path: Path, host: str, trusted: bool) -> None:
    broker, url, cert = tls_broker(tmp_path, host=host)
    with broker, Reporter(url, device="pi-07", state=tmp_path, tls=cert if trusted else None) as reporter:
        wait_until(lambda: "certificate" in reporter.last_error.lower(), what=reporter.last_error)
        assert not reporter.connected


def test_a_wrong_password_is_said_and_the_right_one_is_taken(tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-c", "-b", str(passwords), "pi", "right"], check=True, capture_output=True)
    broker = Mosquitto(tmp_path / "mosquitto")
    config = tmp_path / "mosquitto" / "mosquitto.conf"
    config.write_text(
        config.read_text().replace("allow_anonymous true", f"allow_anonymous false\npassword_file {passwords}")
    )
    with broker:
        for credentials in (None, ("pi", "wrong")):
            with Reporter(broker.url, device="pi-07", state=tmp_path, credentials=credentials) as reporter:
                wait_until(lambda reporter=reporter: "Not authorized" in reporter.last_error, what="refusal")
                assert not reporter.connected
        with Reporter(broker.url, device="pi-07", state=tmp_path, credentials=("pi", "right")) as reporter:
            wait_until(lambda: reporter.connected, what=reporter.last_error)


def test_a_subscription_that_is_refused_is_said(tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.write_text("topic write outrider/#\n")
    broker = Mosquitto(tmp_path / "mosquitto", extra=f"acl_file {rules}\nallow_zero_length_clientid true\n")
    with broker, Reporter(broker.url, device="pi-07", state=tmp_path) as reporter:
        # mosquitto 2.0 takes the subscription and delivers nothing; others refuse it. Records wait either way.
        wait_until(lambda: reporter.connected or "refused" in reporter.last_error)
        reporter.event("x")
        assert not reporter.flush(0.3, level="sink")
        assert reporter.account().pending == 1


def test_a_broker_that_knows_3_1_1_alone_is_served(tmp_path: Path) -> None:
    source = Source()
    with (
        running_amqtt() as url,
        Sink(url) as sink,
        Reporter(url, device="pi-07", state=tmp_path, commit_interval_ms=20.0, rng=random.Random(1)) as reporter,
    ):
        wait_until(lambda: sink.connected and reporter.connected)
        reporter.watch(source)
        source.predict(1000)
        assert reporter.flush(200.0, level="sink")
        assert (sink.count().received, sink.count().gaps) == (1000, 0)


def test_a_twin_with_the_same_device_id_is_noticed(tmp_path: Path) -> None:
    with (
        Mosquitto(tmp_path / "mosquitto") as broker,
        Reporter(broker.url, device="pi-07", state=tmp_path / "one") as one,
    ):
        wait_until(lambda: one.connected)
        said: list[str] = []
        with Reporter(broker.url, device="pi-07", state=tmp_path / "two") as two:
            twin = "is another client connected as outrider-pi-07?"
            wait_until(lambda: said.append(one.last_error + two.last_error) or twin in said[-1])


def test_a_prediction_is_not_kept_for_its_outputs(tmp_path: Path) -> None:
    source = Source()
    with Reporter("mqtt://127.0.0.1:1", device="pi-07", state=tmp_path, commit_interval_ms=3_600_000.0) as reporter:
        reporter.watch(source)
        callback: Callable[[Prediction], None] = source.callbacks[0]
        prediction = a_prediction()
        outputs = weakref.ref(prediction.outputs["logits"])
        callback(prediction)
        del prediction
        gc.collect()
        assert reporter.account().offered == 1
        assert outputs() is None
