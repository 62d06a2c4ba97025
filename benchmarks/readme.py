"""The pages of figures, made from the committed results: all of them, and the few that the README shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import overshoot, shown
from benchmarks.measure import RESULTS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "figures.md"
BEGIN = "<!-- figures: written by `make bench` from benchmarks/results, do not edit -->"
END = "<!-- end of figures -->"

# By the name of a result: its heading, and how it is shown; in the page's order.
SECTIONS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "overhead": ("A call", shown.overhead),
    "variants": ("Variants of one bundle", shown.variants),
    "coldstart": ("A start", shown.coldstart),
    "idle": ("Twenty calls a second", shown.idle),
    "grid": ("What an install chooses", shown.grid),
    "install": ("What a device installs", shown.install),
    "exporters": ("The exporter's files", shown.exporters),
    "overshoot": ("Deadlines under faults", overshoot.section),
    "client": ("The client", shown.client),
    "cascade": ("Board and cloud together", shown.cascade),
    "risk": ("Certified thresholds", shown.risk),
    "overload": ("Overload", shown.overload),
    "endpoint": ("The endpoint", shown.endpoint),
    "ray_serve": ("Under Ray", shown.ray_serve),
    "telemetry": ("Telemetry", shown.telemetry),
}
IN_README = ("overhead", "coldstart", "exporters", "cascade", "overload")


def figures(results: Path = RESULTS) -> str:
    """The Markdown between the README's two marks."""
    found = _results(results)
    lines = [
        "Every other figure, with its peer and its interval: [docs/figures.md](docs/figures.md).",
        *_missed_elsewhere(found),
    ]
    shown_here = (_section(name, found) for name in IN_README)
    return "\n\n".join([_machine(found["overhead"]["environment"]), *shown_here, "\n".join(lines)])


def page(results: Path = RESULTS) -> str:
    """All of ``docs/figures.md``."""
    found = _results(results)
    parts = [
        "# Figures",
        "Written by `make bench` from `benchmarks/results`, which have each run's environment and intervals. What is\n"
        "compared was measured in turn in one run, one of its sides twice: where such twins differ by more than the\n"
        "figure allows, it is marked.",
        _machine(found["overhead"]["environment"]),
    ]
    for name, (heading, _) in SECTIONS.items():
        parts += [f"## {heading}", _section(name, found).replace("](docs/", "](")]
    return "\n\n".join(parts) + "\n"


def replaced(readme: str, text: str) -> str:
    """The README with ``text`` between the marks."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"


def rewrite() -> None:
    """Bring both pages up to date."""
    README.write_text(replaced(README.read_text(encoding="utf-8"), figures()), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


def _results(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in SECTIONS}


def _section(name: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """One result; measured on another processor than the page's head says, it names its own."""
    text, processor = SECTIONS[name][1](found[name]), found[name]["environment"]["processor"]
    alike = processor == found["overhead"]["environment"]["processor"]
    return text if alike else f"{text}\n\nThis was measured on {processor}."


def _missed_elsewhere(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was asked and missed in the results that the README does not show."""
    lines = [
        f"- {SECTIONS[name][0]}: {each['promise']}: {each['measured']:.4g}, {each['asked']:g} was asked"
        for name in SECTIONS
        if name not in IN_README
        for each in found[name].get("promises", ())
        if not each["met"]
    ]
    return ["There, missed of what was asked:", "", *lines] if lines else []


def _machine(environment: Mapping[str, Any]) -> str:
    packages = environment["packages"]
    return (
        f"Measured on {environment['processor']}, {environment['processors_allowed']} processors, "
        f"Python {environment['python']}, onnxruntime {packages['onnxruntime']}, "
        f"ai-edge-litert {packages['ai-edge-litert']}: a workstation, not a board."
    )
