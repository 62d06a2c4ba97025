"""``inspect``, ``verify``, ``keygen`` and ``sign``: commands on bundle files and keys."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.bundle import (
    Bundle,
    VerifiedBundle,
    find_trust,
    load_private_key,
    load_public_key,
    open_bundle,
    save_keypair,
    sign_bundle,
    verify_bundle,
)
from outrider.bundle import key_id as id_of_key
from outrider.cli.options import add_trust
from outrider.cli.text import aligned, bytes_text, tensor_text

if TYPE_CHECKING:
    from outrider.cli import Commands


def register(commands: Commands) -> None:
    """Add the commands."""
    inspect = commands.add(
        "inspect",
        run=_inspect,
        render=_render_bundle,
        summary="What a bundle says: its interface, variants and signatures. Hashes no model file.",
        example="outrider inspect digits.outrider",
    )
    inspect.add_argument("bundle", type=Path, metavar="BUNDLE")

    verify = commands.add(
        "verify",
        run=_verify,
        render=_render_bundle,
        summary="Check every byte of a bundle against its hashes and the keys that are trusted here.",
        example="outrider verify digits.outrider --trust keys/release.pub",
    )
    verify.add_argument("bundle", type=Path, metavar="BUNDLE")
    add_trust(verify)

    keygen = commands.add(
        "keygen",
        run=_keygen,
        render=lambda result: aligned([["private key", result["private"]], ["public key", result["public"]]]),
        summary="Make a key pair: NAME.key signs and stays secret, NAME.pub goes to the boards.",
        example="outrider keygen release --folder keys",
    )
    keygen.add_argument("name", metavar="NAME")
    keygen.add_argument("--folder", type=Path, default=Path(), help="where the two files go (default: here)")

    sign = commands.add(
        "sign",
        run=_sign,
        render=_render_bundle,
        summary="Add a signature to a bundle; those that it has stay.",
        example="outrider sign digits.outrider --key keys/release.key",
    )
    sign.add_argument("bundle", type=Path, metavar="BUNDLE")
    sign.add_argument("--key", type=Path, required=True, help="a private key made by `outrider keygen`")


def _inspect(args: argparse.Namespace) -> dict[str, Any]:
    with open_bundle(args.bundle) as bundle:
        return _summary(bundle)


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    found = verify_bundle(args.bundle, find_trust(args.trust))
    return {**_summary(found), "verified": found.verified}


def _keygen(args: argparse.Namespace) -> dict[str, Any]:
    private, public = save_keypair(args.folder, args.name)
    return {"private": str(private), "public": str(public), "key_id": id_of_key(load_public_key(public))}


def _sign(args: argparse.Namespace) -> dict[str, Any]:
    sign_bundle(args.bundle, load_private_key(args.key))
    return _inspect(args)


def _summary(bundle: Bundle | VerifiedBundle) -> dict[str, Any]:
    manifest = bundle.manifest
    sizes = {member.path: member.size_bytes for member in manifest.members}
    return {
        "path": str(bundle.path),
        "name": manifest.name,
        "version": manifest.version,
        "digest": manifest.digest,
        "size_bytes": bundle.size_bytes,
        "interface": manifest.interface.to_dict(),
        "interface_digest": manifest.interface.digest,
        "variants": [
            {
                "name": variant.name,
                "format": variant.format,
                "precision": variant.precision,
                "size_bytes": sizes[variant.member],
                "present": variant.member in bundle.present,
                "shapes": [{name: list(shape) for name, shape in item.items()} for item in variant.binding.signatures],
                "measured": dict(variant.measured),
            }
            for variant in manifest.variants
        ],
        "golden_rows": manifest.golden.rows,
        "signatures": [signature.key_id for signature in bundle.signatures],
        "provenance": dict(manifest.provenance),
    }


def _render_bundle(result: dict[str, Any]) -> str:
    interface = result["interface"]
    rows = [
        ["bundle", f"{result['name']} version {result['version']}, {bytes_text(result['size_bytes'])}"],
        ["digest", result["digest"]],
        ["takes", ", ".join(map(tensor_text, interface["inputs"]))],
        ["gives", ", ".join(map(tensor_text, interface["outputs"]))],
        *[["state", f"{pair['output']} -> {pair['input']}"] for pair in interface.get("state", ())],
        *_steps_rows(interface),
        ["signed by", ", ".join(result["signatures"]) or "nobody"],
    ]
    if "verified" in result:
        rows.append(["verified", "yes" if result["verified"] else "every byte; no key is trusted here"])
    rows.append(["golden", f"{result['golden_rows']} rows"])
    quantization = result["provenance"].get("quantization")
    verdict = quantization.get("text") if isinstance(quantization, Mapping) else ""
    if isinstance(verdict, str) and verdict:
        rows.append(["quantized", verdict])
    variants = [
        [
            f"  {variant['name']}",
            variant["format"],
            variant["precision"],
            bytes_text(variant["size_bytes"]),
            _metrics_text(variant["measured"].get("metrics")),
            f"{len(variant['shapes'])} shapes" if variant["shapes"] else "",
            "" if variant["present"] else "absent",
        ]
        for variant in result["variants"]
    ]
    notes = [[f"  {v['name']}", v["measured"]["note"]] for v in result["variants"] if _has_note(v["measured"])]
    said = f"\nto be said\n{aligned(notes)}" if notes else ""
    return f"{aligned(rows)}\nvariants\n{aligned(variants)}{said}"


def _steps_rows(interface: Mapping[str, Any]) -> list[list[str]]:
    """What is done between the caller's tensors and the network's; nothing where they are the same."""
    if "network" not in interface:
        return []
    network = interface["network"]

    def steps(key: str) -> str:
        return ", ".join(step["step"] for step in interface[key])

    before = [*filter(None, [steps("preprocessing")]), *map(tensor_text, network["inputs"])]
    after = [*map(tensor_text, network["outputs"]), *filter(None, [steps("postprocessing")])]
    return [["network", f"{' -> '.join(before)} => {' -> '.join(after)}"]]


def _has_note(measured: Mapping[str, Any]) -> bool:
    return isinstance(measured.get("note"), str) and bool(measured["note"])


def _metrics_text(metrics: object) -> str:
    """``accuracy 0.9731``; what a bundle says was measured is free JSON, and anything else is left out."""
    if not isinstance(metrics, Mapping):
        return ""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, (int, float)))
