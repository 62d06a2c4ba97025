"""Knowledge distillation: the network learns from a teacher's softened answers and from the targets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from outrider_exporters.passes.base import DIVERGED, PassContext, Progress, Weight
from outrider_exporters.values import check_fields
from outrider_runtimes.errors import ConfigError, ExportError
from outrider_runtimes.tensors import Array, Interface, Tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

    from outrider_exporters.sources import PositionalModule


@dataclass(frozen=True, kw_only=True)
class _Lessons:
    """The training rows, ready for the loop.

    Attributes:
        inputs: in the interface's order, each with whether it has a batch axis.
        targets: int64 [rows].
        scores: the teacher's, float [rows, classes].
        position: of the class scores among the outputs.
    """

    inputs: tuple[tuple[Array, bool], ...]
    targets: Array
    scores: Array
    position: int


@dataclass(frozen=True)
class Distill:
    """Train on a teacher's class scores, after Hinton, Vinyals and Dean (2015), with Adam and a cosine schedule.

    The loss is ``alpha * T^2 * KL(teacher / T, student / T) + (1 - alpha) * cross-entropy(student, targets)``; the
    factor T^2 keeps the gradients of the first part as large as those of the second, whatever the temperature T.

    Attributes:
        temperature: T, above 0.
        alpha: the weight of the teacher's part, 0 to 1.
        epochs, batch_size, learning_rate: of the loop.
        output: the output with the class scores before softmax, float [N, classes]; may be empty when there is one.
    """

    temperature: float = 4.0
    alpha: float = 0.5
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    output: str = ""
    kind: ClassVar[str] = "distill"

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("temperature", "learning_rate"):
            value = getattr(self, name)
            if not 0.0 < value < math.inf:
                raise ConfigError(f"{name} is {value}, expected a number above 0")
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"alpha is {self.alpha}, expected a number from 0 to 1")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more")

    def requires(self, context: PassContext) -> None:
        """A teacher, training rows with class numbers as targets, and an output that holds class scores."""
        if context.teacher is None:
            raise ConfigError("distill needs a teacher", hint="export(..., teacher=network)")
        if context.data.train is None:
            raise ConfigError("distill needs data.train", hint="Data(train=(inputs, targets), ...)")
        targets = context.data.train[1]
        if targets.ndim != 1 or targets.dtype.kind not in "iu":
            raise ConfigError(
                f"distill needs one class number a row as targets, not {targets.dtype} {list(targets.shape)}",
                hint="integers [N], not one-hot rows",
            )
        _scores_position(context.interface, self.output)

    def call(self, network: PositionalModule, context: PassContext) -> Mapping[str, Any]:
        """Train in place. Gives the mean loss of the first and of the last epoch."""
        import torch

        trained = [p for p in network.parameters() if p.requires_grad]
        if not trained:
            raise ConfigError("no parameter of the network requires a gradient", hint="model.requires_grad_(True)")
        lessons = _prepare(context, self.output)
        rng = np.random.default_rng(context.seed)
        optimizer = torch.optim.Adam(trained, lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        losses = []
        network.train()
        for epoch in range(1, self.epochs + 1):
            losses.append(self._epoch(network, lessons, optimizer, rng))
            schedule.step()
            if not math.isfinite(losses[-1]):
                raise ExportError(f"the loss is {losses[-1]} in epoch {epoch} of {self.epochs}", hint=DIVERGED)
            message = f"epoch {epoch} of {self.epochs}, loss {losses[-1]:.4f}"
            context.progress(Progress(step=self.kind, done=epoch, total=self.epochs, message=message))
        network.eval()
        return {"loss_first_epoch": losses[0], "loss_last_epoch": losses[-1]}

    def ensures(self, before: Weight, after: Weight) -> None:
        """The same network with other weights."""
        if before != after:
            raise ExportError(f"distillation changed the network from {before} to {after}")

    def _epoch(
        self, network: PositionalModule, lessons: _Lessons, optimizer: torch.optim.Optimizer, rng: np.random.Generator
    ) -> float:
        """One pass over the rows in random order; the mean loss."""
        from outrider_exporters.sources import as_tensors

        rows, total = len(lessons.targets), 0.0
        # Parts of nearly equal size: a last batch of one row would stop batch norm.
        for chosen in np.array_split(rng.permutation(rows), max(1, rows // self.batch_size)):
            batch = [a[chosen] if has_rows else a for a, has_rows in lessons.inputs]
            optimizer.zero_grad()
            student = network(*as_tensors(batch))[lessons.position]
            loss = self.loss(student, *as_tensors([lessons.scores[chosen], lessons.targets[chosen]]))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(loss.detach()) * len(chosen)
        return total / rows

    def loss(self, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """A scalar; student and teacher: float [N, classes]; targets: int64 [N]."""
        from torch.nn import functional

        soft = functional.kl_div(
            functional.log_softmax(student / self.temperature, dim=-1),
            functional.log_softmax(teacher / self.temperature, dim=-1),
            reduction="batchmean",
            log_target=True,
        )
        hard = functional.cross_entropy(student, targets)
        return self.alpha * self.temperature**2 * soft + (1.0 - self.alpha) * hard


def _scores_position(interface: Interface, output: str) -> int:
    names = [spec.name for spec in interface.outputs]
    if not output and len(names) > 1:
        raise ConfigError(
            f"distill needs to know which output has the class scores: {names}", hint="Distill(output=...)"
        )
    if output and output not in names:
        raise ConfigError(f"distill: there is no output {output!r}", hint=f"the outputs are {names}")
    position = names.index(output) if output else 0
    spec = interface.outputs[position]
    if not spec.batched or len(spec.shape) != 2 or not spec.dtype.startswith("float"):
        raise ConfigError(
            f"distill needs class scores, float [N, classes]; output {spec.name!r} is {spec.dtype} {list(spec.shape)}"
        )
    return position


def _prepare(context: PassContext, output: str) -> _Lessons:
    """Check teacher and targets against the network, and ask the teacher once for every row."""
    if context.teacher is None or context.data.train is None:
        raise ConfigError("distill needs a teacher and data.train")
    position = _scores_position(context.interface, output)
    spec = context.interface.outputs[position]
    classes = spec.shape[-1]
    inputs, targets = context.data.train
    scores = _teacher_scores(context.teacher, inputs, context, spec.name)
    if scores.shape[-1] != classes:
        raise ConfigError(f"the teacher gives {scores.shape[-1]} classes, the network {classes}")
    if not 0 <= targets.min() <= targets.max() < scores.shape[-1]:
        raise ConfigError(f"data.train has targets {targets.min()} to {targets.max()}, the network {classes} classes")
    return _Lessons(
        inputs=tuple((inputs[item.name], item.batched) for item in context.interface.inputs),
        targets=targets.astype(np.int64),
        scores=scores,
        position=position,
    )


def _teacher_scores(teacher: nn.Module, inputs: Tensors, context: PassContext, output: str) -> Array:
    """The teacher's scores of every row: float [rows, classes]."""
    from outrider_exporters.sources import interface_from_module, torch_predict

    ordered = {spec.name: context.example[spec.name] for spec in context.interface.inputs}
    axes = {spec.name: spec.axes for spec in context.interface.inputs}
    try:
        interface = interface_from_module(teacher, ordered, [s.name for s in context.interface.outputs], axes=axes)
        scores = torch_predict(teacher, interface)(inputs)[output]
    except ExportError as error:
        raise ExportError(f"the teacher: {error}", hint=error.hint) from error
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise ExportError(f"the teacher's {output!r} is not finite class scores [N, classes] on the training rows")
    return scores
