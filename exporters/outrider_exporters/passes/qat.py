"""Quantization-aware training: the network learns while its weights and activations are rounded as in int8."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from outrider_exporters.convert.observers import Range
from outrider_exporters.convert.trained import Trained, TrainedTensor
from outrider_exporters.data import draw_rows
from outrider_exporters.passes.base import PassContext, Progress, Weight, call_fit, seeded
from outrider_exporters.passes.checkpoint import Checkpoint, fingerprint
from outrider_exporters.passes.quantize import Quantize
from outrider_exporters.rows import count_rows, example_rows
from outrider_exporters.values import check_fields
from outrider_runtimes.errors import ConfigError, ExportError
from outrider_runtimes.tensors import Tensors

if TYPE_CHECKING:
    from outrider_exporters.passes.rounding import Rounding, Trace
    from outrider_exporters.sources.module import PositionalModule

START_ROWS = 64  # of the training rows, whose ranges the moving averages start from
CHUNK_ROWS = 8  # every tensor of so many rows is in memory at once
PROBE_ROWS = 4  # on which a file's tensors are recognised


@dataclass(frozen=True)
class QAT:
    """Fine-tune convolutions and dense layers with the rounding of static int8; put ``Quantize("int8")`` behind it.

    Batch norm is folded into the layer before it first, so that what is trained is what the files have. Then every
    weight and every tensor between operators is rounded in each forward as an int8 file rounds it, and the gradient
    passes as if it was not. The range of a tensor is a moving average of those of the batches; the weights become
    what an int8 file stores (those of Keras convolutions in the int8 files only). ``Quantize("int8")`` writes these
    ranges into both formats and observes none; a file in which another range would be used is refused. Only TFLite's
    sigmoid, softmax and tanh have ranges of their own, and these are what is trained with.

    Measured on 597 held-out digits, per-tensor int8 of a depthwise-separable network with channels of very different
    reach (tests/exporters/test_qat_files.py), the same in ONNX and TFLite: fp32 0.960; post-training int8 0.846; four
    epochs of fp32 fine-tuning 0.980, and int8 of that 0.838; four epochs of this pass 0.966. On the same network as it
    was trained, where post-training int8 loses nothing, fine-tuning and this pass came to the same 0.978.

    Attributes:
        rounds: how often ``fit`` is called.
        per_channel: a scale a channel of a weight, or one a weight; as in the ``Quantize("int8")`` behind it.
        checkpoint: a folder. After every round the weights and ranges are kept there, and a training that was stopped
            goes on from it; ``fit`` must not depend on earlier rounds otherwise than by the network. The folder is
            for one ``fit``: remove it when that changes. Empty: nothing is kept.
    """

    rounds: int = 1
    per_channel: bool = field(default=True, kw_only=True)
    checkpoint: str = field(default="", kw_only=True)
    kind: ClassVar[str] = "qat"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rounds < 1:
            raise ConfigError(f"rounds is {self.rounds}, expected 1 or more")

    def requires(self, context: PassContext) -> None:
        """``fit`` and training rows, and a network of convolutions and dense layers."""
        if context.fit is None or context.data.train is None:
            raise ConfigError("qat needs fit and data.train", hint="fit(model, train) fine-tunes in place")
        if self.checkpoint and Path(self.checkpoint).exists() and not Path(self.checkpoint).is_dir():
            raise ConfigError(f"checkpoint {self.checkpoint} is not a folder", hint="QAT(checkpoint=folder)")
        if context.network is not None:
            try:
                _prepare(copy.deepcopy(context.network), context)
            except ExportError as error:
                raise ConfigError(str(error), hint=error.hint) from error

    def call(self, network: PositionalModule, context: PassContext) -> Mapping[str, Any]:
        """Train, and leave what was learned in ``network.trained``.

        Gives the number of layers, the norms that were folded, the ranges and where the training was resumed.
        """
        from outrider_exporters.passes.rounding import Rounding, store_rounded

        traced, folded = _prepare(network, context)
        rounding = Rounding(traced, per_channel=self.per_channel, ranges=_start(network, context, traced))
        resumed = self._train(network, context, rounding)
        learned = _trace(network, context, _drawn(context, 1))
        if learned.calls != traced.calls:
            raise ExportError("fit changed what the network computes", hint="fit(model, train) must only train it")
        store_rounded(learned, per_channel=self.per_channel)
        network.trained = _trained(network, context, rounding)
        return {
            "layers": len({weight.data_ptr() for weight, _ in traced.weights}),
            "rounds": self.rounds,
            "resumed_after_round": resumed,
            "folded": list(folded),
            "ranges": _by_label(rounding),
        }

    def ensures(self, before: Weight, after: Weight) -> None:
        """As many multiplications as before; ``call`` sees to it that the network computes what it computed."""
        if before.macs != after.macs:
            raise ExportError(f"qat changed the network from {before} to {after}")

    def _train(self, network: PositionalModule, context: PassContext, rounding: Rounding) -> int:
        """The rounds; gives the number of those that a checkpoint had."""
        place = self._place(network, context)
        resumed = _resume(place, network, rounding)
        for done in range(resumed, self.rounds):
            context.progress(Progress(step="qat", done=done, total=self.rounds, message="fit with rounding"))
            rounding.forwards = 0
            seeds = np.random.SeedSequence([context.seed, done])
            with rounding.on(network.module), seeded(int(seeds.generate_state(1)[0])):
                call_fit(network, context)
            if not rounding.forwards:
                raise ExportError(
                    "qat: fit did not run the network in training mode",
                    hint="fit(model, train) calls model(inputs) itself, after model.train()",
                )
            if place is not None:
                ranges = {str(group): list(bounds) for group, bounds in rounding.ranges.items()}
                place.save({"network": network.state_dict(), "ranges": ranges, "done": done + 1})
        return resumed

    def _place(self, network: PositionalModule, context: PassContext) -> Checkpoint | None:
        if not self.checkpoint or context.data.train is None:
            return None
        inputs, targets = context.data.train
        words = [dataclasses.replace(self, checkpoint=""), context.seed, getattr(context.fit, "__qualname__", "")]
        return Checkpoint(Path(self.checkpoint), self.kind, fingerprint(words, [*inputs.values(), targets], network))


def check_training(passes: Sequence[object]) -> None:
    """What stands behind a QAT goes with what it trains. Raises ConfigError naming the place."""
    for position, item in enumerate(passes):
        if not isinstance(item, QAT):
            continue
        rules = [other for other in passes if isinstance(other, Quantize) and other.scheme == "int8"]
        behind = passes[position + 1] if position + 1 < len(passes) else None
        if not isinstance(behind, Quantize) or not rules:
            raise ConfigError(
                f"passes[{position}]: qat trains for static int8, and other training would undo it",
                hint='put Quantize("int8") right behind it',
            )
        if rules[-1].per_channel != item.per_channel:
            raise ConfigError(
                f"passes[{position}]: qat has per_channel = {item.per_channel}, quantize {rules[-1].per_channel}",
                hint="the weights are trained for one of them",
            )
        if rules[-1].observer != "min-max":
            raise ConfigError(
                f"passes[{position}]: quantize observes ranges by {rules[-1].observer}, and qat has trained them",
                hint="leave observer out",
            )


def _resume(place: Checkpoint | None, network: PositionalModule, rounding: Rounding) -> int:
    state = None if place is None else place.load()
    if state is None:
        return 0
    network.load_state_dict(state["network"])
    rounding.ranges = {int(group): (low, high) for group, (low, high) in state["ranges"].items()}
    return int(state["done"])


def _prepare(network: PositionalModule, context: PassContext) -> tuple[Trace, tuple[str, ...]]:
    """Fold what can be folded, in place, and see what is to be rounded. Raises ExportError where there is nothing."""
    from outrider_exporters.convert.fuse import fold_norms
    from outrider_exporters.sources.keras_model import is_keras, layer_kinds
    from outrider_exporters.sources.module import as_tensors

    if is_keras(network.module) and "BatchNormalization" in layer_kinds(network.module):
        raise ExportError(
            "qat: batch norm of Keras is not folded", hint="leave qat out, or build the model without batch norm"
        )
    rows = example_rows(context.example, context.interface, 1)
    folded = fold_norms(network, as_tensors([rows[spec.name] for spec in context.interface.inputs]))
    traced = _trace(network, context, rows)
    if not traced.weights:
        raise ExportError("qat found no convolution and no dense layer", hint="leave it out")
    return traced, tuple(name.removeprefix("module.") for name in folded)


def _trace(network: PositionalModule, context: PassContext, inputs: Tensors) -> Trace:
    from outrider_exporters.passes.rounding import trace
    from outrider_exporters.sources.module import as_tensors

    names = [spec.name for spec in context.interface.inputs]
    return trace(network, names, as_tensors([inputs[name] for name in names]))


def _drawn(context: PassContext, rows: int, seed: int = 0) -> Tensors:
    if context.data.train is None:
        raise ConfigError("qat needs data.train")
    return draw_rows(context.data.train[0], context.interface, rows=rows, seed=seed)


def _start(network: PositionalModule, context: PassContext, traced: Trace) -> dict[int, Range]:
    """What the tensors span on some of the training rows, before anything is rounded."""
    from outrider_exporters.passes.rounding import seen_ranges

    found: dict[int, Range] = {}
    for part in range(START_ROWS // CHUNK_ROWS):
        values = _trace(network, context, _drawn(context, CHUNK_ROWS, part)).values
        for group, (low, high) in seen_ranges(traced.places, values).items():
            before = found.get(group, (0.0, 0.0))
            found[group] = (min(before[0], low), max(before[1], high))
    return found


def _trained(network: PositionalModule, context: PassContext, rounding: Rounding) -> Trained:
    inputs = _drawn(context, PROBE_ROWS)
    batched = {spec.name for spec in context.interface.inputs if spec.batched}
    rows = [
        _trace(network, context, {name: x[at : at + 1] if name in batched else x for name, x in inputs.items()}).values
        for at in range(count_rows(inputs, context.interface))
    ]
    places = rounding.trace.places
    tensors = [
        TrainedTensor(
            label=places.labels[group],
            bounds=rounding.ranges[group],
            values=np.sort(np.stack([row[number].numpy().ravel() for row in rows]), axis=1),
        )
        for number, group in places.groups.items()
    ]
    return Trained(inputs=inputs, tensors=tuple(tensors), per_channel=rounding.per_channel)


def _by_label(rounding: Rounding) -> dict[str, list[float]]:
    """The ranges by the name of the first tensor that has them; a second one of the name gets a number."""
    named: dict[str, list[float]] = {}
    for group, bounds in sorted(rounding.ranges.items()):
        label = rounding.trace.places.labels[group]
        same = sum(known == label or known.startswith(f"{label} #") for known in named)
        named[f"{label} #{same + 1}" if same else label] = list(bounds)
    return named
