"""What shares a reporter's connection: commands, Home Assistant. And what they post on it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from outrider.telemetry.mqtt import Message

log = logging.getLogger(__name__)

MAX_POSTED: Final = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Attachment:
    """A part of a program that listens on the reporter's connection. All is called on the connection's thread.

    What it raises is logged; neither the connection nor the other attachments are affected. It must be quick: nothing
    is sent while it runs.

    Attributes:
        subscriptions: topic filters, with QoS 1. A broker that refuses one of them is logged; the connection stays.
        up: connected and subscribed; called again after each reconnect.
        message: topic, payload, and whether the broker had kept it (retained) from before the subscription. Called for
            what matches one of ``subscriptions``. MQTT lets a broker deliver a message again for each subscription on a
            connection that matches it: filters should not overlap.
    """

    subscriptions: tuple[str, ...] = ()
    up: Callable[[], None] = lambda: None
    message: Callable[[str, bytes, bool], None] = lambda topic, payload, retained: None


class Attachments:
    """Several attachments as one."""

    def __init__(self, attachments: Sequence[Attachment]) -> None:
        self._attachments = tuple(attachments)

    @property
    def subscriptions(self) -> tuple[str, ...]:
        """All of theirs, each once."""
        return tuple(dict.fromkeys(topic for each in self._attachments for topic in each.subscriptions))

    def up(self) -> None:
        """Tell each."""
        for each in self._attachments:
            try:
                each.up()
            except Exception:  # it is the user's: whatever it raises, the records have to go on
                log.exception("an attachment failed when the connection came up")

    def message(self, topic: str, payload: bytes, retained: bool) -> None:
        """Tell those that subscribed to it."""
        for each in self._attachments:
            try:
                if any(matches(pattern, topic) for pattern in each.subscriptions):
                    each.message(topic, payload, retained)
            except Exception:
                log.exception("an attachment failed at a message on %s", topic)


def matches(pattern: str, topic: str) -> bool:
    """Whether a topic filter covers a topic, by section 4.7 of the MQTT specifications.

    >>> matches("home/+/state", "home/lamp/state"), matches("home/#", "home"), matches("#", "$SYS/uptime")
    (True, True, False)
    """
    if topic.startswith("$") != pattern.startswith("$"):
        return False
    wanted, levels = pattern.split("/"), topic.split("/")
    for at, level in enumerate(wanted):
        if level == "#":
            return True
        if at >= len(levels) or level not in ("+", levels[at]):
            return False
    return len(levels) == len(wanted)


class Outbox:
    """Messages that wait in memory for a connection and, once sent, for its PUBACK. At most MAX_POSTED.

    What was not confirmed when a connection broke is sent again in the next one: it may arrive twice. Of retained
    messages for one topic the newest alone waits: a broker would keep no other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Message] = deque()
        self._sent: dict[int, Message] = {}

    def offer(self, message: Message) -> bool:
        """Take a message, from any thread; False when it is full."""
        with self._lock:
            if message.retain:
                earlier = [each for each in self._waiting if each.retain and each.topic == message.topic]
                for each in earlier:
                    self._waiting.remove(each)
            if len(self._waiting) + len(self._sent) >= MAX_POSTED:
                return False
            self._waiting.append(message)
            return True

    def up(self) -> None:
        """A new connection: nothing of the old one is confirmed any more."""
        with self._lock:
            self._waiting.extendleft(reversed(self._sent.values()))
            self._sent.clear()

    def send(self, publish: Callable[[Message], int | None]) -> None:
        """Publish what waits, until ``publish`` gives None. What has no form in MQTT is logged and let go."""
        while (message := self._next()) is not None:
            try:
                mid = publish(message)
            except (TypeError, ValueError) as error:  # it is the user's: the records have to go on
                log.error("a message to %r cannot be sent: %s", message.topic, error)
                continue
            with self._lock:
                if mid is None:
                    self._waiting.appendleft(message)
                    return
                self._sent[mid] = message

    def confirmed(self, mid: int) -> None:
        """The PUBACK of one."""
        with self._lock:
            self._sent.pop(mid, None)

    def _next(self) -> Message | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting else None
