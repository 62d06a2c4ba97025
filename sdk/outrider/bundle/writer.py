"""From parts to a bundle: the same parts give the same bytes, and a file appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from outrider.bundle.files import atomic_file
from outrider.bundle.format import ABSENT, PRESENT, Header, layout, pack_header
from outrider.bundle.golden import Golden
from outrider.bundle.limits import MAX_SIGNATURES, SIGNATURE_SIZE_BYTES
from outrider.bundle.manifest import (
    MANIFEST_FORMAT,
    Manifest,
    Member,
    Variant,
    check_path,
    parse_manifest,
    required_names,
)
from outrider.bundle.offload import OffloadRule
from outrider.bundle.reader import CHUNK_SIZE_BYTES, open_bundle
from outrider.bundle.sign import Signature, check_records, public_bytes, sign_manifest
from outrider_runtimes.errors import BundleError, FormatError, IntegrityError
from outrider_runtimes.tensors import Interface

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

Copy = Callable[[str, BinaryIO], None]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """All that a file is made of."""

    manifest: Manifest
    present: frozenset[str]
    records: bytes


def write_bundle(
    path: str | Path,
    *,
    name: str,
    version: int,
    interface: Interface,
    variants: Sequence[Variant],
    golden: Golden,
    members: Mapping[str, bytes | Path],
    provenance: Mapping[str, Any],
    signing_keys: Sequence[Ed25519PrivateKey] = (),
    offload: OffloadRule | None = None,
    cloud_only: bool = False,
) -> str:
    """Write a bundle. Equal arguments give equal bytes.

    Args:
        path: the file to write; what stood there is replaced when all is well, and stays when it is not.
        members: by member path, the bytes or the file that holds them; exactly those that variants and golden name.
        provenance: free JSON: where this comes from.
        signing_keys: each signs, in this order.
        offload: which answers are uncertain.
        cloud_only: its task belongs to the cloud; the board's answer is a stopgap.

    Returns:
        The digest: sha256 of the manifest in hex.

    Raises:
        FormatError: what would be written breaks a rule of the format; nothing was written.
        BundleError: a source cannot be read or changed meanwhile, or the file cannot be written.
    """
    raw = _encode(
        {
            "format": MANIFEST_FORMAT,
            "requires": required_names(interface, variants),
            "name": name,
            "version": version,
            "interface": interface.to_dict(),
            "variants": [variant.to_dict() for variant in variants],
            "golden": golden.to_dict(),
            "members": [_describe(key, members[key]).to_dict() for key in sorted(members)],
            "provenance": dict(provenance),
            **({} if offload is None else {"offload": offload.to_dict()}),
            **({"cloud_only": True} if cloud_only else {}),
        }
    )
    manifest = parse_manifest(raw)
    sha256 = hashlib.sha256(raw).digest()
    records = b"".join(sign_manifest(sha256, key) for key in signing_keys)
    check_records(records, sha256)
    plan = _Plan(manifest=manifest, present=frozenset(members), records=records)
    _write(Path(path), plan, lambda member, file: _copy_source(manifest.member(member), members[member], file))
    return manifest.digest


def sign_bundle(path: str | Path, key: Ed25519PrivateKey) -> Signature:
    """Add a signature to a bundle in place; one that the key gave before stays as it is.

    Every member is hashed on the way, so that nothing damaged gets a signature.

    Returns:
        The signature.

    Raises:
        BundleError: the file is not a sound bundle, has 64 signatures already or cannot be written; it is unchanged.
    """
    path = Path(path)
    signature = Signature(public_key=public_bytes(key))
    with open_bundle(path) as bundle:
        if signature in bundle.signatures:
            return signature
        if len(bundle.signatures) >= MAX_SIGNATURES:
            raise BundleError(f"{path} has {MAX_SIGNATURES} signatures already, which is the most that fit")
        record = sign_manifest(hashlib.sha256(bundle.manifest.raw).digest(), key)
        plan = _Plan(manifest=bundle.manifest, present=bundle.present, records=bundle.records + record)
        # In place: the file that a link leads to, and open to nobody whom it was closed to.
        _write(path.resolve(), plan, bundle.copy_to, mode=stat.S_IMODE(path.stat().st_mode))
    return signature


def thin_bundle(path: str | Path, output: str | Path, *, variants: Sequence[str]) -> str:
    """Write a bundle with the files of some variants only. Its manifest and signatures are those of the whole one.

    Args:
        variants: names of those to keep, one at least; each must be present in ``path``.

    Returns:
        The digest, which is that of the whole bundle.

    Raises:
        BundleError: there is no such variant, its file is absent, or the output cannot be written.
    """
    if not variants:
        raise BundleError("a thin bundle keeps one variant at least", hint="name the variants to keep")
    with open_bundle(path) as bundle:
        models = {variant.member for variant in bundle.manifest.variants}
        kept = {bundle.manifest.variant(name).member for name in variants}
        plan = _Plan(
            manifest=bundle.manifest,
            present=frozenset(m.path for m in bundle.manifest.members if m.path not in models or m.path in kept),
            records=bundle.records,
        )
        _write(Path(output), plan, bundle.copy_to)
        return bundle.manifest.digest


def set_tolerance(
    path: str | Path,
    output: str | Path,
    *,
    tolerance: Mapping[str, Mapping[str, float]],
    signing_keys: Sequence[Ed25519PrivateKey] = (),
) -> str:
    """Write a bundle whose golden allows other differences; all else that its manifest says stays, unknown keys too.

    The manifest's bytes are others, so that no signature of ``path`` holds for it, and none is copied.

    Args:
        tolerance: by variant, by output, the bounds that replace those there are.
        signing_keys: each signs the new bundle, in this order.

    Returns:
        The new bundle's digest.

    Raises:
        BundleError: there is no such variant or output, a bound is no finite number of 0 or more, or ``path`` or
            ``output`` cannot be used; nothing was written.
    """
    with open_bundle(path) as bundle:
        data = json.loads(bundle.manifest.raw)
        bounds = data["golden"]["tolerance"]
        for variant, changed in tolerance.items():
            bundle.manifest.variant(variant)
            bounds[variant].update(changed)  # the parser says what does not belong there
        manifest = parse_manifest(_encode(data))
        sha256 = hashlib.sha256(manifest.raw).digest()
        records = b"".join(sign_manifest(sha256, key) for key in signing_keys)
        check_records(records, sha256)
        plan = _Plan(manifest=manifest, present=bundle.present, records=records)
        _write(Path(output), plan, bundle.copy_to)
    return manifest.digest


def _write(path: Path, plan: _Plan, copy: Copy, *, mode: int = 0o666) -> None:
    manifest = plan.manifest
    header = Header(
        signature_count=len(plan.records) // SIGNATURE_SIZE_BYTES,
        manifest_size_bytes=len(manifest.raw),
        member_count=len(manifest.members),
        manifest_sha256=hashlib.sha256(manifest.raw).digest(),
    )
    presence = [member.path in plan.present for member in manifest.members]
    spans = layout(header.prefix_size_bytes, [member.size_bytes for member in manifest.members], presence).members
    with _writing(path), atomic_file(path, mode=mode) as file:
        file.write(pack_header(header))
        file.write(bytes(PRESENT if here else ABSENT for here in presence))
        file.write(manifest.raw)
        file.write(plan.records)
        for member, span in zip(manifest.members, spans, strict=True):
            if span is not None:
                file.write(bytes(span.offset - file.tell()))
                copy(member.path, file)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be written: {error.strerror}",
            hint="check the folder, its rights and the space on its disk",
        ) from None


def _encode(data: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise FormatError(f"manifest: cannot be written as JSON: {error}") from None


def _describe(path: str, source: bytes | Path) -> Member:
    size, digest = 0, hashlib.sha256()
    for piece in _pieces(source):
        size += len(piece)
        digest.update(piece)
    return Member(path=check_path(path), size_bytes=size, sha256=digest.hexdigest())


def _copy_source(member: Member, source: bytes | Path, file: BinaryIO) -> None:
    digest = hashlib.sha256()
    for piece in _pieces(source):
        digest.update(piece)
        file.write(piece)
    if digest.hexdigest() != member.sha256:
        raise IntegrityError(f"{source!s} changed while the bundle was written", hint="write it again")


def _pieces(source: bytes | Path) -> Iterator[bytes]:
    try:
        with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            while piece := file.read(CHUNK_SIZE_BYTES):
                yield piece
    except OSError as error:
        raise BundleError(
            f"{source!s}: cannot be read: {error.strerror}", hint="check the path and its rights"
        ) from None
