"""Who feeds whom: the layers of a network as a graph, found in the autograd graph of one run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from outrider_exporters.passes.slicing.attention import SlimAttention

if TYPE_CHECKING:
    from outrider_exporters.sources.module import PositionalModule

Tensors = tuple[torch.Tensor, ...]
# Of the output's range; float32 sums in another order differ by a hundredth of it.
EXACT = 1e-4
LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)


class Wiring:
    """The layers that feed each layer, and those that feed the outputs, past no other layer.

    A layer is a convolution, a linear or a recurrent layer or ``nn.MultiheadAttention``. The parameters must require
    gradients while it is built.
    """

    def __init__(self, network: PositionalModule, examples: Tensors) -> None:
        self._makers: dict[Any, nn.Module] = {}
        self._read: dict[nn.Module, list[torch.Tensor]] = {}
        hooks = [
            hook
            for layer in network.modules()
            if isinstance(layer, LAYERS)
            for hook in (
                layer.register_forward_pre_hook(self._remember_inputs, with_kwargs=True),
                layer.register_forward_hook(self._remember_outputs),
            )
        ]
        try:
            outputs = network(*examples)
        finally:
            for hook in hooks:
                hook.remove()
        self.feeding = {layer: self._sources(tensors) for layer, tensors in self._read.items()}
        self.outputs = self._sources(outputs)
        self._read.clear()
        self._makers.clear()

    def readers(self, layer: nn.Module) -> list[nn.Module]:
        """The layers that this one feeds, in the order in which they ran."""
        return [reader for reader, sources in self.feeding.items() if layer in sources]

    def _remember_inputs(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        self._read.setdefault(layer, []).extend(flat_tensors((args, tuple(kwargs.values()))))

    def _remember_outputs(self, layer: nn.Module, _: Any, output: Any) -> None:
        for tensor in flat_tensors(output):
            if tensor.grad_fn is not None:
                self._makers[tensor.grad_fn] = layer

    def _sources(self, tensors: Iterable[torch.Tensor]) -> list[nn.Module]:
        pending = [tensor.grad_fn for tensor in tensors]
        found: dict[nn.Module, None] = {}
        seen = set()
        while pending:
            step = pending.pop()
            if step is None or step in seen:
                continue
            seen.add(step)
            if step in self._makers:
                found[self._makers[step]] = None
            else:
                pending.extend(parent for parent, _ in step.next_functions)
        return list(found)


def flat_tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in flat_tensors(item)]
    return []


def attention_modules(network: nn.Module) -> list[nn.Module]:
    """``nn.MultiheadAttention`` and what takes its place when it loses heads."""
    return [module for module in network.modules() if isinstance(module, nn.MultiheadAttention | SlimAttention)]


def kept(parameter: torch.Tensor, indices: torch.Tensor, axis: int) -> nn.Parameter:
    """A parameter with only these rows of an axis."""
    sliced = parameter.detach().index_select(axis, indices).clone()
    return nn.Parameter(sliced, requires_grad=parameter.requires_grad)


def least(importance: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` least important indices and all others, both ascending. Of equals the later go first."""
    order = torch.argsort(importance.flip(0), stable=True)
    gone = (len(importance) - 1 - order[:count]).sort().values
    mask = torch.ones(len(importance), dtype=torch.bool)
    mask[gone] = False
    return gone, mask.nonzero().flatten()


def normalised(importance: torch.Tensor) -> torch.Tensor:
    """With a mean of 1, so that groups of different weight compare."""
    mean = float(importance.mean())
    return importance / mean if mean > 0 else torch.ones_like(importance)


def alike(wanted: torch.Tensor, got: torch.Tensor) -> bool:
    """Whether two outputs are the same but for the order of sums."""
    if not wanted.is_floating_point():
        return True  # an index may flip where two scores are equal
    scale = max(float((wanted.max() - wanted.min()).abs()), float(wanted.abs().max()), 1e-6)
    return bool(torch.allclose(wanted, got, rtol=0.0, atol=EXACT * scale, equal_nan=True))


def varied(examples: Sequence[torch.Tensor]) -> Tensors:
    """The examples, with noise in place of a constant: zeros would hide what is wrong."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        if tensor.is_floating_point() and bool((tensor == tensor.flatten()[0]).all())
        else tensor
        for tensor in examples
    )
