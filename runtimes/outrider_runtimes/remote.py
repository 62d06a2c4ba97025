"""A runner whose work is done by an endpoint of the Open Inference Protocol v2, over HTTP or gRPC."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

from outrider_runtimes import oip
from outrider_runtimes._forked import tell_of_fork
from outrider_runtimes._pool import Pool
from outrider_runtimes._transport import Described, Transport
from outrider_runtimes.deadline import Clock, Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    InterfaceMismatch,
    OutriderError,
    RemoteRefused,
    RemoteUnavailable,
    ReplyError,
    RunnerClosed,
)
from outrider_runtimes.foreign import Naming, bind, check_mapping, ours_from, theirs_from
from outrider_runtimes.http import HTTP_SCHEMES, Origin
from outrider_runtimes.options import require_kind
from outrider_runtimes.remote_http import HttpTransport
from outrider_runtimes.retrying import pause_s
from outrider_runtimes.runner import Answer, Timing, moved_average
from outrider_runtimes.tensors import Array, Check, Interface, Tensors, by_name, compile_check
from outrider_runtimes.tls import AnyTls

SCHEMES = (*HTTP_SCHEMES, "grpc", "grpcs")
# Between two times that an endpoint which says something else is asked for its metadata.
OUTDATED_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class _Served:
    """What the endpoint says of the model, and how the caller's interface is spelled there.

    Attributes:
        names: the inputs'.
        rows_of: a batched input's name; None where there is none.
    """

    described: Described
    interface: Interface
    digest: str
    naming: Naming | None
    names: tuple[str, ...]
    rows_of: str | None
    check: Check
    check_reply: oip.CheckReply

    def checked(self, inputs: Tensors) -> Tensors:
        """By name, in the interface's order. Raises InputError."""
        return dict(zip(self.names, self.check(inputs)))  # noqa: B905 - as many as there are names

    def rows(self, inputs: Tensors) -> int | None:
        """The request's N; None where no input is batched."""
        return None if self.rows_of is None else inputs[self.rows_of].shape[0]


class _Asked(NamedTuple):
    """One request.

    Attributes:
        known: what the endpoint served when the caller called; None where that was not known.
        checked: whether the inputs are what that takes.
        begun_ns: when the caller called, perf_counter_ns.
        patient: whether it is tried again where nobody listens.
    """

    inputs: Tensors
    known: _Served | None
    checked: bool
    deadline: Deadline
    begun_ns: int
    patient: bool = True


class _Job(NamedTuple):
    asked: _Asked
    future: Future[Answer]


class Remote:
    """One model of an endpoint, as a Runner. Nothing is sent before the first request or ``connect``.

    Args:
        url: ``http://host:port`` or ``https://host:port``, with or without a path before ``/v2``; ``grpc://host:port``
            or ``grpcs://host:port`` with the extra ``[grpc]``.
        model: its name there.
        tls: for https and grpcs: a ``Tls`` of PEM files, the path of the authority's alone, or for https an
            SSLContext. None trusts what this machine trusts. The server is verified in every case.
        token: sent as a bearer token, over TLS or to this machine alone.
        interface: what callers here pass and get, where the endpoint is not ours: its metadata has no batch axis, no
            labels and its own names. Its dtypes and shapes must fit, or requests end with InterfaceMismatch.
        mapping: by the name of a tensor of ``interface``, its name there; one that is left out has the same name.
        max_reply_bytes: a longer reply is a ReplyError. Compressed replies are refused whatever their length.
        threads: requests on their way at once.
        queue_size: requests that wait for one of the threads; more are refused with QueueFull.
        retries: how often a request of which the endpoint ran nothing is sent again; see ``retrying``.
        clock, rng: seconds, monotonic; what spreads the retries, seeded by the system where it is None.

    Raises:
        ConfigError: a URL, name, token, mapping, TLS or number that cannot be used.
        MissingExtra: gRPC is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        tls: AnyTls | None = None,
        token: str | None = None,
        interface: Interface | None = None,
        mapping: Mapping[str, str] | None = None,
        max_reply_bytes: int = 64 << 20,
        threads: int = 4,
        queue_size: int = 16,
        retries: int = 2,
        clock: Clock = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        require_kind("url", url, (str,), "the endpoint's, as http://host:port")
        _check_name(model)
        for name, count in (("threads", threads), ("queue_size", queue_size), ("max_reply_bytes", max_reply_bytes)):
            _check_count(name, count, least=1)
        _check_count("retries", retries, least=0)
        self.url = url
        self.model = model
        self._wanted = _wanted(interface, mapping)
        self._mapping = dict(mapping or {})
        self._retries = retries
        self._clock = clock
        self._rng = rng or random.SystemRandom()
        origin = Origin.from_url(url, schemes=SCHEMES)
        self._transport = _transport(
            origin, model=model, tls=tls, token=token, max_reply_bytes=max_reply_bytes, threads=threads
        )
        self._served: _Served | None = None
        self._outdated = False
        self._fetching = threading.Lock()
        self._outdated_s: float | None = None
        self._ids = _ids()
        self._estimate_ms: float | None = None
        self._estimating = threading.Lock()
        self._pool = Pool[_Job](
            lambda job: self._run(job.asked), threads=threads, queue_size=queue_size, name=f"the client of {self.url}"
        )
        tell_of_fork(self)

    @property
    def interface(self) -> Interface:
        """What it takes and gives: as it was passed, or as the endpoint says.

        Raises:
            RemoteUnavailable: it was not passed, and neither ``connect`` nor a request has succeeded.
        """
        return self._known().interface if self._wanted is None else self._wanted

    @property
    def interface_digest(self) -> str:
        """The digest of ``interface`` once the endpoint's own was found to fit. Raises RemoteUnavailable before."""
        return self._known().digest

    @property
    def bundle(self) -> str:
        """The digest of the bundle that answers; empty when the server is not ours. Raises RemoteUnavailable."""
        return self._known().described.bundle

    @property
    def variant(self) -> str:
        """The variant that answers; empty when the server is not ours. Raises RemoteUnavailable."""
        return self._known().described.variant

    def connect(self, deadline: Deadline) -> Interface:
        """Ask the endpoint what the model takes and gives, unless that is known.

        Raises:
            InterfaceMismatch: it does not fit the interface that was passed.
            DeadlineExceeded, RemoteUnavailable, RemoteRefused, ReplyError, RunnerClosed
        """
        return self._metadata(deadline).interface

    def submit(self, inputs: Tensors, deadline: Deadline) -> Future[Answer]:
        """Send one request; return at once. Once a thread has it, the future ends by the deadline or just after it.

        While all threads wait for requests with later deadlines, it waits with them: wait on it with the time left.
        It ends with an Answer or with DeadlineExceeded, RemoteUnavailable, RemoteRefused, ReplyError or RunnerClosed;
        with an InputError where the interface was not known yet, and with InterfaceMismatch where the endpoint has
        changed it since. The arrays must stay as they are until then.

        Raises:
            InputError: what was passed is not what the interface says; nothing was sent.
            QueueFull, RunnerClosed: nothing was sent.
        """
        return self._put(self._asked(inputs, deadline, time.perf_counter_ns()))

    def submit_once(self, inputs: Tensors, deadline: Deadline) -> Future[Answer]:
        """As ``submit``, for a caller that has another answer in hand: where nobody listens, it is told at once.

        Raises:
            InputError, QueueFull, RunnerClosed: as ``submit``.
        """
        return self._put(self._asked(inputs, deadline, time.perf_counter_ns())._replace(patient=False))

    def infer(self, inputs: Tensors | Array, *, deadline_ms: float | None = None) -> Answer:
        """One request in the caller's own thread: no queue, and no bound on requests at once but the callers' number.

        Args:
            inputs: every input of the interface by name; where there is one input, its array alone will do.
            deadline_ms: milliseconds for all of it; None waits as long as the endpoint takes.

        Raises:
            InputError, and what the future of ``submit`` ends with.
        """
        begun_ns = time.perf_counter_ns()
        deadline = Deadline.after_ms(deadline_ms, clock=self._clock)
        if self._pool.closing.is_set():
            raise RunnerClosed(f"the client of {self.url} is closed")
        if not isinstance(inputs, Mapping):
            known = self._served or self._metadata(deadline)
            inputs = by_name(known.interface, inputs)
        return self._run(self._asked(inputs, deadline, begun_ns))

    def estimate_ms(self) -> float | None:
        """A moving average of what requests took from ``submit`` to the checked answer; None before the first.

        A request that ended by its deadline counts with the time it was given.
        """
        return self._estimate_ms

    def close(self) -> None:
        """Close the connections and end the threads; waiting requests end with RunnerClosed."""
        self._pool.close()
        self._transport.close()

    def forked(self) -> None:
        """As ``Forked`` says; over HTTP it goes on in the child with connections, threads and ids of its own."""
        self._fetching, self._estimating = threading.Lock(), threading.Lock()
        self._ids = _ids()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _known(self) -> _Served:
        if self._served is None:
            raise RemoteUnavailable(
                f"what {self.model!r} at {self.url} takes is not known yet", hint="call connect(deadline) first"
            )
        return self._served

    def _put(self, asked: _Asked) -> Future[Answer]:
        job = _Job(asked, Future())
        self._pool.put(job)
        return job.future

    def _asked(self, inputs: Tensors, deadline: Deadline, begun_ns: int) -> _Asked:
        known = self._served
        if known is None or self._outdated:
            return _Asked(inputs, known, False, deadline, begun_ns)
        return _Asked(known.checked(inputs), known, True, deadline, begun_ns)

    def _run(self, asked: _Asked) -> Answer:
        asked.deadline.timeout_s()
        try:
            answer = self._tried(asked)
        except DeadlineExceeded:
            self._measured((time.perf_counter_ns() - asked.begun_ns) / 1e6, at_least=True)
            raise
        self._measured(answer.timing_ms.total)
        return answer

    def _tried(self, asked: _Asked) -> Answer:
        tries = 0
        while True:
            tries += 1
            try:
                return self._answer(asked)
            except (RemoteUnavailable, RemoteRefused) as error:
                if isinstance(error, RemoteRefused) and error.status == 404:
                    self._outdate()
                pause = self._pause_s(error, tries, asked)
                if pause is None:
                    raise
            if self._pool.closing.wait(pause):
                raise RunnerClosed(f"the client of {self.url} was closed")

    def _pause_s(self, error: OutriderError, tries: int, asked: _Asked) -> float | None:
        if tries > self._retries:
            return None
        usual_s = (self._estimate_ms or 0.0) / 1e3
        return pause_s(
            error,
            tries=tries,
            left_s=asked.deadline.remaining_s(),
            usual_s=usual_s,
            draw=self._rng.random(),
            patient=asked.patient,
        )

    def _answer(self, asked: _Asked) -> Answer:
        begun = time.perf_counter_ns()
        served = self._metadata(asked.deadline)
        if asked.known is not None and asked.known.digest != served.digest:
            raise InterfaceMismatch(f"{self.url} now serves {self.model!r} with another interface than before")
        inputs = asked.inputs if asked.checked else served.checked(asked.inputs)
        id = next(self._ids)
        naming = served.naming
        exchanged = self._transport.infer(
            inputs if naming is None else theirs_from(naming, inputs),
            id=id,
            outputs=None if naming is None else list(naming.outputs.values()),
            described=served.described,
            deadline=asked.deadline,
        )
        reply = exchanged.reply if naming is None else ours_from(naming, exchanged.reply)
        self._check_bundle(served.described, reply)
        outputs = served.check_reply(reply, id, served.rows(inputs))
        done = time.perf_counter_ns()
        asked.deadline.timeout_s()
        infer_ms = _milliseconds(reply.parameters.get("infer_ms"))
        network_ms = max(0.0, (exchanged.received_ns - exchanged.sent_ns) / 1e6 - infer_ms)
        timing = Timing(
            (begun - asked.begun_ns) / 1e6,
            (exchanged.sent_ns - begun) / 1e6,
            infer_ms,
            (done - exchanged.received_ns) / 1e6,
            network_ms,
            (done - asked.begun_ns) / 1e6,
        )
        return Answer(outputs, timing)

    def _check_bundle(self, described: Described, reply: oip.Reply) -> None:
        """An endpoint that was restarted with another bundle answers another question than the one that was asked."""
        if described.bundle and reply.parameters.get("bundle", described.bundle) != described.bundle:
            self._outdate()
            raise ReplyError(
                f"{self.url} now serves {self.model!r} from another bundle",
                hint="what it takes and gives is asked for again, at most once a second",
            )

    def _outdate(self) -> None:
        """The next request asks for the metadata, unless that was said a moment ago."""
        now_s, last_s = self._clock(), self._outdated_s
        if last_s is None or now_s - last_s >= OUTDATED_EVERY_S:
            self._outdated, self._outdated_s = True, now_s

    def _metadata(self, deadline: Deadline) -> _Served:
        served = self._served
        if served is not None and not self._outdated:
            return served
        timeout_s = deadline.timeout_s()
        if not self._fetching.acquire(timeout=-1 if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX)):
            raise DeadlineExceeded("another request asks the endpoint for its metadata and got no answer in time")
        try:
            if self._served is None or self._outdated:
                self._served = self._bound(self._transport.describe(deadline))
                self._outdated = False
            return self._served
        finally:
            self._fetching.release()

    def _bound(self, described: Described) -> _Served:
        ours = self._wanted
        if ours is None:
            naming, interface, digest = None, described.interface, described.digest
        else:
            naming, interface, digest = bind(ours, described.interface, self._mapping), ours, ours.digest
        return _Served(
            described=described,
            interface=interface,
            digest=digest,
            naming=naming,
            names=tuple(spec.name for spec in interface.inputs),
            rows_of=next((spec.name for spec in interface.inputs if spec.batched), None),
            check=compile_check(interface),
            check_reply=oip.compile_reply_check(interface),
        )

    def _measured(self, milliseconds: float, *, at_least: bool = False) -> None:
        with self._estimating:
            known = self._estimate_ms
            if known is None or not at_least or milliseconds > known:
                self._estimate_ms = moved_average(known, milliseconds)


def _transport(
    origin: Origin, *, model: str, tls: AnyTls | None, token: str | None, max_reply_bytes: int, threads: int
) -> Transport:
    if origin.scheme in HTTP_SCHEMES:
        return HttpTransport(
            origin, model=model, tls=tls, token=token, max_reply_bytes=max_reply_bytes, threads=threads
        )
    from outrider_runtimes.remote_grpc import GrpcTransport  # gRPC is an extra, and slow to import

    return GrpcTransport(origin, model=model, tls=tls, token=token, max_reply_bytes=max_reply_bytes)


def _ids() -> Iterator[str]:
    """Another process's, and another remote's, are others."""
    return map((os.urandom(4).hex() + "-{}").format, itertools.count(1))


def _wanted(interface: Interface | None, mapping: Mapping[str, str] | None) -> Interface | None:
    if interface is None:
        if mapping is not None:
            raise ConfigError("mapping= says what an interface's tensors are called", hint="pass interface= as well")
        return None
    if not isinstance(interface, Interface):
        raise ConfigError(
            f"interface= is a {type(interface).__name__}", hint="pass the edge's: interface=model.interface"
        )
    require_kind("mapping", mapping, (Mapping, type(None)), "the endpoint's names by those of the interface")
    check_mapping(interface, mapping or {})
    return interface


def _check_name(model: str) -> None:
    require_kind("model", model, (str,), "its name at the endpoint")
    if not model or len(model) > oip.MAX_NAME or model in (".", "..") or any("\ud800" <= c <= "\udfff" for c in model):
        raise ConfigError(f"{model[:64]!r} is not the name of a model", hint="pass model= as the endpoint calls it")


def _check_count(name: str, count: object, *, least: int) -> None:
    if type(count) is not int or count < least:
        raise ConfigError(f"{name} is {count!r:.40}, expected a whole number of {least} or more")


def _milliseconds(value: object) -> float:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9
    return float(value) if ok else 0.0  # type: ignore[arg-type]
