"""The benchmark as a whole: make, then measure."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.exporters.labels import PEERS
from benchmarks.exporters.making import make_subject
from benchmarks.exporters.measuring import measure_subject
from benchmarks.exporters.subjects import SUBJECTS
from benchmarks.measure import say

SEED = 0  # of weights, rows, training, shuffles and bootstrap


def run(folder: Path) -> dict[str, Any]:
    """Make and measure every subject. Returns what is stored as ``results/exporters.json``."""
    make(folder)
    return measure(folder)


def make(folder: Path, names: Collection[str] = ()) -> None:
    """Train, export and make the peers, one folder a subject; all subjects where none is named."""
    for subject in SUBJECTS:
        if not names or subject.name in names:
            make_subject(subject, folder / subject.name)


def measure(folder: Path, *, glance: bool = False) -> dict[str, Any]:
    """Measure what ``make`` left in a folder. What was met and what was missed is said on standard error as well.

    Args:
        glance: a few blocks only, to try the benchmark out.
    """
    results = {
        subject.name: measure_subject(subject, folder / subject.name, glance=glance)
        for subject in SUBJECTS
        if (folder / subject.name).is_dir()
    }
    for name, result in results.items():
        for line in result["promises"]:
            verdict = "met" if line["met"] else "MISSED"
            verdict += ", noisy" * line["noisy"]
            what = f"{name}: {line['file']}: {line['promise']}"
            say(f"{what}: {line['measured']:.3f}, asked {line['asked']}: {verdict} ({line['note']})")
    return {"seed": SEED, "peers": {name: peer.recipe for name, peer in PEERS.items()}, "subjects": results}
