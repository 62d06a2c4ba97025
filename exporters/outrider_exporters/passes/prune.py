"""Structured pruning: whole channels of convolutions and features of linear layers go, and the network is smaller."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from outrider_exporters.passes.base import PassContext, Weight, call_fit
from outrider_exporters.rows import example_rows
from outrider_exporters.values import check_fields
from outrider_runtimes.errors import ConfigError, ExportError, MissingExtra

if TYPE_CHECKING:
    import torch
    from torch import nn

    from outrider_exporters.sources import PositionalModule


EXAMPLE_ROWS = 2  # a batch of one would hide an axis that is squeezed away


@dataclass(frozen=True)
class Prune:
    """Remove the channels of least weight from all layers but those that make the outputs, then fine-tune with ``fit``.

    Attributes:
        ratio: the share of channels to remove from each layer, above 0 and below 1.
        round_to: channel counts stay multiples of this, as the engines' kernels like them, so that the ratio that is
            reached may differ from the one asked for; the report has both.
    """

    ratio: float
    round_to: int = 8
    kind: ClassVar[str] = "prune"

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0.0 < self.ratio < 1.0:
            raise ConfigError(f"ratio is {self.ratio}, expected a number above 0 and below 1")
        if self.round_to < 1:
            raise ConfigError(f"round_to is {self.round_to}, expected 1 or more")

    def requires(self, context: PassContext) -> None:
        """``fit`` and training rows, and torch-pruning."""
        if context.fit is None:
            raise ConfigError("prune needs fit: a pruned network must be fine-tuned", hint="export(..., fit=fit)")
        if context.data.train is None:
            raise ConfigError("prune needs data.train to fine-tune with", hint="Data(train=(inputs, targets), ...)")
        _torch_pruning()

    def call(self, network: PositionalModule, context: PassContext) -> Mapping[str, Any]:
        """Slice, then fine-tune. Gives the channels before and after and the ratio that was reached."""
        from outrider_exporters.sources import as_tensors

        examples = as_tensors(list(example_rows(context.example, context.interface, EXAMPLE_ROWS).values()))
        shapes = _output_shapes(network, examples)
        before = _channels(network)
        slice_channels(network, examples, ratio=self.ratio, round_to=self.round_to)
        after = _channels(network)
        if _output_shapes(network, examples) != shapes:
            raise ExportError("pruning changed the shape of an output", hint="leave prune out of this recipe")
        if after == before:
            raise ExportError(
                f"pruning at ratio {self.ratio:g} with round_to {self.round_to} removed nothing",
                hint="use a greater ratio or a smaller round_to; recurrent layers and outputs are never pruned",
            )
        call_fit(network, context)
        pruned = [name for name in before if before[name] != after[name]]
        total, kept = sum(before[n] for n in pruned), sum(after[n] for n in pruned)
        return {
            "ratio_asked": self.ratio,
            "ratio_reached": round(1.0 - kept / total, 4),
            "channels": {name: [before[name], after[name]] for name in pruned},
        }

    def ensures(self, before: Weight, after: Weight) -> None:
        """Fewer parameters and fewer multiply-accumulates."""
        if after.parameters >= before.parameters or after.macs >= before.macs:
            raise ExportError(
                f"{after.parameters} of {before.parameters} parameters and {after.macs} of {before.macs} MACs are left",
                hint="use a greater ratio or a smaller round_to",
            )


def slice_channels(
    network: PositionalModule, examples: tuple[torch.Tensor, ...], *, ratio: float, round_to: int
) -> None:
    """Remove channels in place. Whether a parameter is trained stays as it was."""
    from torch import nn

    pruning = _torch_pruning()
    trained = {name: p.requires_grad for name, p in network.module.named_parameters()}
    network.requires_grad_(True)
    ignored = output_layers(network, examples)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = pruning.pruner.BasePruner(
                network,
                examples,
                importance=pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=ratio,
                round_to=round_to,
                global_pruning=False,
                ignored_layers=ignored,
                root_module_types=[nn.modules.conv._ConvNd, nn.Linear],
                # Its defaults are dicts shared by all pruners, which would keep this network alive.
                in_channel_groups={},
                out_channel_groups={},
                num_heads={},
            )
            pruner.step()
    except Exception as error:
        raise ExportError(
            f"torch-pruning cannot follow this network: {type(error).__name__}: {error}",
            hint="leave prune out of the recipe; it takes networks of convolutions and linear layers",
        ) from error
    for name, parameter in network.module.named_parameters():
        parameter.requires_grad_(trained[name])


def output_layers(network: PositionalModule, examples: tuple[torch.Tensor, ...]) -> list[nn.Module]:
    """The convolutions and linear layers from which a way leads to an output past no other of them.

    Their channels are the outputs' channels. Found in the autograd graph, so the parameters must require gradients.
    """
    from torch import nn

    makers: dict[Any, nn.Module] = {}

    def remember(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        makers[output.grad_fn] = module

    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    hooks = [layer.register_forward_hook(remember) for layer in layers]
    try:
        outputs = network(*examples)
    finally:
        for hook in hooks:
            hook.remove()
    pending = [tensor.grad_fn for tensor in outputs]
    found, seen = [], set()
    while pending:
        step = pending.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        if step in makers:
            found.append(makers[step])
        else:
            pending.extend(parent for parent, _ in step.next_functions)
    return found


def _channels(network: PositionalModule) -> dict[str, int]:
    from torch import nn

    return {
        name: module.out_features if isinstance(module, nn.Linear) else module.out_channels
        for name, module in network.module.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    }


def _output_shapes(network: PositionalModule, examples: tuple[torch.Tensor, ...]) -> list[tuple[int, ...]]:
    import torch

    with torch.no_grad():
        return [tuple(tensor.shape) for tensor in network(*examples)]


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise MissingExtra("torch-pruning", extra="export", purpose="Prune") from error
    return torch_pruning
