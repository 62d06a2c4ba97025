"""The child's side of admission, ``python -m outrider.admit.trial``: run a candidate on its golden inputs, and time it.

It may crash, hang or eat memory: the parent (``admit``) watches. Each line of stdout is one JSON object, and
what is about to be tried is said before it is tried:

    {"step": "import", "engine": E}, {"step": "prepare"}
    {"step": "load" | "golden" | "measure" | "batches", "variant": V, "engine": E, "threads": n}
    {"skipped": {variant, engine, reason}}   {"refused": {kind: "failed" | "answer" | "nan", what: in words}}
    {"measured": {variant, engine, threads, p50_ms, runs}}, {"batches": a BatchCurve of the fastest}
    {"done": {engines: {name: version}, board: {...}, unchanged: which of the known surroundings are these, or null}}
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from outrider.admit.admission import Choice, Measured, choose
from outrider.admit.batches import measure_batches
from outrider.admit.grid import Cell, time_cells
from outrider.admit.supervise import enter_limits, resident_bytes
from outrider.bundle import GoldenArrays, Manifest, Variant, load_golden, parse_manifest
from outrider_runtimes.board import this_board, usable_threads
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.engines import Engine, Session, find_engines, strange_names
from outrider_runtimes.errors import MissingExtra, ModelLoadError, NoEngine, OutriderError
from outrider_runtimes.golden import compare
from outrider_runtimes.tensors import Tensors

Report = Callable[..., None]

SEED = 20  # of the order of the rounds


class Refused(Exception):
    """The candidate did something that no bundle may. ``kind`` is one of ``admit``'s."""

    def __init__(self, what: str, *, kind: str = "failed") -> None:
        super().__init__(what)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is tried: a bundle, the files of its members that are here, and the numbers of threads to try it with.

    ``builds``: by member, where an engine keeps what it builds. ``memory_bytes``: how much this process may hold with
    sessions kept open between rounds.
    """

    manifest: Manifest
    files: Mapping[str, Path]
    builds: Mapping[str, Path]
    golden: GoldenArrays
    thread_counts: Sequence[int]
    memory_bytes: int


def main() -> None:
    """Take the request from stdin, try the candidate, report on stdout."""
    report = reporter()
    request = json.load(sys.stdin)
    enter_limits(request["limits"])
    manifest = parse_manifest(request["manifest"].encode())
    files = {path: Path(blob) for path, blob in request["members"].items()}
    present = [variant for variant in manifest.variants if variant.member in files]
    board = this_board()
    engines = survey({variant.format for variant in present}, request["left_out"], report)
    surroundings = {"engines": {name: engine.version() for name, engine in engines.items()}, "board": board.to_dict()}
    report(step="prepare")
    unchanged = request["known"].index(surroundings) if surroundings in request["known"] else None
    if unchanged is None:
        candidate = Candidate(
            manifest=manifest,
            files=files,
            builds={path: Path(folder) for path, folder in request["builds"].items()},
            golden=load_golden(lambda member: files[member].read_bytes(), manifest),
            thread_counts=thread_counts(usable_threads(board)),
            memory_bytes=int(request["limits"]["rss_bytes"]) // 2,
        )
        try:
            run_candidate(candidate, present, list(engines.values()), report)
        except Refused as refusal:
            report(refused={"kind": refusal.kind, "what": str(refusal)})
            return
    report(done={**surroundings, "unchanged": unchanged})


def survey(formats: set[str], left_out: Mapping[str, str], report: Report) -> dict[str, Engine]:
    """The engines that work here and run one of these formats, by name. Imports them: that alone may be fatal."""
    engines: dict[str, Engine] = {}
    for name in strange_names():
        if name in left_out:
            report(skipped={"variant": "", "engine": name, "reason": left_out[name]})
    for engine in find_engines(left_out=left_out):
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


def run_candidate(candidate: Candidate, variants: Sequence[Variant], engines: Sequence[Engine], report: Report) -> None:
    """Check every variant on every engine that takes its format; then time all that passed against each other.

    Raises:
        Refused: one failed on its golden inputs, or answered wrongly.
    """
    pairs = [(variant, engine) for variant in variants for engine in engines if variant.format in engine.formats]
    cells: list[Cell] = []
    for variant, engine in pairs:
        if passes(candidate, variant, engine, report):
            cells += [_cell(candidate, variant, engine, threads) for threads in candidate.thread_counts]
    try:
        time_cells(
            cells,
            keep_open=lambda: resident_bytes() <= candidate.memory_bytes,
            rng=random.Random(SEED),
            on_block=lambda cell: report(step="measure", **_named(cell)),
        )
    except OutriderError as error:
        raise Refused(str(error)) from error
    measured = [Measured(**_named(cell), p50_ms=cell.p50_ms, runs=len(cell.taken_s)) for cell in cells]
    for row in measured:
        report(measured=asdict(row))
    for cell in cells:
        cell.close()
    if measured:
        choice = choose(measured)
        named = (choice.variant, choice.engine, choice.threads)
        one_s = next(cell.taken_s for cell in cells if cell.name == named)
        _batches(candidate, choice, engines, one_s, report)


def _batches(
    candidate: Candidate, choice: Choice, engines: Sequence[Engine], one_s: Sequence[float], report: Report
) -> None:
    """Time what will serve with several rows in one call."""
    report(step="batches", variant=choice.variant, engine=choice.engine, threads=choice.threads)
    variant = candidate.manifest.variant(choice.variant)
    engine = next(engine for engine in engines if engine.name == choice.engine)
    session = _prepared(candidate, variant, engine, choice.threads)
    curve = measure_batches(
        candidate.manifest,
        candidate.golden,
        variant,
        session,
        engine=choice.engine,
        threads=choice.threads,
        one_s=one_s,
        room=lambda: resident_bytes() <= candidate.memory_bytes,
    )
    session.close()
    report(batches=curve.to_dict())


def passes(candidate: Candidate, variant: Variant, engine: Engine, report: Report) -> bool:
    """Run one variant on one engine on the golden inputs; False where the engine does not take it.

    Raises:
        Refused: it failed on them, or answered wrongly.
    """
    threads = candidate.thread_counts[0]
    where = {"variant": variant.name, "engine": engine.name}
    report(step="load", threads=threads, **where)
    try:
        session = _prepared(candidate, variant, engine, threads)
    except (ModelLoadError, MissingExtra, NoEngine) as error:
        report(skipped={**where, "reason": str(error)})
        return False
    try:
        report(step="golden", threads=threads, **where)
        judged = candidate.manifest.interface.judged
        bound = BoundSession(session, judged, variant.binding)
        check_golden(candidate.manifest, candidate.golden, variant, bound)
    except OutriderError as error:
        raise Refused(str(error)) from error
    finally:
        session.close()
    return True


def _prepared(candidate: Candidate, variant: Variant, engine: Engine, threads: int) -> Session:
    cache = candidate.builds.get(variant.member)
    return engine.prepare(candidate.files[variant.member], threads=threads, cache=cache)


def _cell(candidate: Candidate, variant: Variant, engine: Engine, threads: int) -> Cell:
    def open_() -> BoundSession:
        session = _prepared(candidate, variant, engine, threads)
        return BoundSession(session, candidate.manifest.interface, variant.binding)

    return Cell(name=(variant.name, engine.name, threads), open=open_, inputs=first_rows(candidate, variant))


def _named(cell: Cell) -> dict[str, Any]:
    return dict(zip(("variant", "engine", "threads"), cell.name, strict=True))


def check_golden(manifest: Manifest, golden: GoldenArrays, variant: Variant, bound: BoundSession) -> None:
    """Run all golden rows and judge the answers. Raises Refused, InputError, InferenceError."""
    rules = manifest.golden
    outputs = bound.run(golden.inputs).outputs
    result = compare(
        outputs,
        stored=golden.variants[variant.name],
        reference=golden.reference,
        tolerance=rules.tolerance[variant.name],
        decision=rules.decision,
    )
    if not result.passed:
        raise Refused(result.failure, kind="nan" if any_nan(outputs) else "answer")


def any_nan(outputs: Tensors) -> bool:
    """Whether a number among them is none."""
    return any(array.dtype.kind == "f" and bool(np.isnan(array).any()) for array in outputs.values())


def first_rows(candidate: Candidate, variant: Variant) -> dict[str, Any]:
    """The golden inputs cut to one call of the file: one row, or as many as the file's fixed batch has."""
    interface, inputs = candidate.manifest.interface, candidate.golden.inputs
    rows = 1
    for spec, bound in zip(interface.network.inputs, variant.binding.inputs, strict=True):
        if spec.batched:
            rows = bound.shape[bound.permutation.index(0) if bound.permutation else 0] or 1
    return {spec.name: inputs[spec.name][:rows] if spec.batched else inputs[spec.name] for spec in interface.inputs}


def thread_counts(usable: int) -> list[int]:
    """All that may be used first, then the powers of two below, down to 1."""
    return [usable, *sorted((2**n for n in range(usable.bit_length()) if 2**n < usable), reverse=True)]


def reporter() -> Report:
    """Writes JSON lines to what stdout was; stdout itself becomes stderr, because native libraries print there."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def report(**event: Any) -> None:
        stream.write(json.dumps(event, allow_nan=False) + "\n")
        stream.flush()

    return report


if __name__ == "__main__":
    main()
