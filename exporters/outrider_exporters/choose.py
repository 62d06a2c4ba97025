"""Which variants a bundle gets, target by target: pure functions over measured figures.

What was decided and why: docs/adr/0005-choosing-variants-per-target.md and docs/adr/0011-noise-is-what-a-twin-shows.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outrider_runtimes.board import Board
from outrider_runtimes.engines import engine_named
from outrider_runtimes.targets import Target, native_target, target_named

MOST = 3  # variants a target; each costs every board its bytes, and the install its time
# Candidates whose medians are closer than this count as equally fast, and so do those that are closer than two
# measurements of one of their files were. It is the bound that the benchmarks set for two measurements of one file.
LATENCY_NOISE = 0.03
# Metrics closer than this are equally good: a held-out set of a thousand rows cannot tell them apart.
ACCURACY_TIE = 0.002
SIZE_TIE = 0.1  # a scale a channel instead of one a weight costs a small network as much, and is worth it
FLOAT = "float32"
INT8_FEATURES = frozenset(["avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"])
# What computes in integers comes first where nothing was measured: the others can only save bytes.
_FAMILIES = ("float", "static", "dynamic", "weight-only", "other")
_FOR_SPEED = ("static", "dynamic")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One file that could go into the bundle.

    Attributes:
        name, format, precision, scheme: as in VariantReport.
        accuracy: a figure of which higher is better, comparable between candidates.
        size_bytes: of the file.
        latency_ms: one row on the exporting host; None where it was not measured.
        latency_noise: by how much two measurements of this file differed, as a share.
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
    latency_noise: float = 0.0

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


def takes_activations(target: Target, scheme: str) -> bool:
    """Whether a form's activations, signed or not, are those of the target's int8 form."""
    return "u8s8" not in scheme or target.int8_scheme == "U8S8"


def takes_dynamic_channels(target: Target) -> bool:
    """Whether an engine of the target reads dynamic int8 with a scale a channel in TFLite.

    tflite-runtime 2.14 takes the first channel's scale for all, and says nothing.
    """
    return any("tflite" in engine_named(name).formats and name != "tflite_runtime" for name in target.engines)


def choose(candidates: Sequence[Candidate], target: Target, host: Board) -> Choice:
    """What a bundle for the target holds.

    On a host that speaks for the target, latency decides: the fastest quantized candidate of each format, none that
    is slower than the fastest float32 one. A difference within noise decides nothing: then accuracy does, then how it
    computes, then size. So it is elsewhere. Then float32, as the fallback of a board on which int8 does not pay.
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
    plain = [c for c in pool if c.family == "float"]
    floats = _by_latency(plain) if measured else sorted(plain, key=_smallest)
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


def noise_of(one: Candidate, other: Candidate) -> float:
    """The share by which the latencies of two candidates may differ and say nothing: what measuring either file twice
    showed, and ``LATENCY_NOISE`` at least."""
    return max(LATENCY_NOISE, one.latency_noise, other.latency_noise)


def is_faster(one: Candidate, other: Candidate) -> bool:
    """Whether one was measured faster than the other by more than noise."""
    if one.latency_ms is None or other.latency_ms is None:
        return False
    return one.latency_ms * (1.0 + noise_of(one, other)) < other.latency_ms


def fastest_of(candidates: Sequence[Candidate]) -> Candidate:
    """The one with the least latency; of equals the smaller. Raises ValueError for none."""
    return min(candidates, key=_fastest)


def _refusal(item: Candidate, target: Target) -> str:
    """Why a candidate is out of the question for a target whatever its figures are; empty when it is not."""
    if item.format not in formats_of(target):
        return f"no engine of {target.name} runs {item.format}"
    if item.format == "tflite" and "dynamic-per-channel" in item.scheme and not takes_dynamic_channels(target):
        return f"tflite-runtime, the only engine of {target.name}, misreads a scale a channel in dynamic int8"
    if not takes_activations(target, item.scheme):
        return f"unsigned activations are not the int8 form of {target.name}, which is {target.int8_scheme}"
    return item.missed


def _not_slower(
    quantized: Sequence[Candidate], floats: Sequence[Candidate], dropped: dict[str, str], notes: dict[str, str]
) -> list[Candidate]:
    """Those that are worth having beside float32.

    One that computes in integers is for speed, and goes when it is slower; one that only stores in fewer bits stays
    for its size, and so does one that is as fast within noise. What is neither faster nor smaller goes.
    """
    if not floats:
        return list(quantized)
    fastest, kept = fastest_of(floats), []
    for item in quantized:
        beside = f"{ms_text(item)} ms a row, {fastest.name} {ms_text(fastest)} ms"
        slower, faster = is_faster(fastest, item), is_faster(item, fastest)
        if slower and item.family in _FOR_SPEED:
            dropped[item.name] = f"measured slower than float32: {beside}"
            continue
        if not faster:
            beside += "" if slower else f"; within noise, {noise_of(item, fastest):.0%}"
            least = _smallest_of(floats, item.format)
            if item.size_bytes >= least.size_bytes:
                sizes = f"{item.size_bytes} bytes, {least.name} {least.size_bytes}"
                dropped[item.name] = f"no faster than float32 ({beside}) and no smaller ({sizes})"
                continue
            notes[item.name] = f"no faster than float32 ({beside}); kept for its size"
        kept.append(item)
    return kept


def _smallest_of(floats: Sequence[Candidate], model_format: str) -> Candidate:
    """The smallest float file of a format, else of any."""
    return min([item for item in floats if item.format == model_format] or floats, key=_smallest)


def _by_latency(items: Sequence[Candidate]) -> list[Candidate]:
    """Fastest first; of those that are within noise of the fastest left, the most accurate, then the smallest."""
    left, ordered = list(items), []
    while left:
        fastest = fastest_of(left)
        level = [item for item in left if not is_faster(fastest, item)]
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
    times = ""
    if measured:
        alike = not is_faster(beside, item) and not is_faster(item, beside)
        times = f", {ms_text(item)} against {ms_text(beside)} ms" + ", which is within noise" * alike
    return f"{beside.name} was preferred: {figures} bytes{times}"


def _fastest(item: Candidate) -> tuple[float, int, str]:
    return (float("inf") if item.latency_ms is None else item.latency_ms, item.size_bytes, item.name)


def _smallest(item: Candidate) -> tuple[int, str]:
    return (item.size_bytes, item.name)


def ms_text(item: Candidate) -> str:
    """The latency in milliseconds, or ``unmeasured``."""
    return "unmeasured" if item.latency_ms is None else f"{item.latency_ms:.3f}"
