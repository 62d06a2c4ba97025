"""The child's side of admission, ``python -m outrider.trial``: run a candidate on its golden inputs, then time it.

It may crash, hang or eat memory: the parent (``outrider.admit``) watches. Each line of stdout is one JSON object, and
what is about to be tried is said before it is tried:

    {"step": "import", "engine": E}, {"step": "prepare"}
    {"step": "load" | "golden" | "measure", "variant": V, "engine": E, "threads": n}
    {"skipped": {variant, engine, reason}}   {"refused": what was wrong in the step before}
    {"measured": {variant, engine, threads, p50_ms, runs}}
    {"done": {engines: {name: version}, board: {...}, unchanged: bool}}
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.bundle import GoldenArrays, Manifest, Variant, load_golden, parse_manifest
from outrider.supervise import enter_limits
from outrider_runtimes.board import Board, this_board, usable_threads
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.engines import Engine, find_engines
from outrider_runtimes.errors import MissingExtra, ModelLoadError, OutriderError
from outrider_runtimes.golden import compare
from outrider_runtimes.tensors import Tensors

Report = Callable[..., None]

MEASURE_S = 0.3
MAX_RUNS = 500  # of a 20 us model, else one interruption by the system would decide
MIN_RUNS = 3
WARM_UP_S = 0.05
MAX_WARM_UPS = 20


class Refused(Exception):
    """The candidate did something that no bundle may."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is tried: a bundle, the files of its members that are here, and the numbers of threads to try it with."""

    manifest: Manifest
    files: Mapping[str, Path]
    golden: GoldenArrays
    thread_counts: Sequence[int]


def main() -> None:
    """Take the request from stdin, try the candidate, report on stdout."""
    report = _reporter()
    request = json.load(sys.stdin)
    enter_limits(request["limits"])
    manifest = parse_manifest(request["manifest"].encode())
    files = {path: Path(blob) for path, blob in request["members"].items()}
    present = [variant for variant in manifest.variants if variant.member in files]
    board = this_board()
    engines = survey({variant.format for variant in present}, request["left_out"], report)
    surroundings = {"engines": {name: engine.version() for name, engine in engines.items()}, "board": _describe(board)}
    report(step="prepare")
    unchanged = surroundings == request["known"]
    if not unchanged:
        golden = load_golden(lambda member: files[member].read_bytes(), manifest)
        threads = thread_counts(usable_threads(board))
        candidate = Candidate(manifest=manifest, files=files, golden=golden, thread_counts=threads)
        try:
            for variant in present:
                for engine in engines.values():
                    if variant.format in engine.formats:
                        try_pair(candidate, variant, engine, report)
        except Refused as refusal:
            report(refused=str(refusal))
            return
    report(done={**surroundings, "unchanged": unchanged})


def survey(formats: set[str], left_out: Mapping[str, str], report: Report) -> dict[str, Engine]:
    """The engines that work here and run one of these formats, by name. Imports them: that alone may be fatal."""
    engines: dict[str, Engine] = {}
    for engine in find_engines():
        if not formats & set(engine.formats):
            continue
        reason: str | None = left_out.get(engine.name)
        if reason is None:
            report(step="import", engine=engine.name)
            reason = engine.check()
        if reason is None:
            engines[engine.name] = engine
        else:
            report(skipped={"variant": "", "engine": engine.name, "reason": reason})
    return engines


def try_pair(candidate: Candidate, variant: Variant, engine: Engine, report: Report) -> None:
    """Check one variant on one engine against its golden answers, and time it at each number of threads.

    Raises:
        Refused: it failed on its golden inputs, or answered wrongly.
    """
    where = {"variant": variant.name, "engine": engine.name}
    checked = False
    for threads in candidate.thread_counts:
        report(step="load", threads=threads, **where)
        try:
            session = engine.prepare(candidate.files[variant.member], threads=threads)
        except (ModelLoadError, MissingExtra) as error:
            report(skipped={**where, "reason": str(error)})
            return
        try:
            bound = BoundSession(session, candidate.manifest.interface, variant.binding)
            if not checked:
                report(step="golden", threads=threads, **where)
                check_golden(candidate, variant, bound)
                checked = True
            report(step="measure", threads=threads, **where)
            p50_ms, runs = measure(bound, first_rows(candidate, variant))
        except OutriderError as error:
            raise Refused(str(error)) from error
        finally:
            session.close()
        report(measured={**where, "threads": threads, "p50_ms": p50_ms, "runs": runs})


def check_golden(candidate: Candidate, variant: Variant, bound: BoundSession) -> None:
    """Run all golden rows and judge the answers. Raises Refused, InputError, InferenceError."""
    golden, rules = candidate.golden, candidate.manifest.golden
    result = compare(
        bound.run(golden.inputs).outputs,
        stored=golden.variants[variant.name],
        reference=golden.reference,
        tolerance=rules.tolerance[variant.name],
        decision=rules.decision,
    )
    if not result.passed:
        raise Refused(result.failure)


def measure(
    bound: BoundSession, inputs: Tensors, *, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, int]:
    """The median call in milliseconds, and of how many: some hundred, a few when they are slow."""
    _timed(bound, inputs, clock, budget_s=WARM_UP_S, least=1, most=MAX_WARM_UPS)
    taken_s = _timed(bound, inputs, clock, budget_s=MEASURE_S, least=MIN_RUNS, most=MAX_RUNS)
    return statistics.median(taken_s) * 1e3, len(taken_s)


def _timed(
    bound: BoundSession, inputs: Tensors, clock: Callable[[], float], *, budget_s: float, least: int, most: int
) -> list[float]:
    taken_s: list[float] = []
    ends_at = clock() + budget_s
    while len(taken_s) < least or (len(taken_s) < most and clock() < ends_at):
        begun = clock()
        bound.run(inputs)
        taken_s.append(clock() - begun)
    return taken_s


def first_rows(candidate: Candidate, variant: Variant) -> dict[str, Any]:
    """The golden inputs cut to one call of the file: one row, or as many as the file's fixed batch has."""
    specs, inputs = candidate.manifest.interface.inputs, candidate.golden.inputs
    rows = 1
    for spec, bound in zip(specs, variant.binding.inputs, strict=True):
        if spec.batched:
            rows = bound.shape[bound.permutation.index(0) if bound.permutation else 0] or 1
    return {spec.name: inputs[spec.name][:rows] if spec.batched else inputs[spec.name] for spec in specs}


def thread_counts(usable: int) -> list[int]:
    """All that may be used first, then the powers of two below, down to 1."""
    return [usable, *sorted((2**n for n in range(usable.bit_length()) if 2**n < usable), reverse=True)]


def _describe(board: Board) -> dict[str, Any]:
    return {**dataclasses.asdict(board), "features": sorted(board.features)}


def _reporter() -> Report:
    """Writes to what stdout was; stdout itself becomes stderr, because native libraries print there."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def report(**event: Any) -> None:
        stream.write(json.dumps(event, allow_nan=False) + "\n")
        stream.flush()

    return report


if __name__ == "__main__":
    main()
