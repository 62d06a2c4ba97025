"""Speed and size of the files beside the peers', as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.exporters.labels import OURS, PEERS
from outrider_exporters.report.html import BLUE, GREEN, GREY, ORANGE, RASTER_DPI, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATH = Path(__file__).parents[2] / "docs" / "images" / "exporters.png"
SLOT = 0.1  # between two marks of one network
MARKS = dict(zip(PEERS, ("o", "v", "^", "s", "o", "D"), strict=True))
CHOSEN, CHOSEN_MARK = "chosen by Outrider", "*"


def draw(figures: Mapping[str, Any], path: Path = PATH) -> Path:
    """Draw ``results/exporters.json``'s figures; every peer and the file that the export chose, network by network."""
    subjects = list(figures["subjects"].values())
    drawing, (left, right) = figure(1.4 + 0.75 * len(subjects), columns=2)
    for row, subject in enumerate(subjects):
        times, files = subject["latency"]["p50_us"], subject["files"]
        _marks(left, row, subject, {name: times[name] for name in files})
        _marks(right, row, subject, {name: file["size_bytes"] for name, file in files.items()})
    names = [subject["network"].partition(",")[0].removesuffix(" (MLPerf Tiny)") for subject in subjects]
    for axes, text in ((left, "median time, as a share of the fastest"), (right, "size, as a share of the smallest")):
        axes.set_yticks(range(len(names)), names if axes is left else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(left=0.0)
        axes.axvline(1.0, color=GREY, linewidth=0.8)
        axes.set_xlabel(f"{text} float32 file's")
    handles, labels = left.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    drawing.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=RASTER_DPI * 0.75)
    return path


def _marks(axes: Axes, row: int, subject: Mapping[str, Any], values: Mapping[str, float]) -> None:
    """One mark a file in a row, over the least value of a float32 file."""
    files = subject["files"]
    least = min(value for name, value in values.items() if files[name]["float"])
    shown = [*PEERS, subject["chosen"]]
    for slot, name in enumerate(shown):
        mine = name.startswith(OURS)
        axes.scatter(
            values[name] / least,
            row + SLOT * (slot - (len(shown) - 1) / 2),
            marker=CHOSEN_MARK if mine else MARKS[name],
            s=110 if mine else 28,
            color=BLUE if mine else ORANGE if name.startswith("ORT") else GREEN,
            facecolors="none" if not mine and files[name]["float"] else None,
            label=CHOSEN if mine else name,
            zorder=3,
        )
