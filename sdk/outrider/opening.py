"""From an installed bundle to a session that answers: which choice serves, and loading it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from outrider.admit.admission import (
    MAX_THREADS,
    Admission,
    Choice,
    Measured,
    batches_of,
    choose,
    remember,
    remembered,
    same_board,
)
from outrider.store import Installed, Store
from outrider_runtimes.board import this_board
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.engines import Session, engine_named
from outrider_runtimes.errors import AdmissionError, ConfigError, MissingExtra, NoEngine, StoreError
from outrider_runtimes.nouns import dataclass
from outrider_runtimes.runner import Served
from outrider_runtimes.tensors import Finite

Isolation = Literal["thread", "process"]


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """Which bundle a model came from. ``digest`` is the sha256 of its manifest, in hex."""

    name: str
    version: int
    digest: str
    verified: bool


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a caller asked for; None where what was measured decides. As in ``outrider.load``.

    ``stuck`` is asked, while a call runs in a process of its own, whether to kill it.
    """

    engine: str | None = None
    variant: str | None = None
    threads: int | None = None
    isolation: Isolation = "thread"
    finite: Finite = "reject"
    stuck: Callable[[], bool] = lambda: False


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A loaded choice of an installed bundle. Whoever holds it closes ``session``.

    ``raw`` is the engine's session under ``session``; ``bound_ms`` the latency bound of its install; ``batches`` what
    was measured of several rows in one call of this choice, a ``BatchCurve`` as JSON has it.
    """

    session: BoundSession
    raw: Session
    served: Served
    choice: Choice
    bound_ms: float | None
    installed: Installed
    batches: Mapping[str, Any] | None = None

    @property
    def info(self) -> BundleInfo:
        """Which bundle it is."""
        return BundleInfo(
            name=self.installed.name,
            version=self.installed.manifest.version,
            digest=self.installed.digest,
            verified=self.served.verified,
        )


def admission_here(store: Store, installed: Installed, *, engine: str | None = None) -> Admission:
    """What was measured of a bundle with the engine and on the board of now; measured again where nothing was.

    Args:
        store: where it is installed.
        installed: the bundle.
        engine: the one that shall serve; the chosen one where it is None.

    Raises:
        AdmissionError: it does not pass with the engine or on the board of now.
        StoreError: what the store kept is malformed.
    """
    known = remembered(installed.choice)
    board = this_board().to_dict()
    for admission in known:
        if same_board(admission.board, board) and _same_version(admission, engine or admission.choice.engine):
            return admission
    from outrider.admit.admit import admit  # here alone: nearly every load is done before

    what = "the board" if not same_board(known[0].board, board) else f"{engine or known[0].choice.engine}'s version"
    import logging

    log = logging.getLogger(__name__)
    log.warning("%s: %s is another than when it was measured; measuring again", installed.name, what)
    members = {member: installed.blob_path(member) for member in installed.present}
    builds = {member: installed.build_path(member) for member in installed.present}
    try:
        admission = admit(installed.manifest, members, builds=builds)
    except AdmissionError as error:
        versions = ", ".join(f"{name} {version}" for name, version in known[0].engines.items())
        error.hint = f"it passed when it was installed, with {versions}; go back to those, or export it again"
        raise
    try:
        store.rechoose(installed.name, installed.digest, remember(admission, known))
    except StoreError as error:  # a full or read-only disk keeps nothing from serving
        log.warning("%s: what was measured cannot be kept: %s", installed.name, error)
    return admission


def _same_version(admission: Admission, engine: str) -> bool:
    """Whether an engine is what it was; one that was not measured, or is gone, is for the caller to refuse."""
    try:
        return engine not in admission.engines or engine_named(engine).version() == admission.engines[engine]
    except (MissingExtra, NoEngine):
        return True


def open_choice(installed: Installed, admission: Admission, wanted: Wanted, *, verified: bool) -> Opened:
    """Load the best choice whose engine is still there.

    Raises:
        ConfigError, NoEngine, MissingExtra: what ``outrider.load`` says of them.
        ModelLoadError: the engine refused the file.
    """
    gone: list[MissingExtra | NoEngine] = []
    for choice in candidates(installed, admission, wanted):
        variant = installed.manifest.variant(choice.variant)
        try:
            raw = _prepared(installed, choice, wanted)
        except (MissingExtra, NoEngine) as error:
            gone.append(error)
            import logging  # here: most loads have nothing to say

            log = logging.getLogger(__name__)
            log.warning("%s was measured best for %s but is gone: %s", choice.engine, installed.name, error)
            continue
        return Opened(
            session=BoundSession(raw, installed.manifest.interface, variant.binding, finite=wanted.finite),
            raw=raw,
            served=Served(variant=choice.variant, engine=choice.engine, bundle=installed.digest, verified=verified),
            choice=choice,
            bound_ms=admission.bound_ms,
            installed=installed,
            batches=batches_of(admission, choice),
        )
    raise gone[0]


def _prepared(installed: Installed, choice: Choice, wanted: Wanted) -> Session:
    member = installed.manifest.variant(choice.variant).member
    path, cache = installed.blob_path(member), installed.build_path(member)
    if wanted.isolation == "process":
        from outrider_runtimes.isolated import IsolatedSession

        return IsolatedSession(choice.engine, path, threads=choice.threads, cache=cache, stuck=wanted.stuck)
    return engine_named(choice.engine).prepare(path, threads=choice.threads, cache=cache)


def candidates(installed: Installed, admission: Admission, wanted: Wanted) -> list[Choice]:
    """What may serve, best first: one where the caller named it, all that were measured where nothing was named."""
    engine, variant, threads = wanted.engine, wanted.variant, wanted.threads
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
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
