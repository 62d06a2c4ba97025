"""The first run of a bundle on this board, in a child process with limits."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outrider.admit.admission import Admission, Choice, Measured, Skipped, choose
from outrider.admit.strangers import broken_strangers
from outrider.admit.supervise import Ended, Limits, default_rss_bytes, run_child
from outrider.bundle import Manifest
from outrider_runtimes.board import this_board
from outrider_runtimes.engines import Engine, find_engines
from outrider_runtimes.errors import (
    AdmissionAnswer,
    AdmissionCrash,
    AdmissionError,
    AdmissionHang,
    AdmissionIllegal,
    AdmissionLimit,
    AdmissionNaN,
    AdmissionSlow,
    NoEngine,
)

TRIAL = "outrider.admit.trial"
REFUSED = "it was not installed, and what was installed is untouched; export the bundle again"
_DOING = {
    "load": "being loaded by {engine}",
    "golden": "answering its golden inputs on {engine}",
    "measure": "being timed on {engine}",
    "batches": "being timed with several rows a call on {engine}",
}


@dataclass(kw_only=True)
class _Heard:
    """What one child said so far."""

    step: Mapping[str, Any] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    refused: Mapping[str, str] = field(default_factory=dict)
    batches: Mapping[str, Any] | None = None
    done: Mapping[str, Any] | None = None

    @property
    def unchanged(self) -> int | None:
        """Which of the known admissions still holds."""
        return None if self.done is None else self.done["unchanged"]

    @property
    def engines(self) -> Mapping[str, str]:
        return {} if self.done is None else dict(self.done["engines"])

    @property
    def board(self) -> Mapping[str, Any]:
        return {} if self.done is None else dict(self.done["board"])

    def take(self, event: Mapping[str, Any]) -> None:
        if "step" in event:
            self.step = event
        elif "measured" in event:
            self.measured.append(Measured(**event["measured"]))
        elif "skipped" in event:
            self.skipped.append(Skipped(**event["skipped"]))
        elif "batches" in event:
            self.batches = event["batches"]
        elif "refused" in event:
            self.refused = event["refused"]
        elif "done" in event:
            self.done = event["done"]


def admit(
    manifest: Manifest,
    members: Mapping[str, Path],
    *,
    builds: Mapping[str, Path],
    limits: Limits | None = None,
    known: Sequence[Admission] = (),
) -> Admission:
    """Run every variant on every engine that works here on the golden inputs; then measure and choose.

    Args:
        manifest: the bundle's.
        members: the file of each member that is present, by member path.
        builds: the folder for what an engine builds from a member, by member path.
        limits: what the child may use; ``default_limits`` where it is None. An engine that builds may take ``build_s``
            more for each variant.
        known: what earlier admissions of the same files showed; the one whose engines and board are those of now is
            returned as it is.

    Raises:
        AdmissionCrash, AdmissionIllegal, AdmissionHang, AdmissionLimit, AdmissionAnswer, AdmissionNaN, AdmissionSlow:
            what a variant did; each names variant, engine and step. No other variant is looked at then: a bundle is
            admitted whole.
        AdmissionError: no variant could be loaded, or one failed on its golden inputs.
        NoEngine: no engine works here that could run any variant; says why, one by one.
    """
    left_out = {name: f"{cause}; {cure}" for name, (cause, cure) in broken_strangers().items()}
    limits = _with_builds(limits or default_limits(), manifest, find_engines(left_out=left_out))
    while True:
        heard = _Heard()
        request = {
            "limits": dataclasses.asdict(limits),
            "manifest": manifest.raw.decode(),
            "members": {member: str(path) for member, path in members.items()},
            "builds": {member: str(folder) for member, folder in builds.items()},
            "left_out": left_out,
            "known": [{"engines": dict(each.engines), "board": dict(each.board)} for each in known],
        }
        ended = run_child(TRIAL, request, limits, heard.take)
        if heard.done is None and not heard.refused and heard.step.get("step") == "import":
            # An engine that dies on import is no fault of the bundle's: once more without it.
            left_out[heard.step["engine"]] = f"importing it {ended.describe(limits)}{_last_words(ended)}"
            continue
        break
    _require_whole(manifest, heard, ended, limits)
    unchanged = heard.unchanged
    admission = _admission(manifest, members, heard, ended) if unchanged is None else known[unchanged]
    _require_fast(manifest, admission.choice, limits)
    if admission.bound_ms != limits.latency_ms:
        admission = dataclasses.replace(admission, bound_ms=limits.latency_ms)
    return admission


def default_limits() -> Limits:
    """Two minutes, and three quarters of the memory that is free or that this process's control group may have."""
    allowed = this_board().memory_bytes * 3 // 4
    return Limits(rss_bytes=min(default_rss_bytes(), allowed or sys.maxsize))


def _with_builds(limits: Limits, manifest: Manifest, engines: Sequence[Engine]) -> Limits:
    """The limits with the time that engines of this machine need to build what they run."""
    builders = [engine for engine in engines if engine.builds]
    count = sum(variant.format in engine.formats for variant in manifest.variants for engine in builders)
    more_s = limits.build_s * count
    return dataclasses.replace(limits, wall_s=limits.wall_s + more_s, cpu_s=limits.cpu_s + more_s)


def _require_whole(manifest: Manifest, heard: _Heard, ended: Ended, limits: Limits) -> None:
    subject = _subject(manifest, heard)
    if heard.refused:
        kinds = {"answer": AdmissionAnswer, "nan": AdmissionNaN}
        kind = kinds.get(heard.refused["kind"], AdmissionError)
        raise kind(f"{subject}: {heard.refused['what']}", hint=REFUSED)
    if heard.done is None or (ended.how, ended.code) != ("exit", 0):
        raise _violation(f"{subject}: {ended.describe(limits)}{_last_words(ended)}", ended)


def _violation(message: str, ended: Ended) -> AdmissionError:
    """How a child ended, as the error that says so."""
    cause = ended.cause
    if cause == "hang":
        return AdmissionHang(message, hint=REFUSED)
    if cause == "limit":
        return AdmissionLimit(message, hint=REFUSED)
    if cause == "illegal":
        return AdmissionIllegal(message, signal=ended.code, hint="export it for this board's CPU: `targets=`")
    return AdmissionCrash(message, signal=ended.code if ended.how == "signal" else 0, hint=REFUSED)


def _require_fast(manifest: Manifest, choice: Choice, limits: Limits) -> None:
    if limits.latency_ms is not None and choice.p50_ms > limits.latency_ms:
        raise AdmissionSlow(
            f"{manifest.name} version {manifest.version}: {choice.variant} on {choice.engine}, the fastest here, takes "
            f"{choice.p50_ms:.3g} ms a call; the bound is {limits.latency_ms:g} ms",
            hint="export a smaller model, or allow it more time",
        )


def _admission(manifest: Manifest, members: Mapping[str, Path], heard: _Heard, ended: Ended) -> Admission:
    skipped = [*_absent(manifest, members), *heard.skipped]
    if not heard.measured:
        raise _nothing_ran(manifest, heard, skipped)
    return Admission(
        choice=choose(heard.measured),
        measured=tuple(heard.measured),
        skipped=tuple(skipped),
        engines=heard.engines,
        board=heard.board,
        peak_rss_bytes=ended.peak_rss_bytes,
        batches=heard.batches,
    )


def _absent(manifest: Manifest, members: Mapping[str, Path]) -> list[Skipped]:
    missing = [variant.name for variant in manifest.variants if variant.member not in members]
    return [Skipped(variant=name, engine="", reason="its file is not in this thin bundle") for name in missing]


def _subject(manifest: Manifest, heard: _Heard) -> str:
    """What was being done with what, as the child said it last."""
    step = heard.step
    subject = f"{manifest.name} version {manifest.version}"
    if "variant" in step:
        subject += f": variant {step['variant']!r}, {_DOING[step['step']].format(engine=step['engine'])}"
        if "threads" in step:
            subject += f" with {step['threads']} thread{'s' if step['threads'] > 1 else ''}"
    return subject


def _nothing_ran(manifest: Manifest, heard: _Heard, skipped: Sequence[Skipped]) -> AdmissionError | NoEngine:
    subject = f"{manifest.name} version {manifest.version}"
    reasons = "; ".join(f"{' on '.join(filter(None, (row.variant, row.engine)))}: {row.reason}" for row in skipped)
    if heard.engines and any(row.variant and row.engine for row in skipped):
        return AdmissionError(
            f"{subject}: no variant could be loaded here ({reasons})", hint="export it for this board"
        )
    return NoEngine(
        f"no engine here runs any variant of {subject} ({reasons})",
        hint="pip install 'outrider[onnx]' or 'outrider[tflite]', whichever the bundle has a variant for",
    )


def _last_words(ended: Ended) -> str:
    """The last line of stderr: a traceback's says what was raised."""
    return f" ({ended.stderr.splitlines()[-1][:300]})" if ended.stderr else ""
