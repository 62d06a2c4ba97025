"""A stranger's tensors under our names: what fits is bound, what does not is named."""

from __future__ import annotations

import numpy as np
import pytest

from outrider_runtimes import oip
from outrider_runtimes.errors import ConfigError, InterfaceMismatch
from outrider_runtimes.foreign import bind, check_mapping, ours_from, theirs_from
from outrider_runtimes.tensors import Interface, TensorSpec


def spec(name: str, *shape: int | None, dtype: str = "float32", axes: str = "") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape, axes=axes)


OURS = Interface(
    inputs=(spec("image", None, 3, axes="NC"), spec("size", 2, dtype="int32")),
    outputs=(spec("scores", None, 5, axes="NK"),),
    labels=("a", "b", "c", "d", "e"),
)
THEIRS = Interface(
    inputs=(spec("input_0", None, 3), spec("size", 2, dtype="int32")),
    outputs=(spec("output_0", None, 5), spec("features", None, 64)),
)
MAPPING = {"image": "input_0", "scores": "output_0"}


def with_input(**changes) -> Interface:
    first = spec(**{"name": "input_0"} | changes) if "shape" not in changes else spec("input_0", *changes["shape"])
    return Interface(inputs=(first, THEIRS.inputs[1]), outputs=THEIRS.outputs)


def test_names_are_translated_both_ways():
    naming = bind(OURS, THEIRS, MAPPING)
    assert dict(naming.inputs) == {"image": "input_0", "size": "size"}
    assert dict(naming.outputs) == {"scores": "output_0"}
    image = np.zeros((2, 3), np.float32)
    assert theirs_from(naming, {"image": image, "size": image})["input_0"] is image
    reply = oip.Reply(model="m", version="1", id="1", outputs={"output_0": image, "more": image})
    assert set(ours_from(naming, reply).outputs) == {"scores", "more"}


def test_an_interface_fits_itself():
    assert dict(bind(OURS, OURS, {}).inputs) == {"image": "image", "size": "size"}


@pytest.mark.parametrize(
    ("theirs", "mapping", "match"),
    [
        (THEIRS, {}, "no input 'image', only"),
        (THEIRS, {"image": "input_0"}, "no output 'scores'"),
        (THEIRS, MAPPING | {"size": "input_0"}, "two of our inputs are one"),
        (THEIRS, MAPPING | {"scores": "none"}, "no output 'none'"),
        (with_input(shape=(None, 4)), MAPPING, r"shape \[None, 4\] there, \[None, 3\] here"),
        (with_input(shape=(1, 3)), MAPPING, r"shape \[1, 3\] there"),
        (with_input(shape=(3,)), MAPPING, r"shape \[3\] there"),
        (
            Interface(inputs=(spec("input_0", None, 3, dtype="uint8"), THEIRS.inputs[1]), outputs=THEIRS.outputs),
            MAPPING,
            "'image' is 'input_0' at the endpoint: uint8 there, float32 here",
        ),
        (
            Interface(inputs=(*THEIRS.inputs, spec("mask", 1)), outputs=THEIRS.outputs),
            MAPPING,
            r"also takes \['mask'\]",
        ),
        (
            Interface(inputs=THEIRS.inputs, outputs=(spec("output_0", None, 4),)),
            MAPPING,
            "output 'scores' is 'output_0' at the endpoint: shape",
        ),
        (
            Interface(inputs=THEIRS.inputs, outputs=(spec("output_0", None, 5, dtype="float16"),)),
            MAPPING,
            "float16 there",
        ),
    ],
)
def test_what_does_not_fit_is_named(theirs, mapping, match):
    with pytest.raises(InterfaceMismatch, match=match) as caught:
        bind(OURS, theirs, mapping)
    assert "mapping=" in caught.value.hint


def test_sizes_that_may_fit_are_left_to_the_check_of_the_reply():
    """A free size there takes any of ours; an output of a fixed size may be one that is free here."""
    free = Interface(inputs=(spec("input_0", None, None), spec("size", None, dtype="int32")), outputs=THEIRS.outputs)
    bind(OURS, free, MAPPING)
    bind(OURS, Interface(inputs=THEIRS.inputs, outputs=(spec("output_0", 1, None),)), MAPPING)


@pytest.mark.parametrize(
    ("mapping", "match"), [({"imag": "x"}, "no tensor 'imag'"), ({"image": ""}, "no name"), ({"image": 3}, "no name")]
)
def test_a_mapping_of_names_that_are_not_ours_is_refused(mapping, match):
    with pytest.raises(ConfigError, match=match):
        check_mapping(OURS, mapping)
