"""Channels of convolutions and features of linear layers, by the dependency graph of torch-pruning."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from outrider_exporters.passes.plan import Group
from outrider_exporters.passes.slicing.trace import Tensors, attention_modules, kept, least, normalised
from outrider_runtimes.errors import MissingExtra

if TYPE_CHECKING:
    from outrider_exporters.sources.module import PositionalModule

ROOTS = (nn.Linear, nn.modules.conv._ConvNd)
NORMS_OVER_CHANNELS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)


class ChannelPart:
    """The output channels of one layer, and everything that must lose the same ones."""

    def __init__(self, graph: Any, module: nn.Module, name: str, round_to: int) -> None:
        self._graph, self._module = graph, module
        self._function = graph.get_pruner_of_module(module).prune_out_channels
        whole = graph.get_pruning_group(module, self._function, list(range(graph.get_out_channels(module))))
        importance = torch_pruning().importance.GroupMagnitudeImportance(p=2)(whole)
        if importance is None or not bool(torch.isfinite(importance).all()):
            raise ValueError("its channels cannot be weighed")
        self._folds = max((_folds(dep) for dep, _ in whole), default=1)
        self._importance = normalised(importance.reshape(self._folds, -1).mean(0))
        self.targets = [dep.target.module for dep, _ in whole]
        self.made = [dep.target.module for dep, _ in whole if graph.is_out_channel_pruning_fn(dep.handler)]
        self.exact = not any(isinstance(target, NORMS_OVER_CHANNELS) for target in self.targets)
        self.group = Group(
            name=name,
            kind="channels",
            units=len(self._importance),
            step=round_to // math.gcd(round_to, self._folds),
            importance=tuple(sorted(self._importance.tolist())),
        )

    def silence(self, count: int) -> None:
        """Zero the input weights of the layers that read the least important channels."""
        for dep, indices in self._chosen(count):
            layer = dep.target.module
            if not self._graph.is_in_channel_pruning_fn(dep.handler) or self._graph.is_out_channel_pruning_fn(
                dep.handler
            ):
                continue  # norms and depthwise convolutions pass a channel on: both
            for name, weight in layer.named_parameters():
                if isinstance(layer, ROOTS) and name == "weight":
                    _silence_inputs(layer, weight.data, indices)
                elif isinstance(layer, RECURRENT) and name.startswith("weight_ih_l0"):
                    weight.data[:, indices] = 0.0

    def remove(self, count: int) -> None:
        """Cut, here and in all that depends on it."""
        self._chosen(count).prune()

    def _chosen(self, count: int) -> Any:
        gone, _ = least(self._importance, count)
        indices = [int(i) + fold * self.group.units for fold in range(self._folds) for i in gone]
        return self._graph.get_pruning_group(self._module, self._function, indices)


def channel_parts(
    network: PositionalModule, examples: Tensors, *, round_to: int, fixed: Sequence[nn.Module], skipped: dict[str, str]
) -> list[ChannelPart]:
    """The groups of channels that may be pruned.

    Args:
        fixed: layers whose output channels stay.
        skipped: gets the reason why a layer was left out, by its name.
    """
    names = {module: name for name, module in network.module.named_modules()}
    try:
        graph = _dependencies(network, examples)
    except Exception as error:
        skipped["model"] = f"torch-pruning cannot follow this network: {type(error).__name__}: {error}"
        return []
    attention = set(attention_modules(network))
    parts: list[ChannelPart] = []
    taken: set[Any] = set()
    for module in list(graph.module2node):
        if not isinstance(module, ROOTS) or module in taken or module in fixed:
            continue
        try:
            part = ChannelPart(graph, module, names.get(module, "model"), round_to)
        except Exception as error:
            skipped[names.get(module, "model")] = f"torch-pruning: {type(error).__name__}: {error}"
            continue
        taken.update(part.made)
        if attention.intersection(part.targets):
            skipped[part.group.name] = "its features are the width that attention shares"
        elif not any(layer in fixed for layer in part.made):
            parts.append(part)
    return parts


def _dependencies(network: PositionalModule, examples: Tensors) -> Any:
    pruning = torch_pruning()
    with warnings.catch_warnings(), _opaque_recurrence(network):
        warnings.simplefilter("ignore")
        return pruning.DependencyGraph().build_dependency(
            network, example_inputs=examples, customized_pruners=_recurrent_pruners(pruning), verbose=False
        )


def torch_pruning() -> Any:
    """The package. Raises MissingExtra."""
    try:
        import torch_pruning as package
    except ModuleNotFoundError as error:
        raise MissingExtra("torch-pruning", extra="export", purpose="Prune") from error
    return package


def _folds(dep: Any) -> int:
    """Into how many equal parts a grouped layer of a dependency divides its channels; all must lose the same number."""
    module = dep.target.module
    if isinstance(module, nn.modules.conv._ConvNd):
        return 1 if module.groups == module.out_channels else int(module.groups)
    return int(module.num_groups) if isinstance(module, nn.GroupNorm) else 1


def _silence_inputs(layer: nn.Module, weight: torch.Tensor, indices: Sequence[int]) -> None:
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.transposed:
        weight[indices] = 0.0
    elif isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1:
        inputs, outputs = weight.shape[1], weight.shape[0] // layer.groups
        for index in indices:
            block = index // inputs
            weight[block * outputs : (block + 1) * outputs, index % inputs] = 0.0
    else:
        weight[:, indices] = 0.0


class _Through(torch.autograd.Function):
    """A value that is not computed from ``x`` but stands behind it in the autograd graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[None, None]:
        return None, None


@contextlib.contextmanager
def _opaque_recurrence(network: nn.Module) -> Iterator[None]:
    """Inside, a recurrent layer is one step of the autograd graph: torch-pruning loses its way in the unrolled one."""
    layers = [module for module in network.modules() if isinstance(module, RECURRENT)]

    def opaque(layer: nn.RNNBase) -> Any:
        run = layer.forward

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                output, state = run(x, *args, **kwargs)
            through: Any = _Through.apply
            seen = through(x, output)
            if isinstance(state, tuple):
                return seen, tuple(through(seen, item) for item in state)
            return seen, through(seen, state)

        return forward

    try:
        for layer in layers:
            layer.forward = opaque(layer)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _recurrent_pruners(pruning: Any) -> dict[type[nn.Module], Any]:
    """Recurrent layers as torch-pruning should see them: it may cut their inputs, not their hidden units."""

    class Recurrent(pruning.BasePruningFunc):  # type: ignore[misc]
        TARGET_MODULES = RECURRENT

        def prune_in_channels(self, layer: nn.RNNBase, idxs: Sequence[int]) -> nn.Module:
            gone = set(idxs)
            indices = torch.tensor([i for i in range(layer.input_size) if i not in gone])
            for name in [n for n, _ in layer.named_parameters() if n.startswith("weight_ih_l0")]:
                setattr(layer, name, kept(getattr(layer, name), indices, 1))
            layer.input_size = len(indices)
            return layer

        def prune_out_channels(self, layer: nn.RNNBase, idxs: Sequence[int]) -> nn.Module:
            raise ValueError("hidden units are pruned by the recurrent slicer")

        def get_in_channels(self, layer: nn.RNNBase) -> int:
            return int(layer.input_size)

        def get_out_channels(self, layer: nn.RNNBase) -> int:
            return int(layer.hidden_size) * (2 if layer.bidirectional else 1)

    return {kind: Recurrent() for kind in RECURRENT}
