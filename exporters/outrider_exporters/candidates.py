"""Which files are made: one for each rule of the recipe, and, for given targets, the other forms worth comparing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from outrider_exporters.choose import formats_of, speaks_for, takes_dynamic_channels
from outrider_exporters.passes import Quantize
from outrider_runtimes.board import Board
from outrider_runtimes.targets import Target


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One file to make.

    Attributes:
        name: of the variant.
        format: of the file.
        rule: how it is quantized; None for the file that the others are made from.
        slot: the variant that the recipe asks for; another form of it has the same slot.
        asked: whether this form is the recipe's own, so that failing to make it ends the export.
    """

    name: str
    format: str
    rule: Quantize | None
    slot: str
    asked: bool = True


def plans(
    formats: Sequence[str], precision: str, rules: Sequence[Quantize], targets: Sequence[Target], host: Board
) -> tuple[Plan, ...]:
    """The files in the order in which they are made: in each format the first one, then what is made of it.

    Args:
        precision: of the first file.
        targets: without any, the recipe's own forms alone, in every format; else only formats that a target runs.
        host: where latencies are measured.
    """
    made: list[Plan] = []
    for kind in formats:
        runs = [target for target in targets if kind in formats_of(target)]
        if targets and not runs:
            continue
        plain = f"{kind}-{precision}"
        made.append(Plan(name=plain, format=kind, rule=None, slot=plain))
        asked = [Plan(name=f"{kind}-{r.scheme}", format=kind, rule=r, slot=f"{kind}-{r.scheme}") for r in rules]
        for plan in asked:
            made.append(plan)
            made.extend(other for other in _others(plan, runs, host) if other.name not in {p.name for p in asked})
    return tuple(made)


def _others(plan: Plan, targets: Sequence[Target], host: Board) -> list[Plan]:
    """The other forms of a static int8 rule that left its form open, and of a dynamic one that an engine misreads;
    none where there is no target to choose for."""
    rule = plan.rule
    if rule is not None and rule.scheme == "dynamic" and plan.format == "tflite":
        forms = _tensor_grain(rule, targets)
        return [_other(plan, name, form) for name, form in forms.items()]
    open_form = rule is not None and rule == dataclasses.replace(
        Quantize(), observer=rule.observer, keep_float=rule.keep_float
    )
    if rule is None or not open_form or not targets:
        return []
    forms = _onnx_forms(rule, targets) if plan.format == "onnx" else _tflite_forms(rule, targets, host)
    return [_other(plan, name, form) for name, form in forms.items()]


def _other(plan: Plan, name: str, form: Quantize) -> Plan:
    return Plan(name=f"{plan.format}-{name}", format=plan.format, rule=form, slot=plan.slot, asked=False)


def _tensor_grain(rule: Quantize, targets: Sequence[Target]) -> dict[str, Quantize]:
    """The same with a scale a weight, where a target's engine misreads one a channel."""
    if not rule.per_channel or all(takes_dynamic_channels(target) for target in targets):
        return {}
    return {"dynamic-per-tensor": dataclasses.replace(rule, per_channel=False)}


def _onnx_forms(rule: Quantize, targets: Sequence[Target]) -> dict[str, Quantize]:
    forms = {"int8-per-tensor": dataclasses.replace(rule, per_channel=False)}
    if any(target.int8_scheme == "U8S8" for target in targets):
        unsigned = dataclasses.replace(rule, activations="uint8")
        forms["int8-u8s8"] = unsigned
        forms["int8-u8s8-per-tensor"] = dataclasses.replace(unsigned, per_channel=False)
        forms["int8-u8s8-qoperator"] = dataclasses.replace(unsigned, operators="qoperator")
    return forms


def _tflite_forms(rule: Quantize, targets: Sequence[Target], host: Board) -> dict[str, Quantize]:
    """Float inputs and outputs answer and weigh the same: they are worth a file only where latency can be measured."""
    dynamic = Quantize("dynamic", keep_float=rule.keep_float)
    forms = {"dynamic": dynamic, **_tensor_grain(dynamic, targets)}
    if any(speaks_for(host, target) for target in targets):
        forms["int8-float-io"] = dataclasses.replace(rule, io="float")
    return forms
