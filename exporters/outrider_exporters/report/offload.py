"""The section of the report on answers that go to the cloud because they are unsure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from outrider_exporters.report.html import BLUE, GREEN, figure, note, svg, table


def offload_section(report: Mapping[str, Any]) -> str:
    """A curve a variant with the chosen point on it; nothing where no threshold was asked for."""
    rule = report["offload"]
    if not rule:
        return ""
    rows = []
    for variant, measured in rule["measured"].items():
        chosen = measured["chosen"]
        together = chosen.get("accuracy_together")
        rows.append(
            [
                variant,
                f"{chosen['threshold']:.6g}",
                f"{chosen['offloaded']:.1%}",
                f"{chosen['accuracy_kept']:.2%}",
                "" if together is None else f"{together:.2%}",
            ]
        )
    wrong = f"at most {rule['alpha']:.2%} of the kept answers are wrong"
    sure = f"with probability {1.0 - rule['delta']:g} over them, {wrong}"
    text = (
        f"An answer with a {rule['score']['kind']} below the threshold is uncertain, and is offloaded where the board "
        f"can. Certified on {rule['rows']} rows by Learn-then-Test: {sure}. The shares below are of these rows."
    )
    header = ["variant", "threshold", "offloaded", "right of the kept", "together with the teacher"]
    plots = [_plot(variant, measured) for variant, measured in rule["measured"].items()]
    return f"<h2>When the cloud is asked</h2>{note(text)}{table(header, rows)}{''.join(plots)}"


def _plot(variant: str, measured: Mapping[str, Any]) -> str:
    curve: Sequence[Mapping[str, float]] = measured["curve"]
    chosen = measured["chosen"]
    drawing, (axes,) = figure(2.8)
    offloaded = [100.0 * point["offloaded"] for point in curve]
    axes.plot(offloaded, [100.0 * point["accuracy_kept"] for point in curve], color=BLUE, label="of what is kept")
    if "accuracy_together" in chosen:
        together = [100.0 * point["accuracy_together"] for point in curve]
        axes.plot(offloaded, together, color=GREEN, label="of all, with the teacher in the cloud")
    axes.axvline(100.0 * chosen["offloaded"], color=BLUE, linewidth=1, linestyle=":")
    axes.plot(100.0 * chosen["offloaded"], 100.0 * chosen["accuracy_kept"], "o", color=BLUE)
    axes.set_xlabel("offloaded, % of the answers")
    axes.set_ylabel("right, %")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return svg(drawing, f"{variant}: dotted is the certified threshold.")
