"""The golden of a bundle: inputs, and the answers that must come back on every board."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from outrider.bundle import Golden, GoldenTensor
from outrider_exporters.convert.files import output_range
from outrider_exporters.rows import Predict, count_rows
from outrider_runtimes.errors import ExportError
from outrider_runtimes.golden import DecisionCheck, compare
from outrider_runtimes.tensors import Array, Interface, Tensors, check_named

# How far another engine version or CPU may be from the answers of the machine that made the bundle, as a share of
# the output's range. Float kernels sum in another order. Int8 kernels round halves differently, and one step in an
# early layer is several in the last; 5 % are about 13 of its 256 steps, well below what a broken kernel shows.
TOLERANCE_SHARE = {"float64": 1e-3, "float32": 1e-3, "float16": 1e-2, "int8": 5e-2}
LOOSEST_SHARE = 5e-2


def build_golden(
    interface: Interface,
    inputs: Tensors,
    reference: Predict,
    variants: Mapping[str, Predict],
    *,
    precisions: Mapping[str, str],
    decision: DecisionCheck | None = None,
) -> tuple[Golden, dict[str, bytes]]:
    """Run the reference and every variant on the inputs, and store what they answer.

    Args:
        inputs: at the interface, one row or more.
        reference: the model that the variants were made from.
        variants: by variant name, the function that ``convert.predict_file`` gives.
        precisions: by variant name; decides the tolerance, see ``TOLERANCE_SHARE``.
        decision: what must agree with the reference; nothing by default.

    Returns:
        The golden and its members' bytes by path, both for ``outrider.bundle.write_bundle``.

    Raises:
        InputError: inputs that the interface does not allow.
        ExportError: an answer is not finite or empty, or a variant's own decisions miss the check.
    """
    decision = decision or DecisionCheck()
    checked = check_named(interface, inputs)
    rows = count_rows(checked, interface)
    if rows < 1:
        raise ExportError("the golden needs one row of inputs at least")
    wanted = _answers("the reference", reference, checked, interface)
    members: dict[str, bytes] = {}
    golden_inputs = _store("golden/inputs", checked, members)
    golden_reference = _store("golden/reference", wanted, members)
    stored, tolerance = {}, {}
    for name, predict in variants.items():
        given = _answers(f"variant {name!r}", predict, checked, interface)
        tolerance[name] = tolerances(given, precisions[name])
        _check_decision(name, given, wanted, tolerance[name], decision)
        stored[name] = _store(f"golden/variants/{name}", given, members)
    golden = Golden(
        rows=rows,
        inputs=golden_inputs,
        reference=golden_reference,
        variants=stored,
        tolerance=tolerance,
        decision=decision,
    )
    return golden, members


def tolerances(outputs: Tensors, precision: str) -> dict[str, float]:
    """By output, the largest absolute difference that another machine may show.

    A float output gets the precision's share of its range. An integer output (a class, an index) may jump where two
    candidates are level, so it gets its whole range: the decision check is what holds it.
    """
    share = TOLERANCE_SHARE.get(precision, LOOSEST_SHARE)
    return {name: output_range(array) * (share if array.dtype.kind == "f" else 1.0) for name, array in outputs.items()}


def _answers(who: str, predict: Predict, inputs: Tensors, interface: Interface) -> dict[str, Array]:
    outputs = predict(inputs)
    for spec in interface.outputs:
        array = outputs[spec.name]
        if not array.size:
            raise ExportError(f"{who} gives an empty {spec.name!r} for the golden inputs")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ExportError(
                f"{who} gives NaN or infinite values in {spec.name!r} for the golden inputs",
                hint="give inputs like those of the field as the example",
            )
    return {spec.name: outputs[spec.name] for spec in interface.outputs}


def _check_decision(
    name: str, given: Tensors, wanted: Tensors, bounds: Mapping[str, float], decision: DecisionCheck
) -> None:
    """A variant that misses the check here would be refused by every board."""
    report = compare(given, stored=given, reference=wanted, tolerance=bounds, decision=decision)
    if not report.passed:
        raise ExportError(
            f"variant {name!r} fails its own golden: {report.failure}",
            hint="calibrate with more rows, or leave this variant out",
        )


def _store(folder: str, arrays: Tensors, members: dict[str, bytes]) -> dict[str, GoldenTensor]:
    """Add the arrays to the members, numbered: a tensor's name need not be a path."""
    tensors = {}
    for position, (name, array) in enumerate(arrays.items()):
        path = f"{folder}/{position}.bin"
        members[path] = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
        tensors[name] = GoldenTensor(member=path, dtype=array.dtype.name, shape=array.shape)
    return tensors
