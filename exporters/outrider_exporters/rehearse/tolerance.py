"""The spread that a rehearsal measured, written back as the golden's tolerance of a new bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.bundle import open_bundle, set_tolerance
from outrider_exporters.rehearse.report import ABSENT, REFUSED, RIGHT, Rehearsal, measured_tolerance
from outrider_runtimes.errors import RehearsalError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def write_tolerance(found: Rehearsal, output: Path, *, keys: Sequence[Ed25519PrivateKey] = ()) -> dict[str, Any]:
    """Write the rehearsed bundle with the largest differences that were measured as its tolerances.

    They may be narrower or wider than those it had. A variant that answered nowhere keeps what it has.

    Args:
        found: of the bundle as it is now.
        output: the bundle to write, whole or not at all; may be the one that was rehearsed.
        keys: private keys that sign it: no signature of the old one holds for other bytes.

    Returns:
        ``path``, ``digest``, ``tolerance`` by variant and output, ``signatures`` (their number) and
        ``dropped_signatures`` (how many the old one had).

    Raises:
        RehearsalError: a target went wrong otherwise than by a difference, which no tolerance mends; or the bundle
            is another one by now. Nothing was written.
        BundleError: the bundle cannot be written.
    """
    for target in found.targets:
        for pair in target.pairs:
            if pair.verdict not in (RIGHT, ABSENT, REFUSED) and not pair.only_tolerance:
                raise RehearsalError(
                    f"no tolerance mends {target.target}: {pair.variant} on {pair.engine}: {pair.detail}",
                    hint="nothing was written; export the bundle again",
                )
    with open_bundle(found.path) as bundle:
        if bundle.manifest.digest != found.digest:
            raise RehearsalError(f"{found.path} was replaced meanwhile", hint="nothing was written; rehearse it again")
        dropped = len(bundle.signatures)
    tolerance = measured_tolerance(found.targets)
    if not tolerance:
        raise RehearsalError("no variant answered on any target, so nothing was measured", hint="nothing was written")
    digest = set_tolerance(found.path, output, tolerance=tolerance, signing_keys=keys)
    return {
        "path": str(output),
        "digest": digest,
        "tolerance": tolerance,
        "signatures": len(keys),
        "dropped_signatures": dropped,
    }
