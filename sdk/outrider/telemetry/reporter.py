"""What a device tells: predictions and events, into a spool on disk and from there to an MQTT broker.

Inference never waits for it. The callback of a prediction appends one tuple to a bounded queue; a thread of the
reporter builds records and commits them; another one sends them.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from outrider.events import HybridEvent, event_of
from outrider.store import find_state_dir
from outrider.telemetry import homeassistant, info
from outrider.telemetry.attachment import Attachment
from outrider.telemetry.inputs import InputGate, InputPolicy
from outrider.telemetry.metrics import judged_of
from outrider.telemetry.mqtt import Credentials, Message, parse_broker, to_credentials
from outrider.telemetry.numbers import check_number, check_share, check_whole
from outrider.telemetry.paths import without_paths
from outrider.telemetry.publisher import Calls, Limits, Publisher
from outrider.telemetry.record import EVENT, INPUT, Range, check_device, encode_row
from outrider.telemetry.spool import DEFAULT_MAX_BYTES, HIGH, LOWEST, Draft, Spool
from outrider.telemetry.spoolfile import is_no_room, was_left_open
from outrider.telemetry.spoollock import SpoolLock
from outrider.telemetry.vitals import Vitals, read_metrics, vitals
from outrider.telemetry.writer import ReporterAccount, Settings, World, Writer
from outrider_runtimes.board import this_board
from outrider_runtimes.clock import clock_is_synchronised, this_boot
from outrider_runtimes.deadline import LONGEST_MS
from outrider_runtimes.errors import ConfigError, InputError, TelemetryError
from outrider_runtimes.heat import Heat, read_heat
from outrider_runtimes.options import require_kind
from outrider_runtimes.tls import AnyTls

if TYPE_CHECKING:
    from outrider.prediction import Failure, OnPrediction, Prediction
    from outrider.spending import Meter
    from outrider_runtimes.tensors import Tensors

log = logging.getLogger(__name__)

Level = Literal["spooled", "broker", "sink"]

DEFAULT_COMMIT_INTERVAL_MS: Final = 1000.0
DEFAULT_METRICS_INTERVAL_S: Final = 60.0

_FLUSH_TICK_S: Final = 0.05
_LONGEST_AGE_S: Final = 1e10
# On an exception: the devices whose reporters have counted it, because what they watch told them.
_COUNTED: Final = "_outrider_counted"


class Watchable(Protocol):
    """What can be watched: a Model or a Hybrid."""

    def on_prediction(self, callback: OnPrediction) -> Callable[[], None]:
        """Have ``callback`` called with each Prediction; gives what ends it."""
        ...


class Reporter:
    """Reports what it watches. Use it as a context manager, or ``close`` it.

    A broker that is not there is not an error: records wait in the spool. A full disk is none either: without a spool
    records wait in memory, nothing is sent, and every commit interval the spool is tried again. A spool that a kill or
    a power cut left is read through before it is used, beside the first calls: what asks for it waits for that.

    Attributes:
        device: its id.
    """

    def __init__(
        self,
        url: str,
        *,
        device: str,
        tls: AnyTls | None = None,
        credentials: Credentials | tuple[str, str | None] | None = None,
        state: str | Path | None = None,
        commit_interval_ms: float = DEFAULT_COMMIT_INTERVAL_MS,
        max_bytes: int = DEFAULT_MAX_BYTES,
        max_age_s: float | None = None,
        sample: float = 1.0,
        metrics_interval_s: float | None = DEFAULT_METRICS_INTERVAL_S,
        inputs: InputPolicy | None = None,
        meter: Meter | None = None,
        queue_size: int = 32_768,
        limits: Limits | None = None,
        attachments: Sequence[Attachment] = (),
        home_assistant: bool | str = False,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        synchronised: Callable[[], bool | None] = clock_is_synchronised,
        heat: Callable[[], Heat] = read_heat,
    ) -> None:
        """Open the spool and begin to connect; does not wait for the broker.

        Args:
            url: ``mqtt://host:1883`` or ``mqtts://host:8883``.
            device: 1 to 64 letters, digits, ``.``, ``_`` or ``-``; one reporter at a time has a device id.
            tls: for mqtts: the path of the CA certificates, a Tls with the device's own certificate too, or an
                SSLContext that verifies; None trusts the system's.
            credentials: user name and password.
            state: the state directory; by default the store's rule. The spool is ``telemetry/<device>.sqlite`` in it.
            commit_interval_ms: how long a record is in memory alone; what a kill -9 can lose.
            max_bytes: of the records that wait on disk; beyond it the oldest of the lowest priority are dropped.
            max_age_s: records that waited longer are dropped; None for no bound. See ``Spool``.
            sample: the share of the predictions that are reported in full, drawn by chance; all are counted in the
                metrics. Flagged ones (the edge was unsure, or answered for want of the cloud) always are.
            metrics_interval_s: how often the metrics are reported; None for never.
            inputs: what may leave of the inputs that ``report_inputs`` is given; None for nothing.
            meter: on a metered link: what it may cost, shared with a Hybrid. What it does not cover waits.
            queue_size: how many records wait in memory for the next commit; beyond it they are lost and counted.
            limits: how much is under way at once.
            attachments: what else listens on this connection.
            home_assistant: have Home Assistant find the device; a string is the discovery prefix, if it is another than
                ``homeassistant``. ``outrider.telemetry.homeassistant.remove`` takes it back.
            rng: draws the sample and spreads the reconnects.
            clock, wall_clock: seconds, monotonic and since 1970.
            synchronised: whether something keeps the clock right.
            heat: a look at the board.

        Raises:
            ConfigError: the url, the device id or a number is not usable.
            MissingExtra: paho-mqtt is not installed.
            StateDirectoryError, TelemetryError: another process has the spool, or, where it was closed cleanly or is
                new, it cannot be used, for another reason than a full disk. Of one that was not, ``spool_error`` tells.
        """
        broker = parse_broker(url, tls=tls)
        self.device = check_device(device)
        settings = _settings(commit_interval_ms, queue_size, sample, metrics_interval_s)
        check_whole("max_bytes", max_bytes)
        if max_age_s is not None:
            check_number("max_age_s", max_age_s, most=_LONGEST_AGE_S)
        require_kind("limits", limits, (Limits, type(None)), "a Limits, or None")
        require_kind("rng", rng, (random.Random, type(None)), "a random.Random, or None")
        require_kind("inputs", inputs, (InputPolicy, type(None)), "an InputPolicy, or None")
        rng = rng if rng is not None else random.Random()
        self._clock = clock
        self._wall_clock = wall_clock
        self._boot_id = this_boot()
        self._board = this_board()
        self._watched: list[tuple[Watchable, Callable[[], None]]] = []
        self._inputs = InputGate(inputs, clock=clock)
        self._metrics: dict[str, Any] = {}
        self._on_vitals: list[Callable[[Vitals], None]] = []
        if home_assistant:
            prefix = home_assistant if isinstance(home_assistant, str) else homeassistant.PREFIX
            home = homeassistant.HomeAssistant(device=device, post=self.post, prefix=prefix)
            attachments = [*attachments, home.attachment]
            self._on_vitals.append(home.tell)
        self._closing = False
        self._process = os.getpid()
        path = find_state_dir(state) / "telemetry" / f"{device}.sqlite"
        self._spool: Spool | None = None
        self._held: SpoolLock | None = None
        self._make_spool = functools.partial(
            Spool, path, max_bytes=max_bytes, max_age_s=max_age_s, clock=clock, boot=self._boot_id
        )
        self._publisher = Publisher(
            broker,
            device=device,
            boot_id=self._boot_id,
            calls=Calls(receipt=self._take_receipt, poisoned=self._poisoned, info=self._info),
            attachments=attachments,
            credentials=to_credentials(credentials),
            limits=limits,
            meter=meter,
            rng=rng,
            clock=clock,
            wall_clock=wall_clock,
        )
        world = World(clock=clock, wall_clock=wall_clock, synchronised=synchronised, heat=heat, rng=rng)
        self._writer = Writer(
            self._open_spool,
            name=device,
            boot_id=self._boot_id,
            settings=settings,
            world=world,
            committed=self._publisher.wake,
            summarized=self._summarized,
        )
        self._begin(path)

    def _begin(self, path: Path) -> None:
        try:
            if was_left_open(path):  # whose it is, is asked here; what is in it, on the writer's thread
                self._held = SpoolLock(path)
            else:
                self._writer.open()
        except TelemetryError as error:
            if not is_no_room(error):
                self._publisher.close()
                raise
        self._writer.start()

    def _open_spool(self) -> Spool:
        """From then on there is something to send."""
        held = None if self._held is None or self._held.closed else self._held
        spool = self._spool = self._make_spool(held=held)
        if spool.recovered is not None:
            fields = {"reason": without_paths(spool.recovered), "salvaged": spool.salvaged}
            self._offer(EVENT, {"name": "spool_recovered", "fields": fields}, priority=HIGH)
        self._publisher.start(spool)
        return spool

    @property
    def spool(self) -> Spool:
        """The queue on disk.

        Raises:
            TelemetryError: it could not be opened yet; ``spool_error`` says why.
        """
        self._writer.wait_opened()
        if self._spool is None:
            raise TelemetryError(f"the spool of {self.device} is not open: {self._writer.error}")
        return self._spool

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closing

    @property
    def spool_error(self) -> str:
        """Why the spool could not be opened or the last commit failed, such as a full disk; empty while all is well.

        What could not be committed stays in memory and is tried again.
        """
        return self._writer.error

    @property
    def connected(self) -> bool:
        """Whether the broker is there now."""
        return self._publisher.connection.connected

    @property
    def last_error(self) -> str:
        """Why it is not, or was not last time; empty while all is well."""
        return self._publisher.connection.last_error

    @property
    def held_back(self) -> str:
        """Why records wait although the broker is there, such as a spent budget; empty where none does."""
        return self._publisher.held_back

    def watch(self, source: Watchable) -> Callable[[], None]:
        """Report every prediction of ``source``, without its inputs and outputs, its calls that fail (where it has an
        ``on_failure``), and what else it tells: drift, what serves instead of what. Gives what ends it.

        Raises:
            TelemetryError: the reporter is closed.
        """
        self._check_open()
        edge = getattr(source, "edge", source)
        judged = judged_of(getattr(source, "interface", None), getattr(getattr(edge, "offload", None), "score", None))
        ends = [source.on_prediction(self._writer.callback(judged))]
        if (on_failure := getattr(source, "on_failure", None)) is not None:
            ends.append(on_failure(self._source_failed))
        if (on_event := getattr(source, "on_event", None)) is not None:
            ends.append(on_event(self._happened))
        elif (on_change := getattr(source, "on_change", None)) is not None:
            ends.append(on_change(lambda change: self._happened(event_of(change))))

        def unwatch() -> None:
            if entry in self._watched:
                self._watched.remove(entry)
                for end in ends:
                    end()
                if not self._closing:
                    self._publisher.tell_info()
                    self._tell_vitals()

        entry = (source, unwatch)
        self._watched.append(entry)
        self._publisher.tell_info()
        self._tell_vitals()
        return unwatch

    def on_vitals(self, callback: Callable[[Vitals], None]) -> Callable[[], None]:
        """Have ``callback`` called with how the device is doing: now, with each metrics record and when what is watched
        changes. On whichever thread that is, so it must be quick. Gives what ends it."""
        self._on_vitals.append(callback)
        self._tell_vitals()

        def end() -> None:
            if callback in self._on_vitals:
                self._on_vitals.remove(callback)

        return end

    def event(self, name: str, /, **details: Any) -> bool:
        """Report that something happened. Gives False when the queue was full: the event is lost and counted.

        Raises:
            TelemetryError: a field that JSON has no form for, more than a record may hold, or the reporter is closed.
        """
        self._check_open()
        return self._offer(EVENT, {"name": name, "fields": details}, priority=HIGH)

    def failure(self, error: BaseException) -> bool:
        """Report that a request failed on the way to what is watched, by the error's name alone: in the metrics, where
        an InputError is ``refused``, and as an event. One out of what is watched is counted already, and not again.

        Returns:
            False when the queue was full: it is lost and counted.

        Raises:
            TelemetryError: the reporter is closed.
        """
        self._check_open()
        if self.device in vars(error).get(_COUNTED, ()):
            return True
        return self._writer.failed(error, refused=isinstance(error, InputError))

    def report_inputs(self, inputs: Tensors, prediction: Prediction) -> bool:
        """Report what led to a prediction, where ``inputs=`` of the reporter lets it leave.

        Args:
            inputs: as they were passed to ``infer``, by name; copied before this returns.

        Returns:
            Whether they are on their way: they are not too large, not too many in the hour, of a flagged answer if the
            policy wants that, and there was room in the queue.

        Raises:
            TelemetryError: the reporter is closed.
        """
        self._check_open()
        body = self._inputs.body(inputs, prediction)
        return body is not None and self._offer(INPUT, body, priority=LOWEST)

    def post(self, message: Message) -> bool:
        """Send a message beside the records on this connection: not spooled, QoS 1, in the order of the posts.

        It waits in memory while there is no connection, of retained ones for a topic the newest, and may arrive twice
        where one breaks. From any thread.

        Returns:
            False when it was not taken: 256 wait for a connection or their PUBACK, or the reporter is closed.
        """
        return not self._closing and self._publisher.post(message)

    def flush(self, timeout_s: float = 10.0, *, level: Level = "spooled") -> bool:
        """Wait until everything that was offered before this call has come as far as ``level``.

        Args:
            timeout_s: how long at most.
            level: ``spooled``: on this disk. ``broker``: the broker confirmed it, which is no promise that it survives
                there. ``sink``: the consumer's receipt is in the spool.

        Returns:
            Whether it has. False too when a record was dropped on the way.
        """
        if level not in ("spooled", "broker", "sink"):
            raise ConfigError(f"level is {level!r}, expected 'spooled', 'broker' or 'sink'")
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or math.isnan(timeout_s):
            raise ConfigError(f"timeout_s is {timeout_s!r:.40}, expected seconds")
        self._check_open()
        timeout_s = min(timeout_s, threading.TIMEOUT_MAX)
        dropped = None if self._spool is None else self._spool.account().dropped
        reached = self._writer.flush(timeout_s, lambda seq: self._has_reached(level, seq), tick_s=_FLUSH_TICK_S)
        return reached and dropped in (None, self.spool.account().dropped)

    def account(self) -> ReporterAccount:
        """The account now; ``offered`` is exact while nothing is being offered, the rest when the spool is open."""
        return self._writer.account()

    def close(self) -> None:
        """Stop watching, disconnect, commit what was offered and close the spool. What is pending waits on the disk.

        From a callback of its own it returns at once, and the rest follows when the callback has returned. In a forked
        child, which has none of its threads, it lets go of what the child has of it and leaves the parent's alone.
        """
        if self._closing:
            return
        if os.getpid() != self._process:
            self._closing = True
            if self._held is not None:
                self._held.close()
            if self._spool is not None:
                self._spool.close()
            return
        self._closing = True
        for _, unwatch in list(self._watched):
            unwatch()
        here = threading.current_thread()
        if self._writer.is_mine(here) or self._publisher.connection.is_mine(here):
            threading.Thread(target=self._end, name=f"outrider-close-{self.device}").start()
        else:
            self._end()

    def _end(self) -> None:
        self._publisher.close()
        # After the publisher: what it received last is committed too.
        if uncommitted := self._writer.close():
            log.error("%s: %d records could not be committed and are lost", self.device, uncommitted)
        if self._spool is not None:
            self._spool.close()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closing:
            raise TelemetryError(f"the reporter of {self.device} is closed")

    def _offer(self, kind: str, body: dict[str, Any], *, priority: int) -> bool:
        row = encode_row(
            kind=kind,
            boot_id=self._boot_id,
            wall_s=self._wall_clock(),
            monotonic_s=self._clock(),
            body=body,
            clock_unsynced=self._writer.unsynced,
        )
        return self._writer.offer(Draft(body=row, priority=priority))

    def _source_failed(self, failure: Failure) -> None:
        self._writer.failed(failure.error, refused=failure.refused)
        noted = vars(failure.error)
        noted[_COUNTED] = noted.get(_COUNTED, frozenset()) | {self.device}

    def _happened(self, event: HybridEvent) -> None:
        """A source tells something; it is not to fail because of that."""
        fields = {
            name: without_paths(value) if isinstance(value, str) else value for name, value in event.fields.items()
        }
        if event.name == "drift" and isinstance(score := fields.get("share"), (int, float)):
            self._writer.drift = float(score)
        try:
            self._offer(EVENT, {"name": event.name, "fields": fields}, priority=HIGH)
        except TelemetryError as error:
            log.warning("an event that cannot be reported: %s", error)
        if event.name != "drift":
            self._publisher.tell_info()
            self._tell_vitals()

    def _summarized(self, metrics: dict[str, Any]) -> None:
        self._metrics = metrics
        self._tell_vitals()

    def _tell_vitals(self) -> None:
        if not self._on_vitals:
            return
        bundles = [info.bundle_fields(source) for source, _ in self._watched]
        told = vitals([read_metrics(self._metrics)], [fields for fields in bundles if fields is not None])
        for callback in list(self._on_vitals):
            try:
                callback(told)
            except Exception:  # it is the user's: whatever it raises, the records have to go on
                log.exception("%s: a callback of on_vitals failed", self.device)

    def _take_receipt(self, ranges: tuple[Range, ...], through: int) -> None:
        self._writer.received(ranges, through=through)

    def _poisoned(self, seq: int, tries: int) -> None:
        self._offer(EVENT, {"name": "record_poisoned", "fields": {"seq": seq, "tries": tries}}, priority=HIGH)

    def _has_reached(self, level: Level, seq: int) -> bool:
        if level == "spooled":
            return True
        if level == "broker" and self._publisher.confirmed_through >= seq:
            return True
        return self.spool.oldest_seq() > seq

    def _info(self) -> bytes:
        return info.encode(
            device=self.device,
            stream=self.spool.stream,
            boot_id=self._boot_id,
            wall_s=self._wall_clock(),
            board=self._board,
            sources=[source for source, _ in self._watched],
        )


def _settings(commit_interval_ms: float, queue_size: int, sample: float, metrics_interval_s: float | None) -> Settings:
    """The writer's, checked. Raises ConfigError."""
    interval_s = metrics_interval_s
    return Settings(
        commit_interval_s=check_number("commit_interval_ms", commit_interval_ms, most=LONGEST_MS) / 1000.0,
        queue_size=check_whole("queue_size", queue_size),
        sample=check_share("sample", sample),
        metrics_interval_s=None if interval_s is None else check_number("metrics_interval_s", interval_s),
    )
