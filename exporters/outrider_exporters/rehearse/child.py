"""The board's side of a rehearsal, run by path under the board's Python: one variant on one engine.

It imports what a board has. The request on stdin: ``{limits, manifest, members, variant, engine, outputs}``. Each line
of stdout is a JSON object, and what is about to be tried is said before it is tried:

    {"step": "import" | "load" | "golden"}
    {"board": {...}, "version": of the engine}
    {"absent": why the engine is not to be had}   {"refused": why it does not load the file}
    {"answered": {agreement, max_error, failure, only_tolerance}}, the outputs in order in the file ``outputs``
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from outrider.admit.supervise import enter_limits
from outrider.admit.trial import reporter
from outrider.bundle import GoldenArrays, Manifest, load_golden, parse_manifest
from outrider_runtimes.board import this_board
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.engines import engine_named
from outrider_runtimes.errors import ModelLoadError, OutriderError
from outrider_runtimes.golden import compare
from outrider_runtimes.tensors import Tensors

THREADS = 1  # an emulator's threads show nothing of a board's


def main() -> None:
    """Take the request from stdin, run the pair, report on stdout."""
    report = reporter()
    request = json.load(sys.stdin)
    enter_limits(request["limits"])
    manifest = parse_manifest(request["manifest"].encode())
    files = {path: Path(file) for path, file in request["members"].items()}
    variant = manifest.variant(request["variant"])
    report(step="import")
    engine = engine_named(request["engine"])
    reason = engine.check()
    if reason is not None:
        report(absent=reason)
        return
    board = this_board()
    report(board={**dataclasses.asdict(board), "features": sorted(board.features)}, version=engine.version())
    golden = load_golden(lambda member: files[member].read_bytes(), manifest)
    report(step="load")
    try:
        session = engine.prepare(files[variant.member], threads=THREADS)
    except ModelLoadError as error:
        report(refused=str(error))
        return
    report(step="golden")
    try:
        outputs = BoundSession(session, manifest.interface.judged, variant.binding).run(golden.inputs).outputs
    except OutriderError as error:
        report(answered={"agreement": None, "max_error": {}, "failure": str(error), "only_tolerance": False})
        return
    with Path(request["outputs"]).open("wb") as file:
        np.savez(file, *(outputs[name] for name in golden.reference))
    report(answered=judge(manifest, variant.name, golden, outputs))


def judge(manifest: Manifest, variant: str, golden: GoldenArrays, outputs: Tensors) -> dict[str, Any]:
    """What admission would say of these answers, and whether the tolerance is all that they break."""
    rules = manifest.golden

    def under(tolerance: Mapping[str, float]) -> Any:
        return compare(
            outputs,
            stored=golden.variants[variant],
            reference=golden.reference,
            tolerance=tolerance,
            decision=rules.decision,
        )

    result = under(rules.tolerance[variant])
    unbounded = under(dict.fromkeys(golden.reference, sys.float_info.max))
    return {
        "agreement": result.agreement,
        "max_error": {name: error if math.isfinite(error) else None for name, error in result.max_error.items()},
        "failure": result.failure,
        "only_tolerance": not result.passed and unbounded.passed,
    }


if __name__ == "__main__":
    main()
