"""Keys, signature records and trust.

A signature says that the holder of a key signed the manifest's sha256. Whether that key counts here is trust's matter.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from outrider.bundle.files import create_file
from outrider.bundle.limits import SIGNATURE_SIZE_BYTES
from outrider_runtimes.errors import BundleError, FormatError, IntegrityError, TrustError
from outrider_runtimes.nouns import dataclass
from outrider_runtimes.options import require_kind

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

# What is signed begins with its purpose, so that no other signature of the same key can pass for one of a bundle.
SIGNATURE_DOMAIN = b"outrider bundle signature, version 1\x00"
KEY_SIZE_BYTES = 32
MAX_KEY_FILE_SIZE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Signature:
    """A signature that was checked: the holder of ``public_key`` (32 bytes, Ed25519) signed the manifest."""

    public_key: bytes

    @property
    def key_id(self) -> str:
        """The first 16 hex digits of the sha256 of the public key."""
        return key_id(self.public_key)


def key_id(public_key: bytes) -> str:
    """The short name of a public key: the first 16 hex digits of its sha256."""
    import hashlib

    return hashlib.sha256(public_key).hexdigest()[:16]


def signature_message(manifest_sha256: bytes) -> bytes:
    """The bytes that a signature is over."""
    return SIGNATURE_DOMAIN + manifest_sha256


def sign_manifest(manifest_sha256: bytes, key: Ed25519PrivateKey) -> bytes:
    """A signature record: the public key, then the signature; 96 bytes, the same each time."""
    return public_bytes(key) + key.sign(signature_message(manifest_sha256))


def check_records(records: bytes, manifest_sha256: bytes) -> tuple[Signature, ...]:
    """Every record against the key that it carries.

    Args:
        records: whole records of 96 bytes, one after the other.

    Raises:
        IntegrityError: a record's signature is not its key's over this manifest.
        FormatError: a key signed twice.
    """
    if not records:
        return ()
    _need_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    signatures: list[Signature] = []
    for index, at in enumerate(range(0, len(records), SIGNATURE_SIZE_BYTES)):
        public_key, signature = records[at : at + 32], records[at + 32 : at + SIGNATURE_SIZE_BYTES]
        try:
            Ed25519PublicKey.from_public_bytes(public_key).verify(signature, signature_message(manifest_sha256))
        except (InvalidSignature, ValueError):
            raise IntegrityError(
                f"signature {index} (key {key_id(public_key)}) does not match the manifest",
                hint="the file was damaged or changed; copy it again from where it was made",
            ) from None
        if Signature(public_key=public_key) in signatures:
            raise FormatError(f"signature {index}: key {key_id(public_key)} signed twice")
        signatures.append(Signature(public_key=public_key))
    return tuple(signatures)


def generate_key() -> Ed25519PrivateKey:
    """A new private key from the system's randomness."""
    _need_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.generate()


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The 32 raw bytes of the public half."""
    return key.public_key().public_bytes_raw()


def save_keypair(directory: Path, name: str, key: Ed25519PrivateKey | None = None) -> tuple[Path, Path]:
    """Write ``<name>.key`` (PEM, PKCS 8, readable by its owner alone) and ``<name>.pub`` (base64, key id).

    Args:
        directory: made where it is not there.
        name: a file name without its suffix.
        key: what to save; a new one where it is None.

    Returns:
        The paths of the private and of the public file.

    Raises:
        BundleError: one of the files exists or cannot be written; what was there is untouched.
    """
    if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
        raise BundleError(f"{name!r} is not a file name for a key", hint="a name such as release, without a folder")
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization

    key = key or generate_key()
    private, public = directory / f"{name}.key", directory / f"{name}.pub"
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    from base64 import b64encode

    line = f"{b64encode(public_bytes(key)).decode()} {name} {key_id(public_bytes(key))}\n"
    if public.exists():
        raise BundleError(f"{public} exists already", hint="choose another name; keys are never overwritten")
    create_file(private, pem, mode=0o600)
    try:
        create_file(public, line.encode(), mode=0o644)
    except BaseException:
        private.unlink()
        raise
    return private, public


def load_private_key(path: str | Path) -> Ed25519PrivateKey:
    """The Ed25519 private key in a PEM file. Raises BundleError."""
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    pem = _read_small(Path(path), BundleError)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise BundleError(
            f"{path} is not an unencrypted private key in PEM: {error}", hint="`outrider keygen` makes one"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise BundleError(f"{path} holds another kind of key than Ed25519", hint="`outrider keygen` makes one")
    return key


def load_public_key(path: str | Path) -> bytes:
    """The 32 bytes of a ``.pub`` file: one line of base64, and a comment if it likes. Raises TrustError."""
    from base64 import b64decode

    words = _read_small(Path(path), TrustError).split()
    try:
        key = b64decode(words[0], validate=True)
    except (IndexError, ValueError):  # of which binascii.Error is one
        key = b""
    if len(key) != KEY_SIZE_BYTES:
        raise TrustError(f"{path} is not a public key", hint="it is one line: base64 of 32 bytes, then a comment")
    return key


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Which keys may sign.

    Attributes:
        keys: public keys, 32 bytes each.
        revoked: key ids whose signatures do not count, whatever ``keys`` says.
        origin: where this was read, for messages.
    """

    keys: frozenset[bytes] = frozenset()
    revoked: frozenset[str] = frozenset()
    origin: str = "the given trust"

    @property
    def required(self) -> bool:
        """Whether a bundle must be signed: as soon as any key is named, be it a revoked one."""
        return bool(self.keys or self.revoked)

    @classmethod
    def load(cls, path: str | Path) -> Trust:
        """What a ``.pub`` file says, or a folder of them with the revoked ones in its folder ``revoked``.

        Raises:
            TrustError: it is not there, cannot be read, or a ``.pub`` file in it is not a key.
        """
        path = Path(path)
        if not _is_folder(path):
            return cls(keys=frozenset([load_public_key(path)]), origin=str(path))
        return cls(
            keys=frozenset(load_public_key(file) for file in _public_files(path)),
            revoked=frozenset(key_id(load_public_key(file)) for file in _public_files(path / "revoked")),
            origin=str(path),
        )


def find_trust(
    trust: Trust | str | Path | None = None,
    state_dir: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Trust:
    """The trust that holds here: the argument, else ``OUTRIDER_TRUST``, else the folder ``trust`` under ``state_dir``.

    Returns:
        A Trust without keys where none of them names one; then bundles load unverified.

    Raises:
        TrustError: what was named is not there, holds no key or cannot be read.
        ConfigError: it is no path.
    """
    if isinstance(trust, Trust):
        return trust
    require_kind("trust", trust, (str, Path, type(None)), "a Trust, the path of a .pub file or of a folder of them")
    named = environ.get("OUTRIDER_TRUST") or None if trust is None else trust
    if named is not None:
        found = Trust.load(named)
        if not found.required:
            raise TrustError(f"{named} holds no public key", hint="put a *.pub file there, or do not name it")
        return found
    folder = state_dir / "trust" if state_dir else None
    if folder is None or not os.path.lexists(folder):
        return Trust()
    return Trust.load(folder)


def check_trust(what: str, signatures: Sequence[Signature], trust: Trust) -> bool:
    """Whether ``what`` is signed by a key that counts.

    Args:
        what: names the bundle in messages.
        signatures: as ``open_bundle`` or the store gives them, which checked each against its own key.

    Returns:
        True where a trusted key signed; False where no keys are named at all, so that nothing could be checked.

    Raises:
        TrustError: keys are named and none of them that is not revoked signed; names the keys.
    """
    if not trust.required:
        return False
    counting = {key for key in trust.keys if key_id(key) not in trust.revoked}
    if any(signature.public_key in counting for signature in signatures):
        return True
    ids = [signature.key_id for signature in signatures]
    wanted = f"{trust.origin} asks for a signature by {_listed(map(key_id, counting)) or 'a key that is not revoked'}"
    if not ids:
        raise TrustError(f"{what} is not signed; {wanted}", hint="sign it: `outrider sign BUNDLE --key FILE.key`")
    revoked = [name for name in ids if name in trust.revoked]
    if revoked:
        raise TrustError(
            f"{what} is signed by {_listed(ids)}, of which {_listed(revoked)} is revoked; {wanted}",
            hint="have it signed by a key that is still trusted: `outrider sign BUNDLE --key FILE.key`",
        )
    raise TrustError(
        f"{what} is signed by {_listed(ids)}; {wanted}",
        hint="if that signer is to be trusted, put its .pub file there; else have the bundle signed by a trusted key",
    )


def _listed(ids: Iterable[str]) -> str:
    return ", ".join(sorted(ids))


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _public_files(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if file.suffix == ".pub")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TrustError(f"trust folder {folder} cannot be read: {error.strerror}") from None


def _read_small(path: Path, kind: type[BundleError]) -> bytes:
    try:
        # Without O_NONBLOCK the opening of a named pipe waits for ever.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise kind(f"key file {path} is not a regular file", hint="check the path")
            data = file.read(MAX_KEY_FILE_SIZE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or error
        raise kind(f"key file {path} cannot be read: {reason}", hint="check the path and its rights") from None
    if len(data) > MAX_KEY_FILE_SIZE_BYTES:
        raise kind(f"{path} is too long for a key file")
    return data


def _need_cryptography() -> None:
    """A base dependency, which a hand-made environment may lack all the same."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise BundleError(
            "signatures need the package 'cryptography', which is not installed", hint="pip install cryptography"
        ) from None
