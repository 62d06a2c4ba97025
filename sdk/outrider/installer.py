"""From a file to what serves on this board: verify while copying, admit, measure, activate; and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.admit.admission import Admission, Choice, Measured, Skipped, remember, remembered
from outrider.bundle import Trust, find_trust
from outrider.store import Installed, Store, find_state_dir
from outrider_runtimes.errors import StoreError
from outrider_runtimes.options import require_kind

if TYPE_CHECKING:
    from outrider.admit.supervise import Limits

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
        batches: what several rows in one call of the choice take, a ``BatchCurve`` as JSON has it; None where an
            earlier version installed it.
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
    batches: Mapping[str, Any] | None = None

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
        limits: what the first run may use; see ``outrider.admit.admit.default_limits``.

    Raises:
        BundleError: the file is not a sound bundle, or no trusted key signed it.
        AdmissionError: it crashed, hung, outgrew its memory or answered wrongly in its first run.
        NoEngine: no engine here runs any of its variants.
        StoreError: it is older than what is installed, or the state directory cannot be written.
    """
    from outrider.admit.admit import admit
    from outrider.admit.supervise import Limits

    require_kind("path", path, (str, Path), "the path of a bundle")
    require_kind("limits", limits, (Limits, type(None)), "Limits, or None")
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
    require_kind("name", name, (str,), "that of an installed bundle")
    store = Store(find_state_dir(state))
    good = store.last_good(name)
    if good is not None:
        remembered(good.choice)  # first: what could not be loaded is not gone back to
    installed = store.rollback(name)
    return _report(installed, remembered(installed.choice)[0], admitted=False)


def _current(store: Store, digest: str) -> Installed | None:
    with suppress(StoreError):  # damaged: then this install heals it
        return store.find_digest(digest)
    return None


def admissions_of(installed: Installed) -> tuple[Admission, ...]:
    """What its installs here showed, the latest first, read whole. Raises StoreError where any of it is damaged."""
    from outrider.admit.curve import BatchCurve

    found = remembered(installed.choice)
    variants = {variant.name for variant in installed.manifest.variants}
    for admission in found:
        if strange := {row.variant for row in admission.measured} - variants:
            raise StoreError(
                f"what the store kept of an install names a variant {min(strange)!r}, which {installed.name!r} has not",
                hint="install again",
            )
        if admission.batches is not None:
            BatchCurve.from_dict(admission.batches)
    return found


def _admissions(installed: Installed) -> tuple[Admission, ...]:
    with suppress(StoreError):
        return admissions_of(installed)
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
        batches=admission.batches,
    )
