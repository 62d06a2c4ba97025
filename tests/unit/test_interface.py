"""The interface: state pairs, what counts in its digest, what the network and the golden see of it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from outrider_runtimes.errors import FormatError, InputError, ShapeError
from outrider_runtimes.processing import Softmax, around
from outrider_runtimes.tensors import Interface, StatePair, TensorSpec, check_inputs
from support.memory import H_NEXT, INTERFACE, H, X, Y

PAIR = StatePair(input="h", output="h_next")
NETWORK = Interface(
    inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 4), axes="NC"),),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=(None, 3), axes="NC"),),
    labels=("a", "b", "c"),
)
WITH_STEPS = around(NETWORK, NETWORK.inputs, (), (Softmax(tensor="logits"),))


def test_state_comes_back_as_it_was_stored():
    stored = json.loads(json.dumps(INTERFACE.to_dict()))
    assert stored["state"] == [{"input": "h", "output": "h_next"}]
    assert Interface.from_dict(stored) == INTERFACE
    assert Interface.from_dict(stored).digest == INTERFACE.digest


def test_state_counts_in_the_digest():
    assert dataclasses.replace(INTERFACE, state=()).digest != INTERFACE.digest
    assert "state" not in dataclasses.replace(INTERFACE, state=()).to_dict()


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ((StatePair(input="z", output="h_next"),), "no input 'z'"),
        ((StatePair(input="h", output="z"),), "no output 'z'"),
        ((StatePair(input="h_next", output="h"),), "no input 'h_next'"),
        ((StatePair(input="h", output="y"),), "must be alike"),
        ((PAIR, PAIR), "in one pair only"),
        ((PAIR, StatePair(input="h", output="other")), "in one pair only"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(pairs, words):
    other = dataclasses.replace(H_NEXT, name="other")
    with pytest.raises(FormatError, match=words):
        Interface(inputs=(X, H), outputs=(Y, H_NEXT, other), state=pairs)


@pytest.mark.parametrize("change", [{"dtype": "float64"}, {"shape": (None, 2)}, {"axes": "NH"}])
def test_the_two_of_a_pair_are_alike(change):
    with pytest.raises(FormatError, match="must be alike"):
        Interface(inputs=(X, H), outputs=(Y, dataclasses.replace(H_NEXT, **change)), state=(PAIR,))


@pytest.mark.parametrize("state", [7, [7], [{"input": "h"}], [{"input": "h", "output": 1}], {"h": "h_next"}])
def test_malformed_state_is_a_format_error(state):
    with pytest.raises(FormatError):
        Interface.from_dict({**INTERFACE.to_dict(), "state": state})


def test_the_digest_is_that_of_what_a_caller_sees():
    same = dataclasses.replace(WITH_STEPS, processing=None)
    assert WITH_STEPS.processing is not None
    assert same.digest == WITH_STEPS.digest
    assert json.dumps(same.to_dict()) == json.dumps(WITH_STEPS.offered())
    assert set(WITH_STEPS.to_dict()) - set(same.to_dict()) == {"preprocessing", "postprocessing", "network"}
    assert WITH_STEPS.digest != dataclasses.replace(WITH_STEPS, labels=()).digest


def test_the_network_is_inside_the_steps():
    assert WITH_STEPS.network == NETWORK
    assert NETWORK.network is NETWORK
    assert WITH_STEPS.outputs[0] != NETWORK.outputs[0]


def test_what_is_judged_ends_at_the_networks_outputs():
    assert WITH_STEPS.judged.outputs == NETWORK.outputs
    assert WITH_STEPS.judged.inputs == WITH_STEPS.inputs
    assert WITH_STEPS.judged.processing is not None
    assert WITH_STEPS.judged.processing.after == ()
    assert NETWORK.judged is NETWORK


def two(first: str, second: str, shape=(None, None)) -> Interface:
    return Interface(
        inputs=tuple(TensorSpec(name=n, dtype="int64", shape=shape, axes=a) for n, a in (("a", first), ("b", second))),
        outputs=(Y,),
    )


def test_a_free_letter_of_several_inputs_is_one_size():
    interface = two("NT", "NT")
    ids = np.zeros((2, 5), np.int64)
    assert len(check_inputs(interface, {"a": ids, "b": ids})) == 2
    with pytest.raises(ShapeError, match="input 'b' has T = 4, input 'a' 5") as caught:
        check_inputs(interface, {"a": ids, "b": ids[:, :4]})
    assert caught.value.tensor == "b"


def test_other_letters_and_fixed_sizes_are_no_bond():
    ids = np.zeros((2, 5), np.int64)
    assert len(check_inputs(two("NT", "NS"), {"a": ids, "b": ids[:, :4]})) == 2
    assert two("NT", "NT", (None, 5)).shared_axes == ()
    assert two("NT", "NT").shared_axes == (("T", ((0, 1), (1, 1))),)
    assert INTERFACE.shared_axes == ()


def test_one_letter_twice_in_a_tensor_is_a_square():
    image = TensorSpec(name="image", dtype="float32", shape=(None, None, None), axes="NHH")
    interface = Interface(inputs=(image,), outputs=(Y,))
    assert check_inputs(interface, {"image": np.zeros((1, 3, 3), np.float32)})
    with pytest.raises(ShapeError, match="H = 4"):
        check_inputs(interface, {"image": np.zeros((1, 3, 4), np.float32)})


def test_classes_are_called_by_their_labels():
    interface = dataclasses.replace(NETWORK, labels=("cat", "größe", ""))
    got = interface.named(np.array([[1, 0], [-1, 2]]))
    assert got.tolist() == [["größe", "cat"], ["", ""]]
    assert interface.named(np.zeros((0, 3), np.int32)).shape == (0, 3)
    for wrong in ([3], [-2], [0.5], ["cat"]):
        with pytest.raises(InputError, match="are not numbers of the 3 labels"):
            interface.named(np.array(wrong))
    with pytest.raises(InputError, match="0 labels") as caught:
        dataclasses.replace(NETWORK, labels=()).named(np.array([0]))
    assert caught.value.hint == "the bundle has no labels"
