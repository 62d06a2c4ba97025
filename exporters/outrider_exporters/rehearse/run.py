"""A bundle on its targets: one process for each variant on each engine, watched, its answers compared."""

from __future__ import annotations

import dataclasses
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from outrider.admit.supervise import Ended, Limits, run_command
from outrider.bundle import Bundle, Manifest, Trust, Variant, open_bundle
from outrider_exporters.rehearse import child
from outrider_exporters.rehearse.lane import Lane, lane_for
from outrider_exporters.rehearse.plan import TIMEOUT_S
from outrider_exporters.rehearse.report import (
    ABSENT,
    CRASHED,
    FAILED,
    HUNG,
    ILLEGAL,
    MEMORY,
    REFUSED,
    RIGHT,
    WRONG,
    Pair,
    Rehearsal,
    TargetReport,
    missing_operator,
    spread_of,
)
from outrider_exporters.rehearse.userland import Say, find_cache
from outrider_runtimes.engines import Engine, find_engines
from outrider_runtimes.errors import ConfigError, RehearsalError
from outrider_runtimes.targets import Target, target_named
from outrider_runtimes.tensors import Array

_DOING = {"import": "importing {engine}", "load": "being loaded by {engine}", "golden": "answering on {engine}"}
_ENDED = {"wall": HUNG, "memory": MEMORY}
_SIGNALS: Mapping[int, str] = {signal.SIGILL: ILLEGAL, signal.SIGALRM: HUNG}
_CPU_SHARE = 4.0  # of the wall clock: engines start threads of their own


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every run of a rehearsal shares: the manifest, the members as files, and a folder for what is made."""

    manifest: Manifest
    files: Mapping[str, Path]
    work: Path
    timeout_s: float


@dataclass(kw_only=True)
class Heard:
    """What one child said."""

    step: str = ""
    event: dict[str, Any] = field(default_factory=dict)
    board: dict[str, Any] = field(default_factory=dict)
    version: str = ""

    def take(self, event: dict[str, Any]) -> None:
        if "step" in event:
            self.step = str(event["step"])
        elif "board" in event:
            self.board, self.version = event["board"], event["version"]
        else:
            self.event = event


def rehearse(
    path: str | Path,
    targets: Sequence[str],
    *,
    cache: Path | None = None,
    sources: Path | None = None,
    trust: Trust | None = None,
    timeout_s: float = TIMEOUT_S,
    extra: Sequence[Path] = (),
    say: Say = lambda line: None,
) -> Rehearsal:
    """Run every variant of a bundle on every engine of each target, and compare its answers with the golden's.

    Args:
        path: the bundle.
        targets: names of ``outrider_runtimes.targets``.
        cache: where userlands are kept; see ``find_cache``.
        sources: a ``sources.list`` for apt; this machine's where it is None.
        trust: who must have signed it.
        timeout_s: the wall clock of one variant on one engine; what takes longer is killed and reported.
        extra: folders that come first in every target's module search path: an engine of one's own, say.
        say: is told what is being done.

    Returns:
        What was found. A bundle that does badly is a result, no error.

    Raises:
        ConfigError: no such target.
        BundleError: the bundle cannot be read, or is not signed by who is trusted.
        RehearsalError: a target cannot be rehearsed on this machine.
    """
    if not targets:
        raise ConfigError("no target was named", hint="--target pi4, for one")
    rows = [target_named(name) for name in dict.fromkeys(targets)]
    with (
        tempfile.TemporaryDirectory(prefix="outrider-rehearse-") as folder,
        open_bundle(path, trust) as bundle,
    ):
        work = Path(folder)
        kept = find_cache(cache)
        lanes = [lane_for(row, cache=kept, work=work, sources=sources, say=say, extra=extra) for row in rows]
        job = Job(manifest=bundle.manifest, files=_unpack(bundle, work), work=work, timeout_s=timeout_s)
        reports = tuple(run_target(job, lane, say) for lane in lanes)
        return Rehearsal(
            path=str(path),
            name=bundle.manifest.name,
            version=bundle.manifest.version,
            digest=bundle.manifest.digest,
            targets=reports,
            spread=_spread(job, reports),
        )


def run_target(job: Job, lane: Lane, say: Say) -> TargetReport:
    """Every variant that is there on every engine that the target has. Raises RehearsalError."""
    pairs: list[Pair] = []
    board: dict[str, Any] = {}
    for variant, engine in _pairs(job, lane.target):
        say(f"{lane.target.name}: {variant.name} on {engine.name}")
        heard = Heard()
        ended = _run(job, lane, variant, engine.name, heard.take)
        board = board or heard.board
        pairs.append(judged(lane.target, (variant.name, engine.name), heard, ended, limits_of(job, lane)))
    return TargetReport(
        target=lane.target.name,
        cpu=lane.target.qemu_cpu,
        emulated=lane.emulated,
        board=board,
        pairs=tuple(pairs),
        packages=lane.packages,
        wheels=lane.wheels,
    )


def judged(target: Target, names: tuple[str, str], heard: Heard, ended: Ended, limits: Limits) -> Pair:
    """What the events of a child and its end come to.

    Args:
        names: of the variant and the engine.

    Raises:
        RehearsalError: the target's Python did not even start, which is no fault of the bundle's.
    """
    variant, engine = names
    if not heard.step:
        raise RehearsalError(
            f"{target.name}: its Python did not start: {ended.describe(limits)} ({_last(ended)})",
            hint="remove the cache folder's userland, or upgrade qemu-user-static",
        )
    pair = Pair(
        variant=variant,
        engine=engine,
        verdict=CRASHED,
        engine_version=heard.version,
        peak_rss_bytes=ended.peak_rss_bytes,
    )
    if (ended.how, ended.code) != ("exit", 0):
        return dataclasses.replace(
            pair, verdict=_verdict(ended), detail=_fate(target, engine, heard.step, ended, limits)
        )
    if "absent" in heard.event:
        return dataclasses.replace(pair, verdict=ABSENT, detail=str(heard.event["absent"]))
    if "refused" in heard.event:
        reason = str(heard.event["refused"])
        operator = missing_operator(reason)
        detail = f"{reason} (no operator {operator} in it)" if operator else reason
        return dataclasses.replace(pair, verdict=REFUSED, detail=detail, missing_operator=operator)
    answered = heard.event.get("answered")
    if answered is None:
        return dataclasses.replace(pair, detail=f"{_DOING[heard.step].format(engine=engine)}, it ended without a word")
    verdict = RIGHT if not answered["failure"] else WRONG if answered["max_error"] else FAILED
    return dataclasses.replace(
        pair,
        verdict=verdict,
        detail=answered["failure"],
        agreement=answered["agreement"],
        max_error=answered["max_error"],
        only_tolerance=answered["only_tolerance"],
    )


def limits_of(job: Job, lane: Lane) -> Limits:
    """What one child may use."""
    return Limits(wall_s=job.timeout_s, cpu_s=job.timeout_s * _CPU_SHARE, rss_bytes=lane.memory_bytes)


def _pairs(job: Job, target: Target) -> Iterator[tuple[Variant, Engine]]:
    present = [variant for variant in job.manifest.variants if variant.member in job.files]
    # On this machine all that are known here: one of a stranger's stands in no table.
    engines = [engine for engine in find_engines() if not target.qemu_cpu or engine.name in target.engines]
    for variant in present:
        yield from ((variant, engine) for engine in engines if variant.format in engine.formats)


def _run(job: Job, lane: Lane, variant: Variant, engine: str, take: Callable[[dict[str, Any]], None]) -> Ended:
    limits = limits_of(job, lane)
    request = {
        "limits": dataclasses.asdict(limits),
        "manifest": job.manifest.raw.decode(),
        "members": {member: str(file) for member, file in job.files.items()},
        "variant": variant.name,
        "engine": engine,
        "outputs": str(_outputs_file(job, lane.target.name, variant.name, engine)),
    }
    return run_command([*lane.python, str(child.__file__)], lane.environment, request, limits, take)


def _verdict(ended: Ended) -> str:
    if ended.how == "signal":
        return _SIGNALS.get(ended.code, CRASHED)
    return _ENDED.get(ended.how, CRASHED)


def _fate(target: Target, engine: str, step: str, ended: Ended, limits: Limits) -> str:
    doing = _DOING[step].format(engine=engine)
    if _verdict(ended) == ILLEGAL:
        cpu = target.qemu_cpu or "this CPU"
        return f"{doing}, it was killed by SIGILL: it used an instruction that {cpu} does not have"
    what = f"{doing}, it {ended.describe(limits)}"
    return f"{what} ({_last(ended)})" if ended.how == "exit" else what


def _last(ended: Ended) -> str:
    return ended.stderr.splitlines()[-1][:300] if ended.stderr else "it said nothing"


def _unpack(bundle: Bundle, work: Path) -> dict[str, Path]:
    files = {}
    for number, member in enumerate(sorted(bundle.present)):
        files[member] = work / str(number) / Path(member).name  # engines name the file in what they say of it
        files[member].parent.mkdir()
        with files[member].open("wb") as file:
            bundle.copy_to(member, file)
    return files


def _outputs_file(job: Job, target: str, variant: str, engine: str) -> Path:
    return job.work / f"{target}-{variant}-{engine}.npz"


def _spread(job: Job, reports: Sequence[TargetReport]) -> dict[str, dict[str, float | None]]:
    names = [spec.name for spec in job.manifest.interface.judged.outputs]
    found = {}
    for variant in job.manifest.variants:
        answers = [
            _answers(_outputs_file(job, report.target, variant.name, pair.engine), len(names))
            for report in reports
            for pair in report.pairs
            if pair.variant == variant.name and pair.verdict in (RIGHT, WRONG)
        ]
        if len(answers) > 1:
            found[variant.name] = dict(zip(names, spread_of(answers), strict=True))
    return found


def _answers(path: Path, count: int) -> list[Array]:
    with np.load(path, allow_pickle=False) as file:
        return [file[f"arr_{number}"] for number in range(count)]
