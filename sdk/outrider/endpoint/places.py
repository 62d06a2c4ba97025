"""Where what is served is installed: several versions of one name need a store each, and one that nobody has served
from for a month is cleared away.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from outrider.store.state import CHOOSE_STATE
from outrider_runtimes.errors import StateDirectoryError

if TYPE_CHECKING:
    from outrider.bundle import Trust
    from outrider_runtimes.deadline import Clock

log = logging.getLogger(__name__)

SERVED = "served"  # under the state directory: a store for each of several versions of one name
USED = ".used"  # beside such a store: locked by who serves from it, touched when it begins and ends
# Long enough to come back to a version without installing and measuring it anew.
KEPT_S = 30 * 86400.0

_STORE = re.compile("[0-9a-f]{32}")


@contextlib.contextmanager
def places(
    paths: Sequence[Path | str],
    *,
    state: Path | str | None,
    trust: Path | str | Trust | None,
    now: Clock = time.time,
) -> Iterator[list[tuple[Path | str, Path]]]:
    """Each source and the state directory that it is loaded from, which nobody clears away while the block runs.

    A store has one current bundle a name: where several bundles of one name are offered, each gets its own.

    Args:
        now: seconds since 1970.

    Raises:
        BundleError, TrustError: a bundle that cannot be read.
        StateDirectoryError: the state directory cannot be written.
    """
    from outrider.bundle import find_trust, open_bundle
    from outrider.model import is_path
    from outrider.store import find_state_dir

    root = find_state_dir(state)
    keys = find_trust(trust, root)
    named: list[tuple[str, str]] = []
    for source in paths:
        if is_path(source):
            with open_bundle(source, keys) as bundle:
                named.append((bundle.manifest.name, bundle.manifest.digest))
        else:
            named.append((str(source), ""))
    count = Counter(name for name, _ in named)
    own = [root / SERVED / digest[:32] if count[name] > 1 and digest else None for name, digest in named]
    with contextlib.ExitStack() as stack:
        for store in own:
            if store is not None:
                stack.enter_context(_held(store, now))
        _clear(root / SERVED, now())
        yield [(source, store or root) for source, store in zip(paths, own, strict=True)]


@contextlib.contextmanager
def _held(store: Path, now: Clock) -> Iterator[None]:
    """Nobody clears ``store`` away while the block runs, in whatever process."""
    used = store.with_suffix(USED)
    try:
        store.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = _locked(used)
    except OSError as error:
        raise StateDirectoryError(f"{used} cannot be made: {error.strerror or error}", hint=CHOOSE_STATE) from None
    try:
        _touch(descriptor, now())
        yield
        _touch(descriptor, now())
    finally:
        os.close(descriptor)


def _touch(descriptor: int, now_s: float) -> None:
    with contextlib.suppress(OSError):  # a disk that became read-only: it is served from all the same
        os.utime(descriptor, (now_s, now_s))


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # it was cleared away meanwhile


def _clear(folder: Path, now_s: float) -> None:
    """Remove the stores that nobody uses or has used for so long. What cannot be removed stays."""
    for store in list(folder.iterdir()) if folder.is_dir() else []:
        if _STORE.fullmatch(store.name) and store.is_dir() and not store.is_symlink():
            try:
                _clear_one(store, now_s)
            except OSError as error:
                log.warning("the unused store %s stays: %s", store, error.strerror or error)


def _clear_one(store: Path, now_s: float) -> None:
    used = store.with_suffix(USED)
    last_s = (used if used.exists() else store).stat().st_mtime
    if now_s - last_s < KEPT_S:
        return
    descriptor = os.open(used, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(store)
            used.unlink()
            log.info("removed %s, which nobody has served from for %.0f days", store, (now_s - last_s) / 86400)
    finally:
        os.close(descriptor)
