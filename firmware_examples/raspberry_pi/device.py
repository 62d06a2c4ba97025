"""A board's program: read inputs, answer each within its deadline, write the answers, report over MQTT.

    python device.py config.toml

The board answers; an answer that it is unsure of is asked of the cloud, when the cloud can be reached in time.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

import outrider

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


def samples(config: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Rows of an .npz file whose arrays carry the names of the model's inputs, at a steady rate."""
    with np.load(config["file"], allow_pickle=False) as arrays:
        inputs = {name: arrays[name] for name in arrays.files}
    start = time.monotonic()
    for row in range(min(len(array) for array in inputs.values())):
        time.sleep(max(0.0, start + row / config["rate_hz"] - time.monotonic()))
        yield row, {name: array[row : row + 1] for name, array in inputs.items()}


def answer(hybrid: outrider.Hybrid, row: int, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """One line of the results; a request that nobody answered in time is a line as well."""
    line: dict[str, Any] = {"row": row, "at_s": time.time()}
    try:
        prediction = hybrid.infer(inputs)
    except outrider.OutriderError as error:
        return {**line, "source": None, "reason": f"{type(error).__name__}: {error}"}
    scores = next(iter(prediction.outputs.values()))
    line |= {"label": int(scores[0].argmax()), "total_ms": prediction.timing_ms.total}
    return {**line, "source": prediction.source, "reason": prediction.reason}


def run(config: Mapping[str, Any], results: TextIO) -> dict[str, Any]:
    """Answer until the input ends or the program is told to stop; return the account of what was reported."""
    state = config.get("state")
    with (
        outrider.load(config["bundle"], trust=config.get("trust"), state=state) as model,
        outrider.Remote(config["cloud"]["url"], model=config["cloud"]["model"]) as cloud,
        outrider.Hybrid(model, cloud, outrider.Policy(**config["policy"])) as hybrid,
        outrider.Reporter(config["broker"]["url"], device=config["device"], state=state) as reporter,
    ):
        reporter.watch(hybrid)
        try:
            for row, inputs in samples(config["input"]):
                print(json.dumps(answer(hybrid, row, inputs)), file=results, flush=True)
        except KeyboardInterrupt:
            print("stopping", file=sys.stderr)
        reporter.flush(config["broker"]["flush_s"], level="sink")
        return asdict(reporter.account())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        with Path(settings["results"]).open("w", encoding="utf-8") as lines:
            print(json.dumps({"account": run(settings, lines)}))
    except outrider.OutriderError as error:  # a bundle that is not there, a missing extra: what to do is in its hint
        sys.exit("\nhint: ".join(filter(None, [f"error: {error}", error.hint])))
