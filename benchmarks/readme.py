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
    names = ("overhead", "variants", "exporters")
    overhead, variants, exporters = (json.loads((results / f"{name}.json").read_text()) for name in names)
    parts = [_machine(overhead["environment"]), _overhead(overhead), _variants(variants), _exporters(exporters)]
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


def _exporters(result: Mapping[str, Any]) -> str:
    lines = [
        "What the exporter chose for this machine, beside the best float32 file and the best of what the tools make by",
        "themselves (float32, three int8 forms by ONNX Runtime, one by AI Edge Quantizer), each given what it takes:",
        "",
        "| network | float32, kB | chosen, kB | float32, ms | chosen, ms | times as fast | time over the best peer's |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_chosen(subject) for subject in result["subjects"].values()]
    promised = [(subject, line) for subject in result["subjects"].values() for line in subject["promises"]]
    missed = [_missed(subject, line) for subject, line in promised if not line["met"]]
    met = f"Of {len(promised)} bounds on size, speed, accuracy and pruning {len(promised) - len(missed)} were met"
    noisy = sum(line["noisy"] for _, line in promised)
    met += f"; {noisy} were measured while the machine was too noisy" if noisy else ""
    picture = "![Time and size of every file, network by network](docs/images/exporters.png)"
    return "\n".join([*lines, "", f"{met}{':' if missed else '.'}", *missed, "", picture])


def _chosen(subject: Mapping[str, Any]) -> str:
    files, times, chosen = subject["files"], subject["latency"]["p50_us"], subject["chosen"]
    plain = min((name for name in files if files[name]["float"]), key=lambda name: float(times[name]))
    pairs = subject["pairs"]
    own, peer = pairs[f"{chosen} over best fp32"], pairs["chosen over best peer"]
    smallest = min(file["size_bytes"] for file in files.values() if file["float"])
    sizes = [smallest / 1000, files[chosen]["size_bytes"] / 1000]
    cells = [
        subject["network"],
        *(f"{size:.0f}" for size in sizes),
        *(f"{times[name] / 1000:.3f}" for name in (plain, chosen)),
        f"{1 / own['value']:.2f} ({1 / own['high']:.2f} to {1 / own['low']:.2f})",
        f"{peer['value']:.2f} ({peer['low']:.2f} to {peer['high']:.2f})",
    ]
    return f"| {' | '.join(cells)} |{_verdict(subject['latency'])}"


def _missed(subject: Mapping[str, Any], line: Mapping[str, Any]) -> str:
    return (
        f"- missed, {subject['network'].partition(',')[0]}, {line['file']}: {line['promise']}: {line['measured']:.3f}, "
        f"{line['asked']:g} was asked ({line['note']})"
    )
