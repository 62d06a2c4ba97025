"""Steps around the network: what a user hands in is at the caller's side, the passes work at the network's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from outrider_exporters.data import Data
from outrider_exporters.measure import Evaluate
from outrider_exporters.rows import Predict, default_axes
from outrider_exporters.sources import Source, open_source
from outrider_runtimes.errors import ConfigError, ExportError, FormatError, InputError
from outrider_runtimes.processing import DecodeImage, Step, around, callers_of, infer_specs, run_steps, shapes_of
from outrider_runtimes.tensors import BATCH_AXIS, Array, Interface, Tensors, TensorSpec, check_named

CHUNK_ROWS = 256  # bounds the memory of what lies between two steps
OPTIONS = ("axes", "ranges", "meanings")  # of a tensor, by its name


@dataclass(frozen=True, kw_only=True)
class Caller:
    """One network seen from its caller's side.

    Attributes:
        interface: the bundle's.
        example: at this side.
    """

    interface: Interface
    example: Tensors

    def prepared(self, inputs: Tensors) -> dict[str, Array]:
        """The network's inputs from the caller's, in chunks of rows. Raises InputError."""
        if self.interface.processing is None:
            return dict(inputs)
        return run_chunks(self.interface.processing.before, self.interface.inputs, inputs)

    def prepared_data(self, data: Data) -> Data:
        """The parts that passes and converters work on at the network's side; the test part stays as it is."""
        if self.interface.processing is None:
            return data
        return Data(
            train=None if data.train is None else (self.prepared(data.train[0]), data.train[1]),
            calibration=None if data.calibration is None else self.prepared(data.calibration),
            certification=data.certification,
            test=data.test,
        )

    def judged(self, predict: Predict) -> Predict:
        """A function of the network's tensors as one of the caller's inputs, up to the network's outputs: what a
        golden stores."""
        return lambda inputs: predict(self.prepared(check_named(self.interface, inputs)))

    def outside(self, predict: Predict) -> Predict:
        """A function of the network's tensors as one of the caller's: the bundle's own steps run around it."""
        processing = self.interface.processing
        if processing is None:
            return predict
        judged = self.judged(predict)
        return lambda inputs: processing.finish(judged(inputs), inputs)

    def evaluated(self, evaluate: Evaluate) -> Evaluate:
        """``evaluate`` for a function of the network's tensors."""
        if self.interface.processing is None:
            return evaluate
        return lambda predict, test: evaluate(self.outside(predict), test)


def open_around(
    model: Any,
    example: Tensors | None,
    outputs: Sequence[str] | None,
    *,
    preprocessing: Sequence[Step] = (),
    postprocessing: Sequence[Step] = (),
    **options: Any,
) -> tuple[Source, Caller]:
    """What an export starts from, and the steps around it.

    Args:
        model, outputs: see ``open_source``; outputs are the network's.
        example: at the caller's side; needed where there are steps.
        options: see ``open_source``; of the tensors by name, those of either side may be named.

    Raises:
        ConfigError: a step does not fit the tensors before it or the network; and as ``open_source``.
        ExportError, ModelLoadError, MissingExtra: as ``open_source``.
    """
    before, after = tuple(preprocessing), tuple(postprocessing)
    if not before and not after:
        source = open_source(model, example, outputs, **options)
        return source, Caller(interface=source.interface, example=source.example)
    if example is None:
        raise ConfigError("example is missing: steps start from what a caller passes", hint='example={"image": x}')
    named = {key: dict(options.get(key) or {}) for key in OPTIONS}
    free = dict(options.get("dynamic_axes") or {})
    files = {step.tensor: step.content_type for step in before if isinstance(step, DecodeImage)}
    for name in files:
        named["axes"].setdefault(name, "NT")
        free[name] = free.get(name, "") + "T"
    inputs = [
        dataclasses.replace(_spec(name, np.asarray(array), named, free.get(name, "")), content_type=files.get(name, ""))
        for name, array in example.items()
    ]
    try:
        made = infer_specs(before, inputs, callers_of(before, inputs))
        rows = run_chunks(before, inputs, example)
    except FormatError as error:
        raise ConfigError(f"preprocessing: {error}", hint=error.hint) from None
    except InputError as error:
        raise ExportError(f"preprocessing of the example: {error}", hint=error.hint) from None
    free = {name: letters.removesuffix("T") if name in files else letters for name, letters in free.items()}
    options["dynamic_axes"] = _still_free(free, example, made)
    source = open_source(model, rows, outputs, **{**options, **_inside(named, made, outputs or ())})
    interface = _declared(source.interface, inputs, before, after, named)
    return source, Caller(interface=interface, example=dict(example))


def run_chunks(before: Sequence[Step], specs: Sequence[TensorSpec], inputs: Tensors) -> dict[str, Array]:
    """The values after a chain of steps, so many rows at a time. Raises InputError."""
    batched = [spec.name for spec in specs if spec.batched]
    rows = max((len(inputs[name]) for name in batched), default=1)
    parts = []
    for at in range(0, max(rows, 1), CHUNK_ROWS):
        part = {name: array[at : at + CHUNK_ROWS] if name in batched else array for name, array in inputs.items()}
        parts.append(run_steps(before, part, shapes_of(part)))
    if len(parts) == 1:
        return parts[0]
    made = infer_specs(before, specs, callers_of(before, specs))
    return {
        spec.name: np.concatenate([part[spec.name] for part in parts]) if spec.batched else parts[0][spec.name]
        for spec in made
    }


def _still_free(free: Mapping[str, str], example: Tensors, made: Sequence[TensorSpec]) -> dict[str, str]:
    """Which axes of the network's inputs have any size; what a step took up or gave a size is free to callers alone."""
    taken_up = example.keys() - {spec.name for spec in made}
    sized = {
        spec.name: [letter for letter, size in zip(spec.axes, spec.shape, strict=False) if size is not None]
        for spec in made
        if spec.name in example
    }
    left = {name: "".join(a for a in letters if a not in sized.get(name, "")) for name, letters in free.items()}
    return {name: letters for name, letters in left.items() if letters and name not in taken_up}


def _inside(named: Mapping[str, Mapping[str, Any]], made: Sequence[TensorSpec], outputs: Sequence[str]) -> Any:
    """The options at the network's side: of its inputs as the steps made them, of its outputs as they were given."""
    found: dict[str, dict[str, Any]] = {key: {n: v for n, v in named[key].items() if n in outputs} for key in OPTIONS}
    for spec in made:
        found["axes"][spec.name] = spec.axes
        if spec.range is not None:
            found["ranges"][spec.name] = spec.range
        if spec.meaning:
            found["meanings"][spec.name] = spec.meaning
    return found


def _declared(
    network: Interface,
    inputs: Sequence[TensorSpec],
    before: tuple[Step, ...],
    after: tuple[Step, ...],
    named: Mapping[str, Mapping[str, Any]],
) -> Interface:
    try:
        made = around(network, inputs, before, after)
        made = dataclasses.replace(made, outputs=tuple(_with_options(spec, named) for spec in made.outputs))
    except FormatError as error:
        raise ConfigError(f"steps around the network: {error}", hint=error.hint) from None
    known = {spec.name for spec in (*inputs, *network.inputs, *network.outputs, *made.outputs)}
    for key in OPTIONS:
        stray = sorted(set(named[key]) - known)
        if stray:
            raise ConfigError(f"{key}: there is no tensor {stray[0]!r}", hint=f"the tensors are {sorted(known)}")
    return made


def _spec(name: str, array: Array, named: Mapping[str, Mapping[str, Any]], free: str) -> TensorSpec:
    letters = named["axes"].get(name, default_axes(array.ndim, array.dtype.name))
    padded = letters.ljust(array.ndim)
    shape = tuple(None if a in free + BATCH_AXIS else s for a, s in zip(padded, array.shape, strict=False))
    try:
        return _with_options(TensorSpec(name=name, dtype=array.dtype.name, shape=shape, axes=letters), named)
    except FormatError as error:
        raise ConfigError(f"example: {error}", hint=error.hint) from None


def _with_options(spec: TensorSpec, named: Mapping[str, Mapping[str, Any]]) -> TensorSpec:
    bounds = named["ranges"].get(spec.name)
    return dataclasses.replace(
        spec,
        range=spec.range if bounds is None else (float(bounds[0]), float(bounds[1])),
        meaning=named["meanings"].get(spec.name, spec.meaning),
    )
