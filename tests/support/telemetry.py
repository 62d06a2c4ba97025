"""Sources of predictions, and records, for the tests of telemetry."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import numpy as np

from outrider.prediction import OnPrediction, Prediction
from outrider.telemetry.record import Record, encode_row
from outrider.telemetry.spool import NORMAL, Draft
from outrider_runtimes.runner import Timing

BOOT = "00000000-0000-4000-8000-000000000001"
STREAM = "00000000-0000-4000-8000-000000000002"


def a_prediction(number: int = 0) -> Prediction:
    return Prediction(
        outputs={"logits": np.zeros((1, 10), np.float32)},
        source="edge",
        reason="local",
        variant="onnx-int8",
        engine="onnxruntime",
        bundle="ab" * 32,
        verified=True,
        timing_ms=Timing(infer=1.25, total=float(number)),
    )


class Source:
    """What a Model or a Hybrid is to a reporter: something that says when it predicted."""

    def __init__(self) -> None:
        self.callbacks: list[OnPrediction] = []

    def on_prediction(self, callback: OnPrediction) -> Callable[[], None]:
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)

    def predict(self, count: int = 1, *, start: int = 0) -> None:
        for number in range(start, start + count):
            for callback in list(self.callbacks):
                callback(a_prediction(number))


def a_record(seq: int = 1, *, kind: str = "event", body: dict[str, object] | None = None) -> Record:
    return Record(
        stream=STREAM,
        seq=seq,
        kind=kind,
        boot_id=BOOT,
        wall_s=1_764_000_000.5,
        monotonic_s=12.25,
        body=body if body is not None else {"name": "x", "fields": {}},
    )


def a_draft(number: int = 0, *, size_bytes: int = 0, priority: int = NORMAL) -> Draft:
    body = encode_row(
        kind="event",
        boot_id=BOOT,
        wall_s=0.0,
        monotonic_s=0.0,
        body={"number": number, "pad": "x" * size_bytes},
    )
    return Draft(body=body, priority=priority)


def a_stream() -> str:
    return str(uuid.uuid4())
