"""Batch norm behind a transposed convolution into its weights; the converters do it for other convolutions only."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
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
    pairs = _pairs(network, arguments)
    if not pairs:
        return network
    fused = copy.deepcopy(network)
    for conv, norm in pairs:
        layer: Any = fused.get_submodule(conv)
        follower: Any = fused.get_submodule(norm)
        fused.set_submodule(conv, fuse_conv_bn_eval(layer, follower, transpose=True))
        fused.set_submodule(norm, nn.Identity())
    return fused if _same(network, fused, arguments) else network


def _pairs(network: nn.Module, arguments: Sequence[torch.Tensor]) -> list[tuple[str, str]]:
    """Names of (ConvTranspose, batch norm) where the second takes what the first gave, both called once."""
    calls: list[tuple[str, nn.Module, Any, Any]] = []

    def hook(name: str) -> Any:
        return lambda layer, taken, given: calls.append((name, layer, taken[0] if taken else None, given))

    handles = [
        layer.register_forward_hook(hook(name))
        for name, layer in network.named_modules()
        if isinstance(layer, TRANSPOSED + NORMS)
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
        if isinstance(first[1], TRANSPOSED) and _has_statistics(second[1]) and second[2] is first[3]
        if names.count(first[0]) == names.count(second[0]) == 1
    ]


def _has_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, NORMS) and layer.running_mean is not None


def _same(network: nn.Module, fused: nn.Module, arguments: Sequence[torch.Tensor]) -> bool:
    with torch.no_grad():
        pairs = zip(network(*arguments), fused(*arguments), strict=True)
        return all(
            bool((exact - close).abs().max() <= CLOSE * exact.abs().max().clamp(min=1e-30))
            for exact, close in pairs
            if exact.dtype.is_floating_point and exact.numel()
        )
