"""From a file to what serves on this board: verify while copying, admit, measure, activate; and the way back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.admission import Admission, Choice, Measured, Skipped, remember, remembered
from outrider.bundle import Trust, find_trust
from outrider.store import Installed, Store, find_state_dir
from outrider_runtimes.board import this_board
from outrider_runtimes.engines import engine_named
from outrider_runtimes.errors import AdmissionError, MissingExtra, NoEngine, StoreError

if TYPE_CHECKING:
    from outrider.supervise import Limits

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.05
TRIAL_CALLS = 20  # that a bundle owes which replaces another one, before it has proven itself


@dataclass(frozen=True, kw_only=True, slots=True)
class InstallReport:
    """What is current now, and why it is served as it is.

    Attributes:
        name, version, digest: the bundle's.
        verified: whether a trusted key had signed it.
        admitted: whether it was run for this report; False where the same bundle was installed already and neither
            the engines nor the board have changed since.
        choice: the variant, engine and threads that ``load`` takes.
        measured: the grid that the choice comes from.
        skipped: engines, and variants on engines, that could not be tried, and why.
        engines: version by name of the engines that were tried.
        board: what the board was.
        peak_rss_bytes: the most memory that the first run was seen to hold.
    """

    name: str
    version: int
    digest: str
    verified: bool
    admitted: bool
    choice: Choice
    measured: tuple[Measured, ...]
    skipped: tuple[Skipped, ...]
    engines: Mapping[str, str]
    board: Mapping[str, Any]
    peak_rss_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def install(
    path: str | Path,
    *,
    trust: Trust | str | Path | None = None,
    state: str | Path | None = None,
    limits: Limits | None = None,
) -> InstallReport:
    """Make a bundle the current one of its name on this board, or leave everything as it was.

    Where it replaces another one it is on trial for its first 20 calls: ``load`` and ``Model`` go back if they fail.

    Args:
        path: the ``.outrider`` file.
        trust: which keys may sign: a ``.pub`` file, a folder of them, or a Trust; see ``find_trust`` for the default.
        state: the state directory; see ``find_state_dir`` for the default.
        limits: what the first run may use; see ``outrider.admit.default_limits``.

    Raises:
        BundleError: the file is not a sound bundle, or no trusted key signed it.
        AdmissionError: it crashed, hung, outgrew its memory or answered wrongly in its first run.
        NoEngine: no engine here runs any of its variants.
        StoreError: it is older than what is installed, or the state directory cannot be written.
    """
    from outrider.admit import admit

    root = find_state_dir(state)
    store = Store(root)
    with store.add(path, find_trust(trust, root)) as staged:
        candidate = staged.bundle
        same = _current(store, candidate.digest)
        members = {member: candidate.blob_path(member) for member in candidate.present}
        builds = {member: candidate.build_path(member) for member in candidate.present}
        known: tuple[Admission, ...] = ()
        if same is not None:
            members |= {member: same.blob_path(member) for member in same.present}
            if candidate.present <= same.present:
                known = _admissions(same)
        admission = admit(candidate.manifest, members, builds=builds, limits=limits, known=known)
        installed = store.activate(staged, remember(admission, known), trial_calls=TRIAL_CALLS)
    return _report(installed, admission, admitted=all(admission.measured != each.measured for each in known))


def rollback(name: str, *, state: str | Path | None = None) -> InstallReport:
    """Go back to the bundle that was current before, with the choice that was made for it then.

    Raises:
        NotInstalled: there is none of that name, or nothing to go back to.
        StoreError: what it would go back to was damaged; nothing changed.
    """
    installed = Store(find_state_dir(state)).rollback(name)
    return _report(installed, remembered(installed.choice)[0], admitted=False)


def admission_here(store: Store, installed: Installed, *, engine: str | None = None) -> Admission:
    """What was measured of a bundle with the engine and on the board of now; measured again where nothing was.

    Args:
        store: where it is installed.
        installed: the bundle.
        engine: the one that shall serve; the chosen one where it is None.

    Raises:
        AdmissionError: it does not pass with the engine or on the board of now.
        StoreError: what the store kept is malformed, or cannot be written.
    """
    known = remembered(installed.choice)
    board = this_board().to_dict()
    for admission in known:
        if same_board(admission.board, board) and _same_version(admission, engine or admission.choice.engine):
            return admission
    from outrider.admit import admit  # here alone: nearly every load is done before

    what = "the board" if not same_board(known[0].board, board) else f"{engine or known[0].choice.engine}'s version"
    log.warning("%s: %s is another than when it was measured; measuring again", installed.name, what)
    members = {member: installed.blob_path(member) for member in installed.present}
    builds = {member: installed.build_path(member) for member in installed.present}
    try:
        admission = admit(installed.manifest, members, builds=builds)
    except AdmissionError as error:
        versions = ", ".join(f"{name} {version}" for name, version in known[0].engines.items())
        error.hint = f"it passed when it was installed, with {versions}; go back to those, or export it again"
        raise
    store.rechoose(installed.name, installed.digest, remember(admission, known))
    return admission


def same_board(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a choice that was made on one holds on the other: they differ in a little memory at most.

    What a kernel leaves of the RAM changes with each of its versions.
    """
    memory = sorted(board.get("memory_bytes", 0) for board in (one, other))
    alike = {**one, "memory_bytes": 0} == {**other, "memory_bytes": 0}
    return alike and memory[1] - memory[0] <= memory[1] * MEMORY_SHARE


def _same_version(admission: Admission, engine: str) -> bool:
    """Whether an engine is what it was; one that was not measured, or is gone, is for the caller to refuse."""
    try:
        return engine not in admission.engines or engine_named(engine).version() == admission.engines[engine]
    except (MissingExtra, NoEngine):
        return True


def _current(store: Store, digest: str) -> Installed | None:
    with suppress(StoreError):  # damaged: then this install heals it
        return store.find_digest(digest)
    return None


def _admissions(installed: Installed) -> tuple[Admission, ...]:
    with suppress(StoreError):
        return remembered(installed.choice)
    return ()


def _report(installed: Installed, admission: Admission, *, admitted: bool) -> InstallReport:
    return InstallReport(
        name=installed.name,
        version=installed.manifest.version,
        digest=installed.digest,
        verified=installed.verified,
        admitted=admitted,
        choice=admission.choice,
        measured=admission.measured,
        skipped=admission.skipped,
        engines=admission.engines,
        board=admission.board,
        peak_rss_bytes=admission.peak_rss_bytes,
    )
