"""The first run of a bundle on this board, in a child process with limits, and the choice that follows from it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outrider.bundle import Manifest
from outrider.supervise import Ended, Limits, default_rss_bytes, run_child
from outrider_runtimes.board import this_board
from outrider_runtimes.errors import AdmissionError, NoEngine, StoreError

TRIAL = "outrider.trial"
TIE = 1.02  # two medians of some dozen runs that are closer than this are not told apart
_DOING = {
    "load": "being loaded by {engine}",
    "golden": "answering its golden inputs on {engine}",
    "measure": "being timed on {engine}",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What serves here. ``p50_ms``: the median of one call at install, one row or one of the file's fixed batches."""

    variant: str
    engine: str
    threads: int
    p50_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One cell of the grid of variant, engine and threads. ``p50_ms`` is the median of ``runs`` calls."""

    variant: str
    engine: str
    threads: int
    p50_ms: float
    runs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """What was left out, and why. ``variant`` is empty where a whole engine was, ``engine`` where a variant was."""

    variant: str
    engine: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """What a bundle's first run on this board showed.

    Attributes:
        choice: the fastest cell; of those within 2 % of it, the one with the fewest threads.
        measured: the grid.
        skipped: engines and pairs that could not be tried.
        engines: version by name of the engines that were tried.
        board: what the board was.
        peak_rss_bytes: the most memory that the child was seen to hold.
    """

    choice: Choice
    measured: tuple[Measured, ...]
    skipped: tuple[Skipped, ...]
    engines: Mapping[str, str]
    board: Mapping[str, Any]
    peak_rss_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As the store keeps it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Admission:
        """The inverse of ``to_dict``. Raises StoreError."""
        try:
            return cls(
                choice=Choice(**data["choice"]),
                measured=tuple(Measured(**row) for row in data["measured"]),
                skipped=tuple(Skipped(**row) for row in data["skipped"]),
                engines=dict(data["engines"]),
                board=dict(data["board"]),
                peak_rss_bytes=int(data["peak_rss_bytes"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"what the store kept of an install is malformed: {error!r}", hint="install again"
            ) from None


@dataclass(kw_only=True)
class _Heard:
    """What one child said so far."""

    step: Mapping[str, Any] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    refused: str = ""
    done: Mapping[str, Any] | None = None

    @property
    def unchanged(self) -> bool:
        return bool(self._of_done("unchanged"))

    @property
    def engines(self) -> Mapping[str, str]:
        return dict(self._of_done("engines"))

    @property
    def board(self) -> Mapping[str, Any]:
        return dict(self._of_done("board"))

    def _of_done(self, key: str) -> Any:
        return {} if self.done is None else self.done[key]

    def take(self, event: Mapping[str, Any]) -> None:
        if "step" in event:
            self.step = event
        elif "measured" in event:
            self.measured.append(Measured(**event["measured"]))
        elif "skipped" in event:
            self.skipped.append(Skipped(**event["skipped"]))
        elif "refused" in event:
            self.refused = str(event["refused"])
        elif "done" in event:
            self.done = event["done"]


def admit(
    manifest: Manifest,
    members: Mapping[str, Path],
    *,
    limits: Limits | None = None,
    known: Admission | None = None,
) -> Admission:
    """Run every variant on every engine that works here on the golden inputs; then measure and choose.

    Args:
        manifest: the bundle's.
        members: the file of each member that is present, by member path.
        limits: what the child may use; ``default_limits`` where it is None.
        known: what an earlier admission of the same files showed; returned as it is when neither the engines nor
            the board have changed since.

    Raises:
        AdmissionError: a variant crashed, hung, outgrew its memory or answered wrongly; names variant, engine and
            what happened. No other variant is looked at then: a bundle is admitted whole.
        NoEngine: no engine works here that could run any variant; says why, one by one.
    """
    limits = limits or default_limits()
    left_out: dict[str, str] = {}
    while True:
        heard = _Heard()
        request = {
            "limits": dataclasses.asdict(limits),
            "manifest": manifest.raw.decode(),
            "members": {member: str(path) for member, path in members.items()},
            "left_out": left_out,
            "known": None if known is None else {"engines": dict(known.engines), "board": dict(known.board)},
        }
        ended = run_child(TRIAL, request, limits, heard.take)
        if heard.done is None and not heard.refused and heard.step.get("step") == "import":
            # An engine that dies on import is no fault of the bundle's: once more without it.
            left_out[heard.step["engine"]] = f"importing it {ended.describe(limits)}{_last_words(ended)}"
            continue
        break
    _require_whole(manifest, heard, ended, limits)
    if known is not None and heard.unchanged:
        return known
    return _admission(manifest, members, heard, ended)


def default_limits() -> Limits:
    """Two minutes, and three quarters of the memory that is free or that this process's control group may have."""
    allowed = this_board().memory_bytes * 3 // 4
    return Limits(rss_bytes=min(default_rss_bytes(), allowed or sys.maxsize))


def choose(measured: Sequence[Measured]) -> Choice:
    """The fastest; of those that cannot be told from it, the one with the fewest threads.

    Every variant of a bundle passed the export's gates, so that speed alone decides.
    """
    best = min(row.p50_ms for row in measured)
    row = min((row for row in measured if row.p50_ms <= best * TIE), key=lambda row: (row.threads, row.p50_ms))
    return Choice(variant=row.variant, engine=row.engine, threads=row.threads, p50_ms=row.p50_ms)


def _require_whole(manifest: Manifest, heard: _Heard, ended: Ended, limits: Limits) -> None:
    if heard.refused:
        raise _refusal(manifest, heard, heard.refused)
    if heard.done is None or (ended.how, ended.code) != ("exit", 0):
        raise _refusal(manifest, heard, ended.describe(limits) + _last_words(ended))


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
    )


def _absent(manifest: Manifest, members: Mapping[str, Path]) -> list[Skipped]:
    missing = [variant.name for variant in manifest.variants if variant.member not in members]
    return [Skipped(variant=name, engine="", reason="its file is not in this thin bundle") for name in missing]


def _refusal(manifest: Manifest, heard: _Heard, what: str) -> AdmissionError:
    step = heard.step
    subject = f"{manifest.name} version {manifest.version}"
    if "variant" in step:
        subject += f": variant {step['variant']!r}, {_DOING[step['step']].format(engine=step['engine'])}"
        if "threads" in step:
            subject += f" with {step['threads']} thread{'s' if step['threads'] > 1 else ''}"
    return AdmissionError(
        f"{subject}: {what}", hint="it was not installed, and what was installed is untouched; export the bundle again"
    )


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
