"""Measured variants into one bundle, with its golden and where everything comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from outrider._version import __version__
from outrider.bundle import Golden, OffloadRule, Variant, write_bundle
from outrider_exporters.data import Data, draw_rows, inputs_of_test
from outrider_exporters.job import Job
from outrider_exporters.measure import LATENCY_THREADS
from outrider_exporters.offload import Offload, certified_rule
from outrider_exporters.passes import Progress, Stage
from outrider_exporters.report import VariantReport
from outrider_exporters.rows import Predict, count_rows, example_rows
from outrider_runtimes.board import Board
from outrider_runtimes.golden import DecisionCheck
from outrider_runtimes.tensors import Array, Interface, Tensors

if TYPE_CHECKING:
    from outrider_exporters.convert import ModelFile
    from outrider_exporters.deciding import Decision

GOLDEN_ROWS = (8, 64)
GOLDEN_BYTES = 4 * 2**20
TURNED_SHARE, TURNED_ROWS = 0.1, 2
DISTRIBUTIONS = (
    "torch",
    "onnx",
    "onnxruntime",
    "litert-torch",
    "ai-edge-litert",
    "ai-edge-quantizer",
    "torch-pruning",
    "numpy",
)


@dataclass(frozen=True, kw_only=True)
class Built:
    """Measured files, and the answers of the model that they were made from.

    Attributes:
        reference: the model's answers.
        files, variants: by variant name, and in the order in which they were made.
        named: the files with the names of their inner tensors, by variant name; never shipped.
        slots: by variant name, the variant of the recipe that it is a form of.
        failed: why a form could not be made, by the name that it would have had.
    """

    reference: Predict
    files: Mapping[str, ModelFile]
    variants: tuple[VariantReport, ...]
    slots: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    named: Mapping[str, ModelFile] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GoldenRows:
    """The inputs of the golden check, and where they come from.

    Attributes:
        inputs: by name.
        rows: how many.
        origin: ``given``, ``test`` or ``generated``.
        trained_on: how many of them are in ``data.train``; above 0 only where the caller gave them.
    """

    inputs: Tensors
    rows: int
    origin: str
    trained_on: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As the report and the manifest store it."""
        return {"rows": self.rows, "from": self.origin, "trained_on": self.trained_on}


def certify_kept(job: Job, offload: Offload, built: Built, decision: Decision) -> OffloadRule:
    """The rule by which a board finds the answers of the kept variants uncertain. Raises ExportError."""
    from outrider_exporters.convert import predict_file

    job.context.progress(Progress(step="certify", done=0, total=1, message="a threshold for each variant"))
    kept = [variant.name for variant in decision.kept]
    teacher = None
    if job.context.teacher is not None:
        from outrider_exporters.sources.module import torch_predict

        teacher = job.caller.outside(torch_predict(job.context.teacher, job.interface))
    return certified_rule(
        offload,
        job,
        {name: job.caller.outside(predict_file(built.files[name], job.interface)) for name in kept},
        is_wrong=job.is_wrong,
        teacher=teacher,
    )


def write(
    job: Job,
    built: Built,
    decision: Decision,
    golden_rows: GoldenRows,
    stages: Sequence[Stage],
    *,
    offload: OffloadRule | None = None,
) -> str:
    """Write the bundle with the variants that were decided for. Gives its digest.

    Args:
        stages: the original model's, then one a pass.
    """
    baseline, *passes = [_untimed(stage) for stage in stages]
    job.context.progress(Progress(step="bundle", done=0, total=1, message=str(job.output)))
    files = {variant.name: built.files[variant.name] for variant in decision.kept}
    golden, members = _golden(job, built.reference, files, golden_rows)
    return write_bundle(
        job.output,
        name=job.name,
        version=job.version,
        interface=job.caller.interface,
        variants=[_variant(report, files[report.name]) for report in decision.kept],
        golden=golden,
        members={**members, **{_member(v, file.format): file.path for v, file in files.items()}},
        provenance={
            "made_by": {"outrider": __version__},
            "environment": environment(job.host),
            "recipe": job.recipe.to_dict(),
            "baseline": baseline,
            "stages": passes,
            "gates": [result.to_dict() for result in decision.results],
            "targets": list(job.targets),
            "choices": [choice.to_dict() for choice in decision.choices],
            "passed_over": dict(decision.dropped),
            "quantization": decision.worth.to_dict(),
            "golden": golden_rows.to_dict(),
            "seed": job.context.seed,
        },
        signing_keys=job.signing_keys,
        offload=offload,
        cloud_only=job.cloud_only,
    )


def choose_golden(job: Job) -> GoldenRows:
    """The rows that the caller gave, else rows of the test part, else generated ones: never training data."""
    interface = job.caller.interface
    if job.golden is not None:
        rows = count_rows(job.golden, interface)
        inputs = draw_rows(job.golden, interface, rows=rows, seed=0)
        return GoldenRows(inputs=inputs, rows=rows, origin="given", trained_on=trained_on(inputs, job))
    count = golden_count(job.caller.example, interface)
    test = inputs_of_test(job.data.test, interface)
    unseen = None if test is None else _unseen(test, job)
    if unseen is not None:
        inputs, origin = draw_rows(unseen, interface, rows=count, seed=job.context.seed), "test"
    else:
        inputs, origin = generated_rows(job.caller.example, interface, count, job.context.seed), "generated"
        if trained_on(inputs, job):  # the example's own rows
            inputs = generated_rows(job.caller.example, interface, count, job.context.seed, keep=0)
    return GoldenRows(
        inputs=inputs, rows=count_rows(inputs, interface), origin=origin, trained_on=trained_on(inputs, job)
    )


def generated_rows(
    example: Tensors, interface: Interface, rows: int, seed: int, *, keep: int | None = None
) -> dict[str, Array]:
    """Seeded random rows between the least and the greatest value of the interface's range, else of the example.

    The first rows are the example's own: so many as ``keep`` says, else all of them.
    """
    rng = np.random.default_rng(seed)
    tiled = example_rows(example, interface, rows)
    given = count_rows(example, interface) if keep is None else keep
    for spec in interface.inputs:
        if not spec.batched:
            continue
        array = tiled[spec.name].copy()
        low, high = spec.range or (array.min(), array.max())
        fresh = array[given:]
        if array.dtype.kind == "f":
            array[given:] = rng.uniform(low, high, fresh.shape)
        else:
            array[given:] = rng.integers(int(low), int(high), fresh.shape, endpoint=True)
        tiled[spec.name] = array
    return tiled


def sample_rows(job: Job, rows: int) -> dict[str, Array]:
    """At most so many rows of the network's inputs, to compare answers and to take times on: of the test, the
    calibration or the golden part, else generated."""
    interface, seed = job.caller.interface, job.context.seed
    for inputs in (inputs_of_test(job.data.test, interface), job.data.calibration, job.golden):
        if inputs is not None:
            return job.caller.prepared(draw_rows(inputs, interface, rows=rows, seed=seed))
    return job.caller.prepared(generated_rows(job.caller.example, interface, rows, seed))


def trained_on(inputs: Tensors, job: Job) -> int:
    """How many of the rows are rows of ``data.train``, compared by their bytes."""
    return sum(_trained(inputs, job))


def _trained(inputs: Tensors, job: Job) -> list[bool]:
    """Of each row, whether it is one of ``data.train``."""
    rows = list(_row_bytes(inputs, job.caller.interface))
    wanted = set(rows)
    train = () if job.data.train is None else _row_bytes(job.data.train[0], job.caller.interface)
    found = {row for row in train if row in wanted}
    return [row in found for row in rows]


def _unseen(inputs: Tensors, job: Job) -> Tensors | None:
    """Without the rows of ``data.train``; None where no other is left."""
    left = [not row for row in _trained(inputs, job)]
    if all(left):
        return inputs
    batched = {spec.name for spec in job.caller.interface.inputs if spec.batched}
    return {k: a[left] if k in batched else a for k, a in inputs.items()} if any(left) else None


def _row_bytes(inputs: Tensors, interface: Interface) -> Iterator[bytes]:
    batched = [np.ascontiguousarray(inputs[spec.name]) for spec in interface.inputs if spec.batched]
    for at in range(len(batched[0]) if batched else 0):
        yield b"".join(array[at].tobytes() for array in batched)


def _golden(
    job: Job, reference: Predict, files: Mapping[str, ModelFile], rows: GoldenRows
) -> tuple[Golden, dict[str, bytes]]:
    """The golden and its members. Of generated rows no decision is asked: noise has no class."""
    from outrider_exporters.convert import predict_file
    from outrider_exporters.golden import build_golden

    generated = rows.origin == "generated"
    return build_golden(
        job.caller.interface.judged,
        rows.inputs,
        job.caller.judged(reference),
        {variant: job.caller.judged(predict_file(file, job.interface)) for variant, file in files.items()},
        precisions={variant: file.precision for variant, file in files.items()},
        decision=DecisionCheck() if generated else decision_for(job.interface, job.data, rows.rows),
    )


def _untimed(stage: Stage) -> dict[str, Any]:
    """A stage without how long it took, which is nobody's business but the report's."""
    return {key: value for key, value in stage.to_dict().items() if key != "seconds"}


def _variant(report: VariantReport, file: ModelFile) -> Variant:
    return Variant(
        name=report.name,
        format=report.format,
        precision=report.precision,
        member=_member(report.name, report.format),
        binding=file.binding,
        measured=report.to_dict(),
    )


def _member(variant: str, kind: str) -> str:
    return f"models/{variant}.{kind}"


def golden_count(example: Tensors, interface: Interface) -> int:
    """How many golden rows to take: many of small inputs, few of large ones, as every board stores and runs them."""
    row_bytes = sum(array.nbytes for array in example_rows(example, interface, 1).values())
    return max(GOLDEN_ROWS[0], min(GOLDEN_ROWS[1], GOLDEN_BYTES // max(1, row_bytes)))


def decision_for(interface: Interface, data: Data, rows: int) -> DecisionCheck:
    """The golden decision: the class, where the one output holds class scores; else none.

    Scores are taken for class scores when the labels name them one by one or the training targets are class numbers.
    Quantization may turn one decision in ten, and two of a few.
    """
    spec = interface.outputs[0]
    scores = len(interface.outputs) == 1 and spec.batched and len(spec.shape) == 2 and spec.dtype.startswith("float")
    targets = None if data.train is None else data.train[1]
    numbered = targets is not None and targets.ndim == 1 and targets.dtype.kind in "iu"
    if not scores or spec.shape[1] == 1 or not (numbered or len(interface.labels) == spec.shape[1]):
        return DecisionCheck()
    allowed = max(TURNED_SHARE, TURNED_ROWS / rows)
    return DecisionCheck(kind="argmax", output=spec.name, axis=-1, min_agreement=max(0.0, round(1.0 - allowed, 4)))


def environment(host: Board) -> dict[str, Any]:
    """Where the figures come from: the kind of host, never its name, and the versions of the tools."""
    return {
        "machine": host.machine,
        "cpu_features": sorted(host.features),
        "cpus": host.cpus,
        "threads": LATENCY_THREADS,
        "python": host.python,
        "tools": {tool: version for tool in DISTRIBUTIONS if (version := _installed(tool))},
    }


def _installed(tool: str) -> str:
    try:
        return metadata.version(tool)
    except metadata.PackageNotFoundError:
        return ""
