"""A large batch over several endpoints: split along ``N``, answered in any order, collected in order.

``split`` and ``Ledger`` are the rules, without I/O and without a clock; ``fan_out`` obeys them. A part that an
endpoint did not answer goes to another one, and at the end an idle endpoint also takes on what another still holds: one
that dies or hangs costs the others its share of the work, and the caller no answer.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as first_of
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from outrider_runtimes.deadline import Clock, Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    InputError,
    InterfaceMismatch,
    OutriderError,
    QueueFull,
    RemoteRefused,
    RunnerClosed,
    RunnerError,
    RunnerStuck,
)
from outrider_runtimes.runner import Answer, Runner
from outrider_runtimes.tensors import Array, Interface, Tensors, check_named

if TYPE_CHECKING:
    from outrider_runtimes.remote import Remote

INTRODUCTION_SHARE = 0.25  # of the time; one that hangs must not cost the batch
PARTS_AN_ENDPOINT = 8  # the last parts are what endpoints wait for each other with
MOST_PART_BYTES = 8 << 20
FLYING = 2  # parts at one endpoint: one is on its way while the other is computed
# A part may take so much of the time that is left: whoever takes it after that still has some.
PART_SHARE = 0.5
# Failures in a row, of every endpoint: with the rests between them a second or so. One that has enough to do now is
# asked again as long as there is time.
HOPELESS_AFTER = 5
REST_S, REST_MOST_S = 0.1, 2.0  # after a failure, doubling
REQUEST_AT_FAULT = (400, 413, 415)  # another endpoint would say the same


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one endpoint did.

    Attributes:
        rows: of the result, that it answered.
        failures: parts that it was given and did not answer.
        said: its last failure; empty where there was none.
    """

    rows: int = 0
    failures: int = 0
    said: str = ""


@dataclass(frozen=True, kw_only=True)
class FannedOut:
    """The whole batch's answer, and who gave it, in the order of the endpoints."""

    outputs: dict[str, Array]
    shares: tuple[Share, ...]


def split(rows: int, *, endpoints: int, row_bytes: int) -> list[slice]:
    """Consecutive parts of nearly one size: several for each endpoint, none too large for one request.

    Args:
        row_bytes: of all inputs; bounds a part to ``MOST_PART_BYTES``, or to one row.
    """
    wanted = endpoints * PARTS_AN_ENDPOINT
    needed = math.ceil(rows * row_bytes / MOST_PART_BYTES)
    count = max(1, min(rows, max(wanted, needed)))
    edges = [rows * at // count for at in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


@dataclass(kw_only=True)
class Ledger:
    """Which part is where. It only grows towards the end: a part that is done stays done.

    Attributes:
        waiting: parts that no endpoint has, in order; one that came back is asked for first.
        flying: by part, the endpoints that have it.
        done: parts that are answered.
    """

    waiting: deque[int]
    flying: dict[int, list[int]] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)

    def take(self, endpoint: int) -> int | None:
        """A part for an endpoint with room; where none waits, the oldest that only others have; None for none."""
        if self.waiting:
            part = self.waiting.popleft()
        else:
            part = next((part for part, holders in self.flying.items() if endpoint not in holders), -1)
            if part < 0:
                return None
        self.flying.setdefault(part, []).append(endpoint)
        return part

    def answered(self, part: int) -> bool:
        """Whether this is the first answer to the part."""
        self.flying.pop(part, None)
        first = part not in self.done
        self.done.add(part)
        return first

    def failed(self, part: int, endpoint: int) -> None:
        """Give it back; it waits again where nobody else has it."""
        holders = self.flying.get(part, [])
        if endpoint in holders:
            holders.remove(endpoint)
        if part not in self.done and not holders:
            self.flying.pop(part, None)
            self.waiting.appendleft(part)


def introduce(remotes: Sequence[Remote], deadline: Deadline) -> tuple[Interface, dict[int, OutriderError]]:
    """Ask all of them at once what they take and give, in a quarter of the time that is left.

    Returns:
        Their interface, and by position why those that did not say cannot be asked.

    Raises:
        ConfigError: there are none.
        InterfaceMismatch: two of them have different interfaces, or serve different bundles.
        RunnerError, DeadlineExceeded: none of them can be asked.
    """
    _check_some(remotes)
    left_s = deadline.remaining_s()
    soon = Deadline.after_ms(None if left_s == math.inf else max(1.0, INTRODUCTION_SHARE * left_s * 1e3))

    def ask(remote: Remote) -> Interface | OutriderError:
        try:
            return remote.connect(soon)
        except (RunnerError, DeadlineExceeded) as error:
            return error

    with ThreadPoolExecutor(len(remotes)) as threads:
        said = dict(enumerate(threads.map(ask, remotes)))
    away = {at: each for at, each in said.items() if isinstance(each, OutriderError)}
    known = {at: each for at, each in said.items() if isinstance(each, Interface)}
    if not known:
        raise next(reversed(away.values()))
    first, *others = known
    for at in others:
        if known[at].digest != known[first].digest:
            raise InterfaceMismatch(f"{remotes[at].url} and {remotes[first].url} have different interfaces")
        if remotes[at].bundle != remotes[first].bundle:
            raise InterfaceMismatch(
                f"{remotes[at].url} and {remotes[first].url} serve different bundles",
                hint="one batch is answered by one model: serve the same bundle at both",
            )
    return known[first], away


def fan_out(
    runners: Sequence[Runner],
    interface: Interface,
    inputs: Tensors,
    deadline: Deadline,
    *,
    clock: Clock = time.monotonic,
) -> FannedOut:
    """Answer one batch by several runners of one interface; every row once and in order.

    Args:
        inputs: by name; those without a batch axis go along with every part.
        clock: of ``deadline``.

    Raises:
        InputError: what was passed is not what the interface says.
        ConfigError: there are no runners, or a tensor that goes in or comes out has no batch axis to split or to join.
        DeadlineExceeded: not all was answered in time.
        RunnerError: all endpoints failed; the last failure of one of them.
    """
    _check_some(runners)
    checked = check_named(interface, inputs)
    batched = [spec.name for spec in interface.inputs if spec.batched]
    for spec in interface.outputs:
        if not spec.batched or not batched:
            raise ConfigError(f"a batch cannot be split: {spec.name!r} has no axis N", hint="ask one endpoint")
    rows = len(checked[batched[0]])
    row_bytes = sum(checked[name].nbytes for name in batched) // max(1, rows)
    parts = split(rows, endpoints=len(runners), row_bytes=row_bytes)

    def inputs_of(part: int) -> Tensors:
        return {name: array[parts[part]] if name in batched else array for name, array in checked.items()}

    fan = _Fan(runners, inputs_of, sizes=[part.stop - part.start for part in parts], deadline=deadline, clock=clock)
    return fan.run()


@dataclass(kw_only=True)
class _Endpoint:
    runner: Runner
    rows: int = 0
    failures: int = 0
    in_a_row: int = 0
    broken_in_a_row: int = 0  # of those, the ones that are not for want of room
    flying: int = 0
    rests_until_s: float = -math.inf
    error: OutriderError | None = None


@dataclass(frozen=True, kw_only=True)
class _Flight:
    part: int
    endpoint: int
    ends_s: float


class _Fan:
    """One batch on its way. Only the thread of ``run`` touches it."""

    def __init__(
        self,
        runners: Sequence[Runner],
        inputs_of: Callable[[int], Tensors],
        *,
        sizes: Sequence[int],
        deadline: Deadline,
        clock: Clock,
    ) -> None:
        self._endpoints = [_Endpoint(runner=runner) for runner in runners]
        self._inputs_of = inputs_of
        self._sizes = sizes
        self._deadline = deadline
        self._clock = clock
        self._ledger = Ledger(waiting=deque(range(len(sizes))))
        self._flights: dict[Future[Answer], _Flight] = {}
        self._answers: dict[int, Mapping[str, Array]] = {}

    def run(self) -> FannedOut:
        try:
            while len(self._ledger.done) < len(self._sizes):
                self._check_hope()
                now_s = self._clock()  # once a turn: a rest that ends meanwhile would be neither over nor waited for
                self._hand_out(now_s)
                self._collect(now_s)
        finally:
            for future in self._flights:
                future.cancel()
        names = self._answers[0]
        outputs = {
            name: np.concatenate([self._answers[part][name] for part in range(len(self._sizes))]) for name in names
        }
        shares = [
            Share(rows=each.rows, failures=each.failures, said="" if each.error is None else str(each.error))
            for each in self._endpoints
        ]
        return FannedOut(outputs=outputs, shares=tuple(shares))

    def _check_hope(self) -> None:
        done = f"{len(self._ledger.done)} of {len(self._sizes)} parts are answered"
        if self._deadline.passed:
            raise DeadlineExceeded(f"{done}, and no time is left")
        if all(each.broken_in_a_row >= HOPELESS_AFTER for each in self._endpoints):
            error = next(each.error for each in reversed(self._endpoints) if each.error is not None)
            raise RunnerError(f"every endpoint fails, {done}: {error}", hint=error.hint) from error

    def _hand_out(self, now_s: float) -> None:
        for number, each in enumerate(self._endpoints):
            while each.flying < FLYING and each.rests_until_s <= now_s:
                part = self._ledger.take(number)
                if part is None:
                    break
                self._send(part, number)

    def _send(self, part: int, number: int) -> None:
        each = self._endpoints[number]
        left_s = self._deadline.remaining_s()
        ends_s = math.inf if left_s == math.inf else self._clock() + PART_SHARE * left_s
        try:
            future = each.runner.submit(self._inputs_of(part), Deadline(ends_s, clock=self._clock))
        except InputError:
            raise
        except OutriderError as error:
            self._fail(part, number, error)
            return
        each.flying += 1
        self._flights[future] = _Flight(part=part, endpoint=number, ends_s=ends_s)

    def _collect(self, now_s: float) -> None:
        """Wait for the next thing to happen: an answer, a part's end, or the end of a rest."""
        rests = [each.rests_until_s for each in self._endpoints if each.rests_until_s > now_s]
        until_s = min([flight.ends_s for flight in self._flights.values()] + rests + [self._deadline.at_s])
        timeout_s = None if until_s == math.inf else max(0.0, until_s - self._clock())
        if not self._flights:
            time.sleep(timeout_s or 0.0)
            return
        first_of(self._flights, timeout=timeout_s, return_when=FIRST_COMPLETED)
        now_s = self._clock()
        for future, flight in list(self._flights.items()):
            if future.done():
                self._land(future, flight)
            elif flight.ends_s <= now_s:
                future.cancel()
                self._lose(future, flight, DeadlineExceeded("no answer to a part in time"))

    def _land(self, future: Future[Answer], flight: _Flight) -> None:
        error = RunnerClosed("the request was cancelled") if future.cancelled() else future.exception()
        if isinstance(error, (InputError, InterfaceMismatch)) or (
            isinstance(error, RemoteRefused) and error.status in REQUEST_AT_FAULT
        ):
            raise error
        if isinstance(error, OutriderError):
            self._lose(future, flight, error)
            return
        answer = future.result()
        del self._flights[future]
        each = self._endpoints[flight.endpoint]
        each.flying -= 1
        each.in_a_row = each.broken_in_a_row = 0
        if self._ledger.answered(flight.part):
            self._answers[flight.part] = answer.outputs
            each.rows += self._sizes[flight.part]

    def _lose(self, future: Future[Answer], flight: _Flight, error: OutriderError) -> None:
        del self._flights[future]
        self._endpoints[flight.endpoint].flying -= 1
        self._fail(flight.part, flight.endpoint, error)

    def _fail(self, part: int, number: int, error: OutriderError) -> None:
        each = self._endpoints[number]
        each.failures += 1
        each.in_a_row += 1
        each.broken_in_a_row += not _is_busy(error)
        each.error = error
        each.rests_until_s = self._clock() + min(REST_MOST_S, REST_S * 2.0 ** min(each.in_a_row - 1, 16))
        self._ledger.failed(part, number)


def _check_some(endpoints: Sequence[Runner]) -> None:
    if not endpoints:
        raise ConfigError("there is no endpoint to ask", hint="pass one or more")


def _is_busy(error: OutriderError) -> bool:
    """Whether it is sound, and has only enough to do now."""
    if isinstance(error, RemoteRefused):
        return error.busy
    return isinstance(error, QueueFull) and not isinstance(error, RunnerStuck)
