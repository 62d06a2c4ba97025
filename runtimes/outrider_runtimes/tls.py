"""Whom a client trusts and who it says it is, for HTTPS and gRPC alike. The server is verified in every case."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from outrider_runtimes.errors import ConfigError, RemoteUnavailable

_UNTRUSTED = "pass tls= with the authority that signed it; check the host's name and this machine's clock"
_OURS = "pass tls=outrider.Tls(certificate=..., key=...), signed by an authority that the server trusts"
# What a server's alert is called when it wants a certificate and gets none, or one that it does not trust.
_ASKED_FOR_OURS = ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE", "UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_UNKNOWN")
_NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")

FilePath = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Tls:
    """PEM files for a connection.

    Attributes:
        authority: certificates of those whose signature is trusted; None is what this machine trusts.
        certificate: this client's own, with those between it and its authority, where the server asks for one (mTLS).
        key: the certificate's private key, not encrypted; None where it is in the same file.
    """

    authority: FilePath | None = None
    certificate: FilePath | None = None
    key: FilePath | None = None

    def __post_init__(self) -> None:
        if self.key is not None and self.certificate is None:
            raise ConfigError("tls: there is a key and no certificate", hint="Tls(certificate=..., key=...)")


# What users pass: a context of their own, PEM files, or the authority's PEM file alone.
AnyTls = ssl.SSLContext | Tls | FilePath


@dataclass(frozen=True, kw_only=True)
class Pem:
    """The same as bytes; ``authority`` is None where the machine has no file of what it trusts."""

    authority: bytes | None
    certificate: bytes | None
    key: bytes | None


def verifying_context(tls: AnyTls | None) -> ssl.SSLContext:
    """A context that verifies the server.

    Raises:
        ConfigError: a file that cannot be read or holds something else, or a context that does not verify.
    """
    if isinstance(tls, ssl.SSLContext):
        if tls.verify_mode != ssl.CERT_REQUIRED or not tls.check_hostname:
            raise ConfigError(
                "tls= does not verify the server",
                hint="ssl.create_default_context(cafile=...) trusts an authority of your own",
            )
        return tls
    files = _files(tls)
    context = _trusting(files.authority)
    if files.certificate is not None:
        try:
            # An empty password, or OpenSSL would ask the terminal for one.
            context.load_cert_chain(files.certificate, files.key, password="")
        except (OSError, ValueError) as error:
            raise _unusable(files.certificate, error, "a certificate and its unencrypted key") from None
    return context


def pem_of(tls: AnyTls | None) -> Pem:
    """What gRPC takes. Raises ConfigError as ``verifying_context`` does, and for an SSLContext."""
    if isinstance(tls, ssl.SSLContext):
        raise ConfigError(
            "gRPC takes no SSLContext", hint="pass tls=outrider.Tls(authority=..., certificate=..., key=...)"
        )
    files = _files(tls)
    verifying_context(files)
    own = files.certificate
    key = own if files.key is None else files.key
    return Pem(
        authority=_machines_own() if files.authority is None else Path(files.authority).read_bytes(),
        certificate=None if own is None else Path(own).read_bytes(),
        key=None if key is None else Path(key).read_bytes(),
    )


def tls_failure(address: str, error: ssl.SSLError) -> RemoteUnavailable:
    """Why hands were not shaken with ``address``, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return RemoteUnavailable(f"the certificate of {address} was refused: {error.verify_message}", hint=_UNTRUSTED)
    reason = error.reason or str(error)
    if any(word in reason for word in _ASKED_FOR_OURS):
        return RemoteUnavailable(f"{address} refused this client's certificate, or that there was none", hint=_OURS)
    if reason in _NOT_TLS:
        return RemoteUnavailable(f"{address} does not speak TLS", hint="http:// and grpc:// are not encrypted")
    return RemoteUnavailable(f"{address}: TLS: {reason}")


def _files(tls: Tls | FilePath | None) -> Tls:
    if isinstance(tls, Tls):
        return tls
    if tls is None or isinstance(tls, (str, os.PathLike)):
        return Tls(authority=tls)
    raise ConfigError(
        f"tls= is a {type(tls).__name__}", hint="an SSLContext, outrider.Tls(...) or a path of a PEM file"
    )


def _trusting(authority: FilePath | None) -> ssl.SSLContext:
    if authority is None:
        return ssl.create_default_context()
    try:
        return ssl.create_default_context(cafile=Path(authority))
    except (OSError, ValueError) as error:
        raise _unusable(authority, error, "certificates that are trusted") from None


def _unusable(path: FilePath, error: Exception, wanted: str) -> ConfigError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return ConfigError(f"tls: {os.fspath(path)}: {reason}", hint=f"a PEM file with {wanted} is expected")


def _machines_own() -> bytes | None:
    """gRPC has a list of its own, which does not know an authority that this machine's owner has added."""
    file = ssl.get_default_verify_paths().cafile
    return None if file is None else Path(file).read_bytes()
