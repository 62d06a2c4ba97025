"""An installed bundle, opened: the device's model. What serves it was measured when it was installed."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from outrider.admit import Admission, Choice, Measured, choose
from outrider.bundle import Trust, check_trust, find_trust, open_bundle
from outrider.installer import install
from outrider.prediction import OnPrediction, Prediction, Watchers
from outrider.store import Installed, Store, find_state_dir
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.engines import engine_named
from outrider_runtimes.errors import (
    ConfigError,
    DeadlineExceeded,
    MissingExtra,
    NoEngine,
    NotInstalled,
    RunnerClosed,
    StoreError,
)
from outrider_runtimes.runner import Answer, wait
from outrider_runtimes.tensors import Array, Interface, Tensors, by_name
from outrider_runtimes.worker import Worker

__all__ = ["BundleInfo", "Model", "Prediction", "load"]

log = logging.getLogger(__name__)

MAX_THREADS = 1024  # an engine starts each of them at once; far more take minutes and the machine's memory


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleInfo:
    """Which bundle a model came from. ``digest`` is the sha256 of its manifest, in hex."""

    name: str
    version: int
    digest: str
    verified: bool


def load(
    source: str | Path,
    *,
    trust: Trust | str | Path | None = None,
    state: str | Path | None = None,
    engine: str | None = None,
    variant: str | None = None,
    threads: int | None = None,
) -> Model:
    """Open an installed bundle. Its members are not hashed and nothing is tried out: its install did that.

    Args:
        source: the name of what is installed; or a bundle's path (a Path, or a string that ends in ``.outrider`` or
            has a ``/``), which is installed first unless it is what is current under its name.
        trust: which keys may sign; as in ``install``.
        state: the state directory; as in ``install``.
        engine, variant, threads: instead of what was chosen at install.

    Raises:
        NotInstalled: there is no bundle of that name.
        TrustError: no key that is trusted now signed it.
        ConfigError: the bundle has no such variant, or ``threads`` is not from 1 to 1024.
        NoEngine: there is no such engine, or it does not run that variant here; says what does.
        MissingExtra: the engine that was asked for was installed once and is not any more.
        OutriderError: what ``install`` raises, where it is installed first.
    """
    root = find_state_dir(state)
    found = find_trust(trust, root)
    store = Store(root)
    installed = _of_path(store, Path(source), found) if _is_path(source) else _of_name(store, str(source))
    verified = check_trust(f"{installed.name!r} in {root}", installed.signatures, found) or installed.verified
    admission = Admission.from_dict(installed.choice)
    session, chosen = _opened(installed, _candidates(installed, admission, engine, variant, threads))
    info = BundleInfo(
        name=installed.name, version=installed.manifest.version, digest=installed.digest, verified=verified
    )
    return Model(
        session,
        bundle=info,
        variant=chosen.variant,
        engine=chosen.engine,
        threads=chosen.threads,
        expected_ms=chosen.p50_ms,
    )


def _is_path(source: str | Path) -> bool:
    return isinstance(source, Path) or source.endswith(".outrider") or "/" in source


def _of_name(store: Store, name: str) -> Installed:
    try:
        return store.installed(name)
    except NotInstalled as error:
        if _is_file(name):
            raise NotInstalled(str(error), hint=f"for the file of that name, pass {'./' + name!r}") from None
        raise


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a name that is too long for a file
        return False


def _of_path(store: Store, path: Path, trust: Trust) -> Installed:
    """What is current under the path's name, once that is the path's bundle with all of the path's members."""
    with open_bundle(path, trust) as bundle:
        name, digest, present = bundle.manifest.name, bundle.manifest.digest, bundle.present
    with suppress(StoreError):  # not there, or damaged: an install helps either way
        installed = store.installed(name)
        if installed.digest == digest and present <= installed.present:
            return installed
    install(path, trust=trust, state=store.root)
    return store.installed(name)


def _candidates(
    installed: Installed, admission: Admission, engine: str | None, variant: str | None, threads: int | None
) -> list[Choice]:
    """What may serve, best first: one where the caller named it, all that were measured where nothing was named."""
    if threads is not None and (not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS):
        raise ConfigError(f"threads is {threads!r:.40}, expected a whole number from 1 to {MAX_THREADS}")
    names = [each.name for each in installed.manifest.variants]
    if variant is not None and variant not in names:
        raise ConfigError(f"{installed.name!r} has no variant {variant!r}", hint=f"it has {', '.join(names)}")
    if engine is not None:
        engine_named(engine)
    rows = [row for row in admission.measured if engine in (None, row.engine) and variant in (None, row.variant)]
    if not rows:
        raise _none_measured(installed, admission, engine, variant)
    ranked = _ranked([row for row in rows if row.threads == threads] or rows)
    if threads is not None:
        return [dataclasses.replace(choice, threads=threads) for choice in ranked]
    if engine is None and variant is None:
        return [admission.choice, *(choice for choice in ranked if choice.engine != admission.choice.engine)]
    return ranked


def _ranked(rows: list[Measured]) -> list[Choice]:
    """The choice among all rows, then the choice among those of other engines, and so on: one an engine."""
    ranked = []
    while rows:
        ranked.append(choose(rows))
        rows = [row for row in rows if row.engine != ranked[-1].engine]
    return ranked


def _none_measured(installed: Installed, admission: Admission, engine: str | None, variant: str | None) -> NoEngine:
    wanted = " on ".join(name for name in (variant, engine) if name)
    pairs = dict.fromkeys(f"{row.variant} on {row.engine}" for row in admission.measured)
    reasons = [
        row.reason
        for row in admission.skipped
        if row.engine in ("", engine or row.engine) and row.variant in ("", variant or row.variant)
    ]
    why = f" ({'; '.join(dict.fromkeys(reasons))})" if reasons else ""
    return NoEngine(
        f"{installed.name!r} was not run as {wanted} when it was installed{why}",
        hint=f"what runs here: {', '.join(pairs)}; after a new engine came in, install the bundle again",
    )


def _opened(installed: Installed, candidates: list[Choice]) -> tuple[BoundSession, Choice]:
    """The first candidate whose engine is still there. Raises the first one's error when none is."""
    gone: list[MissingExtra | NoEngine] = []
    for choice in candidates:
        variant = installed.manifest.variant(choice.variant)
        try:
            session = engine_named(choice.engine).prepare(installed.blob_path(variant.member), threads=choice.threads)
        except (MissingExtra, NoEngine) as error:
            gone.append(error)
            log.warning("%s was measured best for %s but is gone: %s", choice.engine, installed.name, error)
            continue
        return BoundSession(session, installed.manifest.interface, variant.binding), choice
    raise gone[0]


class Model:
    """One variant of a bundle on one engine. Safe from several threads; calls run one after the other.

    It is a Runner too: ``submit`` queues a request on a thread of its own, ``infer`` without a deadline runs in the
    caller's thread.
    """

    def __init__(
        self,
        session: BoundSession,
        *,
        bundle: BundleInfo,
        variant: str,
        engine: str,
        threads: int,
        expected_ms: float | None = None,
    ) -> None:
        """``expected_ms``: what one call took at install, the estimate until calls were measured here."""
        self.interface: Interface = session.interface
        self.bundle = bundle
        self.variant = variant
        self.engine = engine
        self.threads = threads
        self._session = session
        self._run: Callable[[Tensors], Answer] = session.run
        self._expected_ms = expected_ms
        self._digest, self._verified = bundle.digest, bundle.verified
        self._watchers = Watchers()
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._closed = False

    def infer(self, inputs: Tensors | Array, *, deadline_ms: float | None = None) -> Prediction:
        """Answer one request.

        Args:
            inputs: every input of the interface by name; where there is one input, its array alone will do.
            deadline_ms: raise DeadlineExceeded when there is no answer by then, whatever the engine does.

        Raises:
            InputError: an input is not what the interface says; nothing was run.
            InferenceError: the engine failed.
            DeadlineExceeded, QueueFull: only with a deadline.
            RunnerClosed: the model was closed.
        """
        named = by_name(self.interface, inputs)
        if deadline_ms is None:
            answer = self._run_here(named)
        else:
            answer = self._run_within(named, Deadline.after_ms(deadline_ms))
        prediction = Prediction(
            outputs=answer.outputs,
            variant=self.variant,
            engine=self.engine,
            bundle=self._digest,
            verified=self._verified,
            timing_ms=answer.timing_ms,
        )
        self._watchers.tell(prediction)
        return prediction

    def predict(self, inputs: Tensors | Array) -> dict[str, Array]:
        """The outputs of ``infer`` by name: the same face as a model on the workstation."""
        return self.infer(inputs).outputs

    def submit(self, inputs: Tensors, deadline: Deadline) -> Future[Answer]:
        """Queue one request on the model's own thread; see ``Runner.submit``. Calls no ``on_prediction`` callback."""
        worker = self._worker
        return (self._start_worker() if worker is None else worker).submit(inputs, deadline)

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

    def close(self) -> None:
        """Free the model; waiting requests end with RunnerClosed. Again is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._run = _refuse
            worker = self._worker
        if worker is None:
            self._session.close()
        else:
            worker.close()  # frees the session, and does not wait for a call that is stuck in it

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Model {self.bundle.name} v{self.bundle.version}: {self.variant} on {self.engine}>"

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
                self._worker = Worker(self._session)
            return self._worker


def _refuse(_: Tensors) -> Answer:
    raise RunnerClosed("the model was closed")
