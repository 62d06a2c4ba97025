"""Free axes: which sizes are tried and asked for, what follows them, rows at other sizes, state that is fed back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_exporters.rows import fed_back, free_axes, free_letters, resize_axes
from outrider_exporters.sources.sizes import (
    asked_sizes,
    check_free,
    check_sizes,
    follow,
    other_sizes,
    probe,
    sizes_in,
    with_letters,
)
from outrider_runtimes.errors import ConfigError, ExportError
from outrider_runtimes.tensors import TensorSpec
from support.memory import INTERFACE, step

TOKENS = TensorSpec(name="tokens", dtype="int64", shape=(None, None), axes="NT")
MASK = TensorSpec(name="mask", dtype="float32", shape=(None, None), axes="NT")
IMAGE = TensorSpec(name="image", dtype="float32", shape=(None, 3, None, None), axes="NCHW")


def test_n_is_no_free_axis():
    assert free_axes(TOKENS) == {1: "T"}
    assert free_axes(IMAGE) == {2: "H", 3: "W"}
    assert free_letters((TOKENS, MASK, IMAGE)) == ("T", "H", "W")
    assert free_axes(dataclasses.replace(TOKENS, axes="")) == {}


def test_rows_at_another_size_are_cut_or_repeated_from_their_start():
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    assert np.array_equal(resize_axes({"tokens": ids}, [TOKENS], {"T": 2})["tokens"], [[1, 2], [4, 5]])
    assert np.array_equal(resize_axes({"tokens": ids}, [TOKENS], {"T": 5})["tokens"][0], [1, 2, 3, 1, 2])
    assert np.array_equal(resize_axes({"tokens": ids}, [TOKENS], {"S": 5})["tokens"], ids)


@given(height=st.integers(1, 9), width=st.integers(1, 9))
def test_each_axis_has_its_own_size(height, width):
    image = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    resized = resize_axes({"image": image}, [IMAGE], {"H": height, "W": width})["image"]
    assert resized.shape == (2, 3, height, width)
    assert np.array_equal(resized[:, :, : min(4, height), : min(5, width)], image[:, :, :height, :width])


def test_the_state_is_fed_back_and_the_rows_change():
    inputs = {"x": np.float32([[1, 2], [3, 4]]), "h": np.float32([[0], [8]])}
    seen = []

    def predict(given):
        seen.append(given["x"])
        y, h = step(given["x"], given["h"])
        return {"y": y, "h_next": h}

    outputs = fed_back(predict, INTERFACE, steps=3)(inputs)
    assert outputs["y"].shape == (3, 2, 2)
    assert np.array_equal(seen[1], inputs["x"][::-1])
    _, h = step(*inputs.values())
    assert np.array_equal(outputs["h_next"][0], h)
    assert np.array_equal(outputs["y"][1], step(seen[1], h)[0])
    assert np.array_equal(inputs["h"], [[0], [8]])
    assert fed_back(predict, dataclasses.replace(INTERFACE, state=())) is predict


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_other_sizes_are_others_and_above_0(size):
    tried = other_sizes(size)
    assert len(set(tried)) == len(tried) >= 1
    assert all(other > 0 and other != size for other in tried)


@pytest.mark.parametrize(
    ("free", "words"),
    [
        ({"logits": "T"}, "no input 'logits'"),
        ({"tokens": "N"}, "N of 'tokens' is free already"),
        ({"tokens": "S"}, "has the axes 'NT', no 'S'"),
        ({"tokens": "TT", "image": "D"}, "'image' has the axes 'NCHW', no 'D'"),
    ],
)
def test_free_axes_that_are_not_there(free, words):
    with pytest.raises(ExportError, match=words):
        check_free(free, {"tokens": "NT", "image": "NCHW"})


def test_one_letter_has_one_size():
    ids, mask = np.zeros((1, 4), np.int64), np.zeros((1, 4), np.float32)
    assert sizes_in({"tokens": ids, "mask": mask}, [TOKENS, MASK]) == {"T": 4}
    with pytest.raises(ExportError, match="T = 4 and, in 'mask', T = 3"):
        sizes_in({"tokens": ids, "mask": mask[:, :3]}, [TOKENS, MASK])


def network(allowed):
    """One that sums pairs of neighbours and takes some lengths only."""

    def run(inputs):
        ids = inputs["tokens"]
        if not allowed(ids.shape[1]):
            raise ExportError(f"no {ids.shape[1]}")
        return [ids[:, ::2], ids.sum(1)]

    return run


def test_every_size_that_worked_is_told():
    seen = probe(network(lambda size: True), {"tokens": np.ones((2, 8), np.int64)}, [TOKENS])
    assert [run.sizes["T"] for run in seen] == list(other_sizes(8))
    assert [run.outputs[0].shape[1] for run in seen] == [(size + 1) // 2 for size in other_sizes(8)]


def test_sizes_that_are_multiples_are_found():
    seen = probe(network(lambda size: size % 4 == 0), {"tokens": np.ones((2, 8), np.int64)}, [TOKENS])
    assert [run.sizes["T"] for run in seen] == [16, 4]


def test_a_network_for_one_size_is_refused():
    with pytest.raises(ExportError, match="takes T = 8 and no other size: no 9") as caught:
        probe(network(lambda size: size == 8), {"tokens": np.ones((2, 8), np.int64)}, [TOKENS])
    assert "x.shape" in caught.value.hint


def test_asked_sizes_are_run():
    run = network(lambda size: size < 20)
    check_sizes(run, {"tokens": np.ones((2, 8), np.int64)}, [TOKENS], [{"T": 4}, {"T": 19}])
    with pytest.raises(ExportError, match="cannot take T = 20: no 20"):
        check_sizes(run, {"tokens": np.ones((2, 8), np.int64)}, [TOKENS], [{"T": 4}, {"T": 20}])


def followed(letters, base, *others):
    """Of a network with T = 8 and, in turn, with the given (sizes, shape)."""
    seen = [(sizes, np.zeros(shape)) for sizes, shape in others]
    return follow("y", letters, ({"T": 8, "S": 8}, np.zeros(base)), seen)


def test_an_axis_of_the_same_size_has_the_same_letter():
    nine, ten = {"T": 9, "S": 8}, {"T": 8, "S": 10}
    assert followed("NAB", (2, 8, 8), (nine, (2, 9, 8)), (ten, (2, 8, 10))) == {1: "T", 2: "S"}
    assert followed("NAB", (2, 8, 4), (nine, (2, 9, 4)), (ten, (2, 8, 4))) == {1: "T"}
    assert followed("NC", (2, 8), (nine, (2, 8)), (ten, (2, 8))) == {}


def test_an_axis_of_another_size_has_a_letter_of_its_own():
    found = followed("NT", (2, 4), ({"T": 9, "S": 8}, (2, 5)), ({"T": 8, "S": 10}, (2, 4)))
    assert list(found) == [1] and found[1] not in "NTS"


def test_a_size_that_a_neighbour_hides_is_seen_elsewhere():
    """T // 2 is 4 for 8 and for 9."""
    assert 1 in followed("NC", (2, 4), ({"T": 9, "S": 8}, (2, 4)), ({"T": 16, "S": 8}, (2, 8)))


def test_another_number_of_axes_is_refused():
    with pytest.raises(ExportError, match="'y' has another number of axes"):
        followed("NC", (2, 8), ({"T": 9, "S": 8}, (2, 9, 1)))


@pytest.mark.parametrize(
    ("letters", "axes", "found", "wanted"),
    [("NC", 2, {1: "T"}, "NT"), ("NAT", 3, {1: "T"}, "NTB"), ("", 2, {0: "T"}, "TB"), ("NCHW", 4, {3: "W"}, "NCHW")],
)
def test_no_letter_stands_twice(letters, axes, found, wanted):
    assert with_letters(letters, axes, found) == wanted


def test_every_combination_of_sizes_is_asked_for():
    assert asked_sizes({}, [IMAGE]) == ()
    assert asked_sizes({"T": [8, 4]}, [TOKENS]) == ({"T": 8}, {"T": 4})
    sizes = asked_sizes({"H": [1, 2], "W": [3, 4]}, [IMAGE])
    assert sizes == ({"H": 1, "W": 3}, {"H": 1, "W": 4}, {"H": 2, "W": 3}, {"H": 2, "W": 4})


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"S": [8]}, "'S' is no free axis"),
        ({"N": [8]}, "'N' is no free axis"),
        ({"H": [8]}, "no sizes for W"),
        ({"H": [], "W": [8]}, r"H is \[\]"),
        ({"H": [8, 8], "W": [8]}, r"H is \[8, 8\]"),
        ({"H": [0], "W": [8]}, r"H is \[0\]"),
        ({"H": [True], "W": [8]}, r"H is \[True\]"),
        ({"H": 8, "W": [8]}, "H is 8"),
        ({"H": "8", "W": [8]}, "H is '8'"),
        ({"H": list(range(1, 10)), "W": list(range(1, 9))}, "more combinations than the 64"),
    ],
)
def test_sizes_that_cannot_be(shapes, words):
    with pytest.raises(ConfigError, match=words):
        asked_sizes(shapes, [IMAGE])
