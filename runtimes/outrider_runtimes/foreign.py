"""An endpoint's tensors under the names of another interface: how a stranger's model stands in for ours. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from outrider_runtimes.errors import ConfigError, InterfaceMismatch
from outrider_runtimes.oip import Reply
from outrider_runtimes.tensors import Interface, Tensors, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Naming:
    """By our name, the endpoint's. ``outputs`` need not be all that it has."""

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


def check_mapping(ours: Interface, mapping: Mapping[str, str]) -> None:
    """Refuse a mapping of names that ``ours`` does not have. Raises ConfigError."""
    known = {spec.name for spec in ours.inputs + ours.outputs}
    for name, other in mapping.items():
        if name not in known:
            raise ConfigError(f"mapping: there is no tensor {name!r}", hint=f"the interface has {sorted(known)}")
        if not isinstance(other, str) or not other:
            raise ConfigError(f"mapping: {name!r} stands for {other!r:.64}, which is no name")


def bind(ours: Interface, theirs: Interface, mapping: Mapping[str, str]) -> Naming:
    """How requests at ``ours`` are spelled for a model that takes and gives ``theirs``.

    A tensor that ``mapping`` does not name has one name on both sides. Each of the endpoint's inputs must be given, in
    its dtype and with sizes that it takes; each of our outputs must be among its own, in our dtype.

    Raises:
        InterfaceMismatch: what does not fit, and how.
    """
    naming = Naming(
        inputs={spec.name: mapping.get(spec.name, spec.name) for spec in ours.inputs},
        outputs={spec.name: mapping.get(spec.name, spec.name) for spec in ours.outputs},
    )
    inputs = {spec.name: spec for spec in theirs.inputs}
    outputs = {spec.name: spec for spec in theirs.outputs}
    for names, specs, side in ((naming.inputs, inputs, "input"), (naming.outputs, outputs, "output")):
        if len(set(names.values())) != len(names):
            raise _refused(f"two of our {side}s are one {side} of the endpoint: {dict(names)}")
        for name in names.values():
            if name not in specs:
                raise _refused(f"the endpoint has no {side} {name!r}, only {sorted(specs)}")
    if left := sorted(set(inputs) - set(naming.inputs.values())):
        raise _refused(f"the endpoint also takes {left}, which is not ours to give")
    for spec in ours.inputs:
        _check(spec, inputs[naming.inputs[spec.name]], "input", free_fits=False)
    for spec in ours.outputs:
        _check(spec, outputs[naming.outputs[spec.name]], "output", free_fits=True)
    return naming


def theirs_from(naming: Naming, inputs: Tensors) -> Tensors:
    """Our inputs under the endpoint's names."""
    return {naming.inputs[name]: array for name, array in inputs.items()}


def ours_from(naming: Naming, reply: Reply) -> Reply:
    """The endpoint's reply under our names; one that is not ours keeps its own, for the check of the reply to name."""
    back = {theirs: ours for ours, theirs in naming.outputs.items()}
    return reply._replace(outputs={back.get(name, name): array for name, array in reply.outputs.items()})


def _check(ours: TensorSpec, theirs: TensorSpec, side: str, *, free_fits: bool) -> None:
    """``free_fits``: whether a size that is free here may be fixed there. A reply's sizes are checked when it comes."""
    where = f"{side} {ours.name!r} is {theirs.name!r} at the endpoint"
    if ours.dtype != theirs.dtype:
        raise _refused(f"{where}: {theirs.dtype} there, {ours.dtype} here")
    fits = len(ours.shape) == len(theirs.shape) and all(
        there is None or here == there or (here is None and free_fits)
        for here, there in zip(ours.shape, theirs.shape, strict=True)
    )
    if not fits:
        raise _refused(f"{where}: shape {list(theirs.shape)} there, {list(ours.shape)} here (None is any size)")


def _refused(what: str) -> InterfaceMismatch:
    return InterfaceMismatch(what, hint="mapping= says by our name which tensor of the endpoint is meant")
