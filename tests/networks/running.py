"""One case, the whole way: trained, exported, installed, each variant loaded and run on all held-out rows."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import outrider
from networks.case import JUDGED, POINT, PREDICT_ROWS, Case, Outputs, Predict, Trained, in_chunks
from outrider import cli
from outrider.bundle import Manifest, open_bundle
from outrider_exporters import Data, Quantize, Recipe, export
from outrider_exporters.around import open_around
from outrider_exporters.convert import parity
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.engines import engine_named
from support.tflitefiles import parsed_tflite

FORMATS = ("onnx", "tflite")
EXPORT_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one variant, on the held-out rows, as the device's engine answers.

    Attributes:
        parity: largest difference from PyTorch, as a share of the output range.
        changed: share of decisions that differ from the float32 variant of the same format; NaN where none are taken.
        snr_db: power of the float32 variant's outputs over the power of the difference.
        operators: how many of each the file has.
    """

    variant: str
    engine: str
    metric: float
    parity: float
    changed: float
    snr_db: float
    size_bytes: int
    operators: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a bundle says of its quantized forms, and what ``outrider inspect`` prints of it."""

    quantization: Mapping[str, Any]
    inspected: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Ran:
    """A case with everything that was measured of it.

    Attributes:
        torch: the metric of the PyTorch network.
        rows: how many held-out samples the metric is of.
        said: by the form that was asked for.
    """

    case: Case
    parameters: int
    baseline: float
    rows: int
    torch: float
    variants: dict[str, Figures] = field(default_factory=dict)
    said: dict[str, Said] = field(default_factory=dict)

    def loss_noise(self, variant: str) -> float:
        """Of a share of right decisions: the standard deviation of what was lost to float32, in bounds.

        At most every changed decision moved the metric, each by one row; the sum of so many signs has this deviation.
        """
        return (self.variants[variant].changed / self.rows) ** 0.5 / POINT

    def __repr__(self) -> str:
        case = self.case
        lines = [
            f"{case.item:>2} {case.name}: {case.network}; {case.data}; {self.parameters} parameters, {self.rows} rows",
            f"   {case.metric.name}: {case.rule} {self.baseline:.4f}, floor {case.floor}, torch {self.torch:.4f}, "
            f"ceiling {case.ceiling}",
        ]
        lines += [
            f"   {v.variant:<22} {v.engine:<12} {v.metric:.4f}  parity {v.parity:.1e}  changed {v.changed:.2%}  "
            f"SNR {v.snr_db:.1f} dB  {v.size_bytes} bytes"
            for v in self.variants.values()
        ]
        return "\n".join(lines)


def run_case(case: Case, folder: Path) -> Ran:
    """Train, export and run every variant of a case. Raises what ``export`` and ``load`` raise."""
    trained = case.train(JUDGED)
    reference, network = opened(trained)
    inputs = trained.data.test[0]
    wanted = in_chunks(network, inputs)
    ran = Ran(
        case=case,
        parameters=sum(p.numel() for p in trained.module.parameters() if p.requires_grad),
        baseline=trained.baseline,
        rows=trained.samples or len(next(iter(inputs.values()))),
        torch=_metric(case, trained, reference, in_chunks(reference, inputs) if trained.postprocessing else wanted),
    )
    for form, formats in _by_form(case).items():
        bundle = _exported(case, trained, form, formats, folder)
        ran.said[form] = _said(bundle)
        variants = [f"{f}-{precision}" for f in formats for precision in ("float32", form)]
        ran.variants.update(_run(case, trained, bundle, variants, wanted, folder / "state"))
    return ran


def opened(trained: Trained) -> tuple[Predict, Predict]:
    """The PyTorch network as functions of what a caller passes: with all steps around it, and without the last ones."""
    source, caller = open_around(
        trained.module,
        trained.example,
        trained.outputs,
        preprocessing=trained.preprocessing,
        postprocessing=trained.postprocessing,
        axes=trained.axes,
    )
    predict = source.predict()
    return caller.outside(predict), caller.judged(predict)


def _by_form(case: Case) -> dict[str, tuple[str, ...]]:
    """One bundle a quantization scheme: the formats that it suits."""
    forms = dict.fromkeys(case.forms[f] for f in FORMATS)
    return {form: tuple(f for f in FORMATS if case.forms[f] == form) for form in forms}


def _exported(case: Case, trained: Trained, form: str, formats: tuple[str, ...], folder: Path) -> Path:
    report = export(
        trained.module,
        example=trained.example,
        outputs=trained.outputs,
        data=trained.data if case.gates else _fewer(trained.data),
        evaluate=trained.evaluate,
        gates=case.gates,
        preprocessing=trained.preprocessing,
        postprocessing=trained.postprocessing,
        axes=trained.axes,
        recipe=Recipe([Quantize(form)]),
        formats=formats,
        output=folder / f"{case.name}-{form}.outrider",
    )
    return report.bundle


def _said(bundle: Path) -> Said:
    with open_bundle(bundle) as opened:
        quantization = opened.manifest.provenance["quantization"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["inspect", str(bundle)]) == 0
    return Said(quantization=quantization, inspected=printed.getvalue())


def _fewer(data: Data) -> Data:
    """What the export itself evaluates and takes its golden from; all held-out rows are run afterwards."""
    inputs, targets = data.test
    return replace(data, test=({name: array[:EXPORT_ROWS] for name, array in inputs.items()}, targets[:EXPORT_ROWS]))


def _run(
    case: Case, trained: Trained, bundle: Path, variants: list[str], wanted: Outputs, state: Path
) -> dict[str, Figures]:
    """The variants, loaded as a device loads them; a format's float32 one comes before its quantized one."""
    with open_bundle(bundle) as opened:
        manifest = opened.manifest
        files = {name: opened.read(manifest.variant(name).member) for name in variants}
    figures: dict[str, Figures] = {}
    plain: dict[str, Outputs] = {}
    for variant in variants:
        with outrider.load(bundle, state=state, variant=variant, threads=1) as model:
            outputs = in_chunks(model.predict, trained.data.test[0])
            engine, metric = model.engine, _metric(case, trained, model.predict, outputs)
        if trained.postprocessing:
            outputs = _network_outputs(manifest, variant, files[variant], engine, trained, state)
        before = plain.setdefault(manifest.variant(variant).format, outputs)
        figures[variant] = Figures(
            variant=variant,
            engine=engine,
            metric=metric,
            parity=parity(wanted, outputs),
            changed=_changed(trained, before, outputs),
            snr_db=snr_db(before, outputs),
            size_bytes=len(files[variant]),
            operators=operators_of(files[variant], variant.partition("-")[0]),
        )
    return figures


def _network_outputs(
    manifest: Manifest, variant: str, content: bytes, engine: str, trained: Trained, folder: Path
) -> Outputs:
    """What a variant gives before the last steps, on all held-out rows."""
    file = folder / "network"
    file.write_bytes(content)
    session = engine_named(engine).prepare(file, threads=1)
    try:
        bound = BoundSession(session, manifest.interface.judged, manifest.variant(variant).binding)
        return in_chunks(lambda inputs: bound.run(inputs).outputs, trained.data.test[0])
    finally:
        session.close()


def operators_of(file: bytes, model_format: str) -> Mapping[str, int]:
    """How many of each operator a file has, in all of its graphs."""
    if model_format == "onnx":
        return Counter(node.op_type for node in onnx.load_from_string(file).graph.node)
    from ai_edge_litert import schema_py_generated as schema

    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    model = parsed_tflite(file)
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    return Counter(names[codes[node.opcodeIndex]] for graph in model.subgraphs for node in graph.operators)


def _metric(case: Case, trained: Trained, predict: Predict, outputs: Outputs) -> float:
    return trained.evaluate(predict if trained.live else _replay(outputs), trained.data.test)[case.metric.name]


def _replay(outputs: Outputs) -> Predict:
    """A ``predict`` that gives these outputs chunk by chunk, so that no row is computed twice."""
    chunks = iter(range(0, len(next(iter(outputs.values()))), PREDICT_ROWS))

    def predict(inputs: Outputs) -> Outputs:
        at = next(chunks)
        rows = len(next(iter(inputs.values())))
        return {name: array[at : at + rows] for name, array in outputs.items()}

    return predict


def _changed(trained: Trained, before: Outputs, after: Outputs) -> float:
    if trained.decide is None:
        return float("nan")
    inputs = trained.data.test[0]
    return float((trained.decide(before, inputs) != trained.decide(after, inputs)).mean())


def snr_db(before: Outputs, after: Outputs) -> float:
    """Of all float outputs together, in decibels; infinite where nothing differs."""
    floats = [name for name, array in before.items() if array.dtype.kind == "f"]
    power = sum(float((before[name].astype(np.float64) ** 2).sum()) for name in floats)
    noise = sum(float(((before[name].astype(np.float64) - after[name]) ** 2).sum()) for name in floats)
    return float("inf") if noise == 0.0 else 10.0 * float(np.log10(power / noise))
