"""Batch norm over the rows of several processes; PyTorch's own is for graphics processors alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as processes
from torch.nn.modules.batchnorm import _BatchNorm


class _Total(torch.autograd.Function):
    """The sum over the processes. Each has a part of the loss, so a gradient is summed just the same."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        processes.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].clone()
        processes.all_reduce(total)
        return total


def forward_of(norm: _BatchNorm) -> Callable[[torch.Tensor], torch.Tensor]:
    """``norm``'s forward, with the statistics of all processes while it trains; the running ones are PyTorch's."""
    plain = norm.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not norm.training:
            return plain(x)
        total: Callable[[torch.Tensor], torch.Tensor] = _Total.apply
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1, *([1] * (x.dim() - 2))]
        count = total(torch.tensor([float(x.numel() // x.shape[1])]))
        mean = total(x.sum(axes)) / count
        centred = x - mean.reshape(shape)
        variance = total(centred.pow(2).sum(axes)) / count
        _remember(norm, mean.detach(), variance.detach() * count / (count - 1.0).clamp(min=1.0))
        y = centred * (variance + norm.eps).rsqrt().reshape(shape)
        if norm.affine:
            y = y * norm.weight.reshape(shape) + norm.bias.reshape(shape)
        return y

    return forward


def _remember(norm: _BatchNorm, mean: torch.Tensor, variance: torch.Tensor) -> None:
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        share = norm.momentum if norm.momentum is not None else 1.0 / float(norm.num_batches_tracked)
        norm.running_mean.lerp_(mean, share)
        norm.running_var.lerp_(variance, share)
