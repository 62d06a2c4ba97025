"""The ``.outrider`` file: read it, believe it, write it, sign it. docs/bundle-format.md has it byte for byte."""

from __future__ import annotations

from outrider.bundle.manifest import (
    Golden,
    GoldenTensor,
    Manifest,
    Member,
    Variant,
    parse_manifest,
)
from outrider.bundle.reader import Bundle, GoldenArrays, VerifiedBundle, load_golden, open_bundle, verify_bundle
from outrider.bundle.sign import (
    Signature,
    Trust,
    check_trust,
    find_trust,
    generate_key,
    key_id,
    load_private_key,
    load_public_key,
    public_bytes,
    save_keypair,
)
from outrider.bundle.writer import sign_bundle, thin_bundle, write_bundle

__all__ = [
    "Bundle",
    "Golden",
    "GoldenArrays",
    "GoldenTensor",
    "Manifest",
    "Member",
    "Signature",
    "Trust",
    "Variant",
    "VerifiedBundle",
    "check_trust",
    "find_trust",
    "generate_key",
    "key_id",
    "load_golden",
    "load_private_key",
    "load_public_key",
    "open_bundle",
    "parse_manifest",
    "public_bytes",
    "save_keypair",
    "sign_bundle",
    "thin_bundle",
    "verify_bundle",
    "write_bundle",
]
