"""The ``.outrider`` file: read it, believe it, write it, sign it. docs/bundle-format.md has it byte for byte."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from outrider.bundle.manifest import (
    Manifest,
    Member,
    Variant,
    parse_manifest,
)
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

if TYPE_CHECKING:
    from outrider.bundle.golden import Golden, GoldenTensor
    from outrider.bundle.offload import OffloadRule
    from outrider.bundle.reader import Bundle, GoldenArrays, VerifiedBundle, load_golden, open_bundle, verify_bundle
    from outrider.bundle.writer import set_tolerance, sign_bundle, thin_bundle, write_bundle

__all__ = [
    "Bundle",
    "Golden",
    "GoldenArrays",
    "GoldenTensor",
    "Manifest",
    "Member",
    "OffloadRule",
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
    "set_tolerance",
    "sign_bundle",
    "thin_bundle",
    "verify_bundle",
    "write_bundle",
]

# What only an install, an export or the command line needs: what loads an installed bundle starts without it.
_LATER = {
    "golden": ("Golden", "GoldenTensor"),
    "offload": ("OffloadRule",),
    "reader": ("Bundle", "GoldenArrays", "VerifiedBundle", "load_golden", "open_bundle", "verify_bundle"),
    "writer": ("set_tolerance", "sign_bundle", "thin_bundle", "write_bundle"),
}


def __getattr__(name: str) -> Any:
    for home, names in _LATER.items():
        if name in names:
            value = getattr(import_module(f"outrider.bundle.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'outrider.bundle' has no attribute {name!r}")
