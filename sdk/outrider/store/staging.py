"""What is being written, and how others see that it is."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def remove_tree(folder: Path) -> None:
    """Remove a folder and what is in it, as far as that goes."""
    import shutil  # and what it imports: nothing that a load needs

    shutil.rmtree(folder, ignore_errors=True)


class Staging:
    """A folder for what is being written, with the list of blobs that must not be swept and a lock on it."""

    def __init__(self, parent: Path, blobs: frozenset[str]) -> None:
        self.folder = parent / os.urandom(8).hex()
        self.folder.mkdir(mode=0o700)
        self._descriptor = -1
        try:
            self._descriptor = os.open(self.folder / "held", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            with os.fdopen(self._descriptor, "wb", closefd=False) as file:
                file.write("\n".join(sorted(blobs)).encode())
        except BaseException:
            self._remove()
            raise

    @property
    def held(self) -> bool:
        """Whether it was not released yet."""
        return self._descriptor >= 0

    def release(self) -> None:
        """Remove it."""
        if self.held:
            self._remove()

    def _remove(self) -> None:
        remove_tree(self.folder)
        if self.held:
            os.close(self._descriptor)
            self._descriptor = -1


def held_by(folder: Path) -> list[str]:
    """The blobs that a living process holds by this staging folder; a dead one's folder is removed."""
    try:
        descriptor = os.open(folder / "held", os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        remove_tree(folder)
        return []
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return (folder / "held").read_text().split()
    else:
        remove_tree(folder)
        return []
    finally:
        os.close(descriptor)
