from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_exporters.passes.places import FIXED, FUSED_INTO, KNOWN, PRODUCTS, ROUNDED, Call, find_places
from outrider_runtimes.errors import ExportError

CHAIN = sorted(KNOWN)


def network(*names: str, takes: dict[int, tuple[int, ...]] | None = None) -> list[Call]:
    """Calls one after the other: call k gives tensor k + 1 and takes tensor k, unless `takes` says otherwise."""
    return [
        Call(name=name, takes=(takes or {}).get(k, (k,)), gives=(k + 1,), label=f"{name} {k}")
        for k, name in enumerate(names)
    ]


def places(*names: str, takes: dict[int, tuple[int, ...]] | None = None):
    return find_places(network(*names, takes=takes), {0: "image"}, {len(names)})


def test_what_goes_into_a_relu_is_in_no_file():
    found = places("conv2d", "relu", "max_pool2d", "flatten", "linear")
    assert found.rounded == {0, 2, 5}
    assert found.groups == {0: 0, 2: 2, 3: 2, 4: 2, 5: 5}  # pool and flatten stay on the steps of the ReLU
    assert found.labels == {0: "image", 2: "relu 1", 5: "linear 4"}


@pytest.mark.parametrize("other", ["leaky_relu", "sigmoid", "gelu"])
def test_other_activations_are_operators_of_their_own(other):
    assert places("conv2d", other).rounded == {0, 1, 2}


def test_a_tensor_that_something_else_takes_is_in_the_file_beside_its_relu():
    found = places("conv2d", "relu", "add", takes={2: (1, 2)})
    assert found.rounded == {0, 1, 2, 3}
    assert find_places(network("conv2d", "relu"), {0: "x"}, {1, 2}).rounded == {0, 1, 2}  # it is an output


def test_what_is_joined_has_one_range():
    found = places("conv2d", "conv2d", "cat", "avg_pool2d", takes={1: (0,), 2: (1, 2)})
    assert {number: found.groups[number] for number in (1, 2, 3, 4)} == dict.fromkeys((1, 2, 3, 4), 1)
    assert found.rounded == {0, 1, 2, 3, 4}


def test_the_ranges_of_tflite_are_fixed_where_nothing_else_shares_them():
    found = places("linear", "sigmoid", "flatten", "linear", "tanh")
    assert found.fixed == {2: FIXED["sigmoid"], 5: FIXED["tanh"]}
    mixed = places("conv2d", "sigmoid", "conv2d", "cat", takes={2: (0,), 3: (2, 3)})
    assert mixed.fixed == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("batch_norm", r"batch norm \(batch_norm 1\) cannot be folded"),
        ("lstm", "this one calls lstm"),
        ("scaled_dot_product_attention", "this one calls scaled_dot_product_attention"),
    ],
)
def test_what_cannot_be_trained_is_named(name, message):
    with pytest.raises(ExportError, match=message) as raised:
        places("conv2d", name)
    assert raised.value.hint


@given(
    st.lists(st.sampled_from(CHAIN), min_size=1, max_size=12).flatmap(
        lambda names: st.tuples(
            st.just(names),
            st.tuples(*(st.lists(st.integers(0, k), min_size=1, max_size=3) for k in range(len(names)))),
        )
    )
)
def test_every_tensor_is_rounded_or_on_steps_or_inside_an_operator(drawn):
    names, takes = drawn
    calls = network(*names, takes={k: tuple(taken) for k, taken in enumerate(takes)})
    found = find_places(calls, {0: "image"}, {len(names)})
    makers = {call.gives[0]: call for call in calls}
    for number in range(len(names) + 1):
        if number in found.groups:
            assert found.groups[found.groups[number]] == found.groups[number] <= number
            on_steps = number in found.rounded or makers[number].name not in ROUNDED | FIXED.keys()
            assert on_steps
        else:  # its only reader is an activation that is computed with it
            readers = [call for call in calls if number in call.takes]
            assert [call.name in ("relu", "relu6") for call in readers] == [True]
            assert makers[number].name in FUSED_INTO
    assert set(found.labels) == set(found.groups.values())
    assert found.rounded <= found.groups.keys()
    assert set(PRODUCTS) <= ROUNDED
