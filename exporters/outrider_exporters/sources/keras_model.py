"""What is different about a Keras 3 model on the torch backend, which is a ``torch.nn.Module`` but not like others.

Keras is never imported here: a model of it is only there when the user imported it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from outrider_runtimes.errors import ExportError

if TYPE_CHECKING:
    import torch
    from torch import nn

COPY_HINT = (
    "Keras copies a model through its config: give custom layers get_config() and build(), and decorate them with "
    "keras.saving.register_keras_serializable()"
)


def is_keras(model: object) -> bool:
    """Whether this is a Keras 3 model, on any backend."""
    keras = sys.modules.get("keras")
    return keras is not None and hasattr(keras, "Model") and isinstance(model, keras.Model)


def is_channel_last(model: object) -> bool:
    """Whether four axes are N, H, W, C where nobody named them."""
    return is_keras(model) and bool(sys.modules["keras"].config.image_data_format() == "channels_last")


def layer_kinds(model: Any) -> set[str]:
    """The class names of a model's layers, those of models within it among them."""
    inner = [kind for layer in getattr(model, "layers", ()) for kind in layer_kinds(layer)]
    return {type(model).__name__, *inner}


def refuse_backend(model: object) -> None:
    """Raise ExportError for a Keras model on another backend than torch."""
    backend = sys.modules["keras"].config.backend()
    raise ExportError(
        f"the Keras model {getattr(model, 'name', '')!r} is on the {backend} backend, expected torch",
        hint="save it, set KERAS_BACKEND=torch before Python starts, and load it again with keras.models.load_model",
    )


def call_keras(model: Any, names: Sequence[str], tensors: Sequence[torch.Tensor], *, training: bool) -> Any:
    """Run a model on one tensor an input.

    A functional model gets them by the names of its ``keras.Input`` where these are ``names``, else in its own order;
    a subclassed one by the names of ``call``'s parameters, else in order.
    """
    by_name = dict(zip(names, tensors, strict=True))
    declared = [tensor.name for tensor in getattr(model, "inputs", None) or ()]
    if declared:
        if len(declared) != len(tensors):
            raise ExportError(f"the Keras model has inputs {declared}, the example {list(names)}")
        ordered = [by_name[name] for name in declared] if set(declared) == set(names) else list(tensors)
        if len(ordered) == 1 and not isinstance(getattr(model, "input", None), dict | list | tuple):
            return model(ordered[0], training=training)
        return model(sys.modules["keras"].tree.pack_sequence_as(model.input, ordered), training=training)
    parameters = inspect.signature(model.call).parameters
    mode = {"training": training} if "training" in parameters else {}
    if set(names) <= set(parameters):
        return model(**by_name, **mode)
    return model(*tensors, **mode)


def check_copy(copied: Any, original: Any) -> None:
    """Raise ExportError where the copy has other weights: a config that says too little gives a fresh network."""
    import torch

    if len(copied.weights) != len(original.weights):
        raise ExportError(
            f"the copy of {type(original).__name__} has {len(copied.weights)} weights, "
            f"the model {len(original.weights)}",
            hint=COPY_HINT,
        )
    for mine, theirs in zip(copied.weights, original.weights, strict=True):
        if not torch.equal(mine.value.cpu(), theirs.value.cpu()):
            raise ExportError(f"weight {theirs.path!r} was not copied", hint=COPY_HINT)


def trained_parameters(model: Any) -> list[nn.Parameter]:
    """The tensors behind a model's weights, which are in the same order in a copy."""
    return [variable.value for variable in model.weights]
