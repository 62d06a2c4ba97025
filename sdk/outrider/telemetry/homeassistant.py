"""A device as Home Assistant finds it: MQTT device discovery, and the one retained message that its entities read.

https://www.home-assistant.io/integrations/mqtt: "Device discovery payload", availability, and the birth message. The
entities are unavailable while docs/telemetry.md's status topic does not say ``online``.
"""

from __future__ import annotations

import json
import os
import ssl
import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

from outrider._version import __version__
from outrider.telemetry.attachment import Attachment
from outrider.telemetry.mqtt import Connection, Credentials, Handlers, Message, parse_broker, to_credentials
from outrider.telemetry.record import check_device, topics
from outrider.telemetry.vitals import Vitals
from outrider_runtimes.errors import ConfigError, TelemetryError

PREFIX: Final = "homeassistant"

# object id -> platform, name and what Home Assistant's schema of that platform takes. Templates see the vitals message.
_COMPONENTS: Final[dict[str, dict[str, Any]]] = {
    "model": {
        "platform": "sensor",
        "name": "Model",
        "value_template": "{{ value_json.model }}",
        "icon": "mdi:brain",
        "entity_category": "diagnostic",
    },
    "version": {
        "platform": "sensor",
        "name": "Model version",
        "value_template": "{{ value_json.version }}",
        "icon": "mdi:tag",
        "entity_category": "diagnostic",
    },
    "p95_latency": {
        "platform": "sensor",
        "name": "Latency p95",
        "value_template": "{{ value_json.p95_ms }}",
        "device_class": "duration",
        "unit_of_measurement": "ms",
        "state_class": "measurement",
        "suggested_display_precision": 1,
    },
    "temperature": {
        "platform": "sensor",
        "name": "Temperature",
        "value_template": "{{ value_json.temperature_c }}",
        "device_class": "temperature",
        "unit_of_measurement": "°C",
        "state_class": "measurement",
        "suggested_display_precision": 1,
        "entity_category": "diagnostic",
    },
    "offload_share": {
        "platform": "sensor",
        "name": "Offload share",
        "value_template": (
            "{{ none if value_json.offload_share is none else (value_json.offload_share * 100) | round(2) }}"
        ),
        "unit_of_measurement": "%",
        "state_class": "measurement",
        "suggested_display_precision": 1,
        "icon": "mdi:cloud-upload",
    },
}
_PROBLEM: Final[dict[str, Any]] = {
    "platform": "binary_sensor",
    "name": "Problem",
    "value_template": "{{ 'ON' if value_json.problems else 'OFF' }}",
    "device_class": "problem",
    "json_attributes_template": "{{ {'problems': value_json.problems, 'failures': value_json.failures} | tojson }}",
}


def discovery_topic(device: str, *, prefix: str = PREFIX) -> str:
    """Where the configuration of a device is."""
    return f"{prefix}/device/{_object_id(device)}/config"


def vitals_topic(device: str) -> str:
    """Where the values are: ``outrider/v1/<device>/vitals``."""
    return topics(device).status.removesuffix("status") + "vitals"


def discovery(device: str) -> bytes:
    """The configuration: one device, its entities, and where their values and the device's availability are."""
    node, state_topic = _object_id(device), vitals_topic(device)
    config = {
        "device": {
            "identifiers": [node],
            "name": device,
            "manufacturer": "Outrider",
            "model": "Inference device",
            "sw_version": __version__,
        },
        "origin": {"name": "outrider", "sw_version": __version__},
        "availability": [
            {"topic": topics(device).status, "value_template": "{{ value_json.state }}"},
        ],
        "state_topic": state_topic,
        "qos": 1,
        "components": {
            name: {**fields, "unique_id": f"{node}_{name}"}
            for name, fields in {**_COMPONENTS, "problem": {**_PROBLEM, "json_attributes_topic": state_topic}}.items()
        },
    }
    return json.dumps(config, ensure_ascii=False, separators=(",", ":")).encode()


def encode_vitals(told: Vitals) -> bytes:
    """The retained message that the entities read; null is unknown to Home Assistant."""
    return json.dumps({"v": 1, **asdict(told)}, separators=(",", ":"), allow_nan=False).encode()


class HomeAssistant:
    """Keeps Home Assistant told, over a reporter's connection.

    Attributes:
        attachment: what the reporter has to carry.
    """

    def __init__(self, *, device: str, post: Callable[[Message], bool], prefix: str = PREFIX) -> None:
        """``post`` is the reporter's, ``prefix`` Home Assistant's. Raises ConfigError for one a topic cannot hold."""
        self._status_topic = f"{_check_prefix(prefix)}/status"
        self._post = post
        self._config = Message(topic=discovery_topic(device, prefix=prefix), payload=discovery(device), retain=True)
        self._vitals_topic = vitals_topic(device)
        self._vitals = Vitals()
        self.attachment = Attachment(subscriptions=(self._status_topic,), up=self._tell_all, message=self._message)

    def tell(self, told: Vitals) -> None:
        """New values. From any thread."""
        self._vitals = told
        self._post(Message(topic=self._vitals_topic, payload=encode_vitals(told), retain=True))

    def _tell_all(self) -> None:
        self._post(self._config)
        self.tell(self._vitals)

    def _message(self, topic: str, payload: bytes, retained: bool) -> None:
        # A retained one is from before this connection, and `up` has told everything already.
        if topic == self._status_topic and payload == b"online" and not retained:
            self._tell_all()


def removal(*, device: str, post: Callable[[Message], bool], done: Callable[[], object]) -> Attachment:
    """What a reporter has to carry, to take the device out of Home Assistant at the next connection.

    Args:
        device: the reporter's.
        post: the reporter's. What it took is sent until the broker confirms it, or the process ends.
        done: called when it took all of it.
    """

    def up() -> None:
        if all(post(message) for message in _farewell(device, PREFIX)):
            done()

    return Attachment(up=up)


def _farewell(device: str, prefix: str) -> tuple[Message, ...]:
    """An empty retained message is how MQTT forgets a topic, and how Home Assistant is told that a device is gone."""
    left = (discovery_topic(device, prefix=_check_prefix(prefix)), vitals_topic(device))
    return tuple(Message(topic=topic, payload=b"", retain=True) for topic in left)


def remove(
    url: str,
    *,
    device: str,
    prefix: str = PREFIX,
    tls: ssl.SSLContext | str | os.PathLike[str] | None = None,
    credentials: Credentials | tuple[str, str | None] | None = None,
    timeout_s: float = 10.0,
) -> None:
    """Take a device out of Home Assistant: its entities, and the values that the broker keeps.

    Call it when no reporter with ``home_assistant=`` runs for the device any more.

    Raises:
        ConfigError: the url, the device or the prefix is not usable.
        TelemetryError: the broker did not confirm it within ``timeout_s``.
    """
    farewell = _farewell(device, prefix)
    mids: set[int | None] = set()
    done = threading.Event()

    def clear() -> None:
        mids.clear()
        mids.update(connection.publish(message) for message in farewell)

    def confirmed(mid: int) -> None:
        mids.discard(mid)
        if not mids:
            done.set()

    connection = Connection(
        parse_broker(url, tls=tls),
        client_id=f"outrider-remove-{uuid.uuid4().hex[:12]}",
        handlers=Handlers(up=clear, confirmed=confirmed),
        credentials=to_credentials(credentials),
    )
    connection.start()
    confirmed_in_time = done.wait(timeout_s)
    connection.close()
    if not confirmed_in_time:
        raise TelemetryError(
            f"{connection.broker} did not confirm that {device} was removed: {connection.last_error or 'no answer'}",
            hint="check that the broker is there, and that its rules let you write to the discovery prefix",
        )


def _object_id(device: str) -> str:
    # An object id of Home Assistant has no dot. Two devices never get the same one.
    return "outrider_" + check_device(device).replace("_", "__").replace(".", "_-")


def _check_prefix(prefix: object) -> str:
    if not isinstance(prefix, str) or not prefix.isprintable() or not prefix or set(prefix) & set("+#"):
        raise ConfigError(f"Home Assistant's discovery prefix {prefix!r} is not usable", hint="it is 'homeassistant'")
    return prefix
