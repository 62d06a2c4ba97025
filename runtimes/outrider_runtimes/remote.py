"""A runner whose work is done by an endpoint of the Open Inference Protocol v2, over HTTP."""

from __future__ import annotations

import itertools
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from outrider_runtimes import oip
from outrider_runtimes._wire import HttpReply
from outrider_runtimes.deadline import Clock, Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    InterfaceMismatch,
    OutriderError,
    QueueFull,
    RemoteRefused,
    RemoteUnavailable,
    ReplyError,
    RunnerClosed,
)
from outrider_runtimes.http import HttpClient, Origin
from outrider_runtimes.runner import Answer, Timing, moved_average
from outrider_runtimes.tensors import Interface, Tensors, check_named

MAX_METADATA_BYTES = 1 << 20
MAX_MESSAGE = 300
# Decoding JSON holds the interpreter's lock and cannot be stopped; 20 ns a byte on a PC, taken as five times that.
JSON_DECODE_S_PER_BYTE = 100e-9


@dataclass(frozen=True, kw_only=True)
class _Served:
    """What the endpoint says of the model."""

    interface: Interface
    interface_digest: str
    binary: bool
    bundle: str
    variant: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    inputs: Tensors
    known: _Served | None
    checked: bool
    deadline: Deadline
    future: Future[Answer]
    submitted_ns: int


class Remote:
    """One model of an endpoint, as a Runner. Nothing is sent before the first request or ``connect``.

    Args:
        url: ``http://host:port`` or ``https://host:port``, with or without a path before ``/v2``.
        model: its name there.
        tls: for https; None trusts what this machine trusts. It must verify.
        token: sent as a bearer token, over https or to this machine alone.
        max_reply_bytes: a longer reply is a ReplyError.
        threads: requests on their way at once.
        queue_size: requests that wait for one of the threads; more are refused with QueueFull.

    Raises:
        ConfigError: a URL, name, token or TLS context that cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        tls: ssl.SSLContext | None = None,
        token: str | None = None,
        max_reply_bytes: int = 64 << 20,
        threads: int = 4,
        queue_size: int = 16,
        clock: Clock = time.monotonic,
    ) -> None:
        if threads < 1 or queue_size < 1:
            raise ConfigError(f"threads is {threads} and queue_size {queue_size}, expected 1 or more")
        origin = Origin.from_url(url)
        self.url = url
        self.model = model
        self._path = f"/v2/models/{_path_name(model)}"
        self._headers = _headers(origin, token)
        self._max_reply_bytes = max_reply_bytes
        self._limits = oip.Limits(body_bytes=max_reply_bytes)
        self._clock = clock
        self._client = HttpClient(origin, tls=tls, max_idle=threads)
        self._served: _Served | None = None
        self._outdated = False
        self._fetching = threading.Lock()
        self._ids = itertools.count(1)
        self._estimate_ms: float | None = None
        self._estimating = threading.Lock()
        self._pool = _Pool(self._run, threads=threads, queue_size=queue_size, name=f"the client of {self.url}")

    @property
    def interface(self) -> Interface:
        """What it takes and gives. Raises RemoteUnavailable before ``connect`` or a request has succeeded."""
        return self._known().interface

    @property
    def interface_digest(self) -> str:
        """The interface's digest. Raises RemoteUnavailable as ``interface`` does."""
        return self._known().interface_digest

    @property
    def bundle(self) -> str:
        """The digest of the bundle that answers; empty when the server is not ours. Raises RemoteUnavailable."""
        return self._known().bundle

    @property
    def variant(self) -> str:
        """The variant that answers; empty when the server is not ours. Raises RemoteUnavailable."""
        return self._known().variant

    def connect(self, deadline: Deadline) -> Interface:
        """Ask the endpoint what the model takes and gives, unless that is known.

        Raises:
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
        known = self._served
        checked = known is not None and not self._outdated
        if known is not None and checked:
            inputs = check_named(known.interface, inputs)
        job = _Job(
            inputs=inputs,
            known=known,
            checked=checked,
            deadline=deadline,
            future=Future(),
            submitted_ns=time.perf_counter_ns(),
        )
        self._pool.put(job)
        return job.future

    def estimate_ms(self) -> float | None:
        """A moving average of what requests took from ``submit`` to the checked answer; None before the first.

        A request that ended by its deadline counts with the time it was given.
        """
        return self._estimate_ms

    def close(self) -> None:
        """Close the connections and end the threads; waiting requests end with RunnerClosed."""
        self._pool.close()
        self._client.close()

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

    def _run(self, job: _Job) -> Answer:
        job.deadline.timeout_s()
        try:
            answer = self._answer(job)
        except DeadlineExceeded:
            self._measured((time.perf_counter_ns() - job.submitted_ns) / 1e6, at_least=True)
            raise
        self._measured(answer.timing_ms.total)
        return answer

    def _answer(self, job: _Job) -> Answer:
        begun = time.perf_counter_ns()
        served = self._metadata(job.deadline)
        if job.known is not None and job.known.interface_digest != served.interface_digest:
            raise InterfaceMismatch(f"{self.url} now serves {self.model!r} with another interface than before")
        inputs = job.inputs if job.checked else check_named(served.interface, job.inputs)
        id = str(next(self._ids))
        message = oip.encode_request(inputs, id=id, timeout_us=_timeout_us(job.deadline), binary=served.binary)
        sent = time.perf_counter_ns()
        http = self._client.exchange(
            "POST",
            f"{self._path}/infer",
            headers={**self._headers, **message.headers},
            body=message.body,
            deadline=job.deadline,
            max_reply_bytes=self._max_reply_bytes,
        )
        received = time.perf_counter_ns()
        reply = self._decoded(http, job.deadline)
        self._check_bundle(served, reply)
        outputs = oip.check_reply(served.interface, reply, id=id, rows=_rows(served.interface, inputs))
        done = time.perf_counter_ns()
        job.deadline.timeout_s()
        infer_ms = _milliseconds(reply.parameters.get("infer_ms"))
        timing = Timing(
            queue=(begun - job.submitted_ns) / 1e6,
            pre=(sent - begun) / 1e6,
            infer=infer_ms,
            post=(done - received) / 1e6,
            network=max(0.0, (received - sent) / 1e6 - infer_ms),
            total=(done - job.submitted_ns) / 1e6,
        )
        return Answer(outputs=outputs, timing_ms=timing)

    def _decoded(self, http: HttpReply, deadline: Deadline) -> oip.Reply:
        if http.status != 200:
            raise self._refused(http)
        length = http.headers.get(oip.LENGTH_HEADER.lower())
        if length is not None and not (length.isascii() and length.isdigit() and len(length) < 16):
            raise ReplyError(f"{oip.LENGTH_HEADER} of the reply is {length[:32]!r}")
        json_bytes = None if length is None else int(length)
        document_bytes = len(http.body) if json_bytes is None else json_bytes
        if document_bytes * JSON_DECODE_S_PER_BYTE > deadline.remaining_s():
            raise DeadlineExceeded(f"the reply came too late to decode its {document_bytes} bytes of JSON in time")
        return oip.decode_reply(http.body, json_bytes, limits=self._limits)

    def _check_bundle(self, served: _Served, reply: oip.Reply) -> None:
        """An endpoint that was restarted with another bundle answers another question than the one that was asked."""
        if served.bundle and reply.parameters.get("bundle", served.bundle) != served.bundle:
            self._outdated = True
            raise ReplyError(
                f"{self.url} now serves {self.model!r} from another bundle",
                hint="the next request asks again what it takes and gives",
            )

    def _refused(self, http: HttpReply) -> OutriderError:
        if http.status == 404:
            self._outdated = True
        said = _message(http)
        hint = "redirects are not followed: use the address it names" if 300 <= http.status < 400 else ""
        return RemoteRefused(
            f"{self.url}, model {self.model!r}: status {http.status}" + (f": {said}" if said else ""),
            status=http.status,
            hint=hint,
        )

    def _metadata(self, deadline: Deadline) -> _Served:
        served = self._served
        if served is not None and not self._outdated:
            return served
        timeout_s = deadline.timeout_s()
        if not self._fetching.acquire(timeout=-1 if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX)):
            raise DeadlineExceeded("another request asks the endpoint for its metadata and got no answer in time")
        try:
            if self._served is None or self._outdated:
                self._served = self._fetched(deadline)
                self._outdated = False
            return self._served
        finally:
            self._fetching.release()

    def _fetched(self, deadline: Deadline) -> _Served:
        server = self._get("/v2", deadline)
        model = self._get(self._path, deadline)
        interface = oip.interface_from_metadata(model)
        ours = oip.ours_in(model)
        extensions = server.get("extensions")
        return _Served(
            interface=interface,
            interface_digest=interface.digest,
            binary=isinstance(extensions, list) and oip.BINARY_EXTENSION in extensions,
            bundle=_said(ours, "bundle"),
            variant=_said(ours, "variant"),
        )

    def _get(self, target: str, deadline: Deadline) -> Mapping[str, Any]:
        http = self._client.exchange(
            "GET", target, headers=self._headers, deadline=deadline, max_reply_bytes=MAX_METADATA_BYTES
        )
        if http.status != 200:
            raise self._refused(http)
        return oip.decode_json(http.body, ReplyError)

    def _measured(self, milliseconds: float, *, at_least: bool = False) -> None:
        with self._estimating:
            known = self._estimate_ms
            if known is None or not at_least or milliseconds > known:
                self._estimate_ms = moved_average(known, milliseconds)


class _Pool:
    """A few daemon threads, started when they are needed, behind a bounded queue."""

    def __init__(self, run: Callable[[_Job], Answer], *, threads: int, queue_size: int, name: str) -> None:
        self._run = run
        self._max_threads = threads
        self._queue_size = queue_size
        self._name = name
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._threads = 0
        self._idle = 0
        self._closed = False

    def put(self, job: _Job) -> None:
        with self._changed:
            if self._closed:
                raise RunnerClosed(f"{self._name} is closed")
            if len(self._jobs) >= self._queue_size + self._idle:
                raise QueueFull(f"{self._name} has {len(self._jobs)} requests waiting", hint="send fewer at once")
            self._jobs.append(job)
            if len(self._jobs) > self._idle and self._threads < self._max_threads:
                self._threads += 1
                threading.Thread(target=self._work, name=f"outrider-remote-{self._threads}", daemon=True).start()
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            waiting = list(self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
        for job in waiting:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(RunnerClosed(f"{self._name} was closed"))

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                answer = self._run(job)
            except BaseException as error:
                job.future.set_exception(error)
            else:
                job.future.set_result(answer)

    def _next(self) -> _Job | None:
        with self._changed:
            self._idle += 1
            while not self._jobs and not self._closed:
                self._changed.wait()
            self._idle -= 1
            return self._jobs.popleft() if self._jobs else None


def _rows(interface: Interface, inputs: Tensors) -> int | None:
    return next((inputs[spec.name].shape[0] for spec in interface.inputs if spec.batched), None)


def _timeout_us(deadline: Deadline) -> int | None:
    remaining_s = deadline.timeout_s()
    return None if remaining_s is None else min(max(1, int(remaining_s * 1e6)), oip.MAX_TIMEOUT_US)


def _path_name(model: str) -> str:
    if not model or len(model) > oip.MAX_NAME or model in (".", ".."):
        raise ConfigError(f"{model[:64]!r} is not the name of a model", hint="pass model= as the endpoint calls it")
    return quote(model, safe="")


def _headers(origin: Origin, token: str | None) -> dict[str, str]:
    if token is None:
        return {}
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError("token= is not one word of printable ASCII characters")
    if origin.scheme != "https" and not origin.loopback:
        raise ConfigError(
            f"a token would be sent to {origin.address} in the clear", hint="use https, or an endpoint on this machine"
        )
    return {"Authorization": f"Bearer {token}"}


def _said(ours: Mapping[str, Any], key: str) -> str:
    value = ours.get(key, "")
    return value[: oip.MAX_NAME] if isinstance(value, str) else ""


def _milliseconds(value: object) -> float:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9
    return float(value) if ok else 0.0  # type: ignore[arg-type]


def _message(http: HttpReply) -> str:
    """What the server says of its refusal, in one short printable line; empty when that cannot be told."""
    try:
        said = oip.decode_json(http.body, ReplyError).get("error", "")
    except ReplyError:
        return ""
    text = said if isinstance(said, str) else ""
    return "".join(c if c.isprintable() else " " for c in text[:MAX_MESSAGE]).strip()
