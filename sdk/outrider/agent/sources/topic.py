"""Messages on an MQTT topic, over a connection of its own. Needs paho-mqtt (the extra ``mqtt``)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from functools import partial

from outrider.agent.logs import say
from outrider.agent.payload import MAX_INPUT_BYTES, Payload, read_payload
from outrider.agent.sourceconfig import TopicConfig
from outrider.agent.sources.base import TICK_S, Frame
from outrider.telemetry.mqtt import Broker, Connection, Credentials, Handlers


class TopicSource:
    """What is published while it is open. Retained messages are from before and are left out.

    Attributes:
        dropped: how many were left out because others waited.
    """

    def __init__(
        self, config: TopicConfig, broker: Broker, *, device: str, credentials: Credentials | None = None
    ) -> None:
        self.dropped = 0
        self._config = config
        self._broker = broker
        self._device = device
        self._credentials = credentials
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._came = threading.Event()

    def frames(self) -> Iterator[Frame | None]:
        """See ``Source``. A broker that is not there is tried again by the connection itself."""
        connection = Connection(
            self._broker,
            client_id=f"outrider-{self._device}-source",
            handlers=Handlers(message=self._message),
            subscriptions=(self._config.topic,),
            credentials=self._credentials,
        )
        with self._lock:
            self._waiting.clear()
            self._waiting_bytes = 0
        connection.start()
        try:
            while True:
                self._came.clear()
                while (message := self._take()) is not None:
                    topic, payload = message
                    yield Frame(name=topic, read=partial(_read, payload))
                self._came.wait(TICK_S)
                yield None
        finally:
            connection.close()

    def _take(self) -> tuple[str, bytes] | None:
        with self._lock:
            if not self._waiting:
                return None
            topic, payload = self._waiting.popleft()
            self._waiting_bytes -= len(payload)
            return topic, payload

    def _message(self, topic: str, payload: bytes, retained: bool) -> None:
        if retained:
            return
        with self._lock:
            self._waiting.append((topic, payload))
            self._waiting_bytes += len(payload)
            # The newest stays, whatever its size: it is refused by name, like an input of another kind.
            while len(self._waiting) > 1 and self._is_too_much():
                dropped, oldest = self._waiting.popleft()
                self._waiting_bytes -= len(oldest)
                self._drop(dropped)
        self._came.set()

    def _is_too_much(self) -> bool:
        return len(self._waiting) > self._config.queue or self._waiting_bytes > MAX_INPUT_BYTES

    def _drop(self, topic: str) -> None:
        self.dropped += 1
        if self.dropped & (self.dropped - 1) == 0:  # 1, 2, 4, 8...: a flood is not answered by one in the log
            say("source_dropped", topic=topic, dropped=self.dropped)


def _read(payload: bytes) -> Payload:
    return read_payload(payload)
