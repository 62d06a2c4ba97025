"""The README's figures, made from the committed results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- figures: written by `make bench` from benchmarks/results, do not edit -->"
END = "<!-- end of figures -->"


def figures(results: Path = RESULTS) -> str:
    """The Markdown between the two marks."""
    overhead, variants = (json.loads((results / f"{name}.json").read_text()) for name in ("overhead", "variants"))
    parts = [_machine(overhead["environment"]), _overhead(overhead), _variants(variants)]
    return "\n\n".join(parts)


def replaced(readme: str, text: str) -> str:
    """The README with ``text`` between the marks."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"


def rewrite() -> None:
    """Bring the README up to date."""
    README.write_text(replaced(README.read_text(encoding="utf-8"), figures()), encoding="utf-8")


def _machine(environment: Mapping[str, Any]) -> str:
    packages = environment["packages"]
    return (
        f"Measured on {environment['processor']}, {environment['processors_allowed']} processors, "
        f"Python {environment['python']}, onnxruntime {packages['onnxruntime']}, "
        f"ai-edge-litert {packages['ai-edge-litert']}: a workstation, not a board."
    )


def _verdict(comparison: Mapping[str, Any]) -> str:
    return "" if comparison["valid"] else " **INVALID**: the machine was too noisy."


def _overhead(result: Mapping[str, Any]) -> str:
    lines = [
        "What `Model.infer` adds to the raw engine, median, with all checks on:",
        "",
        "| engine | raw, us | `Model.infer`, us | with a `Reporter` watching, us |",
        "|---|---:|---:|---:|",
    ]
    for name, found in result["variants"].items():
        p50, added = found["p50_us"], found["added_us"]
        cells = [f"{p50[who]:.1f} (+{added[who]:.1f})" for who in ("Model.infer", "Model.infer, reporter watching")]
        lines.append(f"| {name} | {p50['raw']:.1f} | {' | '.join(cells)} |{_verdict(found)}")
    return "\n".join(lines)


def _variants(result: Mapping[str, Any]) -> str:
    found = result["latency"]
    lines = [
        f"{result['network']}: the variants of one bundle, one thread, one interleaved run.{_verdict(found)}",
        "",
        "| variant | kB | p50, us | time over onnx-float32 (95 % interval) |",
        "|---|---:|---:|---:|",
    ]
    for name, size_bytes in result["size_bytes"].items():
        ratio = found["ratios"].get(name)
        share = "1" if ratio is None else f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        lines.append(f"| {name} | {size_bytes / 1000:.0f} | {found['p50_us'][name]:.0f} | {share} |")
    return "\n".join(lines)
