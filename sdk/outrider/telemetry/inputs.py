"""What a model was given, as a record: only where the user asks for it, and only so much."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from outrider.prediction import Prediction
from outrider.telemetry.record import MAX_RECORD_BYTES, holdable
from outrider_runtimes.errors import ConfigError
from outrider_runtimes.tensors import Tensors

# In base64 and with the rest of the record within record.MAX_RECORD_BYTES.
MOST_BYTES: Final = 45_000
# Of all tensors in a record's JSON; many small ones, or long names, take more than their values.
_MOST_WRITTEN: Final = MAX_RECORD_BYTES - 1024
MOST_PER_HOUR: Final = 1_000_000

DEFAULT_MAX_BYTES: Final = 16_384
DEFAULT_PER_HOUR: Final = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class InputPolicy:
    """Which inputs may leave the device.

    Attributes:
        flagged_only: those of answers that the edge was unsure of or gave for want of the cloud, no others.
        max_bytes: of all tensors of one record together, at most 45,000; larger inputs stay, and those of so many
            tensors, or such long names, that a record cannot hold them.
        per_hour: so many records at once, and as many an hour.

    Raises:
        ConfigError: naming the field.
    """

    flagged_only: bool = True
    max_bytes: int = DEFAULT_MAX_BYTES
    per_hour: int = DEFAULT_PER_HOUR

    def __post_init__(self) -> None:
        for name, most in (("max_bytes", MOST_BYTES), ("per_hour", MOST_PER_HOUR)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ConfigError(f"inputs.{name} is {value!r}, expected a whole number from 1 to {most}")


class InputGate:
    """Holds inputs to a policy. Safe from several threads."""

    def __init__(self, policy: InputPolicy | None, *, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens = 0.0 if policy is None else float(policy.per_hour)
        self._refilled_s = clock()

    def body(self, inputs: Tensors, prediction: Prediction) -> dict[str, Any] | None:
        """The record's body with a copy of the values; None where they stay."""
        policy = self._policy
        if policy is None or (policy.flagged_only and not flagged(prediction.source, prediction.reason)):
            return None
        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        if any(array.dtype.hasobject for array in arrays.values()):
            return None
        too_large = sum(array.nbytes for array in arrays.values()) > policy.max_bytes
        if too_large or sum(_written_bytes(*each) for each in arrays.items()) > _MOST_WRITTEN or not self._take(policy):
            return None
        return {
            "source": prediction.source,
            "reason": holdable(prediction.reason),
            "bundle": prediction.bundle,
            "tensors": [_tensor(name, array) for name, array in arrays.items()],
        }

    def _take(self, policy: InputPolicy) -> bool:
        with self._lock:
            now_s = self._clock()
            earned = max(0.0, now_s - self._refilled_s) * policy.per_hour / 3600.0
            self._tokens, self._refilled_s = min(float(policy.per_hour), self._tokens + earned), now_s
            if self._tokens < 1.0:
                return False
            self._tokens -= 1.0
            return True


def flagged(source: str, reason: str) -> bool:
    """Whether an answer is one that someone should look at: the edge was unsure of it, or the cloud was not there."""
    return source == "edge_degraded" or reason == "uncertain"


def _written_bytes(name: str, array: np.ndarray[Any, Any]) -> int:
    """What a tensor takes in JSON, at most."""
    return len(json.dumps([name, array.dtype.name, array.shape])) + 4 * (array.nbytes // 3 + 1) + 48


def _tensor(name: str, array: np.ndarray[Any, Any]) -> dict[str, Any]:
    data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return {
        "name": holdable(name),
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "data": base64.b64encode(data).decode("ascii"),
    }
