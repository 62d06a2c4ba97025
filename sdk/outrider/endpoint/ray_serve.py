"""The same application as a Ray Serve deployment, for more machines than one. Needs the extra ``[ray]``.

Each replica loads the bundles and runs the whole application over them: bounds, refusals, batching. What stands before
it is Ray's proxy, so that what ``protocol`` adds to uvicorn (bounds on heads and on slow bodies) is not there.
Ray listens on ports of its own beyond loopback, which a token of its own guards since 2.60: see docs/ray.md.

Where ``RAY_ADDRESS`` names a cluster, the deployment goes there, and the bundles and the state directory must be on
each of its machines; else a cluster of this machine alone is started, and ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.endpoint.faces import LIMITS, MAX_TIME_S
from outrider.endpoint.intake import QUEUE, Intake
from outrider.endpoint.listening import Listening, listener
from outrider.endpoint.metrics import Counted, Metrics, quality_of
from outrider.endpoint.models import Models
from outrider.endpoint.serve import opened
from outrider_runtimes.board import this_board
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import ConfigError, MissingExtra, RunnerError

if TYPE_CHECKING:
    from starlette.applications import Starlette

NAME = "outrider"
OBJECT_STORE_BYTES = 80 << 20  # requests and replies do not go through it; Ray takes no less
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 1.0, 5.0  # a replica whose model is stuck is replaced after three of them
TOLD_WITHIN_S = 2.0  # by all replicas, what they are asked
DRAIN_LOOK_S = 0.05
LINGER_S = 0.5  # Ray's proxy has the last replies, and passes them on
# Ray's own line in a log for each request takes a replica a third of a millisecond.
QUIET = {"log_level": "WARNING", "enable_access_log": False}


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """How many processes serve. Where ``most`` is above ``least``, Ray starts and ends them by the load."""

    least: int = 1
    most: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError(
                f"replicas are {self.least} to {self.most}, expected 1 or more, the fewest first",
                hint="`--replicas 2`, or `--replicas 1-4` to go by the load",
            )

    @classmethod
    def parsed(cls, text: str) -> Replicas:
        """``2``, or ``1-4``. Raises ConfigError."""
        least, dash, most = text.partition("-")
        if not (least.isdecimal() and (most.isdecimal() if dash else True) and len(text) < 10):
            raise ConfigError(f"replicas are {text!r:.40}, expected a number or two", hint="`2`, or `1-4`")
        return cls(least=int(least), most=int(most or least))


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What each replica serves; as ``serve`` takes it. It travels to other machines."""

    paths: tuple[str, ...]
    state: str | None
    trust: str | None
    token: str | None
    queue: int


class Replica:
    """One process of the deployment."""

    def __init__(self, offer: Offer) -> None:
        self._offer = offer
        self._stack = contextlib.ExitStack()
        self._models: Models = self._stack.enter_context(
            opened(offer.paths, state=offer.state, trust=offer.trust, queue=offer.queue)
        )
        self._intake = Intake(queue=offer.queue, body_bytes=LIMITS.body_bytes)
        self._metrics = Metrics(self._models, self._intake)
        self._handle: Any = None

    def __serve_build_asgi_app__(self) -> Starlette:
        """The application, as Ray asks for it."""
        from outrider.endpoint.app import build_app

        return build_app(
            self._models,
            token=self._offer.token,
            intake=self._intake,
            metrics=self._metrics,
            processes=self._replicas,
        )

    def stop(self) -> int:
        """Let nobody in any more, as the command asks for it; how many are inside."""
        self._intake.stop()
        return self._intake.inside()

    def counted(self) -> tuple[str, Counted]:
        """What this replica counted, by its name, as other replicas and the command ask for it."""
        from ray import serve

        return serve.get_replica_context().replica_tag, self._metrics.counted()

    async def _replicas(self) -> Mapping[str, Counted]:
        """What each replica counted. One that dies now is left out; where one hangs, this one alone is told of."""
        from ray import serve
        from ray.serve.exceptions import RayServeException

        told: Iterable[Any] = ()
        with contextlib.suppress(RayServeException, TimeoutError, asyncio.TimeoutError):
            if self._handle is None:
                here = serve.get_replica_context()
                self._handle = await asyncio.to_thread(serve.get_deployment_handle, here.deployment, here.app_name)
            asked = self._handle.broadcast("counted")
            told = await asked.results_async(timeout_s=TOLD_WITHIN_S, return_exceptions=True)
        found = dict([self.counted(), *_answers(told)])
        return {name: found[name] for name in sorted(found)}

    def check_health(self) -> None:
        """As Ray asks for it, again and again: raises where a model is stuck, and is then replaced."""
        for served in self._models:
            if not served.ready:
                raise RuntimeError(f"{served.name} is stuck in its engine")

    def __del__(self) -> None:
        self._stack.close()


def serve_on_ray(
    paths: Sequence[Path | str],
    *,
    listening: Listening | None = None,
    replicas: Replicas | None = None,
    state: Path | str | None = None,
    trust: Path | str | None = None,
    token: str | None = None,
    queue: int | None = None,
    ready: Callable[[str], None] | None = None,
) -> dict[str, Any] | None:
    """Serve bundles by Ray until SIGTERM or SIGINT. They are opened here once before, to refuse bad ones at once.

    Args:
        paths, state, trust, token, queue: as ``serve`` takes them; ``queue`` is that of one replica.
        listening: where Ray's proxy listens; port 0 takes any free one.
        replicas: by default one.
        ready: called with the URL when connections are taken.

    Returns:
        Service quality as ``metrics.quality_of`` tells it, of the replicas that live at the end; None where they could
        not be asked.

    Raises:
        BundleError, StoreError, AdmissionError, EngineError, ConfigError: as ``serve``.
        RunnerError: no replica could load them on its machine.
        MissingExtra: the extra ``[ray]`` is not installed.
    """
    _require_ray()
    listening = listening or Listening()
    queue = QUEUE if queue is None else queue
    with contextlib.closing(listener(listening, secured=token is not None)) as sock:
        port = int(sock.getsockname()[1])
    with opened(paths, state=state, trust=trust, queue=queue):
        pass
    offer = Offer(
        paths=tuple(str(Path(path).resolve()) if Path(path).exists() else str(path) for path in paths),
        state=None if state is None else str(Path(state).resolve()),
        trust=None if trust is None else str(Path(trust).resolve()),
        token=token,
        queue=queue,
    )
    # Ray tells its driver's standard output what becomes of workers.
    with contextlib.redirect_stdout(sys.stderr), cluster(replicas or Replicas(), listening, port) as run:
        handle = run(offer)
        with _told_to_stop() as (stop, again):
            if ready is not None:
                ready(f"{'http' if listening.tls is None else 'https'}://{listening.address(port)}")
            stop.wait()
            _drain(handle, Deadline.after_ms(1e3 * listening.drain_s), again)
            told = _asked(handle, "counted")
            return quality_of([counted for _, counted in told]) if told else None


def _drain(handle: Any, deadline: Deadline, again: threading.Event) -> None:
    """Have the replicas refuse what is new, and wait until they have answered what is inside, or until a second signal.
    Ray itself would close its proxy first, and every connection with it.
    """
    while any(_asked(handle, "stop")) and not deadline.passed and not again.wait(DRAIN_LOOK_S):
        pass
    again.wait(LINGER_S)


def _asked(handle: Any, method: str) -> list[Any]:
    """What the replicas answer to a method of theirs; nothing where they do not in time."""
    from ray.serve.exceptions import RayServeException

    try:
        return _answers(handle.broadcast(method).results(timeout_s=TOLD_WITHIN_S, return_exceptions=True))
    except (RayServeException, TimeoutError):
        return []


def _answers(told: Iterable[Any]) -> list[Any]:
    """Of what a broadcast gave: a replica that died meanwhile gives an exception."""
    return [each for each in told if not isinstance(each, BaseException)]


@contextlib.contextmanager
def _told_to_stop() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Set by the first and the second SIGTERM or SIGINT. Once Ray is up: it takes over the signals when it starts."""
    stop, again = threading.Event(), threading.Event()

    def told(*_: object) -> None:
        (again if stop.is_set() else stop).set()

    before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop, again
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def cluster(replicas: Replicas, listening: Listening, port: int) -> Iterator[Callable[[Offer], Any]]:
    """Ray with its proxy, until the block ends; gives what deploys an Offer and returns Ray's handle of it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if "RAY_ADDRESS" in os.environ:
        _check_cluster(os.environ["RAY_ADDRESS"])
        ray.init(log_to_driver=False, logging_level="warning")
    else:
        ray.init(
            address="local",  # not one that somebody else started here
            num_cpus=max(this_board().cpus, replicas.most),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="warning",
        )
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": listening.host, "port": port, "request_timeout_s": MAX_TIME_S, **_tls(listening)},
            logging_config=QUIET,
        )

        def run(offer: Offer) -> Any:
            try:
                return serve.run(deployment(replicas, listening.drain_s).bind(offer), name=NAME, route_prefix="/")
            except RuntimeError as error:
                raise _not_started(error) from error

        try:
            yield run
        finally:
            serve.shutdown()
    finally:
        ray.shutdown()


def _not_started(error: RuntimeError) -> RunnerError:
    """What Ray's status says of the replicas' end, whose last line is the error itself."""
    from ray import serve

    found = serve.status().applications.get(NAME)
    messages = [str(error)] if found is None else [each.message for each in found.deployments.values()]
    last = next((line for text in messages for line in reversed(text.splitlines()) if line.strip()), str(error))
    return RunnerError(
        f"no replica could start: {last.removeprefix('outrider_runtimes.errors.'):.400}",
        hint="the bundles and the state directory must be found under the same paths on each machine of the cluster",
    )


def _check_cluster(address: str) -> None:
    """Raises ConfigError where nobody listens at ``HOST:PORT``, which Ray itself tries for minutes; ``auto`` and the
    like are Ray's to find.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()) or "://" in address:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=TOLD_WITHIN_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"no Ray cluster at RAY_ADDRESS {address}: {error}", hint="`ray status` there says whether it runs"
        ) from None


def deployment(replicas: Replicas, drain_s: float) -> Any:
    """``Replica`` as a deployment, to be bound to an Offer."""
    from ray import serve

    options: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.most > replicas.least:
        options = {"autoscaling_config": {"min_replicas": replicas.least, "max_replicas": replicas.most}}
    return serve.deployment(
        # The application's own bounds are stricter, and say why and when to come again.
        max_ongoing_requests=2**20,
        graceful_shutdown_timeout_s=drain_s,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        logging_config=QUIET,
        **options,
    )(serve.ingress()(Replica))


def _tls(listening: Listening) -> dict[str, str]:
    if listening.tls is None:
        return {}
    listening.tls.context()  # names the file that cannot be used
    files = {"ssl_certfile": str(listening.tls.cert), "ssl_keyfile": str(listening.tls.key)}
    if listening.tls.client_ca is not None:
        files["ssl_ca_certs"] = str(listening.tls.client_ca)
    return files


def _require_ray() -> None:
    try:
        import ray.serve  # noqa: F401
    except ImportError:
        raise MissingExtra("ray", extra="ray", purpose="serving bundles on Ray") from None
