"""From a file to a bundle that can be believed: bounded, hashed, verified, and only then parsed."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from outrider.bundle.format import (
    HEADER_SIZE_BYTES,
    Header,
    Layout,
    Span,
    layout,
    unpack_header,
    unpack_presence,
)
from outrider.bundle.golden import GoldenTensors
from outrider.bundle.limits import SIGNATURE_SIZE_BYTES
from outrider.bundle.manifest import Manifest, parse_manifest
from outrider.bundle.sign import Signature, Trust, check_records, check_trust
from outrider_runtimes.errors import BundleError, FormatError, IntegrityError
from outrider_runtimes.tensors import Array

CHUNK_SIZE_BYTES = 1 << 20
_DAMAGED = "the file was damaged or changed; copy it again from where it was made"


class Bundle:
    """An open bundle whose every byte outside the members has been checked. Made by ``open_bundle``.

    Attributes:
        path: as it was opened.
        size_bytes: of the file.
        manifest: what it says.
        signatures: each checked against its own key; whether the key counts is ``check_trust``'s to say.
        records: the signature records as they stand in the file.
        present: paths of the members that are in this file.
        verified: whether a trusted key signed it; False where no trust was asked for.
    """

    def __init__(self, descriptor: int, path: Path, trust: Trust) -> None:
        self.path = path
        self._descriptor = descriptor
        self.size_bytes = os.fstat(descriptor).st_size
        header = unpack_header(self._bytes(0, min(HEADER_SIZE_BYTES, self.size_bytes)))
        if header.prefix_size_bytes > self.size_bytes:
            raise FormatError(f"{self.size_bytes} bytes are fewer than the header announces", hint=_DAMAGED)
        raw = self._bytes(header.manifest_offset, header.manifest_size_bytes)
        if hashlib.sha256(raw).digest() != header.manifest_sha256:
            raise IntegrityError("the manifest is not the one that the header's sha256 names", hint=_DAMAGED)
        self.records = self._bytes(header.signatures_offset, header.signature_count * SIGNATURE_SIZE_BYTES)
        self.signatures: tuple[Signature, ...] = check_records(self.records, header.manifest_sha256)
        self.verified = check_trust("the bundle", self.signatures, trust)
        self.manifest = parse_manifest(raw)
        presence = unpack_presence(self._bytes(header.presence_offset, header.member_count))
        self.present = _check_presence(self.manifest, presence)
        self._spans = self._check_layout(header, presence)

    def read(self, member_path: str) -> bytes:
        """The bytes of a member. Raises IntegrityError when they are not the ones the manifest names."""
        buffer = BytesIO()
        self.copy_to(member_path, buffer)
        return buffer.getvalue()

    def copy_to(self, member_path: str, file: BinaryIO) -> None:
        """Write a member to ``file`` in pieces of 1 MiB.

        Raises:
            IntegrityError: what was written is not what the manifest names; throw it away.
            BundleError: there is no such member, or it is absent from this file.
        """
        digest = hashlib.sha256()
        for piece in self._pieces(member_path):
            digest.update(piece)
            file.write(piece)
        self._check_hash(member_path, digest.hexdigest())

    def check(self, member_path: str) -> None:
        """Hash a member and keep nothing. Raises IntegrityError."""
        digest = hashlib.sha256()
        for piece in self._pieces(member_path):
            digest.update(piece)
        self._check_hash(member_path, digest.hexdigest())

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_layout(self, header: Header, presence: tuple[bool, ...]) -> dict[str, Span]:
        sizes = [member.size_bytes for member in self.manifest.members]
        plan: Layout = layout(header.prefix_size_bytes, sizes, presence)
        if plan.end != self.size_bytes:
            raise FormatError(f"the file has {self.size_bytes} bytes, its manifest says {plan.end}", hint=_DAMAGED)
        for gap in plan.padding:
            if any(self._bytes(gap.offset, gap.size_bytes)):
                raise FormatError(f"the padding at byte {gap.offset} is not zero", hint=_DAMAGED)
        pairs = zip(self.manifest.members, plan.members, strict=True)
        return {member.path: span for member, span in pairs if span is not None}

    def _pieces(self, member_path: str) -> Iterator[bytes]:
        span = self._spans.get(member_path)
        if span is None:
            self.manifest.member(member_path)
            raise BundleError(
                f"{self.path}: member {member_path!r} is not in this thin bundle",
                hint="use the whole bundle, or one made for this target",
            )
        for at in range(0, span.size_bytes, CHUNK_SIZE_BYTES):
            with _named(self.path):
                piece = self._bytes(span.offset + at, min(CHUNK_SIZE_BYTES, span.size_bytes - at))
            yield piece

    def _check_hash(self, member_path: str, sha256: str) -> None:
        if sha256 != self.manifest.member(member_path).sha256:
            raise IntegrityError(
                f"{self.path}: the bytes of member {member_path!r} are not the ones that the manifest names",
                hint=_DAMAGED,
            )

    def _bytes(self, offset: int, size_bytes: int) -> bytes:
        """Exactly so many bytes; callers have held them against the file's size."""
        parts: list[bytes] = []
        while size_bytes:
            part = os.pread(self._descriptor, size_bytes, offset)
            if not part:
                raise FormatError("the file became shorter while it was read", hint=_DAMAGED)
            parts.append(part)
            offset, size_bytes = offset + len(part), size_bytes - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def open_bundle(path: str | Path, trust: Trust | None = None) -> Bundle:
    """Open a bundle and check every byte of it outside the members; members are checked as they are read.

    All of it is done on one open file, so that nothing can be put in its place between check and use.

    Args:
        trust: checked before the manifest is parsed; None asks for no key.

    Returns:
        A context manager; ``close()`` frees the file.

    Raises:
        FormatError, IntegrityError, UnsupportedBundle: naming the file and the rule.
        TrustError: no key that is trusted signed it.
        BundleError: there is no such file, or it cannot be read.
    """
    path = Path(path)
    with _named(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except ValueError as error:  # a null byte in the path
            raise BundleError(f"cannot be opened: {error}", hint="check the path") from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise BundleError("this is not a regular file", hint="a bundle is one file, *.outrider")
            return Bundle(descriptor, path, trust or Trust())
        except BaseException:
            os.close(descriptor)
            raise


@dataclass(frozen=True, kw_only=True)
class VerifiedBundle:
    """What ``verify_bundle`` found. ``verified`` says whether a trusted key signed it."""

    path: Path
    size_bytes: int
    manifest: Manifest
    signatures: tuple[Signature, ...]
    present: frozenset[str]
    verified: bool


def verify_bundle(path: str | Path, trust: Trust | None = None) -> VerifiedBundle:
    """Check every byte of a bundle against hashes and keys. Raises as ``open_bundle`` and ``Bundle.read`` do."""
    with open_bundle(path, trust) as bundle:
        with _named(bundle.path):
            for member in bundle.manifest.members:
                if member.path in bundle.present:
                    bundle.check(member.path)
        return VerifiedBundle(
            path=bundle.path,
            size_bytes=bundle.size_bytes,
            manifest=bundle.manifest,
            signatures=bundle.signatures,
            present=bundle.present,
            verified=bundle.verified,
        )


@dataclass(frozen=True, kw_only=True)
class GoldenArrays:
    """The golden's tensors, read-only, by name; ``variants`` by variant, then by output."""

    inputs: Mapping[str, Array]
    reference: Mapping[str, Array]
    variants: Mapping[str, Mapping[str, Array]]


def load_golden(read: Callable[[str], bytes], manifest: Manifest) -> GoldenArrays:
    """The golden tensors as arrays of the interface's dtypes, native byte order.

    Args:
        read: gives the bytes of a member: ``Bundle.read``, or one over the store's blobs.
    """

    def arrays(tensors: GoldenTensors) -> dict[str, Array]:
        out = {}
        for name, tensor in tensors.items():
            stored = np.dtype(tensor.dtype).newbyteorder("<")
            array = np.frombuffer(read(tensor.member), stored).reshape(tensor.shape)
            out[name] = array.astype(tensor.dtype, copy=False)
        return out

    golden = manifest.golden
    return GoldenArrays(
        inputs=arrays(golden.inputs),
        reference=arrays(golden.reference),
        variants={name: arrays(tensors) for name, tensors in golden.variants.items()},
    )


def _check_presence(manifest: Manifest, presence: tuple[bool, ...]) -> frozenset[str]:
    """Only files of variants may be absent, and not all of them."""
    if len(presence) != len(manifest.members):
        raise FormatError(f"the header counts {len(presence)} members, the manifest lists {len(manifest.members)}")
    models = {variant.member for variant in manifest.variants}
    present = frozenset(member.path for member, here in zip(manifest.members, presence, strict=True) if here)
    for member in manifest.members:
        if member.path not in present and member.path not in models:
            raise FormatError(f"golden member {member.path!r} is absent; only files of variants may be")
    if not present & models:
        raise FormatError("the file of every variant is absent")
    return present


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors name the file; those of the system become ours."""
    try:
        yield
    except BundleError as error:
        text = str(error)
        raise (error if text.startswith(str(path)) else type(error)(f"{path}: {text}", hint=error.hint)) from None
    except FileNotFoundError:
        raise BundleError(f"{path}: there is no such file", hint="check the path") from None
    except OSError as error:
        hint = "a bundle is one file, *.outrider" if error.errno == errno.EISDIR else "check the path and its rights"
        raise BundleError(f"{path}: cannot be read: {error.strerror}", hint=hint) from None
