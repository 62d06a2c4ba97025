"""An installed bundle, opened: the device's model. What serves it was measured when it was installed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from outrider.admit.admission import Admission
from outrider.bundle import Trust, check_trust, find_trust
from outrider.opening import BundleInfo, Isolation, Opened, Wanted, admission_here, candidates, open_choice
from outrider.prediction import Failure, OnFailure, OnPrediction, Prediction, Watchers, failure_of
from outrider.store import Installed, Store, find_state_dir
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    NoEngine,
    NotInstalled,
    OutriderError,
    RunnerClosed,
    StoreError,
)
from outrider_runtimes.nouns import filled
from outrider_runtimes.options import require_kind
from outrider_runtimes.runner import CLOSE_TIMEOUT_S, Answer, Drop, Served, wait
from outrider_runtimes.tensors import Array, Finite, Interface, Tensors, by_name

# What an installed bundle does not need up to its first answer is imported where it is used: a start is short.
if TYPE_CHECKING:
    from concurrent.futures import Future

    from outrider.bundle import OffloadRule
    from outrider.serving import Change, OnChange, Serving
    from outrider.stream import Stream
    from outrider_runtimes.worker import Worker

__all__ = ["BundleInfo", "Model", "Prediction", "load"]

QUEUE_SIZE = 8  # requests that wait beside the one that runs; a board's own calls seldom are more
MAX_CHANGES = 32  # that a model remembers


def load(
    source: str | Path,
    *,
    trust: Trust | str | Path | None = None,
    state: str | Path | None = None,
    engine: str | None = None,
    variant: str | None = None,
    threads: int | None = None,
    isolation: Isolation = "thread",
    drop: Drop = "newest",
    queue_size: int = QUEUE_SIZE,
    finite: Finite = "reject",
    ladder: Sequence[str] | None = None,
    latency_ms: float | None = None,
    ladder_resident: bool = False,
) -> Model:
    """Open an installed bundle. Its members are not hashed and nothing is tried out: its install did that.

    Where the engine's version or the board is another than at any install of it, it is admitted and measured again.

    Args:
        source: the name of what is installed; or a bundle's path (a Path, or a string that ends in ``.outrider`` or
            has a ``/``), which is installed first unless it is what is current under its name, or was rolled back.
        trust: which keys may sign; as in ``install``.
        state: the state directory; as in ``install``.
        engine, variant, threads: instead of what was chosen at install.
        isolation: ``"process"`` runs the engine in a child: one that crashes, or is stuck beyond its deadline, is
            killed and replaced, and the next call is answered. A call costs some 0.1 ms and a copy of its tensors more.
        drop: which request is refused when too many wait; see ``Worker``.
        queue_size: how many may wait beside the one that runs.
        finite: what becomes of inputs with NaN or infinite values: ``"reject"`` refuses the call, ``"clip"`` brings
            infinities to the nearest number that the input allows and refuses NaN, ``"pass"`` does not look.
        ladder: names of variants, the best one first. While the board is too hot, or slowed down, for calls to hold
            ``latency_ms``, the next one serves, and the better one again when it has been cool for a while; see
            ``outrider.ladder.Rules``. Each step is a Change, each Prediction names its variant.
        latency_ms: what the median call may take, for the ladder.
        ladder_resident: keep the sessions of all variants that have served; else one is loaded, and two while they
            change.

    Raises:
        NotInstalled: there is no bundle of that name.
        TrustError: no key that is trusted now signed it.
        ConfigError: the bundle has no such variant, ``threads`` is not from 1 to 1024, or another option is not what
            is said here.
        NoEngine: there is no such engine, or it does not run that variant here; says what does.
        MissingExtra: the engine that was asked for was installed once and is not any more.
        OutriderError: what ``install`` raises, where it is installed first.
    """
    require_kind("source", source, (str, Path), "the name of a bundle that is installed, or the path of one")
    root = find_state_dir(state, writing=False)
    found = find_trust(trust, root)
    store = Store(root)
    if ladder is not None:
        variant = _first_rung(ladder, latency_ms, variant)
    elif latency_ms is not None or ladder_resident:
        raise ConfigError("latency_ms and ladder_resident are for a ladder, and there is none", hint="ladder=[...]")
    wanted = Wanted(engine=engine, variant=variant, threads=threads, isolation=isolation, finite=finite)
    loader = _Loader(store, found, wanted, drop=drop, queue_size=queue_size)
    installed = _of_path(store, Path(source), found) if is_path(source) else _of_name(store, str(source))
    serving, changes = loader.start(installed)
    if ladder is not None:
        serving = loader.climbing(serving, ladder, latency_ms or 0.0, resident=ladder_resident)
    return loader.model(serving, changes)


def _first_rung(ladder: Sequence[str], latency_ms: float | None, variant: str | None) -> str:
    from outrider.ladder import check_ladder

    check_ladder(ladder, latency_ms)
    if variant is not None:
        raise ConfigError("variant and ladder exclude each other", hint="the ladder's first variant serves")
    return ladder[0]


class _Loader:
    """One ``load``: what was asked for, and the steps to a Model of it."""

    def __init__(self, store: Store, trust: Trust, wanted: Wanted, *, drop: Drop, queue_size: int) -> None:
        for name, word, words in (
            ("isolation", wanted.isolation, get_args(Isolation)),
            ("drop", drop, get_args(Drop)),
            ("finite", wanted.finite, get_args(Finite)),
        ):
            if word not in words:
                raise ConfigError(f"{name} is {word!r:.40}, expected {' or '.join(map(repr, words))}")
        require_kind("engine", wanted.engine, (str, type(None)), "the name of one, or None")
        require_kind("variant", wanted.variant, (str, type(None)), "the name of one, or None")
        if type(queue_size) is not int or queue_size < 0:
            raise ConfigError(f"queue_size is {queue_size!r:.40}, expected a whole number of 0 or more")
        self._store = store
        self._trust = trust
        self._drop: Drop = drop
        self._queue_size = queue_size
        self._model: Model | None = None
        self._tried_by = Deadline.after_ms(None)
        self._admissions: dict[tuple[str, str | None], Admission] = {}
        self._wanted = replace(wanted, stuck=self._is_stuck)

    def open(self, installed: Installed, wanted: Wanted | None = None) -> Opened:
        """Load the choice for this board. Raises what ``load`` says."""
        wanted = wanted or self._wanted
        where = f"{installed.name!r} in {self._store.root}"
        verified = check_trust(where, installed.signatures, self._trust) or installed.verified
        opened = open_choice(installed, self._admission(installed, wanted.engine), wanted, verified=verified)
        if installed.on_trial:
            from outrider.admit.supervise import Limits

            self._tried_by = Deadline.after_ms(Limits.wall_s * 1e3)
        return opened

    def _admission(self, installed: Installed, engine: str | None) -> Admission:
        """Found, or measured, once: ``installed`` is what was read before."""
        key = (installed.digest, engine)
        if key not in self._admissions:
            self._admissions[key] = admission_here(self._store, installed, engine=engine)
        return self._admissions[key]

    def open_good(self, good: Installed) -> Opened:
        """Load what was good before: as was asked for, or as it was chosen where it does not have that."""
        try:
            return self.open(good)
        except (ConfigError, NoEngine):
            return self.open(good, replace(self._wanted, engine=None, variant=None, threads=None))

    def start(self, installed: Installed) -> tuple[BoundSession | Serving, list[Change]]:
        """What serves, and what was changed on the way to it: a fresh bundle may have failed."""
        if not installed.on_trial:
            self._opened = self.open(installed)
            return self._opened.session, []
        from outrider.probation import begin
        from outrider.serving import Serving

        self._opened, trial, changes = begin(self._store, installed, self.open, self.open_good)
        return Serving(self._opened, trial=trial), changes

    def climbing(
        self, serving: BoundSession | Serving, variants: Sequence[str], latency_ms: float, *, resident: bool
    ) -> Serving:
        """The same, on a ladder. Raises as ``load`` for a variant that the bundle does not have or cannot run here."""
        from outrider.ladder import Ladder, Rules
        from outrider.serving import Serving

        opened = self._opened
        serving = serving if isinstance(serving, Serving) else Serving(opened)
        admission = self._admission(opened.installed, self._wanted.engine)
        try:
            for variant in variants:
                candidates(opened.installed, admission, replace(self._wanted, variant=variant))
        except OutriderError:
            serving.close()
            raise

        def open_variant(variant: str) -> Opened:
            return self.open(opened.installed, replace(self._wanted, variant=variant))

        Ladder(serving, variants, Rules(latency_ms=latency_ms), open_variant, resident=resident).start()
        return serving

    def model(self, serving: BoundSession | Serving, changes: list[Change]) -> Model:
        """The model over it."""
        opened = self._opened
        self._model = Model(
            serving,
            bundle=opened.info,
            variant=opened.choice.variant,
            engine=opened.choice.engine,
            threads=opened.choice.threads,
            expected_ms=opened.choice.p50_ms,
            offload=opened.installed.manifest.offload,
            cloud_only=opened.installed.manifest.cloud_only,
            changes=changes,
            drop=self._drop,
            queue_size=self._queue_size,
            batches=opened.batches,
            finite=self._wanted.finite,
            isolation=self._wanted.isolation,
        )
        return self._model

    def _is_stuck(self) -> bool:
        """Before there is a model, what runs is a fresh bundle's golden inputs: no longer than at its admission."""
        model = self._model
        return self._tried_by.passed if model is None else model.sick or model.overdue


def is_path(source: str | Path) -> bool:
    """Whether ``load`` takes ``source`` for a bundle's path, not for the name of what is installed."""
    return isinstance(source, Path) or source.endswith(".outrider") or "/" in source


def _of_name(store: Store, name: str) -> Installed:
    try:
        return store.installed(name)
    except NotInstalled as error:
        with suppress(OSError):  # a name that is too long for a file
            if Path(name).is_file():
                raise NotInstalled(str(error), hint=f"for the file of that name, pass {'./' + name!r}") from None
        raise


def _of_path(store: Store, path: Path, trust: Trust) -> Installed:
    """What is current under the path's name, once that is the path's bundle with all of the path's members."""
    from outrider.bundle import open_bundle

    with open_bundle(path, trust) as bundle:
        name, digest, present = bundle.manifest.name, bundle.manifest.digest, bundle.present
    with suppress(StoreError):  # not there, or damaged: an install helps either way
        installed = store.installed(name)
        if installed.digest == digest and present <= installed.present:
            return installed
        if store.has_failed(name, digest):
            import logging

            log = logging.getLogger(__name__)
            log.warning("%s was rolled back when it was tried; `outrider install` tries it again", path)
            return installed
    from outrider.installer import install

    install(path, trust=trust, state=store.root)
    return store.installed(name)


class Model:
    """One variant of a bundle on one engine. Safe from several threads; calls run one after the other.

    It is a Runner too: ``submit`` queues a request on a thread of its own, ``infer`` without a deadline runs in the
    caller's thread.
    """

    def __init__(
        self,
        session: BoundSession | Serving,
        *,
        bundle: BundleInfo,
        variant: str,
        engine: str,
        threads: int,
        expected_ms: float | None = None,
        offload: OffloadRule | None = None,
        cloud_only: bool = False,
        changes: Sequence[Change] = (),
        drop: Drop = "newest",
        queue_size: int = QUEUE_SIZE,
        batches: Mapping[str, Any] | None = None,
        finite: Finite = "reject",
        isolation: Isolation = "thread",
    ) -> None:
        """Take over a session.

        Args:
            expected_ms: what one call took at install, the estimate until calls were measured here.
            offload: which answers are uncertain, as the bundle says it.
            cloud_only: its task belongs to the cloud, as the bundle says it.
            changes: what was changed before it came here.
            drop, queue_size: see ``Worker``.
            batches: what several rows in one call took at install, a ``BatchCurve`` as JSON has it.
            finite, isolation: as the session has them; see ``load``.
        """
        self.interface: Interface = session.interface
        self.bundle = bundle
        self.variant = variant
        self.engine = engine
        self.threads = threads
        self.offload = offload
        self.batches = batches
        self.finite: Finite = finite
        self._isolated = isolation == "process"
        self.cloud_only = cloud_only
        self._rules = {bundle.digest: offload}
        self._session = session
        self._run: Callable[[Tensors], Answer] = session.run
        self._expected_ms = expected_ms
        self._served = Served(variant=variant, engine=engine, bundle=bundle.digest, verified=bundle.verified)
        self._changes: deque[Change] = deque(changes, MAX_CHANGES)
        self._change_watchers: Watchers[Change] = Watchers("on_change")
        self._drop: Drop = drop
        self._queue_size = queue_size
        self._watchers = Watchers[Prediction]()
        self._failure_watchers: Watchers[Failure] = Watchers("on_failure")
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._closed = False
        self._ends = Deadline.after_ms(None)
        if not isinstance(session, BoundSession):
            session.on_change(self._changed)

    @property
    def changes(self) -> tuple[Change, ...]:
        """What it served and does not any more, oldest first: a fresh bundle that failed, steps along the ladder."""
        return tuple(self._changes)

    @property
    def expected_ms(self) -> float | None:
        """What a call of what serves now takes at the median, by its install; None where that measured nothing."""
        return self._expected_ms

    @property
    def sick(self) -> bool:
        """Whether a call with a deadline is taken for stuck; see ``Worker.sick``."""
        worker = self._worker
        return worker is not None and worker.sick

    @property
    def overdue(self) -> bool:
        """Whether ``close`` has waited long enough for the call that runs, if one does."""
        return self._ends.passed

    def rule_of(self, served: Served | None) -> OffloadRule | None:
        """What was certified of the bundle that gave an answer; None for nothing. ``served``: as the answer says it."""
        return self._rules.get(self._served.bundle if served is None else served.bundle)

    def infer(self, inputs: Tensors | Array, *, deadline_ms: float | None = None, private: bool = False) -> Prediction:
        """Answer one request.

        Args:
            inputs: every input of the interface by name; where there is one input, its array alone will do.
            deadline_ms: raise DeadlineExceeded when there is no answer by then, whatever the engine does. The first
                call with one starts the model's own thread as well, which takes some milliseconds of it.
            private: as ``Hybrid.infer`` has it. A model sends nothing anyway.

        Raises:
            InputError: an input is not what the interface says; nothing was run.
            InferenceError: the engine failed.
            DeadlineExceeded, QueueFull: only with a deadline.
            RunnerClosed: the model was closed.
        """
        try:
            named = inputs if type(inputs) is dict else by_name(self.interface, inputs)
            if deadline_ms is None:
                answer = self._run_here(named)
            else:
                answer = self._run_within(named, Deadline.after_ms(deadline_ms))
        except Exception as error:
            self.tell_failure(error, inputs)
            raise
        outputs, timing, served = answer
        if served is None:
            served = self._served
        prediction = filled(
            Prediction,
            (outputs, served.variant, served.engine, served.bundle, served.verified, timing, "edge", "local"),
        )
        self._watchers.tell(prediction)
        return prediction

    def predict(self, inputs: Tensors | Array) -> dict[str, Array]:
        """The outputs of ``infer`` by name: the same face as a model on the workstation."""
        return self.infer(inputs).outputs

    def stream(self, *, initial: Tensors | None = None) -> Stream:
        """A sequence of a recurrent model, which holds its state between calls; see Stream. Raises ConfigError."""
        from outrider.stream import Stream

        return Stream(self, initial=initial)

    def submit(self, inputs: Tensors, deadline: Deadline) -> Future[Answer]:
        """Queue one request on the model's own thread; see ``Runner.submit``. It calls no callback."""
        worker = self._worker
        return (self._start_worker() if worker is None else worker).submit(inputs, deadline)

    def run_here(self, inputs: Tensors, deadline: Deadline) -> Answer | None:
        """As ``Worker.run_here``; None also where more than the engine may hold it up. It calls no callback."""
        session = self._session
        if self._isolated or not (isinstance(session, BoundSession) or session.settled):
            return None
        return (self._worker or self._start_worker()).run_here(inputs, deadline)

    def estimate_ms(self) -> float | None:
        """How long a request that is submitted now would take: by the calls so far, before them by the install."""
        worker = self._worker
        if worker is None:
            return self._expected_ms
        measured = worker.estimate_ms()
        if measured is None and self._expected_ms is not None:
            return (worker.depth + 1) * self._expected_ms
        return measured

    def on_prediction(self, callback: OnPrediction) -> Callable[[], None]:
        """Call ``callback`` with each Prediction of ``infer``, in the caller's thread; returns what takes it off.

        What a callback raises does not reach the caller of ``infer``; the first time, it is logged.
        """
        return self._watchers.add(callback)

    def on_failure(self, callback: OnFailure) -> Callable[[], None]:
        """Call ``callback`` with the Failure of each ``infer`` that raises; else as ``on_prediction``. A call that is
        broken off, by KeyboardInterrupt, is neither answered nor failed."""
        return self._failure_watchers.add(callback)

    def tell_failure(self, error: Exception, inputs: Tensors | Array) -> None:
        """Tell of a call that ``error`` ended before ``infer`` had it, as a Stream's may; see ``on_failure``."""
        self._failure_watchers.tell(failure_of(error, self.interface, inputs))

    def on_change(self, callback: OnChange) -> Callable[[], None]:
        """Call ``callback`` with each Change from now on, in the thread that makes it; returns what takes it off.

        What it raises is logged, once. Changes that came before, at ``load``, are in ``changes``.
        """
        return self._change_watchers.add(callback)

    def close(self) -> None:
        """Free the model; waiting requests end with RunnerClosed. Again is harmless.

        The call that runs may end, but a stuck one is not waited for beyond 5 s where it can be left: with
        ``isolation="process"``, which kills it, and where it has a deadline.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._run = _refuse
            worker = self._worker
        self._ends = Deadline.after_ms(CLOSE_TIMEOUT_S * 1e3)
        if not isinstance(self._session, BoundSession):
            self._session.leave()
        # A worker frees the session, and does not wait for a call that is stuck in it.
        (self._session if worker is None else worker).close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Model {self.bundle.name} v{self.bundle.version}: {self.variant} on {self.engine}>"

    def _changed(self, opened: Opened, change: Change) -> None:
        manifest = opened.installed.manifest
        self._rules[opened.served.bundle] = self.offload = manifest.offload
        self.cloud_only = manifest.cloud_only
        self._served, self.bundle = opened.served, opened.info
        self.variant, self.engine, self.threads = opened.choice.variant, opened.choice.engine, opened.choice.threads
        self._expected_ms = opened.choice.p50_ms
        self._changes.append(change)
        self._change_watchers.tell(change)

    def _run_here(self, inputs: Tensors) -> Answer:
        try:
            return self._run(inputs)
        except Exception:
            if self._closed:  # by another thread, between the look-up and the run
                raise RunnerClosed("the model was closed") from None
            raise

    def _run_within(self, inputs: Tensors, deadline: Deadline) -> Answer:
        try:
            return wait(self.submit(inputs, deadline), deadline)
        except DeadlineExceeded:
            raise DeadlineExceeded(f"no answer from {self.variant} on {self.engine} in time") from None

    def _start_worker(self) -> Worker:
        with self._lock:
            if self._closed:
                _refuse({})
            if self._worker is None:
                from outrider_runtimes.worker import Worker

                self._worker = Worker(self._session, queue_size=self._queue_size, drop=self._drop)
            return self._worker


def _refuse(_: Tensors) -> Answer:
    raise RunnerClosed("the model was closed")
