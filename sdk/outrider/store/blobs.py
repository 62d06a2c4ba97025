"""Files under the name of their sha256, and the bundles that are made of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, BinaryIO

from outrider.bundle import Manifest, Signature
from outrider_runtimes.errors import BundleError, StoreError
from outrider_runtimes.nouns import dataclass

REINSTALL = "install the bundle again: `outrider install BUNDLE`"


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A bundle in the store.

    Attributes:
        signatures: each was checked against its key when the bundle was installed.
        verified: whether a key that was trusted then had signed.
        present: paths of the members that the store has.
        choice: what was chosen for this board when it was activated, free JSON.
        on_trial: whether it still owes good calls; as it was when this was read.
    """

    manifest: Manifest
    signatures: tuple[Signature, ...]
    verified: bool
    present: frozenset[str]
    choice: Mapping[str, Any]
    root: Path = field(repr=False)
    on_trial: bool = False

    @property
    def name(self) -> str:
        """The bundle's name."""
        return self.manifest.name

    @property
    def digest(self) -> str:
        """The bundle's identity."""
        return self.manifest.digest

    def blob_path(self, member: str) -> Path:
        """The file that holds a member. Raises BundleError for one that is not in the bundle or not here."""
        path = blob_path_of(self.root, self.manifest.member(member).sha256)
        if member not in self.present:
            raise BundleError(
                f"member {member!r} of {self.name!r} is not installed: a thin bundle without it was",
                hint="install the whole bundle, or one made for this target",
            )
        return path

    def build_path(self, member: str) -> Path:
        """The folder for what an engine builds from a member; it goes when the member goes."""
        return builds_of(self.root) / self.manifest.member(member).sha256

    def read(self, member: str) -> bytes:
        """The bytes of a member, hashed again. Raises StoreError when they are not the ones that were installed."""
        import hashlib

        data = read_bounded(self.blob_path(member), self.manifest.member(member).size_bytes)
        if hashlib.sha256(data).hexdigest() != self.manifest.member(member).sha256:
            raise StoreError(f"member {member!r} of {self.name!r} was damaged in the store", hint=REINSTALL)
        return data


def blob_path_of(root: Path, sha256: str) -> Path:
    """Where a blob lies."""
    return root / "blobs" / "sha256" / sha256


def builds_of(root: Path) -> Path:
    """Where engines keep what they built, in a folder a blob."""
    return root / "built"


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it, and nothing else: a pipe in its place would be waited for. Raises StoreError, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StoreError(f"{path} is not a regular file", hint="remove it, then install the bundle again")
    return os.fdopen(descriptor, "rb")


def is_whole(path: Path, sha256: str) -> bool:
    """Whether a blob is there and has the hash that its name says. Reads all of it."""
    import hashlib

    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except (FileNotFoundError, StoreError):
        return False
    return digest.hexdigest() == sha256


def size_of(path: Path) -> int:
    """Of a blob in bytes; -1 where it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """A file of at most so many bytes. Raises StoreError for a longer one, none, or what is no file."""
    try:
        with open_regular(path) as file:
            data = file.read(limit_bytes + 1)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing from the store", hint=REINSTALL) from None
    if len(data) > limit_bytes:
        raise StoreError(f"{path} is longer than {limit_bytes} bytes", hint=REINSTALL)
    return data
