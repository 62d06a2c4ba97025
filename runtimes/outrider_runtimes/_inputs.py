"""The check of a caller's inputs: ``check_inputs`` is the rule, ``compile_check`` its fast path for one interface.

Public by way of ``outrider_runtimes.tensors``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from outrider_runtimes.errors import DtypeError, NotFiniteError, ShapeError, UnknownTensor

if TYPE_CHECKING:
    from outrider_runtimes.tensors import Array, Interface, Shape, Tensors, TensorSpec

Finite = Literal["reject", "clip", "pass"]
Check = Callable[["Tensors"], "list[Array]"]

DOT_ELEMENTS = 8192  # BLAS may hand a longer dot product to several threads, which then wait for more by spinning
_FLOAT16_INFINITY = 0x7C00  # the bits of it, and the smallest that are not those of a finite number


def check_inputs(interface: Interface, inputs: Tensors, *, finite: Finite = "reject") -> list[Array]:
    """The inputs in the interface's order: C-contiguous, native byte order, of the interface's dtype and shape.

    Only what loses nothing is converted (memory order, byte order); anything else is refused. All batched inputs
    must agree on N. What was passed is never written to.

    Args:
        inputs: by name.
        finite: what becomes of floats that are no finite numbers. ``reject``: refused. ``clip``: infinities, and
            whatever lies beyond the tensor's ``range`` where it has one, are brought to the nearest bound, which is the
            dtype's largest number where there is no range; NaN is refused even so, because any number in its place
            would be invented. ``pass``: not looked at.

    Raises:
        UnknownTensor, DtypeError, ShapeError, NotFiniteError: naming the tensor and what was expected.
    """
    if type(inputs) is not dict and not isinstance(inputs, Mapping):
        raise UnknownTensor(
            f"the inputs are a {type(inputs).__name__}, not arrays by name",
            hint=f"pass a mapping with {[spec.name for spec in interface.inputs]}",
        )
    if len(inputs) != len(interface.inputs) or any(spec.name not in inputs for spec in interface.inputs):
        _raise_names(interface, inputs)
    arrays = []
    rows: int | None = None
    for spec in interface.inputs:
        array = _finite(spec, _checked(spec, inputs[spec.name]), finite)
        if spec.batched:
            if rows is not None and array.shape[0] != rows:
                raise ShapeError(
                    f"input {spec.name!r} has N = {array.shape[0]}, another input {rows}", tensor=spec.name
                )
            rows = array.shape[0]
        arrays.append(array)
    if interface.shared_axes:
        _check_shared(interface, arrays)
    return arrays


def check_named(interface: Interface, inputs: Tensors, *, finite: Finite = "reject") -> dict[str, Array]:
    """As ``check_inputs``, by name in the interface's order."""
    arrays = check_inputs(interface, inputs, finite=finite)
    return {spec.name: array for spec, array in zip(interface.inputs, arrays, strict=True)}


def by_name(interface: Interface, inputs: Tensors | Array) -> Tensors:
    """Inputs by name, unchecked; where there is one input, its array alone will do. Raises UnknownTensor."""
    if isinstance(inputs, Mapping):
        return inputs
    names = [spec.name for spec in interface.inputs]
    if len(names) != 1:
        raise UnknownTensor(f"there are {len(names)} inputs", hint=f"pass a mapping with {names}")
    return {names[0]: inputs}


def compile_check(interface: Interface, *, finite: Finite = "reject") -> Check:
    """``check_inputs`` of one interface, with everything looked up once.

    Inputs that need no conversion are taken at once; any others go to ``check_inputs``, which converts or refuses.
    """
    names = [spec.name for spec in interface.inputs]
    plain = [_compile_plain(spec, finite) for spec in interface.inputs]

    def refer(inputs: Tensors) -> list[Array]:
        return check_inputs(interface, inputs, finite=finite)

    if len(names) == 1:
        return _compile_single(names[0], plain[0], refer)
    batched = [at for at, spec in enumerate(interface.inputs) if spec.batched]
    missing = object()

    def check(inputs: Tensors) -> list[Array]:
        if type(inputs) is not dict or len(inputs) != len(names):
            return refer(inputs)
        arrays: list[Any] = [inputs.get(name, missing) for name in names]
        for is_plain, array in zip(plain, arrays, strict=True):
            if not is_plain(array):
                return refer(inputs)
        if len({arrays[at].shape[0] for at in batched}) > 1:
            return refer(inputs)
        if interface.shared_axes:
            _check_shared(interface, arrays)
        return arrays

    return check


def _compile_single(name: str, is_plain: Callable[[Any], bool], refer: Check) -> Check:
    def check(inputs: Tensors) -> list[Array]:
        if type(inputs) is dict and len(inputs) == 1 and name in inputs:
            array = inputs[name]
            if is_plain(array):
                return [array]
        return refer(inputs)

    return check


def _compile_plain(spec: TensorSpec, finite: Finite) -> Callable[[Any], bool]:
    """Whether a value is one that ``check_inputs`` would hand on as it is; where in doubt, False."""
    native, ndarray = np.dtype(spec.dtype), np.ndarray
    passes = _passes(spec, finite)
    known: tuple[int, ...] | None = None  # the last shape that fitted, nearly always the next one's too

    def is_plain(value: Any) -> bool:
        nonlocal known
        if type(value) is not ndarray or value.dtype is not native or not value.flags.c_contiguous:
            return False
        if value.shape != known:
            if not fits(value.shape, spec.shape):
                return False
            known = value.shape
        return passes is None or passes(value)

    return is_plain


def _passes(spec: TensorSpec, finite: Finite) -> Callable[[Array], bool] | None:
    """Whether all values are such that the policy leaves them alone; None where it leaves any."""
    if finite == "pass" or np.dtype(spec.dtype).kind != "f":
        return None
    if finite == "reject" or spec.range is None:
        return all_finite
    low, high = _bounds(spec)
    return lambda array: not array.size or bool(low <= array.min() and array.max() <= high)  # False for NaN


def _finite(spec: TensorSpec, array: Array, finite: Finite) -> Array:
    """The array by the policy for what is not finite. Raises NotFiniteError."""
    passes = _passes(spec, finite)
    if passes is None or passes(array):
        return array
    if finite == "reject":
        raise NotFiniteError(
            f"input {spec.name!r} has NaN or infinite values",
            tensor=spec.name,
            hint="clean the input before the call; np.isfinite finds the values",
        )
    if np.isnan(array).any():
        raise NotFiniteError(
            f"input {spec.name!r} has NaN, which has no nearest number to clip to",
            tensor=spec.name,
            hint="clean the input before the call; np.isnan finds the values",
        )
    low, high = _bounds(spec)
    return np.clip(array, low, high)


def _bounds(spec: TensorSpec) -> tuple[Any, Any]:
    """The finite bounds of a float tensor, as numbers of its dtype."""
    limits = np.finfo(spec.dtype)
    lowest, largest = float(limits.min), float(limits.max)
    low, high = (lowest, largest) if spec.range is None else spec.range
    return limits.dtype.type(max(low, lowest)), limits.dtype.type(min(high, largest))


def _check_shared(interface: Interface, arrays: list[Array]) -> None:
    for letter, ((first, axis), *others) in interface.shared_axes:
        size = arrays[first].shape[axis]
        for at, other in others:
            if arrays[at].shape[other] != size:
                name, wanted = interface.inputs[at].name, interface.inputs[first].name
                raise ShapeError(
                    f"input {name!r} has {letter} = {arrays[at].shape[other]}, input {wanted!r} {size}", tensor=name
                )


def _raise_names(interface: Interface, inputs: Tensors) -> None:
    wanted = [spec.name for spec in interface.inputs]
    for name in wanted:
        if name not in inputs:
            raise UnknownTensor(
                f"input {name!r} is missing",
                tensor=name,
                hint=f"pass {wanted}; got {sorted(map(str, inputs))}",
            )
    stray = next(name for name in inputs if name not in wanted)
    raise UnknownTensor(f"there is no input {stray!r}", tensor=str(stray), hint=f"the inputs are {wanted}")


def _checked(spec: TensorSpec, value: Any) -> Array:
    if not isinstance(value, np.ndarray):
        raise DtypeError(
            f"input {spec.name!r} is a {type(value).__name__}, not a numpy array",
            tensor=spec.name,
            hint=f"np.asarray(x, dtype={spec.dtype!r})",
        )
    native = np.dtype(spec.dtype)
    # dtype.name costs 4 us, so it is asked only where the dtype is not numpy's own object of that name.
    if value.dtype is not native and value.dtype.newbyteorder("=").name != spec.dtype:
        raise DtypeError(
            f"input {spec.name!r} has dtype {value.dtype}, expected {spec.dtype}",
            tensor=spec.name,
            hint=f"x.astype({spec.dtype!r}), if that keeps its meaning",
        )
    if not fits(value.shape, spec.shape):
        raise ShapeError(
            f"input {spec.name!r} has shape {list(value.shape)}, expected {readable_shape(spec)}", tensor=spec.name
        )
    if value.flags.c_contiguous and value.dtype.isnative:
        return value
    # Not ascontiguousarray, which gives a scalar an axis.
    return np.asarray(value, dtype=native, order="C")


def fits(shape: tuple[int, ...], wanted: Shape) -> bool:
    """Whether a shape is one that a spec allows."""
    return len(shape) == len(wanted) and all(w is None or s == w for s, w in zip(shape, wanted, strict=True))


def readable_shape(spec: TensorSpec) -> str:
    """``[N, 3, H, W]``: letters where any size is allowed."""
    letters = spec.axes or "?" * len(spec.shape)
    return "[" + ", ".join(f"{a}" if s is None else str(s) for a, s in zip(letters, spec.shape, strict=True)) + "]"


def all_finite(array: Array) -> bool:
    """Whether all values are finite. array: C-contiguous floats of any shape."""
    if array.dtype.itemsize == 2:
        return _all_finite_16(array)
    # A finite dot product with itself proves it in one pass. vdot, because dot warns of an overflow.
    if array.size <= DOT_ELEMENTS and math.isfinite(np.vdot(array, array)):
        return True
    return bool(np.isfinite(array).all())


def _all_finite_16(array: Array) -> bool:
    """By the bits, because numpy's isfinite takes 1.4 ns for a float16 and this takes 0.1."""
    return not array.size or bool((array.view(np.uint16) & np.uint16(0x7FFF)).max() < _FLOAT16_INFINITY)
