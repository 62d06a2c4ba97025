"""Which variants a bundle gets, target by target: pure functions over measured figures.

What was decided and why: docs/adr/0005-choosing-variants-per-target.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outrider_runtimes.board import Board
from outrider_runtimes.engines import engine_named
from outrider_runtimes.targets import Target, native_target, target_named

MOST = 3  # variants a target; each costs every board its bytes, and the install its time
# Candidates whose medians are closer than this count as equally fast. It is the bound that the benchmarks set for two
# measurements of one file, not what export's own shorter measurement was shown to hold on a busy host.
LATENCY_NOISE = 0.03
# Metrics closer than this are equally good: a held-out set of a thousand rows cannot tell them apart.
ACCURACY_TIE = 0.002
SIZE_TIE = 0.1  # a scale a channel instead of one a weight costs a small network as much, and is worth it
FLOAT = "float32"
INT8_FEATURES = frozenset(["avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"])
# What computes in integers comes first where nothing was measured: the others can only save bytes.
_FAMILIES = ("static", "dynamic", "weight-only", "other")
_FOR_SPEED = ("static", "dynamic")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One file that could go into the bundle.

    Attributes:
        name, format, precision, scheme: as in VariantReport.
        accuracy: a figure of which higher is better, comparable between candidates.
        size_bytes: of the file.
        latency_ms: one row on the exporting host; None where it was not measured.
        parity: the largest difference from the torch network, as a share of the output's range.
        missed: the gates that it missed, in words; empty when none.
    """

    name: str
    format: str
    precision: str
    scheme: str
    accuracy: float
    size_bytes: int
    latency_ms: float | None
    parity: float
    missed: str = ""

    @property
    def family(self) -> str:
        """``float``, ``static``, ``dynamic``, ``weight-only`` or ``other``: how it computes."""
        if self.precision == FLOAT:
            return "float"
        if any(mark in self.scheme for mark in ("qdq", "qoperator", "static")):
            return "static"
        return next((name for name in ("dynamic", "weight-only") if name in self.scheme), "other")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one target gets.

    Attributes:
        target: its name.
        measured: whether latencies of this host decided; else the board decides at install.
        kept: names, best first; three at most.
        notes: by the name of one that was kept, what has to be said of it.
        dropped: by the name of every other candidate, why, with the figures.
    """

    target: str
    measured: bool
    kept: tuple[str, ...]
    notes: Mapping[str, str]
    dropped: Mapping[str, str]

    @property
    def latency(self) -> str:
        """``measured on the exporting host`` or ``unmeasured``."""
        return "measured on the exporting host" if self.measured else "unmeasured"

    def to_dict(self) -> dict[str, Any]:
        """As the manifest and the report store it."""
        return {
            "target": self.target,
            "latency": self.latency,
            "kept": list(self.kept),
            "notes": dict(self.notes),
            "dropped": dict(self.dropped),
        }


def speaks_for(host: Board, target: Target) -> bool:
    """Whether a latency on the host says which of two files is faster on the target.

    It does where both have the same architecture and the same int8 instructions: a host that has more of them makes
    int8 faster than the target can, one that has fewer makes it slower.
    """
    return (
        host.machine == target.machine
        and target.features <= host.features
        and host.features & INT8_FEATURES == target.features & INT8_FEATURES
    )


def resolved(name: str, host: Board) -> Target:
    """The target of that name; ``native`` is the host itself. Raises ConfigError."""
    return native_target(host) if name == "native" else target_named(name)


def formats_of(target: Target) -> frozenset[str]:
    """The model formats that the target's engines run."""
    return frozenset(model_format for engine in target.engines for model_format in engine_named(engine).formats)


def choose(candidates: Sequence[Candidate], target: Target, host: Board) -> Choice:
    """What a bundle for the target holds.

    On a host that speaks for the target, latency decides: the fastest quantized candidate of each format, none that
    is slower than the fastest float32 one. Elsewhere accuracy decides, then how it computes, then size. Then float32,
    as the fallback of a board on which int8 does not pay.
    """
    measured = speaks_for(host, target) and all(item.latency_ms is not None for item in candidates)
    dropped: dict[str, str] = {}
    notes: dict[str, str] = {}
    pool = []
    for item in candidates:
        reason = _refusal(item, target)
        if reason:
            dropped[item.name] = reason
        else:
            pool.append(item)
    floats = sorted((c for c in pool if c.family == "float"), key=_fastest if measured else _smallest)
    quantized = [c for c in pool if c.family != "float"]
    if measured:
        quantized = _not_slower(quantized, floats, dropped, notes)
        quantized = _by_latency(quantized)
    else:
        quantized = _by_accuracy(quantized)
    kept = _pick(quantized, floats)
    for item in pool:
        if item not in kept and item.name not in dropped:
            dropped[item.name] = _passed_over(item, kept, measured)
    return Choice(
        target=target.name,
        measured=measured,
        kept=tuple(item.name for item in kept),
        notes={name: text for name, text in notes.items() if name in {item.name for item in kept}},
        dropped=dropped,
    )


def slower_than_float(candidates: Sequence[Candidate]) -> dict[str, str]:
    """For an export without targets, where the recipe alone decides: what is to be said of those that are slower on
    this host than float32, by name."""
    floats = [item for item in candidates if item.family == "float"]
    if not floats:
        return {}
    fastest = min(floats, key=_fastest)
    bound = _fastest(fastest)[0] * (1.0 + LATENCY_NOISE)
    return {
        item.name: f"slower than float32 on the exporting host: {_ms(item)} ms a row, {fastest.name} {_ms(fastest)} ms"
        for item in candidates
        if item.family != "float" and item.latency_ms is not None and item.latency_ms > bound
    }


def _refusal(item: Candidate, target: Target) -> str:
    """Why a candidate is out of the question for a target whatever its figures are; empty when it is not."""
    if item.format not in formats_of(target):
        return f"no engine of {target.name} runs {item.format}"
    if "u8s8" in item.scheme and target.int8_scheme != "U8S8":
        return f"unsigned activations are not the int8 form of {target.name}, which is {target.int8_scheme}"
    return item.missed


def _not_slower(
    quantized: Sequence[Candidate], floats: Sequence[Candidate], dropped: dict[str, str], notes: dict[str, str]
) -> list[Candidate]:
    """Those that are worth having beside float32.

    One that computes in integers is for speed, and goes when it is slower; one that only stores in fewer bits stays
    for its size. What is no faster than float32 and stays says so.
    """
    if not floats:
        return list(quantized)
    fastest, kept = floats[0], []
    for item in quantized:
        ratio = _fastest(item)[0] / _fastest(fastest)[0]
        beside = f"{_ms(item)} ms a row, {fastest.name} {_ms(fastest)} ms"
        if ratio > 1.0 + LATENCY_NOISE and item.family in _FOR_SPEED:
            dropped[item.name] = f"measured slower than float32: {beside}"
            continue
        if ratio > 1.0:
            notes[item.name] = f"no faster than float32 ({beside}); kept for its size"
        kept.append(item)
    return kept


def _by_latency(items: Sequence[Candidate]) -> list[Candidate]:
    """Fastest first; of those that are as fast as the fastest left, the most accurate, then the smallest."""
    left, ordered = list(items), []
    while left:
        bound = min(_fastest(item)[0] for item in left) * (1.0 + LATENCY_NOISE)
        level = [item for item in left if _fastest(item)[0] <= bound]
        best = _by_accuracy(level)[0]
        ordered.append(best)
        left.remove(best)
    return ordered


def _by_accuracy(items: Sequence[Candidate]) -> list[Candidate]:
    """Most accurate first; of those that are as good as the best left, integer arithmetic first, then the smallest,
    and of those that are as small the closest to the torch network."""
    left, ordered = list(items), []
    while left:
        top = max(item.accuracy for item in left)
        level = [item for item in left if item.accuracy >= top - ACCURACY_TIE * max(1.0, abs(top))]
        family = min((item.family for item in level), key=_FAMILIES.index)
        level = [item for item in level if item.family == family]
        bound = min(item.size_bytes for item in level) * (1.0 + SIZE_TIE)
        best = min((item for item in level if item.size_bytes <= bound), key=lambda item: (item.parity, item.name))
        ordered.append(best)
        left.remove(best)
    return ordered


def _pick(quantized: Sequence[Candidate], floats: Sequence[Candidate]) -> list[Candidate]:
    """The best quantized candidate of each format, the best float, then what computes in another way."""
    kept: list[Candidate] = []
    for item in quantized:
        if item.format not in {other.format for other in kept}:
            kept.append(item)
    kept = [*kept[: MOST - 1], *floats[:1]]
    ways = {(item.format, item.family) for item in kept}
    for item in (*floats[1:], *quantized):
        if len(kept) < MOST and (item.format, item.family) not in ways:
            kept.append(item)
            ways.add((item.format, item.family))
    return kept


def _passed_over(item: Candidate, kept: Sequence[Candidate], measured: bool) -> str:
    beside = next((other for other in kept if (other.format, other.family) == (item.format, item.family)), None)
    beside = beside or next((other for other in kept if other.family == item.family), None)
    if beside is None:
        return f"{MOST} variants a target are enough"
    figures = (
        f"accuracy {item.accuracy:.4f} against {beside.accuracy:.4f}, {item.size_bytes} against {beside.size_bytes}"
    )
    times = f", {_ms(item)} against {_ms(beside)} ms" if measured else ""
    return f"{beside.name} was preferred: {figures} bytes{times}"


def _fastest(item: Candidate) -> tuple[float, int, str]:
    return (float("inf") if item.latency_ms is None else item.latency_ms, item.size_bytes, item.name)


def _smallest(item: Candidate) -> tuple[int, str]:
    return (item.size_bytes, item.name)


def _ms(item: Candidate) -> str:
    return "unmeasured" if item.latency_ms is None else f"{item.latency_ms:.3f}"
