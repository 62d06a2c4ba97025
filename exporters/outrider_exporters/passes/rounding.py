"""A network's forward with the rounding of static int8, whatever layers or functions it is written in.

The rounding follows Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference" (2018): the gradient passes as if nothing was rounded, and ranges are moving averages of those of batches.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from outrider_exporters.convert.observers import Range
from outrider_exporters.passes.base import DIVERGED
from outrider_exporters.passes.places import PASSING, PRODUCTS, Call, Places, find_places
from outrider_exporters.sources.keras_model import is_keras
from outrider_runtimes.errors import ExportError

WEIGHT_MAX = 127
STEPS = 255
MOMENTUM = 0.1  # of the range of a batch in the range that activations are rounded to
Arguments = tuple[torch.Tensor, ...]
Position = tuple[int, ...]  # of a tensor within a call's arguments
See = Callable[[str, Any, Any, Any], Any]
# What methods and operators are called, once their underscores are gone.
_SAME = {
    **{"radd": "add", "iadd": "add", "rsub": "sub", "isub": "sub", "rmul": "mul", "imul": "mul", "truediv": "div"},
    **{"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div"},
    **{"mm": "matmul", "concatenate": "cat", "type_as": "to", "float": "to", "cpu": "to", "permute_dims": "permute"},
}


def round_weight(weight: torch.Tensor, axis: int | None = 0) -> torch.Tensor:
    """float32 of any shape: to the nearest of 255 steps of its channel along ``axis``, or of the whole for None."""
    others = [at for at in range(weight.dim()) if axis is None or at != axis % weight.dim()]
    reach = weight.detach().abs().amax(others, keepdim=True).clamp(min=1e-12)
    scale = reach / WEIGHT_MAX
    return weight + ((weight / scale).round() * scale - weight).detach()


def round_activation(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """To the nearest of 256 steps of a range with zero on a step; what is beyond it is clipped and has no gradient."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / STEPS, 1e-12)
    zero = round(-low / scale)
    clipped = values.clamp(-zero * scale, (STEPS - zero) * scale)
    return clipped + ((clipped / scale).round() * scale - clipped).detach()


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one forward did.

    Attributes:
        calls: of float functions, in order.
        fed: by call, where among its arguments the network's inputs are: position and number of the tensor.
        places: what is rounded.
        first: the number of the first tensor that a call gives.
        weights: the constants of products, as the calls took them, each with its channel axis.
        values: what the tensors were, by number; float32.
    """

    calls: tuple[Call, ...]
    fed: tuple[tuple[tuple[Position, int], ...], ...]
    places: Places
    first: int
    weights: tuple[tuple[torch.Tensor, int], ...]
    values: Mapping[int, torch.Tensor]


def trace(network: nn.Module, names: Sequence[str], arguments: Arguments) -> Trace:
    """Run a network once, as it is, and see which functions it calls on what.

    Args:
        network: takes ``arguments`` and gives a tuple of tensors.
        names: of the arguments.

    Raises:
        ExportError: it calls what cannot be rounded as int8 files do; names the function.
    """
    inputs = {at: name for at, (name, tensor) in enumerate(zip(names, arguments, strict=True)) if _is_float(tensor)}
    mode = _Tracer({number: arguments[number] for number in inputs}, len(arguments), network)
    with torch.no_grad(), mode:
        results = network(*arguments)
    outputs = {mode.number_of(tensor) for tensor in results} - {None}
    return Trace(
        calls=tuple(mode.calls),
        fed=tuple(mode.fed),
        places=find_places(mode.calls, inputs, {number for number in outputs if number is not None}),
        first=len(arguments),
        weights=tuple(mode.weights),
        values=mode.values,
    )


class Rounding:
    """The ranges of a network's tensors while it learns, and the rounding of its forwards to them.

    Args:
        traced: of the same network.
        per_channel: whether a weight has a scale a channel or one.
        ranges: by group, to start from.
    """

    def __init__(self, traced: Trace, *, per_channel: bool, ranges: Mapping[int, Range]) -> None:
        self.trace, self.per_channel = traced, per_channel
        self.ranges: dict[int, Range] = {**ranges, **traced.places.fixed}
        self.forwards = 0

    def learn(self, seen: Mapping[int, Range]) -> None:
        """Move the ranges towards those of one batch."""
        self.forwards += 1
        for group, (low, high) in seen.items():
            if group not in self.trace.places.fixed:
                before = self.ranges[group]
                self.ranges[group] = (_moved(before[0], low), _moved(before[1], high))

    @contextlib.contextmanager
    def on(self, module: nn.Module) -> Iterator[None]:
        """Inside, every call of ``module`` rounds; in training mode it learns the ranges too."""
        running: list[tuple[_Rounder, contextlib.ExitStack]] = []

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            mode = _Rounder(self, [tensor for _, tensor in _tensors((args, kwargs))])
            running.append((mode, contextlib.ExitStack()))
            running[-1][1].enter_context(mode)

        def leave(_: nn.Module, __: Any, result: Any) -> None:
            mode, stack = running.pop()
            stack.close()
            if result is not None:  # else forward raised
                mode.finish(learn=module.training)

        hooks = [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def store_rounded(traced: Trace, *, per_channel: bool) -> None:
    """Round the weights of a network in place, where they are parameters or views of them."""
    with torch.no_grad():
        for weight, axis in traced.weights:
            weight.copy_(round_weight(weight, axis if per_channel else None))


def seen_ranges(places: Places, values: Mapping[int, torch.Tensor]) -> dict[int, Range]:
    """The least and the greatest value of every group, zero among them."""
    found: dict[int, Range] = {}
    for number in places.rounded:
        _widen(found, places.groups[number], values[number])
    return found


class _Watching(TorchFunctionMode, ABC):
    """Sees every call of a function of torch; one that files make of several operators as these."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        name = _name_of(func, args, given)
        if name in PRODUCTS and "weight" in given:
            args = (*args[:1], given.pop("weight"), *args[1:])
        if name in _PARTS and (parts := _PARTS[name](self._see, args, given)) is not None:
            return parts
        return self._see(name, func, args, given)

    @abstractmethod
    def _see(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """The call's result; ``name`` is the operator that files know it by."""


class _Tracer(_Watching):
    def __init__(self, inputs: Mapping[int, torch.Tensor], first: int, network: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.fed: list[tuple[tuple[Position, int], ...]] = []
        self.weights: list[tuple[torch.Tensor, int]] = []
        self.values = {number: tensor.clone() for number, tensor in inputs.items()}
        self._inputs = frozenset(inputs)
        self._numbers = {id(tensor): number for number, tensor in inputs.items()}
        self._alive = list(inputs.values())  # an id is one tensor's only while that lives
        self._next = first
        self._names = _names_by_place(network)
        self._layer = ""

    def number_of(self, tensor: torch.Tensor) -> int | None:
        return self._numbers.get(id(tensor))

    def _see(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        numbered = [(at, self.number_of(tensor)) for at, tensor in _tensors((args, kwargs))]
        taken = [(at, number) for at, number in numbered if number is not None]
        label = self._label(name, args, kwargs)
        result = func(*args, **kwargs)
        given = [tensor for _, tensor in _tensors(result) if _is_float(tensor)]
        if name in PASSING and taken:
            self._numbers.update((id(tensor), taken[0][1]) for tensor in given)
            self._alive += given
        elif taken and given:
            if name in PRODUCTS:
                self._take_weight(name, args, label)
            gives = tuple(self._number(tensor) for tensor in given)
            self.calls.append(Call(name=name, takes=tuple(number for _, number in taken), gives=gives, label=label))
            self.fed.append(tuple((at, number) for at, number in taken if number in self._inputs))
        return result

    def _take_weight(self, name: str, args: Any, label: str) -> None:
        weight = args[1] if len(args) > 1 else None
        if not isinstance(weight, torch.Tensor) or self.number_of(weight) is not None:
            raise ExportError(
                f"qat trains products with weights, and this network multiplies two computed tensors ({label})",
                hint='leave qat out: Quantize("dynamic") is for attention',
            )
        self.weights.append((weight, PRODUCTS[name]))

    def _label(self, name: str, args: Any, kwargs: Any) -> str:
        places = [_place(tensor) for _, tensor in _tensors((args, kwargs))]
        layers = [self._names[place] for place in places if place in self._names]
        self._layer = layers[0].rpartition(".")[0] if layers else self._layer
        return f"{self._layer} {name}".strip()

    def _number(self, tensor: torch.Tensor) -> int:
        number, self._next = self._next, self._next + 1
        self._numbers[id(tensor)] = number
        self._alive.append(tensor)
        self.values[number] = tensor.detach().clone()
        return number


class _Rounder(_Watching):
    """One forward. It must make the calls of the trace; a tensor that is changed in place is looked up anew."""

    def __init__(self, rounding: Rounding, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._rounding, self._places = rounding, rounding.trace.places
        self._done = 0
        self._next = rounding.trace.first
        self._seen: dict[int, Range] = {}
        self._alive = [tensor for tensor in inputs if _is_float(tensor)]
        self._computed = {id(tensor) for tensor in self._alive}
        self._changed: dict[int, torch.Tensor] = {}

    def finish(self, *, learn: bool) -> None:
        """Check that nothing is missing; take what was seen over. Raises ExportError."""
        if self._done != len(self._rounding.trace.calls):
            raise _other_calls(f"it ends before {self._rounding.trace.calls[self._done].label}")
        if learn:
            self._rounding.learn(self._seen)

    def _see(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = _mapped(self._current, (args, kwargs))
        if not any(id(tensor) in self._computed for _, tensor in _tensors((args, kwargs))):
            return func(*args, **kwargs)
        rounded = self._arguments(name, args, kwargs)
        result = func(*rounded[0], **rounded[1])
        given = [tensor for _, tensor in _tensors(result) if _is_float(tensor)]
        if name in PASSING:
            self._alive += given
            self._computed |= {id(tensor) for tensor in given}
        if name in PASSING or not given:
            return result
        self._count(name)
        taken = {
            id(mine): theirs for (_, theirs), (_, mine) in zip(_tensors((args, kwargs)), _tensors(rounded), strict=True)
        }
        replaced = _mapped(lambda _, tensor: self._give(tensor) if _is_float(tensor) else tensor, result)
        for (_, before), (_, after) in zip(_tensors(result), _tensors(replaced), strict=True):
            if (original := taken.get(id(before))) is not None and original is not after:
                self._changed[id(original)] = after  # in place: whoever holds the argument means the result
        return replaced

    def _current(self, _: Position, tensor: torch.Tensor) -> torch.Tensor:
        while id(tensor) in self._changed:
            tensor = self._changed[id(tensor)]
        return tensor

    def _arguments(self, name: str, args: Any, kwargs: Any) -> Any:
        """The network's inputs and the weight of a product, rounded."""
        calls = self._rounding.trace.fed
        fed = dict(calls[self._done]) if self._done < len(calls) and name not in PASSING else {}
        args, kwargs = _mapped(lambda at, x: self._round(x, fed[at]) if at in fed else x, (args, kwargs))
        if name in PRODUCTS:
            axis = PRODUCTS[name] if self._rounding.per_channel else None
            args = (args[0], round_weight(args[1], axis), *args[2:])
        return args, kwargs

    def _count(self, name: str) -> None:
        calls = self._rounding.trace.calls
        wanted = calls[self._done].label if self._done < len(calls) else "nothing more"
        if self._done >= len(calls) or calls[self._done].name != name:
            raise _other_calls(f"it calls {name}, expected {wanted}")
        self._done += 1

    def _give(self, tensor: torch.Tensor) -> torch.Tensor:
        number, self._next = self._next, self._next + 1
        rounded = self._round(tensor, number) if number in self._places.rounded else tensor
        self._alive += [tensor, rounded]
        self._computed |= {id(tensor), id(rounded)}
        return rounded

    def _round(self, tensor: torch.Tensor, number: int) -> torch.Tensor:
        group = self._places.groups[number]
        _widen(self._seen, group, tensor)
        if not all(map(math.isfinite, self._seen[group])):
            raise ExportError(f"qat: {self._places.labels[group]} is NaN or infinite", hint=DIVERGED)
        return round_activation(tensor, *self._rounding.ranges[group])


def _other_calls(what: str) -> ExportError:
    return ExportError(
        f"qat: forward does not make the calls in training that it makes in evaluation: {what}",
        hint="a network that does something else while it learns cannot be trained for its int8 file",
    )


def _linear(see: See, args: Any, kwargs: Any) -> Any:
    """ONNX has a product and a sum for more than two axes, and rounds between them."""
    values, weight, bias = (*args, *kwargs.values(), None)[:3]
    if values.dim() <= 2 or bias is None:
        return None
    return see("add", torch.add, (see("linear", functional.linear, (values, weight), {}), bias), {})


def _gated(name: str, gate: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[See, Any, Any], Any]:
    def parts(see: See, args: Any, kwargs: Any) -> Any:
        return see("mul", torch.mul, (args[0], see(name, gate, (args[0],), {})), {})

    return parts


_PARTS: Mapping[str, Callable[[See, Any, Any], Any]] = {
    "linear": _linear,
    "silu": _gated("sigmoid", torch.sigmoid),
    "hardswish": _gated("hardsigmoid", functional.hardsigmoid),
}


def _name_of(func: Any, args: Any, kwargs: Any) -> str:
    """What a function is called, whichever form of it was called; where its options change what it is, another name."""
    name = str(getattr(func, "__name__", func)).strip("_")
    name = _SAME.get(name, name)
    options = [*args[1:], *kwargs.values()]
    if name == "hardtanh" and options[:2] == [0.0, 6.0]:
        return "relu6"
    if name in ("adaptive_avg_pool1d", "adaptive_avg_pool2d") and options[0] in (1, (1,), (1, 1), [1, 1]):
        return "global_avg_pool"
    if name == "interpolate" and kwargs.get("mode", "nearest") == "nearest":
        return "upsample_nearest"
    if name == "pad" and kwargs.get("value", (*options, None, None, None)[2]):
        return "pad with a value"
    return name


def _tensors(tree: Any, at: Position = ()) -> list[tuple[Position, torch.Tensor]]:
    """The tensors in arguments or results, each with its place."""
    if isinstance(tree, torch.Tensor):
        return [(at, tree)]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [found for place, item in enumerate(items) for found in _tensors(item, (*at, place))]


def _mapped(change: Callable[[Position, torch.Tensor], torch.Tensor], tree: Any, at: Position = ()) -> Any:
    """The same with other tensors."""
    if isinstance(tree, torch.Tensor):
        return change(at, tree)
    if not _tensors(tree):
        return tree  # a torch.Size is a tuple
    if isinstance(tree, dict):
        return {key: _mapped(change, item, (*at, place)) for place, (key, item) in enumerate(tree.items())}
    items = [_mapped(change, item, (*at, place)) for place, item in enumerate(tree)]
    return items if isinstance(tree, list) else tuple(items)


def _names_by_place(network: nn.Module) -> dict[int, str]:
    """What the network calls its parameters; Keras calls a model's weights otherwise than torch does."""
    named: Iterable[tuple[str, torch.Tensor]] = network.named_parameters()
    inner: Any = getattr(network, "module", None)
    if is_keras(inner):
        named = [(weight.path.replace("/", "."), weight.value) for weight in inner.weights]
    return {_place(tensor): name.removeprefix("module.") for name, tensor in named}


def _place(tensor: torch.Tensor) -> int:
    """Where its values are: a view of a parameter has the parameter's."""
    return tensor.untyped_storage().data_ptr()


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point and tensor.numel() > 0


def _widen(found: dict[int, Range], group: int, values: torch.Tensor) -> None:
    low, high = (float(end) for end in values.detach().aminmax())
    before = found.get(group, (0.0, 0.0))
    found[group] = (min(low, before[0]), max(high, before[1]))  # in this order NaN stays


def _moved(before: float, now: float) -> float:
    return before + MOMENTUM * (now - before)
