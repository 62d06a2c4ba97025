"""What a network learns from a teacher, by what its output is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from outrider_runtimes.errors import ConfigError
from outrider_runtimes.tensors import Array, Shape, TensorSpec

if TYPE_CHECKING:
    import torch

SUM_SLACK = 1e-3  # of float32 probabilities over some thousand classes
SMALLEST = 1e-7  # of a probability, before its logarithm


@dataclass(frozen=True, kw_only=True)
class Head:
    """What an output is.

    Attributes:
        kind: ``classes`` (scores, one class number a place), ``binary`` (a score, 0 or 1 a place) or ``values``
            (numbers, numbers).
        axis: of the classes.
        probabilities: whether the scores went through softmax or sigmoid already.
    """

    kind: str
    axis: int = 1
    probabilities: bool = False


def head_of(spec: TensorSpec, targets: Array) -> Head:
    """What an output is, by its shape and that of the targets.

    Scores [N, C], [N, ..., C] or [N, C, ...] go with integers [N, ...]; a score for yes or no with 0 and 1, and numbers
    with numbers, of the same shape ([N, 1] also with [N]).

    Raises:
        ConfigError: the two do not belong together.
    """
    shape, wanted = spec.shape[1:], targets.shape[1:]
    whole = targets.dtype.kind in "iu"
    if spec.batched and spec.dtype.startswith("float") and not _one_hot(targets):
        if _fit(shape, wanted) or (wanted == () and shape == (1,)):
            return Head(kind="binary" if whole else "values")
        if whole and len(shape) == len(wanted) + 1:
            named = spec.axes.find("C") if len(spec.axes) == len(spec.shape) else -1
            for axis in (named, len(shape), 1):
                if axis >= 1 and _fit(shape[: axis - 1] + shape[axis:], wanted):
                    return Head(kind="classes", axis=axis)
    raise ConfigError(
        f"output {spec.name!r} is {spec.dtype} {list(spec.shape)}, the targets are {targets.dtype} "
        f"{list(targets.shape)}: they do not belong together",
        hint="class scores [N, C] go with integers [N], not with one-hot rows; numbers with numbers of the same shape",
    )


def looks_like_probabilities(head: Head, scores: Array) -> bool:
    """Whether class scores are within 0..1 and, over the classes, sum to 1."""
    if head.kind == "values" or not ((scores >= 0.0) & (scores <= 1.0)).all():
        return False
    return head.kind == "binary" or bool(np.abs(scores.sum(head.axis) - 1.0).max() < SUM_SLACK)


def check_targets(head: Head, scores: Array, targets: Array) -> Array:
    """The targets in the dtype of the loss. Raises ConfigError for numbers that name no class."""
    if head.kind == "values":
        return targets.astype(np.float32).reshape(scores.shape)
    classes = 2 if head.kind == "binary" else scores.shape[head.axis]
    if not 0 <= targets.min() <= targets.max() < classes:
        raise ConfigError(f"data.train has targets {targets.min()} to {targets.max()}, the network {classes} classes")
    return targets.astype(np.float32).reshape(scores.shape) if head.kind == "binary" else targets.astype(np.int64)


def distillation_loss(
    head: Head,
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float,
    alpha: float,
) -> torch.Tensor:
    """A scalar, the mean over all places: ``alpha`` of the teacher's part and ``1 - alpha`` of the targets'.

    Of scores the teacher's part is the divergence from its distribution, both softened by the temperature and times
    its square, which keeps its gradients as large as the others'; of numbers it is the mean square of the difference.
    """
    from torch.nn import functional

    if head.kind == "values":
        soft, hard = functional.mse_loss(student, teacher), functional.mse_loss(student, targets)
        return alpha * soft + (1.0 - alpha) * hard
    if head.kind == "binary":
        student, teacher = (_logits(x, binary=True) if head.probabilities else x for x in (student, teacher))
        hard = functional.binary_cross_entropy_with_logits(student, targets)
        softened = (teacher / temperature).sigmoid()
        entropy = functional.binary_cross_entropy_with_logits(teacher / temperature, softened)
        soft = functional.binary_cross_entropy_with_logits(student / temperature, softened) - entropy
        return alpha * temperature**2 * soft + (1.0 - alpha) * hard
    student, teacher = student.movedim(head.axis, -1).flatten(0, -2), teacher.movedim(head.axis, -1).flatten(0, -2)
    if head.probabilities:
        student, teacher = _logits(student), _logits(teacher)
    soft = functional.kl_div(
        functional.log_softmax(student / temperature, dim=-1),
        functional.log_softmax(teacher / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return alpha * temperature**2 * soft + (1.0 - alpha) * functional.cross_entropy(student, targets.flatten())


def _logits(probabilities: torch.Tensor, *, binary: bool = False) -> torch.Tensor:
    """Scores whose softmax (or sigmoid) these are."""
    p = probabilities.clamp(SMALLEST, 1.0 - SMALLEST)
    return p.log() - (1.0 - p).log() if binary else p.log()


def _one_hot(targets: Array) -> bool:
    """Whether each row has a single 1 among zeros."""
    if targets.ndim < 2 or targets.shape[-1] < 2 or not ((targets == 0) | (targets == 1)).all():
        return False
    return bool((targets.sum(-1) == 1).all())


def _fit(shape: Shape, wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(a is None or a == b for a, b in zip(shape, wanted, strict=True))
