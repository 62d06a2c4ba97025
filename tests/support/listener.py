"""An MQTT client that writes down what it hears, and can say something: plain paho, none of ours."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from support.sparkplug import Seen


class Listener:
    """Subscribed, with QoS 1, when the constructor returns."""

    def __init__(self, port: int, *topics: str) -> None:
        self.heard: list[Seen] = []
        subscribed = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2)
        self._client.on_message = self._on_message
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.connect("127.0.0.1", port)
        self._client.subscribe([(topic, 1) for topic in topics])
        self._client.loop_start()
        assert subscribed.wait(120)

    def _on_message(self, _client: Any, _data: Any, message: Any) -> None:
        seen = Seen(topic=message.topic, payload=bytes(message.payload), qos=message.qos, retain=bool(message.retain))
        self.heard.append(seen)

    def on(self, topic: str) -> list[Seen]:
        """What was heard on one topic, in order."""
        return [seen for seen in list(self.heard) if seen.topic == topic]

    def say(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish with QoS 1; returns when the broker has it."""
        self._client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(120)

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.disconnect()
        self._client.loop_stop()
