"""The report of an export as one self-contained HTML page, and the same as JSON beside it."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from outrider_exporters.convert.files import kept_when_good
from outrider_exporters.progress import duration_text
from outrider_exporters.recipe import to_toml
from outrider_exporters.report import count_text
from outrider_exporters.report.html import BLUE, GREEN, GREY, ORANGE, RED, figure, note, svg, table, write_page
from outrider_exporters.report.offload import offload_section

NOTE = (
    "Everything on this page was measured by the export that wrote it. Latencies are those of the exporting host, one "
    "row at a time on one thread: none of them is a board's."
)
COLOURS = {"onnx": BLUE, "tflite": ORANGE}
MOST_LAYERS = 24  # bars in one plot; the others are in the JSON
MOST_GROUPS = 8  # lines in the sensitivity plot that get a name
SMALLEST_DOT, LARGEST_DOT = 40.0, 500.0
NUMBER_OFFSETS = (16, -24, 28, -36, 40, -48)  # points from the middle of a dot
LEAST_SPAN = 0.02  # of a metric's axis: a narrower one makes noise look like a difference

Report = Mapping[str, Any]


def write_report(path: Path, report: Report) -> Path:
    """Write the page of an ``ExportReport.to_dict()`` and its JSON, ``x.json`` beside ``x.html``; return its path.

    Raises:
        ExportError: one of them cannot be written; each is as it was before, or new.
    """
    with kept_when_good(path.with_suffix(".json")) as part:
        part.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    sections = [
        _outcome(report),
        _stages(report),
        _variants(report),
        _targets(report),
        _gates(report),
        offload_section(report),
        _layers(report),
        _sensitivity(report),
        _passes(report),
        _environment(report),
        _reproduce(report),
    ]
    with kept_when_good(path) as part:
        write_page(part, f"Export of {report['name']}, version {report['version']}", NOTE, sections)
    return path


def main_metric(report: Report) -> str:
    """The metric of the first gate that names one, else the first that ``evaluate`` gave."""
    for result in report["gates"]:
        metric = result["gate"].get("metric")
        if metric:
            return str(metric["name"] if isinstance(metric, Mapping) else metric)
    return str(next(iter(report["baseline"]["metrics"])))


def higher_is_better(report: Report) -> bool:
    """The direction of the main metric, as the gate says it; up where no gate names one."""
    for result in report["gates"]:
        metric = result["gate"].get("metric")
        if isinstance(metric, Mapping):
            return bool(metric["higher_is_better"])
        if metric:
            return bool(result["gate"]["type"] != "max_metric")
    return True


def pareto(points: Sequence[tuple[float, float]], *, higher_is_better: bool = True) -> list[int]:
    """Positions of the points (cost, metric) that no other point beats in both, by rising cost."""
    front: list[int] = []
    sign = 1.0 if higher_is_better else -1.0
    best = -float("inf")
    for position in sorted(range(len(points)), key=lambda at: (points[at][0], -sign * points[at][1])):
        if sign * points[position][1] > best:
            front.append(position)
            best = sign * points[position][1]
    return front


def flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """A pass's figures as rows of (path, text): what is nested gets a dotted path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and not any(isinstance(item, Mapping | list | tuple) for item in value):
        yield path, " \N{RIGHTWARDS ARROW} ".join(_text(item) for item in value) or "none"
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from flat(item, f"{path}[{position}]")
    else:
        yield path, _text(value)


def _outcome(report: Report) -> str:
    bundle = report["bundle"]
    if not bundle["digest"]:
        missed = [f"{r['variant']} missed {r['gate']['type']}" for r in report["gates"] if not r["passed"]]
        return f"<p class='bad'>No bundle was written: {html.escape('; '.join(missed))}.</p>"
    text = f"{bundle['path']}: {len(report['variants'])} variants, {bundle['size_bytes']:,} bytes, {bundle['digest']}. "
    took = f"The export took {duration_text(report['seconds'])}."
    return f"<p>{html.escape(text + took)}</p>"


def _stages(report: Report) -> str:
    stages = [report["baseline"], *report["stages"]]
    names = list(report["baseline"]["metrics"])
    rows = [
        [s["name"], f"{s['parameters']:,}", count_text(s["macs"]), *(f"{s['metrics'][name]:.4f}" for name in names)]
        for s in stages
    ]
    metric = main_metric(report)
    steps = [(s["name"], s["metrics"][metric]) for s in stages]
    steps += [(v["name"], v["metrics"][metric]) for v in report["variants"]]
    drawing, (left, right) = figure(0.9 + 0.32 * max(len(steps), 2), columns=2)
    colours = [BLUE] * len(stages) + [COLOURS.get(v["format"], GREY) for v in report["variants"]]
    left.barh([name for name, _ in steps], [value for _, value in steps], color=colours, height=0.6)
    left.invert_yaxis()
    left.set_xlabel(metric)
    for position, (_, value) in enumerate(steps):
        left.text(value, position, f" {value:.4f}", va="center", fontsize=8)
    left.margins(x=0.2)
    for offset, (key, colour) in enumerate((("parameters", GREEN), ("macs", GREY))):
        if report["baseline"][key] is None:
            continue
        base = max(1, report["baseline"][key])
        places = [position + (offset - 0.5) * 0.3 for position in range(len(stages))]
        right.barh(places, [100 * s[key] / base for s in stages], height=0.28, color=colour, label=key)
    right.set_yticks(range(len(stages)), [s["name"] for s in stages])
    right.invert_yaxis()
    right.set_xlabel("% of the original model's")
    right.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=2)
    plot = svg(
        drawing, "After each step: the metric in torch and of each variant on its engine, and the network's weight."
    )
    return f"<h2>Before and after</h2>{table(['after', 'parameters', 'MACs', *names], rows)}{plot}"


def _variants(report: Report) -> str:
    kept, others = report["variants"], report["passed_over"]
    metric = main_metric(report)
    names = list(report["baseline"]["metrics"])
    rows = [
        [
            f"{number}  {variant['name']}" if variant in kept else f"{number}  ({variant['name']})",
            variant["scheme"],
            f"{variant['size_bytes']:,}",
            f"{variant['latency_host_ms_p50']:.3f}",
            f"{variant['latency_noise']:.1%}",
            f"{variant['parity']:.2g}",
            *_likeness_cells(variant["likeness"]),
            *(f"{variant['metrics'][name]:.4f}" for name in names),
        ]
        for number, variant in enumerate((*kept, *others), 1)
    ]
    header = ["variant", "scheme", "bytes", "ms on the host", "A/A", "parity error", "SNR dB", "changed", *names]
    said = [[v["name"], v["note"]] for v in kept if v["note"]]
    said += [[name, reason] for name, reason in report["dropped"].items()]
    verdict = report["quantization"].get("text", "")
    paid = f"<p>{html.escape(verdict)}.</p>" if verdict else ""
    twin = note(
        "A/A is by how much two measurements of the same file differed: a smaller difference decides nothing. SNR and "
        "the share of changed decisions are beside the float32 variant of the same format, on the rows of the test."
    )
    words = table(["variant", "what is to be said of it"], said, words=True) if said else ""
    plot = _pareto_plot(kept, others, metric, higher_is_better(report))
    return f"<h2>Variants</h2>{paid}{plot}{table(header, rows)}{twin}{words}"


def _likeness_cells(likeness: Report | None) -> list[str]:
    if not likeness or not likeness["rows"]:
        return ["", ""]
    snr_db, changed = likeness["snr_db"], likeness["changed"]
    return ["the same" if snr_db is None else f"{snr_db:.1f}", "" if changed is None else f"{changed:.2%}"]


def _pareto_plot(kept: Sequence[Report], others: Sequence[Report], metric: str, higher: bool) -> str:
    variants = [*kept, *others]
    largest = max(v["size_bytes"] for v in variants)
    costs = (("latency_host_ms_p50", 1.0, "ms a row on the exporting host"), ("size_bytes", 1e-3, "kB"))
    drawing, plots = figure(4.0, columns=2)
    for axes, (key, unit, label) in zip(plots, costs, strict=True):
        points = [(v[key] * unit, v["metrics"][metric]) for v in variants]
        front = [points[at] for at in pareto(points, higher_is_better=higher)]
        axes.plot(*zip(*front, strict=True), color=GREY, linewidth=1, linestyle=":", zorder=0)
        for position, (variant, point) in enumerate(zip(variants, points, strict=True)):
            colour = COLOURS.get(variant["format"], GREY)
            area = SMALLEST_DOT + (LARGEST_DOT - SMALLEST_DOT) * variant["size_bytes"] / largest
            inside = colour if variant in kept else "none"
            axes.scatter(*point, s=area, facecolors=inside, edgecolors=colour, alpha=0.75)
            place = (0, NUMBER_OFFSETS[position % len(NUMBER_OFFSETS)])  # neighbours do not write over each other
            axes.annotate(str(position + 1), point, textcoords="offset points", xytext=place, ha="center", fontsize=8)
        middle = sum(y for _, y in points) / len(points)
        reach = max(max(abs(y - middle) for _, y in points) * 1.6, LEAST_SPAN)
        axes.set_ylim(middle - reach, middle + reach)
        axes.set_xlim(0.0, 1.3 * max(x for x, _ in points))
        axes.set_xlabel(label)
    plots[0].set_ylabel(metric)
    return svg(
        drawing, "Numbers as in the table below; area is size, hollow was passed over, dotted is what none beats."
    )


def _targets(report: Report) -> str:
    if not report["choices"]:
        return ""
    rows = [[c["target"], c["latency"], ", ".join(c["kept"])] for c in report["choices"]]
    text = "Where latency is unmeasured the board decides among these when the bundle is installed."
    return f"<h2>Targets</h2>{table(['target', 'latency', 'variants, best first'], rows, words=True)}{note(text)}"


def _gates(report: Report) -> str:
    if not report["gates"]:
        return f"<h2>Gates</h2>{note('None was set.')}"
    rows = [
        [r["gate"]["type"], r["variant"], "met" if r["passed"] else "MISSED", r["text"], r["blame"], r["layers"]]
        for r in report["gates"]
    ]
    return f"<h2>Gates</h2>{table(['gate', 'variant', '', 'figure and bound', 'steps', 'layers'], rows, words=True)}"


def _layers(report: Report) -> str:
    if not report["layers"]:
        return ""
    plots = [_layer_plot(variant, layers) for variant, layers in report["layers"].items()]
    text = (
        "The difference of each layer's outputs from the float file's on golden rows, as a share of their root mean "
        "square; what the layer added is darker. A layer that only passes on an error that came in is not to blame."
    )
    return f"<h2>Quantization error by layer</h2>{note(text)}{''.join(plots)}"


def _layer_plot(variant: str, layers: Sequence[Report]) -> str:
    worst = sorted(range(len(layers)), key=lambda at: -layers[at]["error"])[:MOST_LAYERS]
    shown = [layers[at] for at in sorted(worst)]
    drawing, (axes,) = figure(0.9 + 0.24 * len(shown))
    places = range(len(shown))
    axes.barh(places, [100 * item["error"] for item in shown], color=BLUE, alpha=0.35, height=0.7)
    axes.barh(places, [100 * max(0.0, item["added"]) for item in shown], color=RED, height=0.7)
    axes.set_yticks(places, [f"{item['layer']} ({item['operator']})" for item in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("error, % of the layer's signal")
    some = "" if len(shown) == len(layers) else f", the {len(shown)} layers with the largest error of {len(layers)}"
    return svg(drawing, f"{variant}{some}.")


def _sensitivity(report: Report) -> str:
    sections = []
    for stage in report["stages"]:
        scan = stage["detail"].get("sensitivity")
        if scan:
            sections.append(_sensitivity_plot(scan))
    return f"<h2>Pruning sensitivity</h2>{''.join(sections)}" if sections else ""


def _sensitivity_plot(scan: Report) -> str:
    groups: dict[str, list[tuple[float, float]]] = {}
    for point in scan["points"]:
        share = 100.0 * (1.0 - point["kept"] / point["units"])
        groups.setdefault(point["group"], [(0.0, 0.0)]).append((share, point["drop_points"]))
    drawing, (axes,) = figure(3.6)
    ordered = sorted(groups.items(), key=lambda item: -max(drop for _, drop in item[1]))
    for position, (name, points) in enumerate(ordered):
        named = {"label": name} if position < MOST_GROUPS else {"color": GREY, "alpha": 0.4}
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, linewidth=1, **named)
    axes.set_xlabel("units removed from this structure alone, %")
    axes.set_ylabel(f"{scan['metric']} lost, points")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    text = f"Before fine-tuning, on {scan['rows']} training rows; unpruned the {scan['metric']} is {scan['value']:.4f}."
    return svg(drawing, text)


def _passes(report: Report) -> str:
    parts = []
    for stage in report["stages"]:
        detail = {key: value for key, value in stage["detail"].items() if key != "sensitivity"}
        rows = [[path, text] for path, text in flat(detail)]
        took = f"took {duration_text(stage['seconds'])}"
        parts.append(f"<h3>{html.escape(stage['name'])}</h3>{note(took)}{table(['', ''], rows, words=True)}")
    return f"<h2>What each pass changed</h2>{''.join(parts)}" if parts else ""


def _environment(report: Report) -> str:
    origins = {
        "given": "given by the caller",
        "test": "drawn from the test part",
        "generated": "generated, not data",
    }
    golden = report["golden"]
    text = f"{golden['rows']} rows, {origins[golden['from']]}; {golden['trained_on']} of them are training rows."
    rows = [["golden rows", text], *([key, value] for key, value in flat(report["environment"]))]
    return f"<h2>Environment and golden rows</h2>{table(['', ''], rows, words=True)}"


def _reproduce(report: Report) -> str:
    command = f"<pre>{html.escape(report['command'])}</pre>" if report["command"] else ""
    text = (
        "The recipe below, with the model and the data that it was given, makes this bundle again; in Python it is "
        "export(..., recipe=Recipe.from_toml(file)), on the command line outrider export, with [model] source naming "
        "the function that gives model and data."
    )
    return f"<h2>How to make it again</h2>{command}{note(text)}<pre>{html.escape(to_toml(report['asked']))}</pre>"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
