"""Knowledge distillation: the network learns from a teacher's softened answers and from the targets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from outrider_exporters.passes.base import DIVERGED, PassContext, Progress, Weight, seeded
from outrider_exporters.passes.checkpoint import Checkpoint, fingerprint
from outrider_exporters.passes.losses import Head, check_targets, distillation_loss, head_of, looks_like_probabilities
from outrider_exporters.passes.team import Team, shared_batch_norms, team_here
from outrider_exporters.values import check_fields
from outrider_runtimes.errors import ConfigError, ExportError
from outrider_runtimes.tensors import Array, Interface, Tensors

if TYPE_CHECKING:
    from torch import nn

    from outrider_exporters.sources.module import PositionalModule


@dataclass(frozen=True, kw_only=True)
class _Lessons:
    """The training rows, ready for the loop.

    Attributes:
        inputs: in the interface's order, each with whether it has a batch axis.
        targets: of the dtype of the loss, [rows, ...].
        scores: the teacher's output, float [rows, ...].
        position: of that output among all.
        head: what it is.
    """

    inputs: tuple[tuple[Array, bool], ...]
    targets: Array
    scores: Array
    position: int
    head: Head


@dataclass(frozen=True)
class Distill:
    """Train on a teacher's output, after Hinton, Vinyals and Dean (2015), with Adam and a cosine schedule.

    Class scores, also of every place of a sequence or an image, learn by
    ``alpha * T^2 * KL(teacher / T, student / T) + (1 - alpha) * cross-entropy(student, targets)``; a score for yes or
    no by the same with two classes; numbers by the mean square of the difference, without the temperature. Scores that
    went through softmax or sigmoid in both networks are recognised.

    Under ``torchrun`` each process takes its part of every batch, and all have the weights that one would have.

    Attributes:
        temperature: T, above 0.
        alpha: the weight of the teacher's part, 0 to 1.
        epochs, batch_size, learning_rate: of the loop; the batch is that of all processes together.
        output: the output to learn, before softmax where it is class scores; may be empty when there is one.
        checkpoint: a folder. After every epoch the loop's state is kept there, and a loop that was stopped goes on
            from it to the very weights that it would have had. A finished one is not repeated. Empty: nothing is kept.
    """

    temperature: float = 4.0
    alpha: float = 0.5
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    output: str = ""
    checkpoint: str = field(default="", kw_only=True)
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
        """A teacher, training rows, and an output and targets that belong together."""
        if context.teacher is None:
            raise ConfigError("distill needs a teacher", hint="export(..., teacher=network)")
        if context.data.train is None:
            raise ConfigError("distill needs data.train", hint="Data(train=(inputs, targets), ...)")
        if self.checkpoint and Path(self.checkpoint).exists() and not Path(self.checkpoint).is_dir():
            raise ConfigError(f"checkpoint {self.checkpoint} is not a folder", hint="Distill(checkpoint=folder)")
        position = _position(context.interface, self.output)
        head_of(context.interface.outputs[position], context.data.train[1])

    def call(self, network: PositionalModule, context: PassContext) -> Mapping[str, Any]:
        """Train in place. Gives the mean loss of the first and of the last epoch, and where it was resumed."""
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise ConfigError("no parameter of the network requires a gradient", hint="model.requires_grad_(True)")
        lessons = _prepare(network, context, self.output)
        team = team_here()
        team.check_batch(min(self.batch_size, len(lessons.targets)))
        team.same_weights(network)
        loop = _Loop(self, network, lessons, context, team)
        resumed = loop.resume()
        with shared_batch_norms(network, team):
            network.train()
            try:
                loop.run()
            finally:
                network.eval()
        return {
            "loss_first_epoch": loop.losses[0],
            "loss_last_epoch": loop.losses[-1],
            "head": lessons.head.kind,
            "resumed_after_epoch": resumed,
            "processes": team.size,
        }

    def ensures(self, before: Weight, after: Weight) -> None:
        """The same network with other weights."""
        if before != after:
            raise ExportError(f"distillation changed the network from {before} to {after}")


class _Loop:
    """One training: optimizer, schedule, the losses so far, and its checkpoint.

    Every epoch draws from generators of its own number, so that nothing of an epoch depends on how one got there.
    """

    def __init__(
        self, config: Distill, network: PositionalModule, lessons: _Lessons, context: PassContext, team: Team
    ) -> None:
        import torch

        self._config, self._network, self._lessons = config, network, lessons
        self._context, self._team = context, team
        self._trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.Adam(self._trained, lr=config.learning_rate)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, config.epochs)
        self._checkpoint = self._place() if config.checkpoint else None
        self.losses: list[float] = []

    def resume(self) -> int:
        """Take up what was saved; gives the number of epochs that are done."""
        state = self._checkpoint.load() if self._checkpoint is not None and self._team.leads else None
        state = self._team.same(state)
        if state is not None:
            self._network.load_state_dict(state["network"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._schedule.load_state_dict(state["schedule"])
            self.losses = list(state["losses"])
        return len(self.losses)

    def run(self) -> None:
        """The epochs that are left. Raises ExportError when the loss is not finite."""
        epochs = self._config.epochs
        for epoch in range(len(self.losses) + 1, epochs + 1):
            seeds = np.random.SeedSequence([self._context.seed, epoch, self._team.rank])
            with seeded(int(seeds.generate_state(1)[0])):
                loss = self._epoch(np.random.default_rng([self._context.seed, epoch]))
            self._schedule.step()
            if not math.isfinite(loss):
                raise ExportError(f"the loss is {loss} in epoch {epoch} of {epochs}", hint=DIVERGED)
            self.losses.append(loss)
            if not self._team.leads:
                continue
            self._save()
            message = f"epoch {epoch} of {epochs}, loss {loss:.4f}"
            self._context.progress(Progress(step=self._config.kind, done=epoch, total=epochs, message=message))

    def _epoch(self, rng: np.random.Generator) -> float:
        """One pass over the rows in random order; the mean loss."""
        import torch

        from outrider_exporters.sources.module import as_tensors

        config, lessons, rows = self._config, self._lessons, len(self._lessons.targets)
        total = torch.zeros(1, dtype=torch.float64)
        # Parts of nearly equal size: a last batch of one row would stop batch norm.
        for batch in np.array_split(rng.permutation(rows), max(1, rows // config.batch_size)):
            chosen = self._team.part(batch)
            inputs = as_tensors([a[chosen] if has_rows else a for a, has_rows in lessons.inputs])
            self._optimizer.zero_grad()
            student = self._network(*inputs)[lessons.position]
            teacher, targets = as_tensors([lessons.scores[chosen], lessons.targets[chosen]])
            loss = distillation_loss(
                lessons.head, student, teacher, targets, temperature=config.temperature, alpha=config.alpha
            )
            # Each process's share of the mean over the whole batch; the shares are summed.
            (loss * (len(chosen) / len(batch))).backward()  # type: ignore[no-untyped-call]
            self._team.add_gradients(self._trained)
            self._optimizer.step()
            total += loss.detach().double() * len(chosen)
        self._team.add([total])
        return float(total) / rows

    def _place(self) -> Checkpoint:
        lessons, context = self._lessons, self._context
        config = dataclasses.replace(self._config, checkpoint="")
        words = [config, context.seed, lessons.head, lessons.position]
        arrays = [lessons.scores, lessons.targets, *(array for array, _ in lessons.inputs)]
        return Checkpoint(Path(self._config.checkpoint), config.kind, fingerprint(words, arrays, self._network))

    def _save(self) -> None:
        if self._checkpoint is None:
            return
        self._checkpoint.save(
            {
                "network": self._network.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "schedule": self._schedule.state_dict(),
                "losses": self.losses,
            }
        )


def _position(interface: Interface, output: str) -> int:
    names = [spec.name for spec in interface.outputs]
    if not output and len(names) > 1:
        raise ConfigError(f"distill needs to know which output to learn: {names}", hint="Distill(output=...)")
    if output and output not in names:
        raise ConfigError(f"distill: there is no output {output!r}", hint=f"the outputs are {names}")
    return names.index(output) if output else 0


def _prepare(network: PositionalModule, context: PassContext, output: str) -> _Lessons:
    """Check teacher and targets against the network, and ask the teacher once for every row."""
    from outrider_exporters.sources.module import torch_predict

    if context.teacher is None or context.data.train is None:
        raise ConfigError("distill needs a teacher and data.train")
    position = _position(context.interface, output)
    spec = context.interface.outputs[position]
    inputs, targets = context.data.train
    head = head_of(spec, targets)
    scores = _teacher_scores(context.teacher, inputs, context, spec.name)
    own = torch_predict(network.module, context.interface)(inputs)[spec.name]
    if head.kind == "classes" and scores.ndim == own.ndim and scores.shape[head.axis] != own.shape[head.axis]:
        raise ConfigError(f"the teacher gives {scores.shape[head.axis]} classes, the network {own.shape[head.axis]}")
    if scores.shape != own.shape:
        raise ConfigError(f"the teacher gives {spec.name!r} as {list(scores.shape)}, the network {list(own.shape)}")
    probabilities = looks_like_probabilities(head, scores)
    # Scores of a binary student that has learnt nothing may all be in 0..1.
    if probabilities != looks_like_probabilities(head, own) and (probabilities or head.kind == "classes"):
        raise ConfigError(
            f"output {spec.name!r} is probabilities in one of teacher and network only", hint="both before softmax"
        )
    return _Lessons(
        inputs=tuple((inputs[item.name], item.batched) for item in context.interface.inputs),
        targets=check_targets(head, scores, targets),
        scores=scores,
        position=position,
        head=dataclasses.replace(head, probabilities=probabilities),
    )


def _teacher_scores(teacher: nn.Module, inputs: Tensors, context: PassContext, output: str) -> Array:
    """The teacher's output for every row: float [rows, ...]."""
    from outrider_exporters.sources.module import interface_from_module, torch_predict

    ordered = {spec.name: context.example[spec.name] for spec in context.interface.inputs}
    axes = {spec.name: spec.axes for spec in context.interface.inputs}
    if context.data.train is None:
        raise ConfigError("distill needs data.train")
    try:
        interface = interface_from_module(teacher, ordered, [s.name for s in context.interface.outputs], axes=axes)
        scores = torch_predict(teacher, interface)(inputs)[output]
    except ExportError as error:
        raise ExportError(f"the teacher: {error}", hint=error.hint) from error
    if scores.shape[:1] != context.data.train[1].shape[:1] or not np.isfinite(scores).all():
        raise ExportError(f"the teacher's {output!r} is not one finite answer a row on the training rows")
    return scores
