"""The demo's page: one self-contained HTML file with the plots."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from outrider_exporters.demo.score import SERVICE_COLUMNS, service_rows
from outrider_exporters.demo.stream import Outcome
from outrider_exporters.report.html import BLUE, GREEN, ORANGE, RASTER_DPI, RED, figure, note, svg, table, write_page
from outrider_exporters.report.offload import offload_section

COLOURS = {"edge": BLUE, "cloud": ORANGE, "edge_degraded": RED, "hybrid": GREEN}
PACKAGES = ("outrider", "torch", "onnx", "onnxruntime", "ai-edge-litert", "ai-edge-quantizer", "torch-pruning")
LEAST_SPAN_POINTS = 4.0  # a narrower axis makes noise look like a difference
POINTS_PER_SOURCE = 2_000  # more make the file large and the plot no clearer

NOTE = (
    "Everything on this page was measured in the run that wrote it, on one machine, with the board, the cloud and the "
    "broker as processes of their own. None of the times is a board's time."
)


def write_report(path: Path, result: dict[str, Any], outcome: Outcome, *, deadline_ms: float) -> Path:
    """Write the page, and its picture of every request as ``requests.png`` beside it; return the page's path."""
    sections = [
        _accuracy_section(result),
        _offload_section(result),
        _timeline_section(result, outcome, deadline_ms, path.with_name("requests.png")),
        _service_section(result),
        _telemetry_section(result),
        _variants_section(result),
        _environment_section(),
    ]
    return write_page(path, "Outrider demo", NOTE, sections)


def _accuracy_section(result: dict[str, Any]) -> str:
    scores = result["accuracy"]
    drawing, (axes,) = figure(2.2)
    names = ["edge", "hybrid", "cloud"]
    axes.barh(names, [100 * scores[name] for name in names], color=[COLOURS[name] for name in names], height=0.6)
    for position, name in enumerate(names):
        axes.text(100 * scores[name] - 0.5, position, f"{scores[name]:.1%}", ha="right", va="center", color="white")
    axes.set_xlabel("right answers on the stream, %")
    axes.set_xlim(0, 100)
    low, high = scores["hybrid_minus_edge_ci95"]
    text = (
        f"The hybrid asked the cloud for {result['offloaded']:.1%} of the answers. Against the board alone it gains "
        f"{100 * low:.1f} to {100 * high:.1f} points (95 % interval, paired bootstrap), with the outage counted in."
    )
    return f"<h2>Accuracy</h2>{svg(drawing, text)}{note(_threshold_text(result))}"


def _threshold_text(result: dict[str, Any]) -> str:
    threshold = result["threshold"]
    wrong = threshold["kept_wrong"]
    seen = "" if wrong is None else f" Of those that it kept in this stream, {wrong:.1%} were wrong."
    return f"{threshold['text']}{seen}"


def _offload_section(result: dict[str, Any]) -> str:
    """The curve of the variant that the board chose; nothing where no threshold is certified."""
    rule, served = result["offload"], result["served"]
    if not rule:
        return ""
    return offload_section({"offload": {**rule, "measured": {served: rule["measured"][served]}}})


def _timeline_section(result: dict[str, Any], outcome: Outcome, deadline_ms: float, picture: Path) -> str:
    answers = [line for line in outcome.answers if line["source"] is not None]
    start = outcome.answers[0]["at_s"]
    drawing, (axes,) = figure(3.6)
    for source in ("edge", "cloud", "edge_degraded"):
        lines = [line for line in answers if line["source"] == source]
        lines = lines[:: max(1, len(lines) // POINTS_PER_SOURCE)]
        axes.scatter(
            [line["at_s"] - start for line in lines],
            [line["total_ms"] for line in lines],
            s=6, alpha=0.5, linewidths=0, color=COLOURS[source], label=source, rasterized=True,
        )  # fmt: skip
    axes.axhline(deadline_ms, color="#222", linewidth=1, linestyle="--")
    axes.text(0, deadline_ms * 1.1, "deadline")
    for label, span in (("endpoint stopped", outcome.endpoint_down), ("broker stopped", outcome.broker_down)):
        if span is not None:
            axes.axvspan(span[0] - start, span[1] - start, color="#999", alpha=0.2, linewidth=0)
            axes.text((span[0] + span[1]) / 2 - start, deadline_ms * 1.1, label, ha="center")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(top=deadline_ms * 2)
    axes.set_xlabel("seconds since the first request")
    axes.set_ylabel("ms until the answer")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False, markerscale=2)
    requests, outage = result["requests"], result["outage"]
    text = (
        f"{requests['answered']:,} of {requests['sent']:,} requests were answered, {requests['late']} of them late. "
        f"While the endpoint was stopped, {outage['answered']:,} of {outage['requests']:,} were; "
        f"{outage['degraded']:,} of them are marked edge_degraded: the board would have asked the cloud."
    )
    drawing.savefig(picture, dpi=RASTER_DPI)
    return f"<h2>Every request</h2>{svg(drawing, text)}"


def _service_section(result: dict[str, Any]) -> str:
    text = "Availability is the share of the requests that got an answer; times are until that, on this machine."
    return f"<h2>Service quality</h2>{table(SERVICE_COLUMNS, service_rows(result['service']))}{note(text)}"


def _telemetry_section(result: dict[str, Any]) -> str:
    account = result["telemetry"]
    rows = [[name, f"{value:,}"] for name, value in account.items()]
    text = (
        "enqueued = delivered + pending + dropped, where delivered means that the consumer's receipt is in the board's "
        "spool. While the broker was stopped the records waited on the board's disk."
    )
    return f"<h2>Telemetry</h2>{table(['records', ''], rows)}{note(text)}"


def _variants_section(result: dict[str, Any]) -> str:
    variants = result["bundle"]["variants"]
    drawing, (axes,) = figure(3.0)
    ordered = sorted(variants, key=lambda variant: float(variant["latency_ms_p50"]))
    for position, variant in enumerate(ordered):
        where = (variant["latency_ms_p50"] * 1000, 100 * variant["accuracy"])
        colour = COLOURS["edge" if variant["format"] == "onnx" else "cloud"]
        axes.scatter(*where, s=variant["size_bytes"] / 60, color=colour, alpha=0.7, linewidths=0)
        above = position % 2 == 0  # neighbours on the axis do not write over each other
        axes.annotate(
            f"{variant['name']}, {variant['size_bytes'] / 1000:.0f} kB",
            where,
            textcoords="offset points",
            xytext=(0, 14 if above else -22),
            ha="center",
        )
    middle = 100 * float(np.mean([variant["accuracy"] for variant in variants]))
    axes.set_ylim(middle - LEAST_SPAN_POINTS / 2, middle + LEAST_SPAN_POINTS / 2)
    axes.set_xlim(0.0, 1.25e3 * max(float(variant["latency_ms_p50"]) for variant in variants))
    axes.set_xlabel("median latency on this machine, microseconds")
    axes.set_ylabel("right answers, %")
    plot = svg(drawing, "Accuracy, latency and size (area) of each variant in the bundle, on the gate's test inputs.")
    rows = [
        [v["name"], f"{v['size_bytes']:,}", f"{1000 * v['latency_ms_p50']:.0f}", f"{v['accuracy']:.2%}"]
        for v in variants
    ]
    stages = [
        [row["name"], f"{row['parameters']:,}", f"{row['macs']:,}", f"{row['metrics']['accuracy']:.2%}"]
        for row in (result["baseline"], *result["stages"])
    ]
    return (
        f"<h2>The board's bundle</h2>{plot}{table(['variant', 'bytes', 'p50 us', 'accuracy'], rows)}"
        f"{table(['after', 'parameters', 'MACs', 'accuracy'], stages)}"
    )


def _environment_section() -> str:
    rows = [["Python", platform.python_version()], ["machine", platform.machine()], ["processors", str(os.cpu_count())]]
    rows += [[package, metadata.version(package)] for package in PACKAGES]
    return f"<h2>Environment</h2>{table(['', ''], rows)}"
