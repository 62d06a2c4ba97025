"""What a rehearsal found: the nouns, the verdicts, the differences, the text. No I/O."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from outrider.cli.text import aligned, bytes_text
from outrider_runtimes.tensors import Array

RIGHT, ABSENT, REFUSED = "right", "absent", "refused"
WRONG, FAILED, ILLEGAL, CRASHED, HUNG, MEMORY = "wrong", "failed", "illegal", "crashed", "hung", "memory"
FATAL = frozenset([WRONG, FAILED, ILLEGAL, CRASHED, HUNG, MEMORY])
EMULATION_NOTE = (
    "Emulated: what is right or wrong here is so on the board; times under an emulator mean nothing, and none are "
    "given. Memory is the emulator's process, which is larger than the board's."
)
# What the engines say of an operator that they do not have: ONNX Runtime twice, then the TFLite interpreters.
_OPERATOR = (
    re.compile(r"Could not find an implementation for ([\w.]+\(\d+\))"),
    re.compile(r"([\w.]+\(-?\d+\)) is not a registered function/op"),
    re.compile(r"Didn't find op for builtin opcode '(\w+)' version '(\d+)'"),
    re.compile(r"[Uu]nresolved custom op: ([\w./]+)"),
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One variant on one engine of one target.

    Attributes:
        verdict: ``right``; ``absent``: the engine is not there; ``refused``: the engine does not load the file;
            ``wrong``: the golden's rules are broken; ``failed``: no answer; ``illegal``: an instruction that the CPU
            does not have; ``crashed``, ``hung``, ``memory``: how it was ended.
        detail: in words; empty when right.
        missing_operator: that the engine named when it refused; else empty.
        engine_version: empty where it was not reached.
        agreement: the share of decisions that equal the reference's; None where none are compared.
        max_error: by output, the largest difference from the stored answer; None where it is not finite.
        only_tolerance: whether the tolerance is all that is broken.
        peak_rss_bytes: of the process; the emulator's where there is one.
    """

    variant: str
    engine: str
    verdict: str
    detail: str = ""
    missing_operator: str = ""
    engine_version: str = ""
    agreement: float | None = None
    max_error: Mapping[str, float | None] = field(default_factory=dict)
    only_tolerance: bool = False
    peak_rss_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class TargetReport:
    """One target. ``cpu`` is qemu's, empty on this machine's own; ``board`` as the target's Python saw it."""

    target: str
    cpu: str
    emulated: bool
    board: Mapping[str, Any]
    pairs: tuple[Pair, ...]
    packages: tuple[str, ...] = ()
    wheels: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the board would take the bundle: nothing fatal, and one pair at least that answers right."""
        verdicts = [pair.verdict for pair in self.pairs]
        return RIGHT in verdicts and FATAL.isdisjoint(verdicts)


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """All of it. ``spread``: by variant, by output, the largest difference between any two targets and engines."""

    path: str
    name: str
    version: int
    digest: str
    targets: tuple[TargetReport, ...]
    spread: Mapping[str, Mapping[str, float | None]]

    @property
    def passed(self) -> bool:
        """Whether every target passed."""
        return all(target.passed for target in self.targets)

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        targets = [{**dataclasses.asdict(target), "passed": target.passed} for target in self.targets]
        return {
            **{key: getattr(self, key) for key in ("path", "name", "version", "digest", "passed")},
            "targets": targets,
            "spread": {variant: dict(outputs) for variant, outputs in self.spread.items()},
        }


def missing_operator(reason: str) -> str:
    """The operator that an engine's refusal names, ``CONV_2D version 9`` or ``Gelu(20)``; empty when it names none."""
    for pattern in _OPERATOR:
        found = pattern.search(reason)
        if found:
            return " version ".join(found.groups())
    return ""


def spread_of(answers: Iterable[Sequence[Array]]) -> list[float | None]:
    """By output, the largest difference between any two answers; None where one has NaN or infinity, or another shape.

    Args:
        answers: of each run, its outputs in the interface's order.
    """
    return [_spread(list(arrays)) for arrays in zip(*answers, strict=True)]


def _spread(arrays: list[Array]) -> float | None:
    if len({array.shape for array in arrays}) > 1 or not all(np.isfinite(array).all() for array in arrays):
        return None
    stacked = np.stack(arrays).astype(np.float64)
    return float((stacked.max(0) - stacked.min(0)).max(initial=0.0))


def measured_tolerance(targets: Iterable[TargetReport]) -> dict[str, dict[str, float]]:
    """By variant, by output, the largest difference from the stored answer on any target and engine that answered."""
    found: dict[str, dict[str, float]] = {}
    for pair in (pair for target in targets for pair in target.pairs):
        for output, error in pair.max_error.items():
            bounds = found.setdefault(pair.variant, {})
            bounds[output] = max(bounds.get(output, 0.0), error or 0.0)
    return found


def render(result: Mapping[str, Any]) -> str:
    """The text for people, from what ``--json`` prints."""
    head = [
        ["bundle", f"{result['name']} version {result['version']}"],
        ["digest", result["digest"]],
    ]
    rows = [["target", "CPU", "variant", "engine", "answers", "decisions", "differs by", "memory"]]
    rows += [
        _row(target, pair) for target in result["targets"] for pair in target["pairs"] if pair["verdict"] != ABSENT
    ]
    parts = [aligned(head), aligned(rows)]
    details = [line for target in result["targets"] for line in _details(target)]
    parts += details
    spread = [
        [f"  {variant}", output, "not comparable" if value is None else f"{value:.3g}"]
        for variant, outputs in result["spread"].items()
        for output, value in outputs.items()
    ]
    if spread:
        parts += ["largest difference between targets and engines", aligned(spread)]
    if any(target["emulated"] for target in result["targets"]):
        parts.append(EMULATION_NOTE)
    if result.get("written"):
        parts.append(_written_text(result["written"]))
    return "\n".join(parts)


def _row(target: Mapping[str, Any], pair: Mapping[str, Any]) -> list[str]:
    errors = pair["max_error"].values()
    worst = "not finite" if None in errors else f"{max(errors):.3g}" if errors else ""
    return [
        target["target"],
        target["cpu"] or "this machine's",
        pair["variant"],
        pair["engine"],
        pair["verdict"],
        "" if pair["agreement"] is None else f"{pair['agreement']:.1%}",
        worst,
        bytes_text(pair["peak_rss_bytes"]) if pair["peak_rss_bytes"] else "",
    ]


def _details(target: Mapping[str, Any]) -> list[str]:
    name = target["target"]
    lines = [
        f"{name}: {pair['engine']}: {pair['detail']}"
        if pair["verdict"] == ABSENT
        else f"{name}: {pair['variant']} on {pair['engine']}: {pair['detail']}"
        for pair in target["pairs"]
        if pair["detail"]
    ]
    lines = list(dict.fromkeys(lines))
    if not any(pair["verdict"] in (RIGHT, *FATAL) for pair in target["pairs"]):
        lines.append(f"{name}: no variant runs on any engine of it")
    return lines


def _written_text(written: Mapping[str, Any]) -> str:
    bounds = [
        f"  {variant} {output} {value:.3g}"
        for variant, outputs in written["tolerance"].items()
        for output, value in outputs.items()
    ]
    signed = "signed anew" if written["signatures"] else "not signed"
    dropped = f"; {written['dropped_signatures']} signatures of the old one do not hold for it"
    return "\n".join(
        [
            f"wrote {written['path']}, digest {written['digest']}, {signed}"
            f"{dropped if written['dropped_signatures'] else ''}; its tolerances, as measured:",
            *bounds,
        ]
    )
