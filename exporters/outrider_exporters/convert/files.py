"""A converted model file, tied to the interface and run by the very engines that devices use."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from outrider_exporters.convert.quiet import quiet
from outrider_exporters.rows import (
    Predict,
    Sizes,
    count_rows,
    example_rows,
    fed_back,
    free_axes,
    resize_axes,
    sizes_text,
)
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.engines import Engine, FileTensor, Session, find_engines
from outrider_runtimes.errors import ExportError, InferenceError, NoEngine, OutriderError
from outrider_runtimes.tensors import (
    Array,
    Binding,
    Interface,
    Shape,
    TensorBinding,
    Tensors,
    TensorSpec,
)

CHANNEL_FIRST = "NCHW"
TO_CHANNEL_LAST = (0, 2, 3, 1)
CHECK_ROWS = (1, 3)  # one row and several: a file that has baked in a batch size fails on one of them
# A conversion that is right is within 1e-6 on the networks tried; a wrong one (a layout, a mode) is far above.
BROKEN_PARITY = 1e-3


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """One model file that was written, loaded and run.

    Attributes:
        format: ``"onnx"`` or ``"tflite"``.
        precision: ``"float32"``, ``"int8"``.
        binding: how its tensors are made from the interface's.
        scheme: how it was made, in one word (``"float32"``, ``"qdq-s8s8-per-channel"``).
        sizes: of the interface's free axes, at which it is checked beside the example's: where its binding has
            signatures all that it takes, else some.
    """

    path: Path
    format: str
    precision: str
    binding: Binding
    scheme: str
    sizes: tuple[Sizes, ...] = ()


def engine_for(model_format: str) -> Engine:
    """The first engine on this workstation for a format. Raises NoEngine, saying why each was passed over."""
    reasons = []
    for engine in find_engines():
        if model_format in engine.formats:
            reason = engine.check()
            if reason is None:
                return engine
            reasons.append(f"{engine.name}: {reason}")
    raise NoEngine(f"no engine here runs {model_format!r} files: {'; '.join(reasons) or 'unknown format'}")


def open_session(path: Path, model_format: str, *, threads: int = 1) -> Session:
    """A file in this process's engine, loaded without a word. Raises ModelLoadError, NoEngine."""
    with quiet():
        return engine_for(model_format).prepare(path, threads=threads)


def open_file(file: ModelFile, interface: Interface, *, threads: int = 1) -> BoundSession:
    """A model file behind its interface, in the engine that devices use. Raises ModelLoadError, NoEngine."""
    return BoundSession(open_session(file.path, file.format, threads=threads), interface, file.binding)


def predict_file(file: ModelFile, interface: Interface, *, threads: int = 1) -> Predict:
    """A model file as a function of the interface's inputs. It is freed with the function."""
    session = open_file(file, interface, threads=threads)

    def predict(inputs: Tensors) -> dict[str, Array]:
        return session.run(inputs).outputs

    return predict


def parity(reference: Tensors, outputs: Tensors) -> float:
    """The largest error over all outputs: that of the worst output.

    Of a float output it is the largest absolute error relative to the range (max - min) of the reference; a reference
    that is constant is measured against its magnitude, one of zeros against 1; NaN against a number is infinitely
    wrong. Of any other output (a class, an index) it is the share of elements that differ.

    Raises:
        ExportError: other names or shapes than the reference's.
    """
    if set(reference) != set(outputs):
        raise ExportError(f"outputs {sorted(outputs)} were to be compared with {sorted(reference)}")
    return max(_relative_error(name, wanted, outputs[name]) for name, wanted in reference.items())


def output_range(array: Array) -> float:
    """What an error is relative to: max - min, else the magnitude, else 1."""
    finite = array.astype(np.float64)[np.isfinite(array.astype(np.float64))]
    if not finite.size:
        return 1.0
    return float(np.ptp(finite)) or float(np.abs(finite).max()) or 1.0


def bind(
    interface: Interface,
    session: Session,
    *,
    channel_last: bool,
    signatures: Sequence[Mapping[str, tuple[int, ...]]] = (),
) -> Binding:
    """The binding of a file that was just converted, its tensors in the interface's order.

    Args:
        channel_last: whether 4-axis NCHW tensors became NHWC.
        signatures: the shapes that the file was made for; without any its axes must be as free as the interface's.

    Raises:
        ExportError: the converter dropped or reshaped a tensor, or fixed a size.
    """
    binding = Binding(
        inputs=_bind_side("input", interface.inputs, session.inputs, channel_last),
        outputs=_bind_side("output", interface.outputs, session.outputs, channel_last),
        signatures=tuple(signatures),
    )
    if not signatures:
        _check_free(interface.inputs, binding.inputs)
        _check_free(interface.outputs, binding.outputs)
    return binding


def signature_shapes(interface: Interface, sizes: Sequence[Sizes]) -> tuple[dict[str, tuple[int, ...]], ...]:
    """The shapes of a channel-last file of one row for some sizes of the interface's free axes, by input."""

    def shape(spec: TensorSpec, given: Sizes) -> tuple[int, ...]:
        free = free_axes(spec)
        sized = [given[free[at]] if at in free else 1 if size is None else size for at, size in enumerate(spec.shape)]
        return tuple(sized[at] for at in TO_CHANNEL_LAST) if is_channel_first(spec) else tuple(sized)

    return tuple({spec.name: shape(spec, given) for spec in interface.inputs} for given in sizes)


def is_channel_first(spec: TensorSpec) -> bool:
    """Whether a channel-last format should turn this tensor."""
    return spec.axes == CHANNEL_FIRST and spec.dtype.startswith("float")


def check_file(file: ModelFile, interface: Interface, example: Tensors, reference: Predict | None = None) -> None:
    """Load a file and run it on one and on several rows, and at other sizes of free axes; compare it with the reference
    where there is one, with the state fed back over several calls.

    Raises:
        ModelLoadError, InferenceError: the engine refused or failed.
        ExportError: outputs of another dtype or shape than the interface's, or far from the reference.
    """
    predict = predict_file(file, interface)
    for inputs, where in inputs_to_check(file, interface, example):
        outputs = _answered(predict, inputs, file, where)
        for spec in interface.outputs:
            _check_output(spec, outputs[spec.name], count_rows(inputs, interface), file)
        if reference is not None:
            error = parity(fed_back(reference, interface)(inputs), fed_back(predict, interface)(inputs))
            if not error <= BROKEN_PARITY:
                raise ExportError(
                    f"the converted {file.format} file answers differently from the network: {error:.2g} of the output "
                    f"range at {where}, at most {BROKEN_PARITY:g} expected",
                    hint="look for random numbers or conditions on values in forward",
                )


def _answered(predict: Predict, inputs: Tensors, file: ModelFile, where: str) -> dict[str, Array]:
    """What the file gives; that it cannot take a size is the converter's failure, not the engine's."""
    try:
        return predict(inputs)
    except InferenceError as error:
        if where not in map(sizes_text, file.sizes):
            raise
        raise ExportError(
            f"the converted {file.format} file cannot take {where}: {error}",
            hint="use x.shape in forward, not a number; a loop over a free axis has the example's number of steps",
        ) from error


def parity_at_sizes(
    file: ModelFile, interface: Interface, reference: Predict, predict: Predict, rows: Tensors
) -> float:
    """The largest ``parity`` over the rows as they are and at the other sizes that the file is checked at, with the
    state fed back over several calls. Raises ExportError."""
    theirs, ours = fed_back(reference, interface), fed_back(predict, interface)
    sized = [rows, *(resize_axes(rows, interface.inputs, sizes) for sizes in file.sizes)]
    return max(parity(theirs(inputs), ours(inputs)) for inputs in sized)


def inputs_to_check(file: ModelFile, interface: Interface, example: Tensors) -> Iterator[tuple[dict[str, Array], str]]:
    """What a file is run on before it is kept, and what that is called: some rows, and other sizes of free axes."""
    batched = any(spec.batched for spec in interface.inputs)
    for rows in CHECK_ROWS if batched else (1,):
        inputs = example_rows(example, interface, rows)
        if not (file.binding.signatures and file.sizes):
            yield inputs, f"N = {rows}"
    for sizes in file.sizes:
        yield resize_axes(inputs, interface.inputs, sizes), sizes_text(sizes)


@contextlib.contextmanager
def kept_when_good(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write to; it becomes ``path`` when the block ends well, else nothing is left.

    Raises:
        ExportError: it cannot be written there.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            part = Path(folder) / path.name
            yield part
            part.replace(path)
    except OSError as error:
        if isinstance(error, OutriderError):
            raise
        raise ExportError(f"{path.name} cannot be written: {error.strerror or error}") from error


def first_line(error: BaseException) -> str:
    """What an exception of a converter says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _relative_error(name: str, wanted: Array, got: Array) -> float:
    if wanted.shape != got.shape:
        raise ExportError(f"output {name!r} has shape {list(got.shape)}, the reference {list(wanted.shape)}")
    if not wanted.size:
        return 0.0
    if wanted.dtype.kind != "f":
        return float(np.mean(wanted != got))
    exact, close = wanted.astype(np.float64), got.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where(exact == close, 0.0, np.abs(exact - close))
    difference[np.isnan(exact) & np.isnan(close)] = 0.0
    error = float(difference.max() / output_range(exact))
    return float("inf") if np.isnan(error) else error


def _bind_side(
    side: str, specs: Sequence[TensorSpec], tensors: Sequence[FileTensor], channel_last: bool
) -> tuple[TensorBinding, ...]:
    if len(specs) != len(tensors):
        raise ExportError(
            f"the converted file has {len(tensors)} {side}s, the interface {len(specs)}: {[s.name for s in specs]}",
            hint=f"every {side} must matter: leave out inputs that forward does not use and outputs that repeat",
        )
    ordered = sorted(tensors, key=lambda tensor: _position(tensor, tensors))
    return tuple(
        _bind_one(spec, tensor, channel_last and is_channel_first(spec))
        for spec, tensor in zip(specs, ordered, strict=True)
    )


def _position(tensor: FileTensor, tensors: Sequence[FileTensor]) -> int:
    """litert-torch numbers its tensors (``args_10``, ``output_2``) and sorts them as text; others keep the order."""
    numbers = [re.fullmatch(r"(?:args|output)_(\d+)", item.name) for item in tensors]
    if all(numbers):
        return int(tensor.name.rsplit("_", 1)[1])
    return list(tensors).index(tensor)


def _bind_one(spec: TensorSpec, tensor: FileTensor, turned: bool) -> TensorBinding:
    permutation = TO_CHANNEL_LAST if turned else ()
    wanted = tuple(spec.shape[axis] for axis in permutation) if permutation else spec.shape
    if not _compatible(tensor.shape, wanted):
        raise ExportError(f"tensor {spec.name!r} became {list(tensor.shape)} in the file, expected {list(wanted)}")
    return TensorBinding(
        name=spec.name,
        file_name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        permutation=permutation,
        scale=tensor.scale,
        zero_point=tensor.zero_point,
    )


def _compatible(shape: Shape, wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(
        size is None or want is None or size == want for size, want in zip(shape, wanted, strict=True)
    )


def _check_free(specs: Sequence[TensorSpec], bound: Sequence[TensorBinding]) -> None:
    for spec, item in zip(specs, bound, strict=True):
        for axis, letter in free_axes(spec).items():
            place = item.permutation.index(axis) if item.permutation else axis
            if item.shape[place] is not None:
                raise ExportError(
                    f"the converter fixed {letter} of {spec.name!r} to {item.shape[place]}",
                    hint="use x.shape in forward, not a number; or leave the letter out of dynamic_axes",
                )


def _check_output(spec: TensorSpec, array: Array, rows: int, file: ModelFile) -> None:
    wanted = tuple(rows if index == 0 and spec.batched else size for index, size in enumerate(spec.shape))
    if array.dtype.name != spec.dtype or not _compatible(array.shape, wanted):
        raise ExportError(
            f"the {file.format} file gives {spec.name!r} as {array.dtype} {list(array.shape)}, "
            f"expected {spec.dtype} {list(wanted)}"
        )
