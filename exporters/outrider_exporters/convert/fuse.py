"""Batch norm into the weights of the layer before it.

The converters do it for convolutions other than transposed ones; training under quantization does it first for all.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CLOSE = 1e-4  # of the largest output; the two orders of rounding differ by a hundredth of it


def fuse_transposed(network: nn.Module, arguments: Sequence[torch.Tensor]) -> nn.Module:
    """A copy of a network in evaluation mode with every ConvTranspose and the batch norm right behind it in one.

    Left as they are, AI Edge Quantizer makes an int8 file of them that the interpreter refuses.

    Args:
        arguments: what the network is run on, to see which layer feeds which.

    Returns:
        The network itself where there is nothing to fuse, or where the fused one answers otherwise, as it does when
        something else looks at the tensor between the two.
    """
    if not any(isinstance(layer, TRANSPOSED) for layer in network.modules()):
        return network
    pairs = _pairs(network, arguments, TRANSPOSED)
    if not pairs:
        return network
    fused = copy.deepcopy(network)
    for conv, norm in pairs:
        _fold(fused, conv, norm)
    return fused if _same(network, fused, arguments) else network


def fold_norms(network: nn.Module, arguments: Sequence[torch.Tensor]) -> tuple[str, ...]:
    """Fold, in place, every batch norm right behind a convolution or dense layer that can be folded.

    A layer's parameters are trained where they were, and a bias that the norm brings where the norm's was.

    Args:
        network: in evaluation mode.
        arguments: see ``fuse_transposed``.

    Returns:
        The paths of the norms that are gone; of those that remain something else looks at what they take.
    """
    folded = []
    for layer, norm in _pairs(network, arguments, FOLDABLE):
        before: tuple[Any, Any] = (network.get_submodule(layer), network.get_submodule(norm))
        if len(before[0].weight) != before[1].num_features:
            continue  # a dense layer over three axes gives other channels than the norm takes
        with torch.no_grad():
            exact = network(*arguments)
        _fold(network, layer, norm)
        if _close(exact, network, arguments):
            folded.append(norm)
        else:
            network.set_submodule(layer, before[0])
            network.set_submodule(norm, before[1])
    return tuple(folded)


def _fold(network: nn.Module, name: str, norm: str) -> None:
    layer: Any = network.get_submodule(name)
    follower: Any = network.get_submodule(norm)
    if isinstance(layer, nn.Linear):
        fused: Any = fuse_linear_bn_eval(layer, follower)
    else:
        fused = fuse_conv_bn_eval(layer, follower, transpose=isinstance(layer, TRANSPOSED))
    if layer.bias is None and follower.bias is not None:
        fused.bias.requires_grad_(follower.bias.requires_grad)
    network.set_submodule(name, fused)
    network.set_submodule(norm, nn.Identity())


def _pairs(
    network: nn.Module, arguments: Sequence[torch.Tensor], layers: tuple[type[nn.Module], ...]
) -> list[tuple[str, str]]:
    """Names of (layer, batch norm) where the second takes what the first gave, both called once."""
    calls: list[tuple[str, nn.Module, Any, Any]] = []

    def hook(name: str) -> Any:
        return lambda layer, taken, given: calls.append((name, layer, taken[0] if taken else None, given))

    handles = [
        layer.register_forward_hook(hook(name))
        for name, layer in network.named_modules()
        if isinstance(layer, layers + NORMS)
    ]
    try:
        with torch.no_grad():
            network(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, *_ in calls]
    return [
        (first[0], second[0])
        for first, second in itertools.pairwise(calls)
        if isinstance(first[1], layers) and _has_statistics(second[1]) and second[2] is first[3]
        if names.count(first[0]) == names.count(second[0]) == 1
    ]


def _has_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, NORMS) and layer.running_mean is not None


def _same(network: nn.Module, fused: nn.Module, arguments: Sequence[torch.Tensor]) -> bool:
    with torch.no_grad():
        return _close(network(*arguments), fused, arguments)


def _close(wanted: Sequence[torch.Tensor], fused: nn.Module, arguments: Sequence[torch.Tensor]) -> bool:
    with torch.no_grad():
        return all(
            bool((exact - close).abs().max() <= CLOSE * exact.abs().max().clamp(min=1e-30))
            for exact, close in zip(wanted, fused(*arguments), strict=True)
            if exact.dtype.is_floating_point and exact.numel()
        )
