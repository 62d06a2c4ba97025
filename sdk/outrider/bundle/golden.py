"""The golden of a manifest: which arrays it has, and what must come back. No load of what is installed needs it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from outrider.bundle.fields import (
    Json,
    as_object,
    check_distinct,
    get_integer,
    get_list,
    get_mapping,
    get_string,
    keyed,
    wrapped,
)
from outrider_runtimes.errors import FormatError
from outrider_runtimes.golden import DecisionCheck
from outrider_runtimes.tensors import DTYPES, Interface, TensorSpec

if TYPE_CHECKING:
    from outrider.bundle.manifest import Member, Variant

MAX_GOLDEN_ROWS = 65_536


@dataclass(frozen=True, kw_only=True)
class GoldenTensor:
    """A tensor stored as a member: little-endian, C order, nothing else in the file."""

    member: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """What the member must measure."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def to_dict(self) -> dict[str, Any]:
        """As the manifest stores it."""
        return {"member": self.member, "dtype": self.dtype, "shape": list(self.shape)}


GoldenTensors = Mapping[str, GoldenTensor]


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Inputs and the answers that must come back.

    Attributes:
        rows: N of every batched tensor here.
        inputs: by interface input.
        reference: by output of the network, before any postprocessing; the answers of the model that the variants were
            made from.
        variants: by variant, by output; each variant's own answers on the machine that made it.
        tolerance: by variant, by output; the largest absolute difference to the variant's own answers.
        decision: what must agree with the reference.
    """

    rows: int
    inputs: GoldenTensors
    reference: GoldenTensors
    variants: Mapping[str, GoldenTensors]
    tolerance: Mapping[str, Mapping[str, float]]
    decision: DecisionCheck

    def tensors(self) -> list[GoldenTensor]:
        """All of them."""
        groups = [self.inputs, self.reference, *self.variants.values()]
        return [tensor for group in groups for tensor in group.values()]

    def to_dict(self) -> dict[str, Any]:
        """As the manifest stores it."""
        return {
            "rows": self.rows,
            "inputs": _dicts(self.inputs),
            "reference": _dicts(self.reference),
            "variants": {name: _dicts(tensors) for name, tensors in self.variants.items()},
            "tolerance": {name: dict(bounds) for name, bounds in self.tolerance.items()},
            "decision": self.decision.to_dict(),
        }


def _dicts(tensors: GoldenTensors) -> dict[str, Any]:
    return {name: tensor.to_dict() for name, tensor in tensors.items()}


def parse_golden(data: Json, interface: Interface, variants: Sequence[Variant]) -> Golden:
    """The golden of these variants. Raises FormatError."""
    rows = get_integer(data, "rows", 1, MAX_GOLDEN_ROWS, "golden")
    names = [variant.name for variant in variants]
    given = interface.judged.outputs
    outputs = [spec.name for spec in given]

    def tensors(owner: Json, key: str, specs: Sequence[TensorSpec], at: str) -> dict[str, GoldenTensor]:
        entries = keyed(owner, key, [spec.name for spec in specs], at)
        return {spec.name: _parse_tensor(entries[spec.name], spec, rows, f"{at}.{key}.{spec.name}") for spec in specs}

    answers = keyed(data, "variants", names, "golden")
    bounds = keyed(data, "tolerance", names, "golden")
    return Golden(
        rows=rows,
        inputs=tensors(data, "inputs", interface.inputs, "golden"),
        reference=tensors(data, "reference", given, "golden"),
        variants={name: tensors(answers, name, given, "golden.variants") for name in names},
        tolerance={name: _parse_bounds(bounds, name, outputs) for name in names},
        decision=_parse_decision(get_mapping(data, "decision", "golden"), interface.judged),
    )


def _parse_tensor(item: Any, spec: TensorSpec, rows: int, at: str) -> GoldenTensor:
    entry = as_object(item, at)
    shape = tuple(get_list(entry, "shape", at=at, most=16))
    if any(type(size) is not int or not 1 <= size < 2**31 for size in shape):
        raise FormatError(f"manifest: {at}: shape {list(shape)} is not made of sizes of 1 and more")
    wanted = (rows, *spec.shape[1:]) if spec.batched else spec.shape
    if len(shape) != len(wanted) or any(w is not None and s != w for s, w in zip(shape, wanted, strict=True)):
        raise FormatError(f"manifest: {at}: shape {list(shape)}, the interface and rows say {list(wanted)}")
    dtype = get_string(entry, "dtype", at)
    if dtype != spec.dtype or dtype not in DTYPES:
        raise FormatError(f"manifest: {at}: dtype {dtype[:32]!r}, the interface says {spec.dtype!r}")
    return GoldenTensor(member=get_string(entry, "member", at), dtype=dtype, shape=shape)


def _parse_bounds(owner: Json, name: str, outputs: Sequence[str]) -> dict[str, float]:
    entries = keyed(owner, name, outputs, "golden.tolerance")
    for output, bound in entries.items():
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or bound < 0:
            raise FormatError(f"manifest: golden.tolerance.{name}.{output}: expected a number of 0 or more")
    return {output: float(entries[output]) for output in outputs}


def _parse_decision(data: Json, interface: Interface) -> DecisionCheck:
    decision = wrapped("golden.decision", lambda: DecisionCheck.from_dict(data))
    if decision.kind == "none":
        return decision
    spec = next((spec for spec in interface.outputs if spec.name == decision.output), None)
    if spec is None:
        raise FormatError(f"manifest: golden.decision.output: the interface has no output {decision.output[:64]!r}")
    axes = len(spec.shape)
    if not -axes <= decision.axis < axes or (spec.batched and decision.axis in (0, -axes)):
        raise FormatError(
            f"manifest: golden.decision.axis: {decision.axis} is no axis of {decision.output!r} to decide on"
        )
    return decision


def check_references(variants: Sequence[Variant], golden: Golden, members: Sequence[Member]) -> None:
    """Each member is used once, each use has its member, and a golden member measures what its tensor does."""
    sizes = {member.path: member.size_bytes for member in members}
    tensors = golden.tensors()
    used = [variant.member for variant in variants] + [tensor.member for tensor in tensors]
    check_distinct(used, "use of member")
    for path in used:
        if path not in sizes:
            raise FormatError(f"manifest: member {path[:64]!r} is used but not listed under members")
    unused = sorted(set(sizes) - set(used))
    if unused:
        raise FormatError(f"manifest: member {unused[0]!r} belongs to no variant and not to the golden")
    for tensor in tensors:
        if sizes[tensor.member] != tensor.size_bytes:
            raise FormatError(
                f"manifest: member {tensor.member!r} has {sizes[tensor.member]} bytes, "
                f"its {tensor.dtype} tensor {list(tensor.shape)} has {tensor.size_bytes}"
            )
