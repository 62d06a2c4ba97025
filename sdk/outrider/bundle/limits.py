"""Sizes that the format allows; docs/bundle-format.md is the specification. Apart from ``format`` for a short start."""

from __future__ import annotations

SIGNATURE_SIZE_BYTES = 32 + 64
MAX_MANIFEST_SIZE_BYTES = 4 << 20
MAX_SIGNATURES = 64
MAX_MEMBERS = 1024
MAX_MEMBER_SIZE_BYTES = 2 << 30
