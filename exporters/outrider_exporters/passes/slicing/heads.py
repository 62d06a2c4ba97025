"""Heads of attention: ``nn.MultiheadAttention``, and modules of the user's own that hold the usual four projections."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from outrider_exporters.passes.plan import Group
from outrider_exporters.passes.slicing.attention import SlimAttention
from outrider_exporters.passes.slicing.trace import Tensors, Wiring, alike, kept, least, normalised, varied

if TYPE_CHECKING:
    from outrider_exporters.sources.module import PositionalModule

_log = logging.getLogger(__name__)

HEAD_COUNTS = ("heads", "num_heads", "n_heads", "nheads", "nhead", "n_head", "num_attention_heads")
HEADS_HINT = (
    "to prune its heads, write their number as self.heads = N in __init__ and read it in forward, and keep the size of "
    "a head in an attribute of its own"
)


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
    network: PositionalModule, wiring: Wiring, examples: Tensors, *, skipped: dict[str, str]
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
            found = _own_attention(module, wiring, name)
            part = None if found is None else _own_part(network, found, examples, skipped)
            if part is not None:
                parts.append(part)
                inner += part._projections
    return parts, inner


def _slim_part(module: SlimAttention, name: str) -> HeadPart:
    return HeadPart(module, "heads", [module.q, module.k, module.v], module.out, name)


@dataclass(frozen=True, kw_only=True)
class _Attention:
    """An attention of the user's own: which module it is, and which of its layers do what, by name."""

    name: str
    projections: tuple[str, ...]
    out: str


def _own_attention(module: nn.Module, wiring: Wiring, name: str) -> _Attention | None:
    """One layer that is fed by projections to query, key and value, which are three layers or one."""
    linear = {
        child: key for key, child in module.named_children() if isinstance(child, nn.Linear) and child in wiring.feeding
    }
    found = []
    for out, key in linear.items():
        sources = [layer for layer in linear if layer in wiring.feeding[out]]
        whole = sum(layer.out_features for layer in sources)
        if whole == 3 * out.in_features and not any(layer.out_features % out.in_features for layer in sources):
            found.append(_Attention(name=name, projections=tuple(linear[layer] for layer in sources), out=key))
    return found[0] if len(found) == 1 else None


def _own_part(
    network: PositionalModule, found: _Attention, examples: Tensors, skipped: dict[str, str]
) -> HeadPart | None:
    """Its heads, where an attribute of the module holds their number."""
    module = network.module.get_submodule(found.name)
    width = getattr(module, found.out).in_features
    known = [key for key in HEAD_COUNTS if type(getattr(module, key, None)) is int]
    if len(known) == 1:
        heads = getattr(module, known[0])
        return _part(network, found, known[0]) if heads >= 2 and width % heads == 0 else None
    for count in _numbers(module, width):
        if _holds_heads(network, found, count, examples):
            return _part(network, found, count)
    skipped[found.name or "model"] = f"no attribute of it was found to hold the number of its heads; {HEADS_HINT}"
    return None


def _numbers(module: nn.Module, width: int) -> Iterator[str]:
    """The attributes of the module and of its class that could be a number of heads."""
    for key in dict.fromkeys((*vars(module), *vars(type(module)))):
        value = getattr(module, key, None)
        if type(value) is int and value >= 2 and width % value == 0:
            yield key


def _holds_heads(network: PositionalModule, found: _Attention, count: str, examples: Tensors) -> bool:
    """Whether the network with a head less by this attribute answers as the one in which nothing reads that head."""
    silenced, cut = copy.deepcopy(network), copy.deepcopy(network)
    try:
        _part(silenced, found, count).silence(1)
        _part(cut, found, count).remove(1)
        probes = varied(examples)
        with torch.no_grad():
            wanted, got = silenced.eval()(*probes), cut.eval()(*probes)
    except Exception:
        _log.debug("no head goes by %s", count, exc_info=True)
        return False
    seen = any(tensor.is_floating_point() for tensor in wanted)
    return seen and all(a.shape == b.shape and alike(a, b) for a, b in zip(wanted, got, strict=True))


def _part(network: PositionalModule, found: _Attention, count: str) -> HeadPart:
    module = network.module.get_submodule(found.name)
    projections = [getattr(module, name) for name in found.projections]
    return HeadPart(module, count, projections, getattr(module, found.out), found.name or "model")
