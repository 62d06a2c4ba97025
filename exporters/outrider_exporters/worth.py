"""Whether quantizing paid: every quantized candidate beside float32, with the figures. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outrider_exporters.choose import Candidate, fastest_of, is_faster, ms_text, noise_of

HOST = "on the exporting host"


@dataclass(frozen=True, kw_only=True)
class Worth:
    """What was tried, and which of it beats float32.

    Attributes:
        text: in words, with the figures; empty where nothing quantized was tried.
        faster: names of those that are faster than the fastest float32 file by more than noise, and met the gates.
        smaller: names of those that are smaller than the smallest float32 file, and met the gates.
        tried: by name, ``size_bytes``, ``latency_ms`` (None: not measured), ``accuracy`` and ``missed`` of every
            candidate, float32 first.
    """

    text: str = ""
    faster: tuple[str, ...] = ()
    smaller: tuple[str, ...] = ()
    tried: Mapping[str, Mapping[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As the manifest and the report store it; nothing where nothing quantized was tried."""
        if not self.text:
            return {}
        tried = {name: dict(figures) for name, figures in (self.tried or {}).items()}
        return {"text": self.text, "faster": list(self.faster), "smaller": list(self.smaller), "tried": tried}


def worth_of(candidates: Sequence[Candidate]) -> Worth:
    """Which quantized candidates beat float32, over all formats, in latency and in size."""
    floats = [item for item in candidates if item.family == "float"]
    quantized = [item for item in candidates if item.family != "float"]
    if not floats or not quantized:
        return Worth()
    fastest, smallest = fastest_of(floats), min(floats, key=lambda item: (item.size_bytes, item.name))
    fit = [item for item in quantized if not item.missed]
    faster = [item for item in fit if is_faster(item, fastest)]
    smaller = [item for item in fit if item.size_bytes < smallest.size_bytes]
    beside = [
        f"{fastest.name} takes {ms_text(fastest)} ms a row {HOST}, {smallest.name} has {smallest.size_bytes} bytes",
        *(_figures(item, fastest) for item in quantized),
    ]
    return Worth(
        text=f"{_verdict(faster, smaller)}: {'; '.join(beside)}",
        faster=tuple(item.name for item in faster),
        smaller=tuple(item.name for item in smaller),
        tried={item.name: _tried(item) for item in (*floats, *quantized)},
    )


def no_better_than_float(candidates: Sequence[Candidate]) -> dict[str, str]:
    """For an export without targets, where the recipe alone decides: what is to be said of those that are slower on
    this host or larger than float32, by name."""
    floats = [item for item in candidates if item.family == "float"]
    if not floats:
        return {}
    fastest = fastest_of(floats)
    notes = {}
    for item in (item for item in candidates if item.family != "float"):
        said = []
        if is_faster(fastest, item):
            beside = f"{ms_text(item)} ms a row, {fastest.name} {ms_text(fastest)} ms"
            said.append(f"slower than float32 {HOST}: {beside}")
        for plain in floats:
            if plain.format == item.format and plain.size_bytes <= item.size_bytes:
                said.append(f"no smaller than float32: {item.size_bytes} bytes, {plain.name} {plain.size_bytes}")
        if said:
            notes[item.name] = "; ".join(said)
    return notes


def _verdict(faster: Sequence[Candidate], smaller: Sequence[Candidate]) -> str:
    both = [item.name for item in faster if item in smaller]
    if both:
        return f"{' and '.join(both)} beat{'s' * (len(both) == 1)} float32 in latency and size"
    if not faster and not smaller:
        return "no quantized form beats float32"
    if not faster:
        return "no quantized form is faster than float32, some are smaller"
    if not smaller:
        return "no quantized form is smaller than float32, some are faster"
    return "no quantized form beats float32 in latency and size both"


def _figures(item: Candidate, fastest: Candidate) -> str:
    alike = item.latency_ms is not None and not is_faster(item, fastest) and not is_faster(fastest, item)
    noise = f" (within noise, {noise_of(item, fastest):.0%})" if alike else ""
    missed = f", {item.missed}" if item.missed else ""
    return f"{item.name} {ms_text(item)} ms{noise}, {item.size_bytes} bytes{missed}"


def _tried(item: Candidate) -> dict[str, Any]:
    return {
        "size_bytes": item.size_bytes,
        "latency_ms": item.latency_ms,
        "accuracy": item.accuracy,
        "missed": item.missed,
    }
