"""A device as an edge node of Sparkplug B (Eclipse Sparkplug 3.0.0), beside its reporter.

It has a connection of its own: Sparkplug's last will (NDEATH) is another than that of docs/telemetry.md, and an MQTT
connection has one. Its messages are QoS 0, without receipts: a host that missed one sees it by ``seq`` and asks for a
rebirth. What has to arrive goes through the spool. docs/adr/0022 says what is left out.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from outrider.bundle.files import atomic_file
from outrider.store import find_state_dir
from outrider.telemetry.linked import Linked, connection_to
from outrider.telemetry.mqtt import Credentials, Handlers, Message
from outrider.telemetry.record import check_device
from outrider.telemetry.sparkplug_payload import NUMBERS, Datatype, Session, Tag, Value, asks_for_rebirth
from outrider.telemetry.vitals import Vitals
from outrider_runtimes.errors import ConfigError
from outrider_runtimes.tls import AnyTls

log = logging.getLogger(__name__)

_MAX_FILE_BYTES = 16
# The metrics that a node announces, and where of the vitals each one is.
_METRICS: tuple[tuple[str, Datatype, str], ...] = (
    ("Model/Name", Datatype.STRING, "model"),
    ("Model/Version", Datatype.INT64, "version"),
    ("Model/Variant", Datatype.STRING, "variant"),
    ("Model/Engine", Datatype.STRING, "engine"),
    ("Requests/Answered", Datatype.INT64, "predictions"),
    ("Requests/Failed", Datatype.INT64, "failures"),
    ("Requests/Refused", Datatype.INT64, "refused"),
    ("Requests/Availability", Datatype.DOUBLE, "availability"),
    ("Requests/Per second", Datatype.DOUBLE, "per_second"),
    ("Requests/Offload share", Datatype.DOUBLE, "offload_share"),
    ("Requests/Degraded share", Datatype.DOUBLE, "degraded_share"),
    ("Latency/p50 ms", Datatype.DOUBLE, "p50_ms"),
    ("Latency/p95 ms", Datatype.DOUBLE, "p95_ms"),
    ("Board/Temperature C", Datatype.DOUBLE, "temperature_c"),
    ("Board/Throttled", Datatype.BOOLEAN, "throttled"),
    ("Board/Memory bytes", Datatype.INT64, "memory_rss_bytes"),
    ("Model/Drift", Datatype.DOUBLE, "drift"),
)
_PROBLEMS = Tag(name="Problems", datatype=Datatype.STRING)
TAGS = (*(Tag(name=name, datatype=datatype) for name, datatype, _ in _METRICS), _PROBLEMS)


def values_of(told: Vitals) -> dict[str, Value]:
    """The values of TAGS; several problems are joined by commas, none is an empty string."""
    values: dict[str, Value] = {name: getattr(told, attribute) for name, _, attribute in _METRICS}
    return {**values, _PROBLEMS.name: ",".join(told.problems)}


class SparkplugNode(Linked):
    """One edge node. Use it as a context manager, or ``close`` it.

    NBIRTH at every connection and on Node Control/Rebirth, NDATA when ``tell`` brought another value, NDEATH at
    ``close`` and as the last will. A broker that is not there is not an error: the next birth tells the newest values.
    """

    def __init__(
        self,
        url: str,
        *,
        group: str,
        device: str,
        tls: AnyTls | None = None,
        credentials: Credentials | tuple[str, str | None] | None = None,
        state: str | Path | None = None,
        rng: random.Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Begin to connect; does not wait for the broker.

        Args:
            url, tls, credentials, state: as for the Reporter. The number of the next session is in the state,
                ``telemetry/<device>.bdseq``.
            group: Sparkplug's group id; the node's id is the device's.

        Raises:
            ConfigError: the url, the group or the device id is not usable.
            MissingExtra: paho-mqtt is not installed.
            StateDirectoryError: the state cannot be used.
        """
        self.device = check_device(device)
        self._topic = f"spBv1.0/{check_group(group)}/{{}}/{device}"
        self._connection = connection_to(
            url,
            tls=tls,
            credentials=credentials,
            client_id=f"outrider-{device}-sparkplug",
            handlers=Handlers(
                opened=self._opened, up=self._birth, down=self._down, message=self._message, pump=self._pump
            ),
            subscriptions=(self._topic.format("NCMD"),),
            will=self._will,
            rng=rng,
        )
        self._numbers = _Numbers(find_state_dir(state) / "telemetry" / f"{device}.bdseq")
        self._session = Session(TAGS, bd_seq=self._numbers.take())
        self._greeted = False  # the session's number went out with a greeting: the next one needs another
        self._born = False
        self._values: Mapping[str, Value] = values_of(Vitals())
        self._wall_clock = wall_clock
        self._connection.start()

    def tell(self, told: Vitals) -> None:
        """New values: what a reporter's ``on_vitals`` calls. From any thread, returns at once."""
        self._values = values_of(told)
        self._connection.wake()

    def close(self) -> None:
        """Publish NDEATH and disconnect."""
        if not self._connection.close(self._death):
            log.warning("%s: the connection's thread did not end in time", self._connection.broker)

    # All below runs on the connection's thread.

    def _will(self) -> Message:
        if self._greeted:
            self._greeted = False
            self._session = Session(TAGS, bd_seq=self._numbers.take())
        return self._death()

    def _death(self) -> Message:
        return Message(topic=self._topic.format("NDEATH"), payload=self._session.death(now_ms=self._now_ms()))

    def _opened(self) -> None:
        self._greeted = True

    def _birth(self) -> None:
        self._publish("NBIRTH", self._session.birth(self._values, now_ms=self._now_ms()))
        self._born = True

    def _down(self) -> None:
        self._born = False

    def _message(self, topic: str, payload: bytes, retained: bool) -> None:
        if retained:  # an old command that a broker kept is not a request of now
            return
        if asks_for_rebirth(payload) and self._born:
            log.info("%s: a host asked for a rebirth", self._connection.broker)
            self._birth()

    def _pump(self) -> None:
        data = self._session.data(self._values, now_ms=self._now_ms())
        if data is not None:
            self._publish("NDATA", data)

    def _publish(self, kind: str, payload: bytes) -> None:
        self._connection.publish(Message(topic=self._topic.format(kind), payload=payload, qos=0))

    def _now_ms(self) -> int:
        return max(0, int(self._wall_clock() * 1000))


class _Numbers:
    """bdSeq over restarts: the file holds a number that no session has had yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = _read(path)

    def take(self) -> int:
        """The number of a new session. The one after it is on disk before this is used."""
        number, self._next = self._next, (self._next + 1) % NUMBERS
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_file(self._path, mode=0o600) as file:
                file.write(b"%d\n" % self._next)
        except OSError as error:
            # Telling goes on: only a restart would begin with a number that was used.
            log.warning("%s cannot be written: %s", self._path, error)
        return number


def _read(path: Path) -> int:
    """The number in the file; 0 where there is none, or it holds something else."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES).strip()
    except OSError:
        return 0
    return int(text) % NUMBERS if text.isdigit() else 0


def check_group(group: object) -> str:
    """A group id that Sparkplug allows. Raises ConfigError."""
    if not isinstance(group, str) or not 0 < len(group) <= 64 or not group.isprintable() or set(group) & set("+/#"):
        raise ConfigError(
            f"Sparkplug group {group!r} is not usable",
            hint="use 1 to 64 printable characters without '+', '/' and '#', such as plant-3",
        )
    return group
