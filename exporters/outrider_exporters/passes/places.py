"""Where int8 rounds the tensors of a network, found from the calls that one forward makes. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from outrider_exporters.convert.observers import Range
from outrider_runtimes.errors import ExportError

# A multiplication with weights: the axis of its output channels in the weight, which is the second argument.
PRODUCTS: Mapping[str, int] = {"conv1d": 0, "conv2d": 0, "linear": 0, "matmul": -1}
# What both formats compute in the operator before it, so that only its own result is rounded.
FUSED = frozenset(["relu", "relu6"])
FUSED_INTO = frozenset([*PRODUCTS, "add", "mul", "sub"])
# The result is made of values of the argument, or of zeros: it is on the argument's steps already.
SELECTING = frozenset(
    [
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "max_pool1d", "max_pool2d", "upsample_nearest", "pad"),
        *("chunk", "expand", "get", "getitem", "narrow", "select", "split"),
        *("flatten", "movedim", "permute", "pixel_shuffle", "reshape", "squeeze", "t", "transpose", "unflatten"),
        *("unsqueeze", "view"),
    ]
)
# Nothing of these is in a file, and some of them are called in training only.
PASSING = frozenset(["clone", "contiguous", "detach", "dropout", "dropout1d", "dropout2d", "feature_dropout", "to"])
# The engines give the result the steps of what was taken, or what was taken those of the result.
SHARED = frozenset(["adaptive_avg_pool2d", "avg_pool1d", "avg_pool2d", "cat", "concat", "stack"])
ROUNDED = frozenset(["div", "gelu", "global_avg_pool", "hardsigmoid", "leaky_relu", "mean", *FUSED, *FUSED_INTO])
# TFLite's int8 operators have these ranges whatever they compute: scale 1/256 from 0, and 1/128 from -1.
FIXED: Mapping[str, Range] = {"sigmoid": (0.0, 255 / 256), "softmax": (0.0, 255 / 256), "tanh": (-1.0, 127 / 128)}
KNOWN = SELECTING | SHARED | ROUNDED | FIXED.keys()
NORMS = frozenset(["batch_norm"])


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a function of torch that takes or gives floating-point tensors.

    Attributes:
        name: of the function, without the marks of methods and of in-place forms.
        takes, gives: the numbers of the tensors, constants left out; each number is given once.
        label: a name for people.
    """

    name: str
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    label: str


@dataclass(frozen=True, kw_only=True)
class Places:
    """Which tensors are rounded, and which of them have one range together.

    Attributes:
        groups: of every tensor that is rounded or on the steps of one that is, the number of its group.
        rounded: those that are rounded when they come to be.
        fixed: the ranges of groups whose ranges are no matter of training.
        labels: of the groups.
    """

    groups: Mapping[int, int]
    rounded: frozenset[int]
    fixed: Mapping[int, Range]
    labels: Mapping[int, str]


def find_places(calls: Sequence[Call], inputs: Mapping[int, str], outputs: Collection[int]) -> Places:
    """Every tensor that an int8 file of either format may round, so that training rounds it too.

    Args:
        inputs: the network's float inputs, by number, with their names.
        outputs: the numbers of what the network gives.

    Raises:
        ExportError: a call that has no int8 form which training could round as the files do.
    """
    for call in calls:
        _check_known(call)
    readers = Counter(number for call in calls for number in set(call.takes))
    fused = _fused(calls, readers, set(outputs))
    roots = {number: number for number in inputs}
    rounded, labels = set(inputs), dict(inputs)
    only: dict[int, list[str]] = {number: ["input"] for number in inputs}
    for call in calls:
        for number in call.gives:
            if number in fused:
                continue
            roots[number], labels[number] = number, call.label
            shared = [taken for taken in call.takes if call.name in SELECTING | SHARED and taken in roots]
            for taken in shared:
                _join(roots, taken, number)
            if not (shared and call.name in SELECTING):
                rounded.add(number)
                only[number] = [call.name]
    groups = {number: _root(roots, number) for number in roots}
    made: dict[int, set[str]] = {}
    for number in rounded:
        made.setdefault(groups[number], set()).update(only[number])
    return Places(
        groups=groups,
        rounded=frozenset(rounded),
        fixed={group: FIXED[min(names)] for group, names in made.items() if len(names) == 1 and names <= FIXED.keys()},
        labels={group: labels[group] for group in set(groups.values())},
    )


def _check_known(call: Call) -> None:
    if call.name in NORMS:
        raise ExportError(
            f"qat: batch norm ({call.label}) cannot be folded into a layer before it",
            hint="it must take what one convolution or dense layer gives, and nothing else may take that",
        )
    if call.name not in KNOWN:
        raise ExportError(
            f"qat trains networks of convolutions and dense layers, and this one calls {call.name} ({call.label})",
            hint='leave qat out: Quantize("dynamic") and Quantize("weight-only") take recurrent layers and attention',
        )


def _fused(calls: Sequence[Call], readers: Mapping[int, int], outputs: set[int]) -> set[int]:
    """The tensors that no file has, because the activation behind them is computed with them."""
    makers = {number: call.name for call in calls for number in call.gives}
    return {
        number
        for call in calls
        if call.name in FUSED
        for number in call.takes
        if makers.get(number) in FUSED_INTO and readers[number] == 1 and number not in outputs
    }


def _root(roots: dict[int, int], number: int) -> int:
    while roots[number] != number:
        number = roots[number]
    return number


def _join(roots: dict[int, int], first: int, second: int) -> None:
    """One group, which is called after the tensor that was there first."""
    low, high = sorted((_root(roots, first), _root(roots, second)))
    roots[high] = low
