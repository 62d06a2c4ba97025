"""Ed25519 keys that are the same in every run."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def private_key(number: int) -> Ed25519PrivateKey:
    """The key with that number; never one to sign anything real with."""
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
