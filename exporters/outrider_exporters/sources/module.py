"""A trained network as a source: what it takes and gives, and its answers as the reference."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from outrider_exporters.rows import Predict, Sizes, count_rows, default_axes, tile_rows
from outrider_exporters.sources.checks import check_answers, check_kind, check_weights
from outrider_exporters.sources.keras_model import (
    COPY_HINT,
    call_keras,
    check_copy,
    is_channel_last,
    is_keras,
    trained_parameters,
)
from outrider_exporters.sources.sizes import Run, Seen, check_free, check_sizes, follow, probe, sizes_in, with_letters
from outrider_runtimes.errors import ExportError, FormatError
from outrider_runtimes.tensors import (
    BATCH_AXIS,
    DTYPES,
    Array,
    Interface,
    StatePair,
    Tensors,
    TensorSpec,
    check_inputs,
)

if TYPE_CHECKING:
    from outrider_exporters.convert.trained import Trained

PROBE_ROWS = (2, 3)  # torch.export treats a size of 1 as a constant, so no probe has one row
STATE_HINT = "torch's recurrent layers take [layers, N, size]: transpose in forward, so that N is first in the state"
CHUNK_ROWS = 256  # bounds the memory of the reference's activations


class PositionalModule(nn.Module):
    """A copy of a network in evaluation mode, with the interface's tensors in order: what the converters see.

    ``forward`` takes one tensor an input and gives a tuple with one tensor an output. The original is not touched.

    Attributes:
        trained: what training under quantization found, once it ran.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.module = evaluation_copy(module)
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._keras = is_keras(module)
        self.trained: Trained | None = None
        self._by_keyword = not self._keras and _takes_keywords(module, self._inputs)
        self._gathered = None if self._keras or self._by_keyword else _gathers(module, self._inputs)
        self.eval()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One tensor an input, in order; one tensor an output, in order."""
        if self._keras:
            result = call_keras(self.module, self._inputs, tensors, training=self.training)
        elif self._by_keyword:
            result = self.module(**dict(zip(self._inputs, tensors, strict=True)))
        elif self._gathered is not None:
            together = dict(zip(self._inputs, tensors, strict=True)) if self._gathered is dict else tensors
            result = self.module(together)
        else:
            result = self.module(*tensors)
        return _ordered(result, self._outputs)


def evaluation_copy(module: nn.Module) -> nn.Module:
    """A deep copy on the CPU in evaluation mode, its weights checked.

    Raises:
        ExportError: a weight or buffer is not finite, not float32 or has no shape, a layer is quantized or works with
            the statistics of its batch, or the network cannot be copied.
    """
    check_kind(module)
    check_weights(module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras tells of the optimizer's state, which is not needed
            copied: nn.Module = copy.deepcopy(module).cpu().eval().requires_grad_(False)
    except Exception as error:
        raise ExportError(
            f"{type(module).__name__} cannot be copied: {_first_line(error)}",
            hint=COPY_HINT
            if is_keras(module)
            else "keep tensors that need gradients out of the module's attributes, or detach() them",
        ) from error
    if is_keras(module):
        check_copy(copied, module)
    return copied


def trainable_copy(module: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> PositionalModule:
    """A copy that passes may change, trainable where the original is."""
    network = PositionalModule(module, inputs, outputs)
    pairs = [trained_parameters(m) if is_keras(module) else m.parameters() for m in (network.module, module)]
    for mine, original in zip(*pairs, strict=True):
        mine.requires_grad_(original.requires_grad)
    return network


@dataclass(frozen=True, kw_only=True)
class Described:
    """A network's interface, and what was seen of it.

    Attributes:
        sizes: of the free axes, beside the example's, at which the network was run.
    """

    interface: Interface
    sizes: tuple[Sizes, ...] = ()


def interface_from_module(
    module: nn.Module, example: Mapping[str, Array], outputs: Sequence[str], **options: Any
) -> Interface:
    """The interface alone; see ``describe_module``."""
    return describe_module(module, example, outputs, **options).interface


def describe_module(
    module: nn.Module,
    example: Mapping[str, Array],
    outputs: Sequence[str],
    *,
    axes: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
    ranges: Mapping[str, tuple[float, float]] | None = None,
    meanings: Mapping[str, str] | None = None,
    dynamic_axes: Mapping[str, str] | None = None,
    state: Mapping[str, str] | None = None,
) -> Described:
    """The interface of a network, found by running it on an example.

    The first axis of an input is the batch, N, unless ``axes`` says otherwise (``""`` for an input without one). Which
    outputs have a batch is found by running two batch sizes, and which of their axes follow a free one by running
    other sizes of it. Axes that are not named are taken as NCHW (4 axes, float; NHWC for Keras), NC (2 axes, float),
    NT (2 axes, integers), else as letters without a meaning; an output of the state has its input's.

    Args:
        module: its ``forward`` gets the inputs by name where its parameters are called so, else in the example's order;
            a ``forward`` with one parameter gets several inputs as one dict, or as one tuple where it is annotated so.
        example: arrays by input name, at least one row.
        outputs: names for what it returns: in order for a tensor or a tuple, the keys to take for a dict.
        axes, ranges, meanings: by tensor name, inputs and outputs; see TensorSpec.
        labels: what the classes are called.
        dynamic_axes: by input name, the letters of its axes, beside N, that may have any size.
        state: by input name, the output that is this input of the next call.

    Raises:
        ExportError: the network cannot run on the example, or not with another N or another size of a free axis, or a
            weight is not finite; its answers are random, or those of a row depend on the rows beside it; or what it
            gives for the state is not what it takes.
    """
    options = _Options(axes=axes or {}, ranges=ranges or {}, meanings=meanings or {}, last=is_channel_last(module))
    _check_names(example, outputs, options.axes, options.ranges, options.meanings)
    letters = {name: options.letters(name, np.asarray(array)) for name, array in example.items()}
    _check_example(example, letters)
    check_free(dynamic_axes or {}, letters)
    runner = PositionalModule(module, tuple(example), outputs)
    probes = [tile_rows(example, letters, rows) for rows in PROBE_ROWS]
    small, again, large = (_run(runner, list(rows.values()), outputs) for rows in (probes[0], *probes))
    check_answers(outputs, small, again, large)
    free = {name: _places(letters[name], (dynamic_axes or {}).get(name, "")) for name in example}
    pairs = tuple(StatePair(input=before, output=after) for before, after in (state or {}).items())
    try:
        inputs = tuple(
            options.spec(name, np.asarray(array), letters[name], free[name]) for name, array in example.items()
        )
        seen = probe(_by_name(runner, outputs), probes[0], inputs)
        base = Seen(sizes=sizes_in(probes[0], inputs), outputs=small)
        taken = {spec.name: spec for spec in inputs}
        given = _output_specs(outputs, base, large, seen, options)
        given = _like_inputs(given, {p.output: taken[p.input] for p in pairs if p.input in taken})
        interface = Interface(inputs=inputs, outputs=given, labels=tuple(labels), state=pairs)
    except FormatError as error:
        raise ExportError(str(error), hint=error.hint or (STATE_HINT if pairs else "")) from error
    return Described(interface=interface, sizes=tuple(run.sizes for run in seen))


def run_sizes(module: nn.Module, interface: Interface, example: Tensors, asked: Sequence[Sizes]) -> None:
    """Run a network at sizes of its free axes that were asked for. Raises ExportError for one that it cannot take."""
    names = [spec.name for spec in interface.outputs]
    runner = PositionalModule(module, [spec.name for spec in interface.inputs], names)
    rows = tile_rows(example, {spec.name: spec.axes for spec in interface.inputs}, PROBE_ROWS[0])
    check_sizes(_by_name(runner, names), rows, interface.inputs, asked)


def torch_predict(module: nn.Module, interface: Interface) -> Predict:
    """The network as it is now, behind its interface: the reference. Later training does not change it.

    Raises:
        ExportError: a weight is not finite. The function itself raises InputError for wrong inputs.
    """
    names = [spec.name for spec in interface.outputs]
    runner = PositionalModule(module, [spec.name for spec in interface.inputs], names)
    batched = [spec.batched for spec in interface.inputs]
    chunked = any(batched) and all(spec.batched for spec in interface.outputs)

    def predict(inputs: Tensors) -> dict[str, Array]:
        arrays = check_inputs(interface, inputs)
        rows = count_rows(inputs, interface)
        step = CHUNK_ROWS if chunked else max(rows, 1)
        parts = []
        for at in range(0, max(rows, 1), step):
            chunk = [a[at : at + step] if has_rows else a for a, has_rows in zip(arrays, batched, strict=True)]
            parts.append(_run(runner, chunk, names))
        if len(parts) == 1:
            return dict(zip(names, parts[0], strict=True))
        return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}

    return predict


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What a user says of tensors, by name; and whether images have their channels last."""

    axes: Mapping[str, str]
    ranges: Mapping[str, tuple[float, float]]
    meanings: Mapping[str, str]
    last: bool

    def letters(self, name: str, array: Array) -> str:
        return self.axes.get(name, _axes_of(array, self.last))

    def spec(self, name: str, array: Array, letters: str, free: Collection[int]) -> TensorSpec:
        """Args: free: the places of axes that have any size, N aside."""
        places = {0, *free} if letters.startswith(BATCH_AXIS) else free
        bounds = self.ranges.get(name)
        return TensorSpec(
            name=name,
            dtype=_dtype_name(name, array),
            shape=tuple(None if at in places else size for at, size in enumerate(array.shape)),
            axes=letters,
            range=None if bounds is None else (float(bounds[0]), float(bounds[1])),
            meaning=self.meanings.get(name, ""),
        )


def _output_specs(
    names: Sequence[str], base: Seen, larger: Sequence[Array], seen: Sequence[Seen], options: _Options
) -> tuple[TensorSpec, ...]:
    """Args: base, larger: the outputs for few rows and for more; seen: those for other sizes of free axes."""
    specs = []
    for at, (name, first, second) in enumerate(zip(names, base.outputs, larger, strict=True)):
        letters = _output_axes(name, first, second, options.last)
        found = follow(name, letters, (base.sizes, first), [(run.sizes, run.outputs[at]) for run in seen])
        if found:
            letters = with_letters(letters, first.ndim, found)
        specs.append(options.spec(name, first, options.axes.get(name, letters), found))
    return tuple(specs)


def _like_inputs(outputs: tuple[TensorSpec, ...], like: Mapping[str, TensorSpec]) -> tuple[TensorSpec, ...]:
    """Outputs that are the next call's inputs, with their letters where these fit."""
    return tuple(
        replace(spec, axes=like[spec.name].axes) if spec.name in like and spec.shape == like[spec.name].shape else spec
        for spec in outputs
    )


def _places(letters: str, free: str) -> set[int]:
    return {at for at, letter in enumerate(letters) if letter in free}


def _by_name(runner: PositionalModule, names: Sequence[str]) -> Run:
    return lambda inputs: _run(runner, list(inputs.values()), names)


def as_tensors(arrays: Sequence[Array]) -> tuple[torch.Tensor, ...]:
    """Copies, so that no converter or network can write into the caller's arrays."""
    return tuple(torch.from_numpy(np.array(array, order="C", copy=True)) for array in arrays)


def _run(runner: PositionalModule, arrays: Sequence[Array], names: Sequence[str]) -> list[Array]:
    try:
        with torch.inference_mode():
            results = runner(*as_tensors(arrays))
            return [_to_numpy(name, result) for name, result in zip(names, results, strict=True)]
    except ExportError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{array.dtype} {list(array.shape)}" for array in arrays)
        raise ExportError(
            f"{type(runner.module).__name__} failed on inputs of {shapes}: {_first_line(error)}",
            hint="it must take any batch size: use x.shape[0] in forward, not a number; dtypes must be the weights'",
        ) from error


def _to_numpy(name: str, value: object) -> Array:
    if not isinstance(value, torch.Tensor):
        raise ExportError(f"output {name!r} is a {type(value).__name__}, not a tensor")
    if value.dtype == torch.bfloat16:
        raise ExportError(f"output {name!r} is bfloat16, which no engine here takes", hint="model.float()")
    array: Array = value.detach().cpu().numpy()
    return np.array(array, order="C", copy=True)


def _ordered(result: Any, names: Sequence[str]) -> tuple[torch.Tensor, ...]:
    """What a network returned, in the order of the names."""
    if isinstance(result, Mapping):
        missing = [name for name in names if name not in result]
        if missing:
            raise ExportError(f"the network returns {sorted(map(str, result))}, not {missing[0]!r}")
        return tuple(result[name] for name in names)
    flat = _flat(result)
    if len(flat) != len(names):
        raise ExportError(
            f"the network returns {len(flat)} tensors, {len(names)} outputs are named: {list(names)}",
            hint="outputs= needs one name for each tensor that forward returns",
        )
    return flat


def _flat(result: Any) -> tuple[torch.Tensor, ...]:
    if isinstance(result, (tuple, list)):
        return tuple(tensor for item in result for tensor in _flat(item))
    return (result,)


def _gathers(module: nn.Module, names: Sequence[str]) -> type | None:
    """What a ``forward`` with one parameter gets of several inputs: a tuple where its annotation says tuple, list or
    sequence, else a dict by name; None where it has a parameter an input."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if len(names) < 2 or len(parameters) != 1 or parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return None
    said = str(parameters[0].annotation).lower()
    return tuple if any(word in said for word in ("tuple", "list", "sequence")) else dict


def _takes_keywords(module: nn.Module, names: Sequence[str]) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return set(names) <= named


def _output_axes(name: str, small: Array, large: Array, channel_last: bool) -> str:
    if small.shape == large.shape:
        return ""
    if small.shape[:1] + large.shape[:1] == PROBE_ROWS and small.shape[1:] == large.shape[1:]:
        return _axes_of(small, channel_last)
    raise ExportError(
        f"output {name!r} has shape {list(small.shape)} for N = {PROBE_ROWS[0]} and {list(large.shape)} for "
        f"N = {PROBE_ROWS[1]}; only the first axis may follow N"
    )


def _check_names(example: Tensors, outputs: Sequence[str], *options: Mapping[str, Any]) -> None:
    if isinstance(outputs, str) or not outputs:
        raise ExportError(f"outputs is {outputs!r}, expected a list of names", hint='outputs=["logits"]')
    if not example:
        raise ExportError("the example is empty", hint='example={"image": x} with one array an input')
    known = {*example, *outputs}
    for option in options:
        for name in option:
            if name not in known:
                raise ExportError(f"there is no tensor {name!r}", hint=f"the tensors are {sorted(known)}")


def _check_example(example: Tensors, axes: Mapping[str, str]) -> None:
    rows: dict[int, str] = {}
    for name, array in example.items():
        if not isinstance(array, np.ndarray):
            raise ExportError(f"example {name!r} is a {type(array).__name__}, not a numpy array")
        _dtype_name(name, array)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ExportError(f"example {name!r} has NaN or infinite values")
        if len(axes[name]) not in (0, array.ndim):
            raise ExportError(f"axes {axes[name]!r} of {name!r} do not name its {array.ndim} dimensions")
        if axes[name].startswith(BATCH_AXIS):
            rows[array.shape[0]] = name
    if 0 in rows:
        raise ExportError(f"example {rows[0]!r} has no rows")
    if len(rows) > 1:
        raise ExportError(f"the example's inputs have different numbers of rows: {sorted(rows)}")


def _axes_of(array: Array, channel_last: bool) -> str:
    letters = default_axes(array.ndim, array.dtype.name)
    return "NHWC" if channel_last and letters == "NCHW" else letters


def _dtype_name(name: str, array: Array) -> str:
    if array.dtype.name not in DTYPES:
        raise ExportError(f"tensor {name!r} has dtype {array.dtype}", hint=f"one of {', '.join(sorted(DTYPES))}")
    return array.dtype.name


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
