"""How long a network takes where it will run: converted, in the engine of a device, one row, one thread."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from outrider_exporters.measure import LATENCY_THREADS, latencies_p50_ms
from outrider_exporters.passes.base import PassContext
from outrider_exporters.rows import example_rows

if TYPE_CHECKING:
    from torch import nn


def latencies_of(networks: Mapping[str, nn.Module], context: PassContext) -> dict[str, float]:
    """Median milliseconds a row on this host, by name, as float32 ONNX files, timed in shuffled rounds.

    Raises:
        ExportError: a network cannot be converted.
        NoEngine: there is no engine for ONNX here.
    """
    from outrider_exporters.convert import open_file
    from outrider_exporters.convert.onnx import to_onnx

    row = example_rows(context.example, context.interface, 1)
    with tempfile.TemporaryDirectory(prefix="outrider-latency-") as folder:
        files = {
            name: to_onnx(network, context.interface, context.example, Path(folder) / f"{name}.onnx")
            for name, network in networks.items()
        }
        sessions = {name: open_file(file, context.interface, threads=LATENCY_THREADS) for name, file in files.items()}
        try:
            runs = {name: (lambda session=session: session.run(row)) for name, session in sessions.items()}
            return latencies_p50_ms(runs, seed=context.seed)
        finally:
            for session in sessions.values():
                session.close()
