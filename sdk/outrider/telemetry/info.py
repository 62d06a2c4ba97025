"""What a device is: the retained message on its ``info`` topic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from outrider._version import __version__
from outrider.telemetry.record import encode_info
from outrider_runtimes.board import Board


def board_fields(board: Board) -> dict[str, Any]:
    """A board as the message has it: nothing in it names the owner or the place."""
    fields = board.to_dict()
    return {name: fields[name] for name in ("machine", "features", "cpus", "memory_bytes")}


def bundle_fields(source: object) -> dict[str, Any] | None:
    """What a Model, or the edge of a Hybrid, serves now; None for a source without a bundle."""
    source = getattr(source, "edge", source)
    bundle, interface = getattr(source, "bundle", None), getattr(source, "interface", None)
    if bundle is None or interface is None:
        return None
    return {
        "name": bundle.name,
        "version": bundle.version,
        "digest": bundle.digest,
        "verified": bundle.verified,
        "interface": interface.digest,
        "variant": str(getattr(source, "variant", "")),
        "engine": str(getattr(source, "engine", "")),
    }


def encode(*, device: str, stream: str, boot_id: str, wall_s: float, board: Board, sources: Iterable[object]) -> bytes:
    """The message for what is watched now."""
    found = (bundle_fields(source) for source in sources)
    return encode_info(
        device=device,
        stream=stream,
        boot_id=boot_id,
        wall_s=wall_s,
        software={"outrider": __version__, "python": board.python},
        board=board_fields(board),
        bundles=[fields for fields in found if fields is not None],
    )
