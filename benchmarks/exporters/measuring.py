"""The second stage: every file of a subject in the same shuffled blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.exporters.labels import GIVEN_FLOAT, OURS, PRUNED, UNPRUNED
from benchmarks.exporters.making import IMAGE, read_made
from benchmarks.exporters.promises import all_lines
from benchmarks.exporters.subjects import Subject
from benchmarks.measure import compare_calls, say
from benchmarks.raw import open_raw
from benchmarks.stats import Times, ratio

GLANCE_BLOCKS = 4


def measure_subject(subject: Subject, folder: Path, *, glance: bool = False) -> dict[str, Any]:
    """Time what ``make_subject`` left in ``folder``. Gives what the results say of the subject.

    Args:
        glance: a few blocks only.
    """
    made = read_made(folder)
    image = np.load(folder / IMAGE)
    blocks = GLANCE_BLOCKS if glance else subject.blocks
    say(f"measure {subject.name}: {blocks} blocks of {subject.calls_a_block} calls")
    files = {name: folder / file["file"] for name, file in made["files"].items()}
    opened = {name: open_raw(path) for name, path in files.items()}
    calls = {name: raw.call(image) for name, raw in opened.items()}
    calls |= {name + GIVEN_FLOAT: raw.call_float(image) for name, raw in opened.items() if raw.call_float is not None}
    found, times = compare_calls(
        calls,
        base=made["chosen"],
        blocks=blocks,
        calls_a_block=subject.calls_a_block,
        twin=open_raw(files[made["chosen"]]).call(image),
    )
    result = {
        "network": subject.text,
        "chosen": made["chosen"],
        "export_seconds": made["export_seconds"],
        "candidates": made["candidates"],
        "files": made["files"],
        "blocks": blocks,
        "calls_a_block": subject.calls_a_block,
        "latency": found.to_dict(),
        "pairs": _pairs(made, times),
    }
    if "right" in made:
        right = made["right"]
        result["accuracy"] = {"pytorch": made["baseline"], "rows": len(next(iter(right.values())))}
        result["accuracy"]["files"] = {name: float(rows.mean()) for name, rows in right.items()}
        result["pruning"] = _pruning(made["pruning"], folder, image, blocks, subject.calls_a_block)
    result["promises"] = [asdict(line) for line in all_lines(subject.speedup, made, result)]
    return result


def _pairs(made: Mapping[str, Any], times: Mapping[str, Times]) -> dict[str, Any]:
    """The ratios that the promises are about, of the time of one over the time of the other."""
    files, chosen = made["files"], made["chosen"]

    def fastest(names: list[str]) -> str:
        return min(names, key=lambda name: float(np.median(times[name])))

    def given_float(name: str) -> str:
        return name + GIVEN_FLOAT if name + GIVEN_FLOAT in times else name

    ours = [name for name in files if name.startswith(OURS) and not files[name]["float"]]
    ours = ours or [chosen]  # where no int8 file was kept, float32 is the best there is
    peers = [name for name in files if not name.startswith(OURS)]
    plain = fastest([name for name in files if files[name]["float"]])
    wanted = {
        "best int8 over best fp32": (fastest(ours), plain),
        "chosen over best peer": (chosen, fastest(peers)),
        "chosen over best peer" + GIVEN_FLOAT: (given_float(chosen), fastest([given_float(name) for name in peers])),
    }
    wanted |= {f"{name} over best fp32": (name, plain) for name in dict.fromkeys([*ours, chosen])}
    rng = np.random.default_rng(0)
    return {
        text: {"of": one, "over": other, **asdict(ratio(times[one], times[other], rng))}
        for text, (one, other) in wanted.items()
    }


def _pruning(made: Mapping[str, Any], folder: Path, image: Any, blocks: int, calls_a_block: int) -> dict[str, Any]:
    paths = {name: folder / made["files"][name] for name in (UNPRUNED, PRUNED)}
    found, _ = compare_calls(
        {name: open_raw(path).call(image) for name, path in paths.items()},
        base=UNPRUNED,
        blocks=blocks,
        calls_a_block=calls_a_block,
        twin=open_raw(paths[UNPRUNED]).call(image),
    )
    return {**made, "latency": found.to_dict()}
