"""Heads of attention: ``nn.MultiheadAttention``, and modules of the user's own that hold the usual four projections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from outrider_exporters.passes.plan import Group
from outrider_exporters.passes.slicing.attention import SlimAttention
from outrider_exporters.passes.slicing.trace import Wiring, kept, least, normalised

if TYPE_CHECKING:
    from outrider_exporters.sources.module import PositionalModule

HEAD_COUNTS = ("heads", "num_heads", "n_heads", "nheads", "nhead", "n_head", "num_attention_heads")


class HeadPart:
    """The heads of an attention module with linear layers for its projections.

    ``forward`` must read the number of heads from the module and must not derive the size of a head from it.
    """

    exact = True

    def __init__(self, module: nn.Module, count: str, projections: list[nn.Linear], out: nn.Linear, name: str) -> None:
        self._module, self._count, self._projections, self._out = module, count, projections, out
        self._heads = int(getattr(module, count))
        self._importance = normalised(self._weigh())
        self.group = Group(
            name=name, kind="heads", units=self._heads, step=1, importance=tuple(sorted(self._importance.tolist()))
        )

    def silence(self, count: int) -> None:
        """Zero the output projection's weights for the least important heads."""
        gone, _ = least(self._importance, count)
        self._out.weight.data[:, self._features(gone)] = 0.0

    def remove(self, count: int) -> None:
        """Cut the least important heads out of all projections."""
        _, stay = least(self._importance, count)
        width, features = self._out.in_features, self._features(stay)
        for layer in self._projections:
            # Query, key and value may be one layer: then its features are so many blocks of the inner width.
            rows = torch.cat([features + block * width for block in range(layer.out_features // width)])
            layer.weight = kept(layer.weight, rows, 0)
            if layer.bias is not None:
                layer.bias = kept(layer.bias, rows, 0)
            layer.out_features = len(rows)
        self._out.weight = kept(self._out.weight, features, 1)
        self._out.in_features = len(features)
        setattr(self._module, self._count, len(stay))

    def _features(self, heads: torch.Tensor) -> torch.Tensor:
        size = self._out.in_features // self._heads
        return (heads[:, None] * size + torch.arange(size)).flatten()

    def _weigh(self) -> torch.Tensor:
        total = self._out.weight.detach().pow(2).sum(0).reshape(self._heads, -1).sum(1)
        for layer in self._projections:
            rows = layer.weight.detach().pow(2).sum(1)
            total = total + rows.reshape(-1, self._heads, self._out.in_features // self._heads).sum((0, 2))
        return total


class BuiltInHeadPart:
    """The heads of ``nn.MultiheadAttention``, which is replaced when it loses one: it cannot have fewer."""

    exact = True

    def __init__(self, network: PositionalModule, module: nn.MultiheadAttention, name: str) -> None:
        self._network, self._module, self._name = network, module, name
        slim = SlimAttention(module)
        self._slim = _slim_part(slim, name)
        self.group = self._slim.group

    def silence(self, count: int) -> None:
        """Zero the output projection's weights for the least important heads."""
        self._slim.silence(count)
        self._module.out_proj.weight.data.copy_(self._slim._out.weight.data)

    def remove(self, count: int) -> None:
        """Put a module with fewer heads in its place, wherever the network holds it."""
        slim = SlimAttention(self._module)
        for parameter in slim.parameters():
            parameter.requires_grad_(self._module.out_proj.weight.requires_grad)
        for module in self._network.modules():
            for name, child in list(module.named_children()):
                if child is self._module:
                    setattr(module, name, slim)
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False  # it looks into nn.MultiheadAttention for this
        _slim_part(slim, self._name).remove(count)


def head_parts(
    network: PositionalModule, wiring: Wiring, *, skipped: dict[str, str]
) -> tuple[list[HeadPart | BuiltInHeadPart], list[nn.Module]]:
    """The attention modules whose heads may be pruned, and the layers inside them, whose features are heads'."""
    parts: list[HeadPart | BuiltInHeadPart] = []
    inner: list[nn.Module] = []
    for name, module in network.module.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            if module.bias_k is not None or module.add_zero_attn:
                skipped[name] = "attention with bias_k or add_zero_attn is not pruned"
            elif module in wiring.feeding:
                parts.append(BuiltInHeadPart(network, module, name))
        elif isinstance(module, SlimAttention):
            parts.append(_slim_part(module, name))
            inner += [module.q, module.k, module.v]
        else:
            part = _own_part(module, wiring, name)
            if part is not None:
                parts.append(part)
                inner += part._projections
    return parts, inner


def _slim_part(module: SlimAttention, name: str) -> HeadPart:
    return HeadPart(module, "heads", [module.q, module.k, module.v], module.out, name)


def _own_part(module: nn.Module, wiring: Wiring, name: str) -> HeadPart | None:
    """An attention of the user's own: a number of heads, projections, and one layer that the projections feed."""
    counts = [key for key in HEAD_COUNTS if type(getattr(module, key, None)) is int]
    linear = [child for child in module.children() if isinstance(child, nn.Linear) and child in wiring.feeding]
    outs = [layer for layer in linear if any(source in linear for source in wiring.feeding[layer])]
    if len(counts) != 1 or len(outs) != 1:
        return None
    out = outs[0]
    projections = [layer for layer in linear if layer in wiring.feeding[out]]
    heads, width = getattr(module, counts[0]), out.in_features
    whole = sum(layer.out_features for layer in projections)
    if heads < 2 or width % heads or whole != 3 * width or any(p.out_features % width for p in projections):
        return None
    return HeadPart(module, counts[0], projections, out, name or "model")
