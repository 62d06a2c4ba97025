"""What the pages that Outrider writes have in common: one self-contained HTML file, plots as SVG inside it."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, RED, GREEN, GREY = "#3b6fb6", "#d9822b", "#b23a48", "#3a8f5c", "#8a8f98"
RASTER_DPI = 200
WIDTH_IN = 9.0
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "outrider",  # the same figures give the same page
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
}

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem } h3 { margin-top: 1.5rem }
figure { margin: 1rem 0 } figure svg { max-width: 100%; height: auto }
figcaption, .note { color: #555; font-size: .9rem }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .9rem .25rem 0; text-align: right }
td:first-child, th:first-child { text-align: left } tr + tr td { border-top: 1px solid #ddd }
table.words td, table.words th { text-align: left; vertical-align: top }
pre { background: #f4f4f2; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem }
.bad { color: #b23a48; font-weight: 600 }
</style></head><body>
<h1>$title</h1>
<p class="note">$note</p>
$body
</body></html>
""")


def write_page(path: Path, title: str, note: str, sections: Sequence[str]) -> Path:
    """Write the page and return its path. ``title`` and ``note`` are text, ``sections`` are HTML."""
    body = "\n".join(section for section in sections if section)
    text = _PAGE.substitute(title=html.escape(title), note=html.escape(note), body=body)
    path.write_text(text, encoding="utf-8")
    return path


def figure(height_in: float, *, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty drawing as wide as the page, with so many plots side by side."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        drawing = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        axes = drawing.subplots(1, columns, squeeze=False)
    return drawing, list(axes[0])


def svg(drawing: Figure, caption: str) -> str:
    """The drawing as a ``figure`` element."""
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context(_STYLE):
        drawing.savefig(text, format="svg", dpi=RASTER_DPI, metadata={"Date": None})
    image = text.getvalue()
    return f"<figure>{image[image.index('<svg') :]}<figcaption>{html.escape(caption)}</figcaption></figure>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> str:
    """A table of text; the first column is left-aligned, with ``words`` every one."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    kind = ' class="words"' if words else ""
    return f"<table{kind}>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def note(text: str) -> str:
    """A paragraph in small print."""
    return f"<p class='note'>{html.escape(text)}</p>"
