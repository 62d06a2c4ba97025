"""What is done to a caller's tensors before a network, and to its outputs after it: steps as data, in numpy alone.

The exporter's evaluation and the board run the same code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from outrider_runtimes.errors import FormatError, UnsupportedBundle
from outrider_runtimes.processing.base import (
    Processing,
    Step,
    around,
    callers_of,
    check_processing,
    infer_specs,
    run_steps,
    shapes_of,
)
from outrider_runtimes.tensors import PROCESSING_KEYS, Interface, TensorSpec

if TYPE_CHECKING:
    from outrider_runtimes.processing.arrange import Layout, Rename
    from outrider_runtimes.processing.boxes import AnchorBoxes, BoxesToImage, CornerBoxes, GridBoxes
    from outrider_runtimes.processing.encoded import DecodeImage, encode_images
    from outrider_runtimes.processing.images import CenterCrop, Letterbox, Normalise, Resize
    from outrider_runtimes.processing.masks import MaskArgmax
    from outrider_runtimes.processing.scores import Argmax, Sigmoid, Softmax, TopK
    from outrider_runtimes.processing.sound import MFCC, LogMel
    from outrider_runtimes.processing.suppression import Suppression
    from outrider_runtimes.processing.text import TokenLookup, encode_text
    from outrider_runtimes.processing.values import Cast, Dequantize, Quantize

__all__ = [
    "MFCC",
    "STEPS",
    "AnchorBoxes",
    "Argmax",
    "BoxesToImage",
    "Cast",
    "CenterCrop",
    "CornerBoxes",
    "DecodeImage",
    "Dequantize",
    "GridBoxes",
    "Layout",
    "Letterbox",
    "LogMel",
    "MaskArgmax",
    "Normalise",
    "Processing",
    "Quantize",
    "Rename",
    "Resize",
    "Sigmoid",
    "Softmax",
    "Step",
    "Suppression",
    "TokenLookup",
    "TopK",
    "around",
    "callers_of",
    "check_processing",
    "encode_images",
    "encode_text",
    "infer_specs",
    "processing_from_dict",
    "run_steps",
    "shapes_of",
    "step_class",
    "step_from_dict",
]

MAX_STEPS = 64  # on a side

# By kind, the module here and the class: a board loads the kinds that its bundle has, and no other.
STEPS: Mapping[str, tuple[str, str]] = {
    "decode_image": ("encoded", "DecodeImage"),
    "resize": ("images", "Resize"),
    "letterbox": ("images", "Letterbox"),
    "center_crop": ("images", "CenterCrop"),
    "normalise": ("images", "Normalise"),
    "layout": ("arrange", "Layout"),
    "rename": ("arrange", "Rename"),
    "cast": ("values", "Cast"),
    "quantize": ("values", "Quantize"),
    "dequantize": ("values", "Dequantize"),
    "log_mel": ("sound", "LogMel"),
    "mfcc": ("sound", "MFCC"),
    "token_lookup": ("text", "TokenLookup"),
    "softmax": ("scores", "Softmax"),
    "sigmoid": ("scores", "Sigmoid"),
    "top_k": ("scores", "TopK"),
    "argmax": ("scores", "Argmax"),
    "mask_argmax": ("masks", "MaskArgmax"),
    "grid_boxes": ("boxes", "GridBoxes"),
    "anchor_boxes": ("boxes", "AnchorBoxes"),
    "corner_boxes": ("boxes", "CornerBoxes"),
    "suppression": ("suppression", "Suppression"),
    "boxes_to_image": ("boxes", "BoxesToImage"),
}
_HOMES = {"encode_text": "text", "encode_images": "encoded", **{name: module for module, name in STEPS.values()}}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def step_class(kind: str) -> type[Any]:
    """The class of a kind, one of ``STEPS``."""
    module, name = STEPS[kind]
    found: type[Any] = getattr(import_module(f"{__name__}.{module}"), name)
    return found


def step_from_dict(entry: Mapping[str, Any], at: str) -> Step:
    """The inverse of ``Step.to_dict``.

    Args:
        at: where it stands, for errors: ``preprocessing[0]``.

    Raises:
        UnsupportedBundle: no step of that name is known here.
        FormatError: a key is unknown, missing or out of its bounds.
    """
    kind = entry.get("step")
    if not isinstance(kind, str) or kind not in STEPS:
        raise UnsupportedBundle(
            f"{at}: this version of Outrider has no step {kind!r}", hint=f"it has {', '.join(sorted(STEPS))}"
        )
    made = step_class(kind)
    known = {field.name for field in dataclasses.fields(made)}
    stray = sorted(set(entry) - known - {"step"})
    if stray:
        raise FormatError(f"{at}.{stray[0]}: {kind} has no such key", hint=f"it has {', '.join(sorted(known))}")
    try:
        step: Step = made(**{key: value for key, value in entry.items() if key != "step"})
    except FormatError as error:
        raise FormatError(f"{at}: {error}", hint=error.hint) from None
    except (TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{at}: {kind} is malformed: {error}") from None
    return step


def processing_from_dict(data: Mapping[str, Any], interface: Interface) -> Processing:
    """The inverse of ``Processing.to_dict``, checked against the interface that it leads to.

    Raises:
        UnsupportedBundle: no step of that name is known here.
        FormatError: malformed, or the steps do not lead from the caller's tensors to the network's and back.
    """
    if not set(data) >= PROCESSING_KEYS:
        raise FormatError(f"interface: {', '.join(sorted(PROCESSING_KEYS))} stand together or not at all")
    network = data["network"]
    processing = Processing(
        before=_steps(data["preprocessing"], "preprocessing"),
        after=_steps(data["postprocessing"], "postprocessing"),
        inputs=tuple(TensorSpec.from_dict(item) for item in network["inputs"]),
        outputs=tuple(TensorSpec.from_dict(item) for item in network["outputs"]),
    )
    check_processing(interface, processing)
    return processing


def _steps(items: Any, at: str) -> tuple[Step, ...]:
    if not isinstance(items, list) or len(items) > MAX_STEPS:
        raise FormatError(f"interface: {at}: expected a list of at most {MAX_STEPS} steps")
    return tuple(step_from_dict(item, f"{at}[{position}]") for position, item in enumerate(items))
