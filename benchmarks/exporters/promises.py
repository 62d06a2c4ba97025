"""What was asked for and what was measured, line by line. Pure; a missed bound is a line like the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.exporters.labels import AEQ_DEFAULT, GIVEN_FLOAT, ORT_DEFAULT, PRUNED, UNPRUNED

MOST_SIZE = 0.27  # of the float32 file where the int8 file is weights to this share at least, else of its weights:
MOSTLY_WEIGHTS = 0.95
MOST_OVER_PEERS = 1.05
LEAST_GAIN_SHARE = 0.6


@dataclass(frozen=True, kw_only=True)
class Line:
    """One promise about one file or network.

    Attributes:
        promise: in words, with what the figures are.
        file: that it is about.
        asked, measured: the bound, and what was reached.
        met: whether the figure itself keeps the bound; its interval is not stretched in our favour.
        noisy: whether two measurements of one file differed by too much, so that ``measured`` means little.
        interval: 95 %, where the figure has one.
        note: what else has to be said.
    """

    promise: str
    file: str
    asked: float
    measured: float
    met: bool
    noisy: bool = False
    interval: tuple[float, float] | None = None
    note: str = ""


def all_lines(speedup: float, made: Mapping[str, Any], result: Mapping[str, Any]) -> list[Line]:
    """Every line about one subject.

    Args:
        speedup: that was asked for; 0 where none was.
        made: see ``making.read_made``.
        result: with ``latency`` and ``pairs``, and ``accuracy`` and ``pruning`` where it is trained.
    """
    lines = [*size_lines(made), *speed_lines(speedup, result)]
    if "right" in made:
        lines += [*accuracy_lines(made["right"], made["kept"], made["files"]), pruning_line(result["pruning"])]
    return lines


def size_lines(made: Mapping[str, Any]) -> Iterator[Line]:
    """The size of each int8 file that was kept, against the float32 file of its format.

    Where an int8 file is less than ``MOSTLY_WEIGHTS`` weights, the bound is on its weights: in a small network each
    channel's scale, bias and bias scale are too much of it. It is the int8 file that is asked: with 5 % of overhead in
    the float32 file a perfect quarter of the weights leaves 0.2875. The note has the whole file all the same.
    """
    files, candidates = made["files"], made["candidates"]
    for name in (n for n in made["kept"] if not files[n]["float"]):
        file = files[name]
        size, weights = file["size_bytes"], file["weight_bytes"]
        plain_size = candidates[f"{file['format']}-float32"]["size_bytes"]
        plain_weights = next(f["weight_bytes"] for f in files.values() if f["float"] and f["format"] == file["format"])
        whole = weights >= MOSTLY_WEIGHTS * size
        measured = size / plain_size if whole else weights / plain_weights
        yield Line(
            promise="size of the int8 file over the float32 file" if whole else "int8 weights over float32 weights",
            file=name,
            asked=MOST_SIZE,
            measured=measured,
            met=measured <= MOST_SIZE,
            note=f"{size} of {plain_size} bytes ({size / plain_size:.3f}); {size - weights} of them are no weights",
        )


def speed_lines(speedup: float, result: Mapping[str, Any]) -> Iterator[Line]:
    """How fast the best int8 file is, whether a kept one is slower than float32, and the chosen beside the peers."""
    pairs, noisy = result["pairs"], not result["latency"]["valid"]
    if speedup:
        pair = pairs["best int8 over best fp32"]
        yield Line(
            promise="best float32 time over best int8 time",
            file=pair["of"],
            asked=speedup,
            measured=1.0 / pair["value"],
            interval=(1.0 / pair["high"], 1.0 / pair["low"]),
            met=1.0 / pair["value"] >= speedup,
            noisy=noisy,
            note=f"beside {pair['over']}",
        )
    for text, pair in pairs.items():
        if text == f"{pair['of']} over best fp32" and not result["files"][pair["of"]]["float"]:
            yield _at_most("time of a kept int8 file over the best float32 time", 1.0, pair, noisy)
    for given in ("", GIVEN_FLOAT):
        promise = f"time of the chosen file over the best peer's{given or ', each given what it takes'}"
        yield _at_most(promise, MOST_OVER_PEERS, pairs["chosen over best peer" + given], noisy)


def _at_most(promise: str, asked: float, pair: Mapping[str, Any], noisy: bool) -> Line:
    return Line(
        promise=promise,
        file=pair["of"],
        asked=asked,
        measured=pair["value"],
        interval=(pair["low"], pair["high"]),
        met=pair["value"] <= asked,
        noisy=noisy,
        note=f"beside {pair['over']}",
    )


def accuracy_lines(
    right: Mapping[str, NDArray[np.bool_]], kept: list[str], files: Mapping[str, Mapping[str, Any]]
) -> Iterator[Line]:
    """How much more each kept int8 file loses than the quantizers' default files do, in points, on the same rows."""
    for name in (n for n in kept if not files[n]["float"]):
        for peer in (ORT_DEFAULT, AEQ_DEFAULT):
            points, noise = difference(right[peer], right[name])
            yield Line(
                promise=f"points of accuracy lost beyond {peer}",
                file=name,
                asked=0.0,
                measured=points,
                interval=(points - noise, points + noise),
                met=points <= 0.0,
                note=(
                    f"{right[name].mean():.2%} against {right[peer].mean():.2%} of {len(right[name])} rows; "
                    f"their difference is known to {noise:.2f} points"
                ),
            )


def difference(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[float, float]:
    """Points that ``after`` answers fewer rows right than ``before``, and half their 95 % interval (paired rows)."""
    moved = before.astype(float) - after.astype(float)
    return 100.0 * float(moved.mean()), 100.0 * 1.96 * float(moved.std()) / len(moved) ** 0.5


def pruning_line(pruning: Mapping[str, Any]) -> Line:
    """How much of the gain in multiply-accumulates is a gain in time."""
    ratio, macs, accuracy = pruning["latency"]["ratios"][PRUNED], pruning["macs"], pruning["accuracy"]
    macs_gain = macs[UNPRUNED] / macs[PRUNED]
    drop = 100.0 * (accuracy[UNPRUNED] - accuracy[PRUNED])
    return Line(
        promise="latency gain over the gain in multiply-accumulates, pruned, LiteRT float32",
        file=PRUNED,
        asked=LEAST_GAIN_SHARE,
        measured=1.0 / ratio["value"] / macs_gain,
        interval=(1.0 / ratio["high"] / macs_gain, 1.0 / ratio["low"] / macs_gain),
        met=1.0 / ratio["value"] / macs_gain >= LEAST_GAIN_SHARE,
        noisy=not pruning["latency"]["valid"],
        note=(
            f"{1.0 / ratio['value']:.2f} times as fast with {macs_gain:.2f} times fewer multiply-accumulates; "
            f"{drop:.1f} points below the unpruned network given the same extra training"
        ),
    )
