"""The file of a name: what is current, and what was good before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from outrider.bundle import Signature
from outrider.bundle.manifest import SHA256, parse_json
from outrider.store.blobs import Installed
from outrider_runtimes.errors import StoreError
from outrider_runtimes.nouns import dataclass

RECORD_FORMAT = 1
# A record lists at most two bundles of 1,024 members; far more than this is no record of ours.
MAX_RECORD_SIZE_BYTES = 4 << 20
MAX_FAILED = 8  # digests that are remembered


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One bundle in a record. ``blobs`` are the sha256 of all that it needs, its manifest among them."""

    digest: str
    version: int
    verified: bool
    signatures: tuple[Signature, ...]
    present: tuple[str, ...]
    blobs: frozenset[str]
    choice: Mapping[str, Any]

    @classmethod
    def of(cls, bundle: Installed, choice: Mapping[str, Any]) -> Entry:
        """The entry of a bundle."""
        here = [member for member in bundle.manifest.members if member.path in bundle.present]
        return cls(
            digest=bundle.digest,
            version=bundle.manifest.version,
            verified=bundle.verified,
            signatures=bundle.signatures,
            present=tuple(member.path for member in here),
            blobs=frozenset([bundle.digest, *(member.sha256 for member in here)]),
            choice=dict(choice),
        )

    def to_dict(self) -> dict[str, Any]:
        """As the record stores it."""
        return {
            "digest": self.digest,
            "version": self.version,
            "verified": self.verified,
            "signatures": [_base64(signature.public_key) for signature in self.signatures],
            "present": list(self.present),
            "blobs": sorted(self.blobs),
            "choice": dict(self.choice),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Entry:
        """The inverse of ``to_dict``; raises what odd data makes it raise."""
        return cls(
            digest=_hex(data["digest"]),
            version=int(data["version"]),
            verified=data["verified"] is True,
            signatures=tuple(_signature(key) for key in data["signatures"]),
            present=tuple(str(path) for path in data["present"]),
            blobs=frozenset(_hex(blob) for blob in data["blobs"]),
            choice=dict(data["choice"]),
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """That the current bundle is fresh: how many good calls it still owes, and how many processes died in one."""

    left: int
    strikes: int = 0

    def to_dict(self) -> dict[str, int]:
        """As the record stores it."""
        return {"left": self.left, "strikes": self.strikes}


@dataclass(frozen=True, kw_only=True)
class Record:
    """What ``names/<name>.json`` holds.

    Attributes:
        current: what serves.
        last_good: what served before and can be gone back to.
        trial: where ``current`` still has to prove itself.
        failed: digests that did not, the latest last.
    """

    current: Entry
    last_good: Entry | None
    trial: Trial | None = None
    failed: tuple[str, ...] = ()

    @property
    def blobs(self) -> frozenset[str]:
        """All that must stay."""
        return self.current.blobs | (self.last_good.blobs if self.last_good else frozenset())

    def gone_back(self, failed: str = "") -> Record:
        """What stands there after a rollback. Raises ValueError where there is no last good one."""
        if self.last_good is None:
            raise ValueError("there is nothing to go back to")
        failures = (*self.failed, failed)[-MAX_FAILED:] if failed else self.failed
        return Record(current=self.last_good, last_good=None, failed=failures)

    def to_json(self) -> bytes:
        """The bytes of the record. Raises StoreError for a choice that is not JSON."""
        last_good = self.last_good.to_dict() if self.last_good else None
        data = {
            "format": RECORD_FORMAT,
            "current": self.current.to_dict(),
            "last_good": last_good,
            "trial": self.trial.to_dict() if self.trial else None,
            "failed": list(self.failed),
        }
        try:
            return json.dumps(data, indent=1, sort_keys=True, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise StoreError(f"the choice cannot be stored as JSON: {error}") from None

    @classmethod
    def parse(cls, raw: bytes) -> Record:
        """The inverse of ``to_json``; raises what odd data makes it raise."""
        data = parse_json(raw, "record", max_bytes=MAX_RECORD_SIZE_BYTES)
        if data["format"] != RECORD_FORMAT:
            raise StoreError(f"it has format {data['format']}, this Outrider reads {RECORD_FORMAT}")
        last_good, trial = data["last_good"], data.get("trial")
        return cls(
            current=Entry.from_dict(data["current"]),
            last_good=None if last_good is None else Entry.from_dict(last_good),
            trial=None if trial is None else Trial(left=int(trial["left"]), strikes=int(trial["strikes"])),
            failed=tuple(_hex(digest) for digest in data.get("failed", ())),
        )


def _base64(data: bytes) -> str:
    from base64 import b64encode

    return b64encode(data).decode()


def _signature(key: str) -> Signature:
    """Raises ValueError for what is no base64."""
    from base64 import b64decode  # only where there are signatures

    return Signature(public_key=b64decode(key, validate=True))


def _hex(value: object) -> str:
    """A sha256, which becomes a file name. Raises ValueError."""
    if not isinstance(value, str) or not SHA256.match(value):
        raise ValueError(f"{value!r} is not a sha256")
    return value
