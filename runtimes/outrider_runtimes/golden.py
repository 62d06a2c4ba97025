"""Whether a variant still gives the answers that its bundle was packed with. Arrays in, a report out; no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from outrider_runtimes.errors import FormatError
from outrider_runtimes.tensors import Array, Tensors

KINDS = ("argmax", "none")


@dataclass(frozen=True, kw_only=True)
class DecisionCheck:
    """What of an answer must survive rounding.

    Attributes:
        kind: ``"argmax"``: the index of the largest value; ``"none"``: nothing is checked.
        output: the interface's name of the output that is looked at; empty for ``"none"``.
        axis: the axis of the argmax.
        min_agreement: the share, 0 to 1, of decisions that must equal the reference's.
    """

    kind: str = "none"
    output: str = ""
    axis: int = -1
    min_agreement: float = 0.95

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FormatError(f"golden: decision kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.kind != "none" and not self.output:
            raise FormatError(f"golden: decision {self.kind!r} names no output")
        if not 0.0 <= self.min_agreement <= 1.0:
            raise FormatError(f"golden: min_agreement {self.min_agreement} is not within 0 and 1")

    def to_dict(self) -> dict[str, Any]:
        """As the manifest stores it."""
        if self.kind == "none":
            return {"kind": "none"}
        return {"kind": self.kind, "output": self.output, "axis": self.axis, "min_agreement": self.min_agreement}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DecisionCheck:
        """The inverse of ``to_dict``. Raises FormatError."""
        try:
            kind, output, axis = data["kind"], data.get("output", ""), data.get("axis", -1)
            if not (isinstance(kind, str) and isinstance(output, str)) or type(axis) is not int:
                raise TypeError(f"kind {kind!r}, output {output!r}, axis {axis!r}")
            return cls(kind=kind, output=output, axis=axis, min_agreement=float(data.get("min_agreement", 0.95)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"golden: decision is malformed: {error!r}") from None


@dataclass(frozen=True, kw_only=True)
class GoldenReport:
    """What a comparison found.

    Attributes:
        agreement: the share of decisions that equal the reference's; None where none were compared.
        max_error: by output, the largest absolute difference from what was stored; of those that were compared.
        failure: the first rule that was broken, in one line; empty when all hold.
    """

    agreement: float | None
    max_error: dict[str, float]
    failure: str

    @property
    def passed(self) -> bool:
        """Whether every rule holds."""
        return not self.failure


def compare(
    outputs: Tensors,
    *,
    stored: Tensors,
    reference: Tensors,
    tolerance: Mapping[str, float],
    decision: DecisionCheck,
) -> GoldenReport:
    """Judge this run's outputs.

    Args:
        outputs: what the variant gave now, at the interface.
        stored: what the same variant gave when the bundle was packed; every output by name.
        reference: what the original model gave; only the decision's output is looked at.
        tolerance: by output, the largest absolute difference from ``stored``; every output needs one.
        decision: what must equal the reference's. With ``[N, ..., C]`` each argmax is one decision.

    Returns:
        A report; a missing output, another shape and a NaN are failures, not errors.
    """
    max_error: dict[str, float] = {}
    failure = ""
    for name, wanted in stored.items():
        problem = _unusable(name, outputs.get(name), wanted)
        if not problem:
            max_error[name] = largest_difference(outputs[name], wanted)
            problem = _beyond(name, max_error[name], tolerance.get(name))
        failure = failure or problem
    for name, given in outputs.items():
        if name not in stored:
            failure = failure or f"output {name!r} has nothing stored to compare with"
        if _has_nan(given):
            failure = failure or f"output {name!r} has NaN values"
    agreement, problem = _decide(outputs, reference, decision)
    return GoldenReport(agreement=agreement, max_error=max_error, failure=failure or problem)


def largest_difference(given: Array, wanted: Array) -> float:
    """The largest ``|given - wanted|`` of two arrays of one shape; 0 when empty, infinite where either has a NaN."""
    unequal = given != wanted
    if not unequal.any():
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(given[unequal].astype(np.float64) - wanted[unequal].astype(np.float64))
    return float(np.where(np.isnan(difference), np.inf, difference).max())


def _unusable(name: str, given: Array | None, wanted: Array) -> str:
    if given is None:
        return f"output {name!r} is missing"
    if given.shape != wanted.shape:
        return f"output {name!r} has shape {list(given.shape)}, stored is {list(wanted.shape)}"
    return f"output {name!r} has NaN values" if _has_nan(given) else ""


def _beyond(name: str, error: float, tolerance: float | None) -> str:
    if tolerance is None:
        return f"output {name!r} has no tolerance"
    if error <= tolerance:
        return ""
    return f"output {name!r} differs by {error:.6g} from what was stored, at most {tolerance:.6g} is allowed"


def _decide(outputs: Tensors, reference: Tensors, decision: DecisionCheck) -> tuple[float | None, str]:
    if decision.kind == "none":
        return None, ""
    name, axis = decision.output, decision.axis
    given, wanted = outputs.get(name), reference.get(name)
    if given is None or wanted is None:
        return None, f"output {name!r}, on which the decision rests, is missing"
    problem = _undecidable(given, wanted, axis)
    if problem:
        return None, f"output {name!r} {problem}"
    agreement = float(np.mean(given.argmax(axis) == wanted.argmax(axis)))
    if agreement >= decision.min_agreement:
        return agreement, ""
    return agreement, (
        f"output {name!r}: {agreement:.1%} of the decisions equal the reference's, "
        f"at least {decision.min_agreement:.1%} are required"
    )


def _undecidable(given: Array, wanted: Array, axis: int) -> str:
    if given.shape != wanted.shape:
        return f"has shape {list(given.shape)}, the reference {list(wanted.shape)}"
    if not -given.ndim <= axis < given.ndim:
        return f"has no axis {axis}"
    return "" if given.size else "has no rows to decide on"


def _has_nan(array: Array) -> bool:
    return array.dtype.kind == "f" and bool(np.isnan(array).any())
