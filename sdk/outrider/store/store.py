"""Adding, activating and going back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from outrider.bundle import Manifest, Trust, parse_manifest
from outrider.bundle.files import atomic_file, sync_directory
from outrider.bundle.limits import MAX_MANIFEST_SIZE_BYTES
from outrider.bundle.manifest import NAME, manifest_digest
from outrider.store.blobs import (
    REINSTALL,
    Installed,
    blob_path_of,
    builds_of,
    is_whole,
    read_bounded,
    size_of,
)
from outrider.store.records import MAX_RECORD_SIZE_BYTES, Entry, Record, Trial
from outrider.store.state import NO_SPACE, system_errors
from outrider_runtimes.errors import NotInstalled, OutriderError, StoreError

if TYPE_CHECKING:
    from outrider.bundle import Bundle
    from outrider.store.marks import Mark
    from outrider.store.staging import Staging


class Staged:
    """A bundle whose blobs are in the store and which nothing uses yet: ``Store.activate`` it, or ``close``.

    Until it is closed or its process ends, its blobs are not swept away. ``bundle`` is what can be run from it.
    """

    def __init__(self, store: Store, bundle: Installed, staging: Staging) -> None:
        self.bundle = bundle
        self._store = store
        self._staging = staging

    @property
    def open(self) -> bool:
        """Whether its blobs are still held."""
        return self._staging.held

    def close(self) -> None:
        """Let go of it; blobs that nothing else uses go away. Does nothing the second time."""
        if self._staging.held:
            self._staging.release()
            try:
                self._store.sweep()
            except (OSError, StoreError) as error:
                _warn_unswept(self._store.root, error)

    def __enter__(self) -> Staged:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Store:
    """The installed bundles under one state directory. Any number of processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs" / "sha256"
        self._names = root / "names"
        self._back = root / "back"
        self._tmp = root / "tmp"
        self._marks = root / "marks"

    def add(self, path: str | Path, trust: Trust) -> Staged:
        """Verify a bundle while its members are copied into the store. Nothing that is installed changes.

        A blob that is there already is hashed again, and replaced where it was damaged.

        Returns:
            What ``activate`` takes; a context manager.

        Raises:
            BundleError: the file is not a sound bundle that is trusted.
            StoreError: it is older than what is installed, or cannot be written; nothing is left behind.
        """
        from outrider.bundle import open_bundle

        with open_bundle(path, trust) as bundle, system_errors(self.root):
            _refuse_downgrade(bundle.manifest, self._record(bundle.manifest.name))
            self._prepare()
            staged = self._stage(bundle)
            try:
                self._copy(bundle, staged._staging)
            except BaseException:
                staged.close()
                raise
            return staged

    def activate(self, staged: Staged, choice: Mapping[str, Any], *, trial_calls: int = 0) -> Installed:
        """Make a staged bundle the current one of its name, by one rename; what was current becomes the last good.

        Activating what is current already keeps the last good, and so does replacing one that is still on trial.
        Blobs that nothing uses any more are removed.

        Args:
            choice: what was chosen for this board; JSON.
            trial_calls: how many good calls a bundle that replaces another one owes until it has proven itself.

        Raises:
            StoreError: it is older than what is installed, was closed, or cannot be recorded; nothing changed.
        """
        manifest = staged.bundle.manifest
        with system_errors(self.root), self._locked():
            if not staged.open:
                raise StoreError(f"{manifest.name!r} was closed before it was activated", hint="add the bundle again")
            old = self._record(manifest.name)
            _refuse_downgrade(manifest, old)
            record = self._next(staged.bundle, old, choice, trial_calls)
            if record.last_good is not None:
                self._write(self._back, manifest.name, record.gone_back(record.current.digest))
            self._write(self._names, manifest.name, record)
            staged._staging.release()
            self._sweep()
            return self._load(manifest.name, record.current)

    def installed(self, name: str) -> Installed:
        """The current bundle of a name. No member is hashed: that was done when it was installed.

        Raises:
            NotInstalled: there is none of that name.
            StoreError: the store was damaged; names what is missing.
        """
        with system_errors(self.root):
            record = self._known(name)
            return replace(self._load(name, record.current), on_trial=record.trial is not None)

    def rollback(self, name: str, *, failed: str = "") -> Installed:
        """Go back to what was current before, once; its members are hashed again first.

        Where there is no space for a record, the one that was written for this at the activation takes its place.

        Args:
            name: the bundle's.
            failed: the digest of what did not prove itself; where it is not current any more, nothing happens.

        Raises:
            NotInstalled: there is nothing to go back to.
            StoreError: what it would go back to was damaged, or the disk cannot be written; nothing changed.
        """
        with system_errors(self.root):
            self._known(name)
        with system_errors(self.root), self._locked():
            record = self._known(name)
            if failed and record.current.digest != failed:
                return self._load(name, record.current)
            if record.last_good is None:
                raise NotInstalled(
                    f"{name!r} has no earlier bundle to go back to", hint="install the bundle that you want instead"
                )
            installed = self._load(name, record.last_good)
            _require_whole(installed)
            self._go_back(name, record, failed)
            self._sweep()
            return installed

    def rechoose(self, name: str, digest: str, choice: Mapping[str, Any]) -> None:
        """Keep another choice for a bundle; nothing happens where it is not the current one of its name any more."""
        with system_errors(self.root), self._locked():
            record = self._known(name)
            if record.current.digest == digest:
                changed = replace(record, current=replace(record.current, choice=dict(choice)))
                self._write(self._names, name, changed)

    def last_good(self, name: str, *, hashed: bool = False) -> Installed | None:
        """What ``rollback`` would go back to; its members are hashed where ``hashed``. Raises as ``installed``."""
        with system_errors(self.root):
            record = self._known(name)
            if record.last_good is None:
                return None
            installed = self._load(name, record.last_good)
            if hashed:
                _require_whole(installed)
            return installed

    def has_failed(self, name: str, digest: str) -> bool:
        """Whether that bundle was rolled back because it did not prove itself."""
        with system_errors(self.root):
            record = self._record(name)
            return record is not None and digest in record.failed

    def trial(self, name: str, digest: str) -> Trial | None:
        """The trial that a bundle is on. Processes that died in a call of it since the last look count as strikes."""
        from outrider.store.marks import died_inside

        with system_errors(self.root):
            record = self._known(name)
            if record.trial is None or record.current.digest != digest:
                return None
            with self._locked():
                strikes = died_inside(self._marks, digest)
                return self._tried(name, digest, strikes=strikes)

    def tried(self, name: str, digest: str, good_calls: int) -> None:
        """Count good calls of a bundle on trial; when it owes no more, it has proven itself."""
        with system_errors(self.root), self._locked():
            self._tried(name, digest, good_calls=good_calls)

    def mark(self, digest: str) -> Mark:
        """This process's mark on a bundle on trial."""
        from outrider.store.marks import Mark

        with system_errors(self.root):
            return Mark(self._marks, digest)

    def _tried(self, name: str, digest: str, *, good_calls: int = 0, strikes: int = 0) -> Trial | None:
        record = self._known(name)
        trial = record.trial
        if trial is None or record.current.digest != digest or not (good_calls or strikes):
            return trial
        left = trial.left - good_calls
        trial = replace(trial, left=left, strikes=trial.strikes + strikes) if left > 0 else None
        self._write(self._names, name, replace(record, trial=trial))
        return trial

    def names(self) -> tuple[str, ...]:
        """Names of all that is installed, sorted."""
        with system_errors(self.root):
            if not self._names.is_dir():
                return ()
            stems = [file.name.removesuffix(".json") for file in self._names.iterdir() if file.suffix == ".json"]
            return tuple(sorted(stem for stem in stems if NAME.match(stem)))

    def find_digest(self, digest: str) -> Installed | None:
        """The current bundle with that digest, or None."""
        for name in self.names():
            with system_errors(self.root):
                record = self._record(name)
                if record is not None and record.current.digest == digest:
                    return self._load(name, record.current)
        return None

    def sweep(self) -> None:
        """Remove what killed processes left and blobs that nothing uses. ``activate`` does it by itself."""
        with system_errors(self.root), self._locked():
            self._sweep()

    def _prepare(self) -> None:
        for folder in (self._blobs, self._names, self._back, self._tmp):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process, one thread at a time; the lock goes with the process."""
        import fcntl  # what has proven itself is loaded without a lock

        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _stage(self, bundle: Bundle) -> Staged:
        """Say under the lock which blobs are coming, so that no sweep takes them."""
        installed = Installed(
            manifest=bundle.manifest,
            signatures=bundle.signatures,
            verified=bundle.verified,
            present=bundle.present,
            choice={},
            root=self.root,
        )
        from outrider.store.staging import Staging

        with self._locked():
            return Staged(self, installed, Staging(self._tmp, Entry.of(installed, {}).blobs))

    def _copy(self, bundle: Bundle, staging: Staging) -> None:
        for member in bundle.manifest.members:
            if member.path in bundle.present:
                self._put(member.sha256, staging, partial(bundle.copy_to, member.path))
        self._put(bundle.manifest.digest, staging, lambda file: file.write(bundle.manifest.raw))
        sync_directory(self._blobs)

    def _put(self, sha256: str, staging: Staging, write: Callable[[BinaryIO], object]) -> None:
        target = blob_path_of(self.root, sha256)
        if is_whole(target, sha256):
            return
        part = staging.folder / sha256
        try:
            with part.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except OSError as error:
            error.filename = error.filename or str(target)
            raise

    def _record(self, name: str, *, strict: bool = False) -> Record | None:
        """None where there is none; a damaged one is none too unless ``strict``, so that an install can heal it."""
        path = self._names / f"{name}.json"
        if not NAME.match(name) or not path.exists():
            return None
        try:
            return Record.parse(read_bounded(path, MAX_RECORD_SIZE_BYTES))
        except (KeyError, TypeError, ValueError, AttributeError, OutriderError) as error:
            if strict:
                raise StoreError(f"record {path} was damaged: {error}", hint=REINSTALL) from None
            return None

    def _next(self, bundle: Installed, old: Record | None, choice: Mapping[str, Any], trial_calls: int) -> Record:
        """The record after an activation. The same bundle again keeps what it had of itself, if that is still whole."""
        if old is None:
            return Record(current=Entry.of(bundle, choice), last_good=None)
        if old.current.digest != bundle.digest:
            return Record(
                current=Entry.of(bundle, choice),
                last_good=old.last_good if old.trial and old.last_good else old.current,
                trial=Trial(left=trial_calls) if trial_calls else None,
                failed=tuple(digest for digest in old.failed if digest != bundle.digest),
            )
        missing = {*old.current.present} - bundle.present
        members = [member for member in bundle.manifest.members if member.path in missing]
        more = {m.path for m in members if is_whole(blob_path_of(self.root, m.sha256), m.sha256)}
        return replace(old, current=Entry.of(replace(bundle, present=bundle.present | more), choice))

    def _known(self, name: str) -> Record:
        record = self._record(name, strict=True)
        if record is None:
            known = ", ".join(self.names()) or "nothing"
            raise NotInstalled(
                f"no bundle named {name[:64]!r} is installed in {self.root}",
                hint=f"installed: {known}; `outrider install BUNDLE` installs one",
            )
        return record

    def _write(self, folder: Path, name: str, record: Record) -> None:
        data = record.to_json()
        with atomic_file(folder / f"{name}.json", mode=0o600) as file:
            file.write(data)

    def _go_back(self, name: str, record: Record, failed: str) -> None:
        """Write the record of a rollback; on a full disk a rename, which takes no space, does it."""
        prepared = self._back / f"{name}.json"
        try:
            self._write(self._names, name, record.gone_back(failed))
        except OSError as error:
            if error.errno not in NO_SPACE or not _goes_back_to(prepared, record.last_good):
                raise
            prepared.replace(self._names / prepared.name)
            sync_directory(self._names)
        else:
            prepared.unlink(missing_ok=True)

    def _load(self, name: str, entry: Entry) -> Installed:
        raw = read_bounded(blob_path_of(self.root, entry.digest), MAX_MANIFEST_SIZE_BYTES)
        if manifest_digest(raw) != entry.digest:
            raise StoreError(f"the manifest of {name!r} was damaged in the store", hint=REINSTALL)
        manifest = parse_manifest(raw, known=True)
        sizes = {member.path: (member.sha256, member.size_bytes) for member in manifest.members}
        for path in entry.present:
            sha256, size_bytes = sizes.get(path, ("", 0))
            if size_of(blob_path_of(self.root, sha256)) != size_bytes:
                raise StoreError(f"member {path!r} of {name!r} is missing or cut in the store", hint=REINSTALL)
        return Installed(
            manifest=manifest,
            signatures=entry.signatures,
            verified=entry.verified,
            present=frozenset(entry.present),
            choice=entry.choice,
            root=self.root,
        )

    def _sweep(self) -> None:
        """Under the lock. An unreadable record may name any blob, so then all blobs stay."""
        from outrider.store.staging import held_by, remove_tree

        try:
            keep = {digest for folder in self._tmp.iterdir() for digest in held_by(folder)}
            self._unlink([*self._names.glob(".*.tmp"), *self._back.glob(".*.tmp")])
            for name in self.names():
                record = self._record(name)
                if record is None:
                    return
                keep |= record.blobs
            self._unlink([blob for blob in self._blobs.iterdir() if blob.name not in keep])
            for folder in builds_of(self.root).glob("*"):
                if folder.name not in keep:
                    remove_tree(folder)
        except FileNotFoundError:
            return
        except (OSError, StoreError) as error:
            _warn_unswept(self.root, error)

    def _unlink(self, strays: Iterable[Path]) -> None:
        """One that cannot be removed keeps no other one."""
        failure: OSError | None = None
        for stray in strays:
            try:
                stray.unlink(missing_ok=True)
            except OSError as error:
                failure = error
        if failure is not None:
            _warn_unswept(self.root, failure)


def _warn_unswept(root: Path, error: Exception) -> None:
    import logging  # nothing that a load needs

    logging.getLogger(__name__).warning("store %s: what nothing uses cannot be removed: %s", root, error)


def _require_whole(earlier: Installed) -> None:
    """Raises StoreError where a member of what would be gone back to is not what its hash says."""
    for path in sorted(earlier.present):
        if not is_whole(earlier.blob_path(path), earlier.manifest.member(path).sha256):
            raise StoreError(
                f"member {path!r} of the earlier {earlier.name!r} was damaged in the store; nothing changed",
                hint="install a bundle that works instead",
            )


def _goes_back_to(path: Path, last_good: Entry | None) -> bool:
    """Whether a record that was written beforehand is sound and the one of now."""
    try:
        return Record.parse(read_bounded(path, MAX_RECORD_SIZE_BYTES)).current == last_good
    except (KeyError, TypeError, ValueError, AttributeError, OutriderError):
        return False


def _refuse_downgrade(manifest: Manifest, record: Record | None) -> None:
    """Raises StoreError where a newer version of the bundle is current."""
    if record is not None and manifest.version < record.current.version:
        raise StoreError(
            f"{manifest.name!r} version {manifest.version} is older than version {record.current.version}, "
            "which is installed",
            hint=f"`outrider rollback {manifest.name}` goes back to the last good; "
            "else export it again under a higher version",
        )
