"""Certificates for tests: self-signed, or signed by a test authority; each in one PEM file with its key."""

from __future__ import annotations

import datetime
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NOW = datetime.datetime.now(datetime.timezone.utc)


@dataclass(frozen=True)
class Issued:
    """A certificate and its key. `pem` has both, `certificate` and `key` one each."""

    path: Path
    certificate: Path
    key: Path
    private: ec.EllipticCurvePrivateKey
    name: x509.Name


def issue(
    folder: Path, *, host: str = "localhost", days: int = 1, by: Issued | None = None, begins_days: int = -10
) -> Issued:
    """A certificate for `host`, signed by `by` or by itself; expired where `days` is negative.

    It is not valid yet where `begins_days` is positive.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    signs = key if by is None else by.private
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name if by is None else by.name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + datetime.timedelta(days=begins_days))
        .not_valid_after(NOW + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
        # Python 3.13 asks for these.
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signs.public_key()), critical=False)
        .add_extension(_usage(ca=by is None), critical=True)
        .sign(signs, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = built.public_bytes(serialization.Encoding.PEM)
    stem = f"{host}{days}{'' if by is None else '-issued'}"
    paths = {suffix: folder / f"{stem}{suffix}.pem" for suffix in ("", "-certificate", "-key")}
    for path, data in zip(paths.values(), (private + public, public, private), strict=True):
        path.write_bytes(data)
    return Issued(paths[""], paths["-certificate"], paths["-key"], key, name)


def _usage(*, ca: bool) -> x509.KeyUsage:
    others = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    return x509.KeyUsage(digital_signature=True, key_cert_sign=ca, crl_sign=ca, decipher_only=False, **others)


def serving(issued: Issued, *, clients: Issued | None = None) -> ssl.SSLContext:
    """A server's context; it asks for a client certificate where `clients` is their authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.path)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(clients.certificate)
    return context
