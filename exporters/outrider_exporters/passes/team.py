"""The processes that ``torchrun`` started, as one: the same batch over all of them, the same weights in each."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from outrider_runtimes.errors import ConfigError
from outrider_runtimes.tensors import Array

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Team:
    """This process among those that train together. Alone, every method leaves things as they are."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and shows."""
        return self.rank == 0

    def part(self, rows: Array) -> Array:
        """This process's part of a batch; the parts differ by at most one row."""
        return np.array_split(rows, self.size)[self.rank]

    def check_batch(self, rows: int) -> None:
        """Raise ConfigError when a batch of so many rows leaves a process without work."""
        if rows < self.size:
            raise ConfigError(f"a batch has {rows} rows, {self.size} processes train", hint="a greater batch_size")

    def same(self, value: Any) -> Any:
        """What the leader holds. Tensors in it are copied."""
        if self.size == 1:
            return value
        import torch.distributed as processes

        held = [value]
        processes.broadcast_object_list(held, src=0)
        return held[0]

    def same_weights(self, network: nn.Module) -> None:
        """Parameters and buffers become the leader's."""
        if self.size > 1:
            network.load_state_dict(self.same(network.state_dict()))

    def add(self, tensors: Sequence[torch.Tensor]) -> None:
        """Each tensor becomes the sum over the processes."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as processes

        together = torch.cat([tensor.reshape(-1) for tensor in tensors])
        processes.all_reduce(together)
        at = 0
        for tensor in tensors:
            tensor.copy_(together[at : at + tensor.numel()].reshape(tensor.shape))
            at += tensor.numel()

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gradients become their sum over the processes; what has none takes part with zeros."""
        if self.size == 1:
            return
        import torch

        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.add([parameter.grad for parameter in parameters if parameter.grad is not None])


def team_here() -> Team:
    """The processes that ``torchrun`` started, connected by gloo; else this one alone.

    A process group that is there already is used as it is; one that is made here lasts as long as the process, because
    a second one cannot be made over the same store.
    """
    import torch.distributed as processes

    if not processes.is_available():
        return Team()
    if not processes.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Team()
        processes.init_process_group("gloo")
        atexit.register(processes.destroy_process_group)
    return Team(rank=processes.get_rank(), size=processes.get_world_size())


@contextlib.contextmanager
def shared_batch_norms(network: nn.Module, team: Team) -> Iterator[None]:
    """Inside, batch norms take mean and variance over the rows of all processes, as one process would."""
    from torch import nn

    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if team.size == 1 or not norms:
        yield
        return
    from outrider_exporters.passes.shared_norm import forward_of

    try:
        for norm in norms:
            norm.forward = forward_of(norm)  # type: ignore[method-assign, assignment]
        yield
    finally:
        for norm in norms:
            norm.__dict__.pop("forward", None)
