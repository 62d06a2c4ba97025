"""Quantization-aware training: the network learns while its weights and activations are rounded as in int8."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from outrider_exporters.passes.base import PassContext, Progress, Weight, call_fit
from outrider_exporters.values import check_fields
from outrider_runtimes.errors import ConfigError, ExportError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from outrider_exporters.sources.module import PositionalModule

WEIGHT_MAX = 127
STEPS = 255
MOMENTUM = 0.1  # of the range of a batch in the range that activations are rounded to


@dataclass(frozen=True)
class QAT:
    """Fine-tune convolutions and dense layers with the rounding of static int8; put ``Quantize("int8")`` behind it.

    A layer's weights are rounded with a scale an output channel, and what it takes with one range for the tensor; the
    gradient passes as if nothing was rounded. Afterwards the weights are exactly what an int8 file stores. The ranges
    of activations are observed anew by ``Quantize``. BatchNorm behind a convolution does not change which weights are
    equal steps, so it stays as it is.

    Attributes:
        rounds: how often ``fit`` is called.
    """

    rounds: int = 1
    kind: ClassVar[str] = "qat"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rounds < 1:
            raise ConfigError(f"rounds is {self.rounds}, expected 1 or more")

    def requires(self, context: PassContext) -> None:
        """``fit`` and training rows."""
        if context.fit is None or context.data.train is None:
            raise ConfigError("qat needs fit and data.train", hint="fit(model, train) fine-tunes in place")

    def call(self, network: PositionalModule, context: PassContext) -> Mapping[str, Any]:
        """Train; gives the number of layers that learned with rounding."""
        layers = _layers(network.module)
        if not layers:
            raise ExportError("qat found no convolution and no dense layer", hint="leave it out")
        with rounding(layers):
            for done in range(self.rounds):
                context.progress(Progress(step="qat", done=done, total=self.rounds, message="fit with rounding"))
                call_fit(network, context)
        return {"layers": len(layers), "rounds": self.rounds}

    def ensures(self, before: Weight, after: Weight) -> None:
        """The network has the parameters that it had."""
        if before.parameters != after.parameters:
            raise ExportError(f"qat changed the number of parameters from {before.parameters} to {after.parameters}")


@contextlib.contextmanager
def rounding(layers: list[nn.Module]) -> Iterator[None]:
    """Inside, these layers round their weights and what they take; afterwards their weights are the rounded ones."""
    from torch.nn.utils import parametrize

    hooks = []
    try:
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", _rounded_weight())
            hooks.append(layer.register_forward_pre_hook(_Activation()))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def round_weight(weight: torch.Tensor) -> torch.Tensor:
    """float32 [out, ...]: to the nearest of 255 steps of its output channel."""
    reach = weight.detach().abs().flatten(1).amax(1).clamp(min=1e-12)
    scale = (reach / WEIGHT_MAX).reshape(-1, *[1] * (weight.dim() - 1))
    return weight + ((weight / scale).round() * scale - weight).detach()


def round_activation(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """To the nearest of 256 steps of a range with zero on a step; what is beyond it is clipped and has no gradient."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / STEPS, 1e-12)
    zero = round(-low / scale)
    clipped = values.clamp(-zero * scale, (STEPS - zero) * scale)
    return clipped + ((clipped / scale).round() * scale - clipped).detach()


class _Activation:
    """A forward pre-hook with the moving range of what its layer takes."""

    def __init__(self) -> None:
        self._range: tuple[float, float] | None = None

    def __call__(self, layer: nn.Module, taken: tuple[Any, ...]) -> tuple[Any, ...] | None:
        values = taken[0]
        if not values.dtype.is_floating_point or not values.numel():
            return None
        known = self._range
        if layer.training or known is None:
            low, high = float(values.detach().min()), float(values.detach().max())
            known = (low, high) if known is None else (_moved(known[0], low), _moved(known[1], high))
            self._range = known
        return (round_activation(values, *known), *taken[1:])


def _moved(before: float, now: float) -> float:
    return before + MOMENTUM * (now - before)


def _rounded_weight() -> nn.Module:
    from torch import nn

    class Rounded(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return round_weight(weight)

    return Rounded()


def _layers(network: nn.Module) -> list[nn.Module]:
    from torch import nn
    from torch.nn.utils import parametrize

    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)
    return [m for m in network.modules() if isinstance(m, kinds) and not parametrize.is_parametrized(m)]
