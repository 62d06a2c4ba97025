"""The hidden size of recurrent layers: all gates of all layers of one module lose the same number of units."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from outrider_exporters.passes.plan import Group
from outrider_exporters.passes.slicing.channels import RECURRENT
from outrider_exporters.passes.slicing.trace import Wiring, kept, least, normalised

if TYPE_CHECKING:
    from outrider_exporters.sources.module import PositionalModule

Reader = nn.Linear | nn.RNNBase


class HiddenPart:
    """The hidden units of one ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``, in all its layers and directions.

    Each layer loses its own least important units; the two directions of a layer lose the same.
    """

    exact = True

    def __init__(self, layer: nn.RNNBase, readers: list[Reader], name: str, round_to: int) -> None:
        self._layer, self._readers = layer, readers
        self._importance = [self._weigh(depth) for depth in range(layer.num_layers)]
        ladder = torch.stack([importance.sort().values for importance in self._importance]).mean(0)
        self.group = Group(
            name=name, kind="hidden", units=layer.hidden_size, step=round_to, importance=tuple(ladder.tolist())
        )

    def silence(self, count: int) -> None:
        """Zero what the least important units of each layer give to others: their own step, the next layer, readers."""
        for depth, importance in enumerate(self._importance):
            gone, _ = least(importance, count)
            for weight, columns in self._outgoing(depth, gone):
                weight.data[:, columns] = 0.0

    def remove(self, count: int) -> None:
        """Cut the least important units of each layer out of all its gates, and out of what reads them."""
        layer, size = self._layer, self._layer.hidden_size
        stays = [least(importance, count)[1] for importance in self._importance]
        directions = 2 if layer.bidirectional else 1
        for depth in range(layer.num_layers):
            for name in _names(layer, depth):
                parameter = getattr(layer, name)
                gates = parameter.shape[0] // size
                rows = torch.cat([stays[depth] + gate * size for gate in range(gates)])
                parameter = kept(parameter, rows, 0)
                if name.startswith("weight_hh"):
                    parameter = kept(parameter, stays[depth], 1)
                elif name.startswith("weight_ih") and depth > 0:
                    parameter = kept(parameter, _both(stays[depth - 1], size, directions), 1)
                setattr(layer, name, parameter)
        columns = _both(stays[-1], size, directions)
        for reader in self._readers:
            _cut_inputs(reader, columns)
        layer.hidden_size = size - count

    def _weigh(self, depth: int) -> torch.Tensor:
        """The squares of all weights that go into a unit and out of it."""
        layer, size = self._layer, self._layer.hidden_size
        total = torch.zeros(size)
        for name in _names(layer, depth):
            if name.startswith("weight"):
                total += (
                    getattr(layer, name).detach().reshape(-1, size, getattr(layer, name).shape[1]).pow(2).sum((0, 2))
                )
        for weight, columns in self._outgoing(depth, torch.arange(size)):
            total += weight.detach()[:, columns].pow(2).sum(0).reshape(-1, size).sum(0)
        return normalised(total)

    def _outgoing(self, depth: int, units: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Weights that read units of a layer, with the columns in which they do."""
        layer = self._layer
        found = [(getattr(layer, name), units) for name in _names(layer, depth) if name.startswith("weight_hh")]
        columns = _both(units, layer.hidden_size, 2 if layer.bidirectional else 1)
        if depth + 1 < layer.num_layers:
            names = [name for name in _names(layer, depth + 1) if name.startswith("weight_ih")]
            return found + [(getattr(layer, name), columns) for name in names]
        return found + [(weight, columns) for reader in self._readers for weight in _input_weights(reader)]


def hidden_parts(
    network: PositionalModule, wiring: Wiring, *, round_to: int, skipped: dict[str, str]
) -> list[HiddenPart]:
    """The recurrent layers whose hidden size may be pruned; ``skipped`` gets the reason for the others."""
    parts = []
    for name, layer in network.module.named_modules():
        if not isinstance(layer, RECURRENT) or layer not in wiring.feeding:
            continue
        readers = [reader for reader in wiring.readers(layer) if reader is not layer]
        reason = _reason(layer, readers, wiring)
        if reason:
            skipped[name or "model"] = reason
        else:
            parts.append(HiddenPart(layer, readers, name or "model", round_to))  # type: ignore[arg-type]
    return parts


def _reason(layer: nn.RNNBase, readers: list[nn.Module], wiring: Wiring) -> str:
    """Why the hidden size must stay; empty when nothing is known."""
    features = layer.hidden_size * (2 if layer.bidirectional else 1)
    if layer.proj_size:
        return "a projected LSTM is not pruned"
    if layer in wiring.outputs:
        return "its hidden state is an output"
    for reader in readers:
        size = reader.in_features if isinstance(reader, nn.Linear) else getattr(reader, "input_size", None)
        if size != features or not isinstance(reader, nn.Linear | nn.RNNBase):
            return f"its hidden state is read by a {type(reader).__name__} of another shape"
    return ""


def _names(layer: nn.RNNBase, depth: int) -> list[str]:
    return [name for name, _ in layer.named_parameters() if name.removesuffix("_reverse").endswith(f"_l{depth}")]


def _both(units: torch.Tensor, size: int, directions: int) -> torch.Tensor:
    """Units of a direction in the features of all directions, one after the other."""
    return torch.cat([units + direction * size for direction in range(directions)])


def _input_weights(reader: Reader) -> list[torch.Tensor]:
    if isinstance(reader, nn.Linear):
        return [reader.weight]
    return [getattr(reader, name) for name in _names(reader, 0) if name.startswith("weight_ih")]


def _cut_inputs(reader: Reader, columns: torch.Tensor) -> None:
    if isinstance(reader, nn.Linear):
        reader.weight = kept(reader.weight, columns, 1)
        reader.in_features = len(columns)
        return
    for name in _names(reader, 0):
        if name.startswith("weight_ih"):
            setattr(reader, name, kept(getattr(reader, name), columns, 1))
    reader.input_size = len(columns)
