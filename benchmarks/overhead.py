"""What ``Model.infer`` adds to the raw engine, with every default check on and a reporter watching, and what a session
of an engine adds to it.

The promises: at most 10 us and 0.3 ns a byte of the input at the median; a session at most 1.00 of
``InferenceSession.run`` and 1.03 of LiteRT's set, invoke, get on a model that takes 100 us.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import outrider
from benchmarks.bundles import load_variant
from benchmarks.handmade import FORMATS, Network, dense, write_file, write_handmade
from benchmarks.measure import Call, compare_calls, say
from benchmarks.raw import open_raw
from benchmarks.stats import difference
from outrider_runtimes.engines import require_engines
from outrider_runtimes.errors import InputError

BLOCKS = 40
CALLS_A_BLOCK = 250
WIDTHS = (64, 3 * 32 * 32, 3 * 224 * 224, 3 * 640 * 640)  # float32 numbers of the input
CALLS_OF_WIDTH = {64: 250, 3 * 32 * 32: 250, 3 * 224 * 224: 50, 3 * 640 * 640: 10}
ALLOWED_US, ALLOWED_NS_A_BYTE = 10.0, 0.3
ALLOWED_RATIO = {"onnx": 1.00, "tflite": 1.03}
FIRST_CALLS = 200  # a bundle is on trial at first; what is promised is what comes after
UNUSED_BROKER = "mqtt://127.0.0.1:9"
PLAIN, WATCHED = "Model.infer", "Model.infer, reporter watching"


def run(folder: Path) -> dict[str, Any]:
    """Measure on both engines. Returns what is stored as ``results/overhead.json``."""
    smallest = write_handmade(_slice(WIDTHS[0]), folder)
    checks = _checks_on(smallest, folder)
    added: dict[str, dict[str, Any]] = {}
    for width in WIDTHS:
        bundle = write_handmade(_slice(width), folder)
        for format_ in FORMATS:
            say(f"overhead: {format_}, {4 * width} bytes")
            added[f"{format_}-float32, {4 * width} bytes"] = _infer(bundle, format_, width, folder)
    return {
        "checks_on": checks,
        "blocks": BLOCKS,
        "variants": {f"{each}-float32": added[f"{each}-float32, {4 * WIDTHS[0]} bytes"] for each in FORMATS},
        "sizes": added,
        "sessions": {format_: _session(format_, folder) for format_ in FORMATS},
    }


def _slice(width: int) -> Network:
    return Network(name=f"slice-{width}", width=width)


def _infer(bundle: Path, format_: str, width: int, folder: Path) -> dict[str, Any]:
    image = _slice(width).input()
    inputs = {"x": image}
    variant = f"{format_}-float32"
    raw = open_raw(bundle.with_suffix(f".{format_}")).call(image)
    with load_variant(bundle, variant, folder=folder) as fresh:
        for _ in range(FIRST_CALLS):
            fresh.infer(inputs)
    reporter = outrider.Reporter(UNUSED_BROKER, device="bench", state=folder / "state")
    with (
        load_variant(bundle, variant, folder=folder) as plain,
        load_variant(bundle, variant, folder=folder) as watched,
        reporter,
    ):
        reporter.watch(watched)
        calls: dict[str, Call] = {
            "raw": raw,
            PLAIN: lambda: plain.infer(inputs),
            WATCHED: lambda: watched.infer(inputs),
        }
        found, times = compare_calls(calls, base="raw", blocks=BLOCKS, calls_a_block=CALLS_OF_WIDTH[width])
    rng = np.random.default_rng(2)
    intervals = {name: difference(times[name] / 1e3, times["raw"] / 1e3, rng) for name in (PLAIN, WATCHED)}
    allowed_us = ALLOWED_US + ALLOWED_NS_A_BYTE * 1e-3 * image.nbytes
    return {
        **found.to_dict(),
        "added_us": {name: each.value for name, each in intervals.items()},
        "added_us_interval": {name: [each.low, each.high] for name, each in intervals.items()},
        "input_bytes": image.nbytes,
        "allowed_us": allowed_us,
        "kept": found.valid and intervals[WATCHED].value <= allowed_us,
    }


def _session(format_: str, folder: Path) -> dict[str, Any]:
    """An engine's session beside the engine on a model of some 100 us."""
    network = dense("session", 704, 4)
    path = write_file(network, folder / f"session.{format_}")
    x = network.input()
    session = require_engines(format_)[0].prepare(path, threads=1)
    say(f"overhead: session of {format_}")
    calls: dict[str, Call] = {"raw": open_raw(path).call(x), "Session.run": lambda: session.run([x])}
    found, _ = compare_calls(calls, base="raw", blocks=BLOCKS, calls_a_block=100, twin=open_raw(path).call(x))
    session.close()
    allowed = ALLOWED_RATIO[format_]
    kept = found.valid and found.ratios["Session.run"].value <= allowed
    return {**found.to_dict(), "allowed_ratio": allowed, "kept": kept}


def _checks_on(bundle: Path, folder: Path) -> dict[str, str]:
    """By check, the error by which a model as it is measured here proved that the check is on."""
    good = _slice(WIDTHS[0]).input()
    bad = {
        "names": {"z": good},
        "one array a name": {"x": good.tolist()},
        "dtype": {"x": good.astype(np.float64)},
        "shape": {"x": good[:, 1:]},
        "NaN": {"x": good * np.float32(np.nan)},
        "infinity": {"x": np.full_like(good, np.inf)},
    }
    proved = {}
    with load_variant(bundle, "onnx-float32", folder=folder) as model:
        wanted = model.predict({"x": good})["y"].tobytes()
        for check, inputs in bad.items():
            try:
                model.infer(inputs)
            except InputError as error:
                proved[check] = type(error).__name__
            else:
                raise RuntimeError(f"the check of {check} is off")
        for order, same in (("byte order", good.astype(">f4")), ("memory order", np.repeat(good, 2, axis=1)[:, ::2])):
            if model.predict({"x": same})["y"].tobytes() != wanted:
                raise RuntimeError(f"{order} is not converted")
            proved[order] = "converted"
    return proved
