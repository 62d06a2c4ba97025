"""Where a broker is, and how long to wait for it."""

from __future__ import annotations

import random
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from outrider.telemetry.mqtt import (
    FIRST_BACKOFF_S,
    MAX_BACKOFF_S,
    Broker,
    Connection,
    Credentials,
    Handlers,
    Message,
    backoff_s,
    parse_broker,
    to_credentials,
)
from outrider_runtimes.errors import ConfigError
from support.broker import wait_until


@pytest.mark.parametrize(
    ("url", "broker"),
    [
        ("mqtt://broker", Broker(host="broker", port=1883)),
        ("mqtt://127.0.0.1:2883/", Broker(host="127.0.0.1", port=2883)),
        ("mqtt://[::1]:1884", Broker(host="::1", port=1884)),
    ],
)
def test_a_url_names_host_and_port(url: str, broker: Broker) -> None:
    assert parse_broker(url) == broker
    assert parse_broker(str(broker)) == broker


def test_mqtts_verifies_unless_the_user_brings_a_context() -> None:
    broker = parse_broker("mqtts://broker")
    assert broker.port == 8883
    assert broker.tls is not None
    assert broker.tls.verify_mode == ssl.CERT_REQUIRED
    assert broker.tls.check_hostname
    mine = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    assert parse_broker("mqtts://broker:1", tls=mine).tls is mine


@pytest.mark.parametrize(
    "url",
    [
        *("", "broker", "broker:1883", "http://broker", "mqtt://", "mqtt://broker:0", "mqtt://broker:99999"),
        *("mqtt://broker:x", "mqtt://bro ker", "mqtt://broker/topic", "mqtt://broker?x=1", "mqtt://broker#x"),
        *("mqtt://[::1", None, 7),
    ],
)
def test_another_form_is_refused_with_the_right_one(url: object) -> None:
    with pytest.raises(ConfigError, match="broker url") as caught:
        parse_broker(url)  # type: ignore[arg-type]
    assert "mqtt://host:1883" in caught.value.hint


def test_secrets_do_not_belong_into_a_url_and_are_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_broker("mqtt://pi:hunter2@broker")
    assert "hunter2" not in str(caught.value)
    assert "credentials=" in caught.value.hint


def test_tls_for_a_plain_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not encrypted"):
        parse_broker("mqtt://broker", tls=tmp_path / "ca.pem")
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        parse_broker("mqtts://broker", tls=tmp_path / "ca.pem")


def test_credentials_are_a_pair_and_are_not_shown() -> None:
    assert to_credentials(None) is None
    credentials = to_credentials(("pi", "hunter2"))
    assert credentials == to_credentials(Credentials(username="pi", password="hunter2"))
    assert "hunter2" not in repr(credentials)
    for wrong in (
        "pi",
        ("pi",),
        ("pi", "x", "y"),
        (1, "x"),
        ("pi", 5),
        ("p" * 70_000, "x"),
        ("pi", "\0"),
        ("\ud800", "x"),
    ):
        with pytest.raises(ConfigError, match="credentials"):
            to_credentials(wrong)  # type: ignore[arg-type]


def test_the_wait_grows_to_a_bound_and_is_spread() -> None:
    rng = random.Random(1)
    waits = {attempt: [backoff_s(attempt, rng) for _ in range(500)] for attempt in (1, 2, 30, 10_000)}
    assert all(0.0 < wait <= MAX_BACKOFF_S for many in waits.values() for wait in many)
    assert max(waits[1]) <= FIRST_BACKOFF_S < max(waits[2]) <= 2 * FIRST_BACKOFF_S < max(waits[30])
    # Fifty devices that lost the same broker: no tenth of the time holds more than a fifth of them.
    in_tenths = [int(wait / (MAX_BACKOFF_S / 10)) for wait in waits[30]]
    assert max(in_tenths.count(tenth) for tenth in range(10)) < 0.2 * len(in_tenths)


def test_whatever_an_attempt_raises_the_connection_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outrider.telemetry.mqtt.CLOSE_TIMEOUT_S", 120.0)
    raised = []

    def will() -> Message:
        raised.append(1)
        raise ZeroDivisionError("no will")

    class Soon(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return 0.0

    connection = Connection(Broker(host="127.0.0.1", port=1), client_id="x", handlers=Handlers(), will=will, rng=Soon())
    connection.start()
    wait_until(lambda: len(raised) > 2)
    assert "no will" in connection.last_error
    assert connection.close()


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)


def test_telemetry_imports_no_client_before_it_is_used() -> None:
    done = run(
        "import sys, outrider.telemetry.reporter, outrider.telemetry.sink\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('paho', 'cryptography', 'torch', 'onnx')]"
    )
    assert done.returncode == 0, done.stderr


def test_without_paho_the_extra_is_named_and_the_spool_is_free_again(tmp_path: Path) -> None:
    done = run(
        "import sys; sys.modules['paho'] = None\n"
        "from outrider.telemetry import Reporter\n"
        "from outrider_runtimes.errors import MissingExtra\n"
        "for _ in range(2):\n"
        "    try:\n"
        f"        Reporter('mqtt://127.0.0.1', device='pi', state={str(tmp_path)!r})\n"
        "    except MissingExtra as error:\n"
        "        print(error.hint)\n"
    )
    assert done.stdout == "pip install 'outrider[mqtt]'\n" * 2, done.stderr
