"""A fleet kept up to date from a broker. An onlooker: it publishes nothing, receipts least of all."""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable
from typing import Final

from outrider.telemetry.linked import Linked, connection_to
from outrider.telemetry.mqtt import Credentials, Handlers
from outrider.telemetry.record import ALL_DEVICES
from outrider.watch.fleet import STALE_AFTER_S, Fleet, News, Point, Row
from outrider_runtimes.tls import AnyTls

log = logging.getLogger(__name__)

_SHOWN_OF_A_TOPIC: Final = 100


class Watch(Linked):
    """A view of all devices at a broker. Use it as a context manager, or ``close`` it."""

    def __init__(
        self,
        url: str,
        *,
        tls: AnyTls | None = None,
        credentials: Credentials | tuple[str, str | None] | None = None,
        stale_after_s: float = STALE_AFTER_S,
        on_news: Callable[[News], None] = lambda news: None,
        rng: random.Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Begin to connect; does not wait for the broker.

        Args:
            url, tls, credentials: as for the Reporter.
            stale_after_s: a connected device that was not heard for so long is marked.
            on_news: called with each thing that a message brought, on the watch's thread.

        Raises:
            ConfigError: the url is not usable.
            MissingExtra: paho-mqtt is not installed.
        """
        self._fleet = Fleet(stale_after_s=stale_after_s)
        self._on_news = on_news
        self._wall_clock = wall_clock
        self._changed = threading.Condition()
        self._told = False
        self._connection = connection_to(
            url,
            tls=tls,
            credentials=credentials,
            client_id=f"outrider-watch-{uuid.uuid4().hex[:12]}",
            handlers=Handlers(up=self._link, down=self._link, message=self._message, pump=self._pump),
            subscriptions=(ALL_DEVICES.status, ALL_DEVICES.info, ALL_DEVICES.records),
            rng=rng,
        )
        self.broker = self._connection.broker
        self._connection.start()

    def rows(self, *, after: int = 0) -> list[Row]:
        """The table, or the rows that changed after a ``number``."""
        with self._changed:
            return self._fleet.rows(after=after)

    def changes(self, *, after: int) -> tuple[int, list[tuple[Row, list[Point]]]]:
        """The number now, the rows that changed after ``after``, each with the points that it got since."""
        with self._changed:
            rows = self._fleet.rows(after=after)
            return self._fleet.number, [(row, self._fleet.points(row.device, after=after)) for row in rows]

    def wait(self, *, after: int, timeout_s: float) -> bool:
        """Wait until something changed after a ``number``. Gives whether it did in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._fleet.number > after, timeout_s)

    @property
    def number(self) -> int:
        """Rises with every change."""
        return self._fleet.number

    @property
    def malformed(self) -> int:
        """Messages and records that could not be read."""
        return self._fleet.malformed

    def now_s(self) -> float:
        """The watch's own time, which the rows' ``heard_s`` are in."""
        return self._wall_clock()

    def _message(self, topic: str, payload: bytes, retained: bool) -> None:
        try:
            self._fold(lambda: self._fleet.take(topic, payload, now_s=self._wall_clock()))
        except Exception:  # what one device says must not take the watch off its broker, and all others with it
            with self._changed:
                self._fleet.malformed += 1
            if self._told:  # a device that goes on so does not fill a log
                return
            self._told = True
            log.exception(
                "%s: a message on %r could not be taken in; told once", self.broker, topic[:_SHOWN_OF_A_TOPIC]
            )

    def _link(self) -> None:
        """The broker is there, or gone: whoever waits for a change is to see that."""
        with self._changed:
            self._fleet.number += 1
            self._changed.notify_all()

    def _pump(self) -> None:
        self._fold(lambda: self._fleet.tick(self._wall_clock()))

    def _fold(self, step: Callable[[], list[News]]) -> None:
        with self._changed:
            before = self._fleet.number
            news = step()
            if self._fleet.number > before:
                self._changed.notify_all()
        for each in news:
            self._on_news(each)
