"""Interface, binding and the input checks."""

from __future__ import annotations

import contextlib
import json
import types
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from outrider_runtimes.errors import (
    DtypeError,
    FormatError,
    InputError,
    NotFiniteError,
    ShapeError,
    UnknownTensor,
)
from outrider_runtimes.tensors import (
    DTYPES,
    Binding,
    Interface,
    TensorBinding,
    TensorSpec,
    check_inputs,
    compile_check,
)
from support.effort import effort

IMAGE = TensorSpec(name="image", dtype="float32", shape=(None, 2, 3), axes="NHW")
IDS = TensorSpec(name="ids", dtype="int64", shape=(None, 4), axes="NT")
SCALAR = TensorSpec(name="gain", dtype="float64", shape=())
LOGITS = TensorSpec(name="logits", dtype="float32", shape=(None, 10), axes="NC", range=(0.0, 1.0), meaning="odds")
INTERFACE = Interface(inputs=(IMAGE, IDS, SCALAR), outputs=(LOGITS,), labels=("a", "b"))


def good(rows=2):
    return {
        "image": np.ones((rows, 2, 3), np.float32),
        "ids": np.ones((rows, 4), np.int64),
        "gain": np.array(1.0),
    }


def test_good_inputs_pass_as_they_are_in_the_interfaces_order():
    inputs = good()
    arrays = check_inputs(INTERFACE, dict(reversed(inputs.items())))
    assert all(a is b for a, b in zip(arrays, inputs.values(), strict=True))


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_any_number_of_rows(rows):
    assert check_inputs(INTERFACE, good(rows))[0].shape[0] == rows


@pytest.mark.parametrize(
    ("error", "tensor", "change"),
    [
        (UnknownTensor, "ids", {"ids": None}),
        (UnknownTensor, "more", {"more": np.zeros(1)}),
        (UnknownTensor, "ids", {"ids": None, "Ids": np.ones((2, 4), np.int64)}),
        (DtypeError, "image", {"image": np.ones((2, 2, 3), np.float64)}),
        (DtypeError, "image", {"image": np.ones((2, 2, 3), np.float16)}),
        (DtypeError, "ids", {"ids": np.ones((2, 4), np.int32)}),
        (DtypeError, "ids", {"ids": np.ones((2, 4), object)}),
        (DtypeError, "ids", {"ids": np.ones((2, 4), "M8[s]")}),
        (DtypeError, "ids", {"ids": [[1, 2, 3, 4]]}),
        (DtypeError, "gain", {"gain": 1.0}),
        (ShapeError, "image", {"image": np.ones((2, 3, 2), np.float32)}),
        (ShapeError, "image", {"image": np.ones((2, 3), np.float32)}),
        (ShapeError, "image", {"image": np.ones((2, 2, 3, 1), np.float32)}),
        (ShapeError, "gain", {"gain": np.ones(1)}),
        (ShapeError, "ids", {"ids": np.ones((3, 4), np.int64)}),
        (NotFiniteError, "image", {"image": np.full((2, 2, 3), np.nan, np.float32)}),
        (NotFiniteError, "image", {"image": np.full((2, 2, 3), -np.inf, np.float32)}),
        (NotFiniteError, "gain", {"gain": np.array(np.inf)}),
    ],
)
def test_bad_inputs_name_the_tensor(error, tensor, change):
    inputs = {name: value for name, value in {**good(), **change}.items() if value is not None}
    with pytest.raises(error) as caught:
        check_inputs(INTERFACE, inputs)
    assert caught.value.tensor == tensor
    assert repr(tensor) in str(caught.value)
    assert isinstance(caught.value, InputError)
    assert isinstance(caught.value, ValueError)


def test_large_finite_values_are_finite():
    inputs = {**good(), "image": np.full((2, 2, 3), np.finfo(np.float32).max, np.float32)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_inputs(INTERFACE, inputs)


@settings(max_examples=effort(200))
@given(st.data())
def test_one_bad_value_anywhere_is_found(data):
    dtype = data.draw(st.sampled_from(["float16", "float32", "float64"]))
    array = data.draw(hnp.arrays(dtype, st.integers(1, 40), elements=st.floats(-100, 100, width=16)))
    interface = Interface(inputs=(TensorSpec(name="x", dtype=dtype, shape=(None,)),), outputs=(LOGITS,))
    assert np.array_equal(check_inputs(interface, {"x": array})[0], array)
    array[data.draw(st.integers(0, len(array) - 1))] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    with pytest.raises(NotFiniteError):
        check_inputs(interface, {"x": array})


@settings(max_examples=effort(200))
@given(st.data())
def test_memory_and_byte_order_are_converted_without_loss(data):
    dtype = data.draw(st.sampled_from(sorted(DTYPES - {"bool"})))
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(max_dims=3, max_side=5), elements=st.integers(0, 100)))
    variant = data.draw(st.sampled_from(["fortran", "swapped", "strided", "reversed", "read-only"]))
    given_ = {
        "fortran": lambda: np.asfortranarray(array),
        "swapped": lambda: array.astype(array.dtype.newbyteorder()),
        "strided": lambda: np.repeat(array, 2, axis=0)[::2],
        "reversed": lambda: np.ascontiguousarray(array[::-1])[::-1],
        "read-only": lambda: np.frombuffer(array.tobytes(), dtype).reshape(array.shape),
    }[variant]()
    interface = Interface(inputs=(TensorSpec(name="x", dtype=dtype, shape=array.shape),), outputs=(LOGITS,))
    (out,) = check_inputs(interface, {"x": given_})
    assert out.flags.c_contiguous
    assert out.dtype == np.dtype(dtype)
    assert out.dtype.isnative
    assert np.array_equal(out, array)


def one_input(dtype, shape, **more):
    return Interface(inputs=(TensorSpec(name="x", dtype=dtype, shape=shape, **more),), outputs=(LOGITS,))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_scalar_stays_a_scalar(dtype):
    swapped = np.array(1).astype(np.dtype(dtype).newbyteorder())
    (out,) = check_inputs(one_input(dtype, ()), {"x": swapped})
    assert (out.shape, out.dtype.name, out.dtype.isnative, out.item()) == ((), dtype, True, 1)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("finite", ["reject", "clip", "pass"])
def test_nothing_at_all_passes(dtype, shape, finite):
    empty = np.zeros(shape, dtype)
    (out,) = check_inputs(one_input(dtype, (None,) * len(shape)), {"x": empty}, finite=finite)
    assert out is empty


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("size", [1, 3, 8192, 8193, 20000])  # on both sides of where the rule changes its way
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_is_found_at_any_size_and_place(dtype, size, bad):
    interface = one_input(dtype, (None,))
    array = np.full(size, np.finfo(dtype).max, dtype)
    assert check_inputs(interface, {"x": array})[0] is array
    for at in (0, size // 2, size - 1):
        spoilt = array.copy()
        spoilt[at] = bad
        with pytest.raises(NotFiniteError):
            check_inputs(interface, {"x": spoilt})
        assert check_inputs(interface, {"x": spoilt}, finite="pass")[0] is spoilt


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_clip_brings_infinity_to_the_largest_number_and_refuses_nan(dtype):
    interface, limits = one_input(dtype, (3,)), np.finfo(dtype)
    given_ = np.array([-np.inf, 0.5, np.inf], dtype)
    (out,) = check_inputs(interface, {"x": given_}, finite="clip")
    assert out.dtype.name == dtype
    assert out.tolist() == [limits.min, 0.5, limits.max]
    assert np.isinf(given_).sum() == 2  # what was passed is not written to
    fine = np.array([limits.min, 0, limits.max], dtype)
    assert check_inputs(interface, {"x": fine}, finite="clip")[0] is fine
    with pytest.raises(NotFiniteError, match="has NaN, which has no nearest number") as caught:
        check_inputs(interface, {"x": np.array([np.nan, 0, np.inf], dtype)}, finite="clip")
    assert (caught.value.tensor, "np.isnan" in caught.value.hint) == ("x", True)


def test_clip_brings_what_is_beyond_the_range_to_its_bounds():
    interface = one_input("float32", (4,), range=(-1.0, 2.0))
    given_ = np.array([-np.inf, -1.5, 2.5, 1.0], np.float32)
    assert check_inputs(interface, {"x": given_}, finite="clip")[0].tolist() == [-1.0, -1.0, 2.0, 1.0]
    inside = np.array([-1, 0, 1, 2], np.float32)
    assert check_inputs(interface, {"x": inside}, finite="clip")[0] is inside
    assert check_inputs(interface, {"x": inside * 9}, finite="reject")[0].max() == 18.0  # a range alone refuses nothing


def test_a_range_beyond_the_dtype_clips_to_the_dtype():
    interface = one_input("float16", (2,), range=(-1e9, 1e9))
    out = check_inputs(interface, {"x": np.array([-np.inf, np.inf], np.float16)}, finite="clip")[0]
    assert out.tolist() == [-65504.0, 65504.0]


def test_integers_have_no_such_policy():
    ids = np.array([-5, 9], np.int64)
    assert check_inputs(one_input("int64", (2,), range=(0.0, 1.0)), {"x": ids}, finite="clip")[0] is ids


def answer_of(check, inputs):
    """What a check says: its arrays, or its error in full."""
    try:
        return [(a.dtype.str, a.shape, a.tobytes()) for a in check(inputs)]
    except InputError as error:
        return (type(error), str(error), error.hint, error.tensor)


values = st.sampled_from([0.0, 1.0, -3.5, 1e30, np.nan, np.inf, -np.inf])
dtypes = st.sampled_from(["float16", "float32", "float64", "int8", ">f4", "bool"])


def arrays_like(dtype, shape):
    """Arrays that fit, or nearly; now and then no array at all."""
    fitting = shape.flatmap(lambda sizes: hnp.arrays(np.float64, sizes, elements=values))
    cast = fitting.map(lambda array: _cast(array, dtype))
    return cast | cast.map(lambda a: a[::-1]) | st.sampled_from([None, 1.0, [1.0]])


def _cast(array, dtype):
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return array.astype(dtype)


@settings(max_examples=effort(300), deadline=None)
@given(st.data())
def test_the_compiled_check_is_the_check(data):
    """One check, several calls: what an earlier call left behind changes nothing."""
    sizes = st.integers(0, 3)
    specs = tuple(
        TensorSpec(
            name=name,
            dtype=data.draw(st.sampled_from(["float16", "float32", "float64", "int8"])),
            shape=data.draw(st.sampled_from([(None, 2), (2, 2), (None, None), (1, None)])),
            axes=data.draw(st.sampled_from(["NT", "", "NC", "CT"])),
            range=data.draw(st.sampled_from([None, (-2.0, 2.0)])),
        )
        for name in data.draw(st.sampled_from([("a",), ("a", "b"), ("a", "b", "c")]))
    )
    interface = Interface(inputs=specs, outputs=(LOGITS,))
    finite = data.draw(st.sampled_from(["reject", "clip", "pass"]))
    compiled = compile_check(interface, finite=finite)
    for _ in range(data.draw(st.integers(1, 4))):
        inputs = {}
        for spec in specs:
            dtype = data.draw(st.just(spec.dtype) | dtypes)
            shape = st.tuples(sizes, st.just(2) | sizes)
            inputs[spec.name] = data.draw(arrays_like(dtype, shape))
        if data.draw(st.integers(0, 9)) == 0:
            inputs["z"] = inputs.pop("a")
        wanted = answer_of(lambda given_: check_inputs(interface, given_, finite=finite), inputs)
        assert answer_of(compiled, inputs) == wanted
        assert answer_of(compiled, types.MappingProxyType(inputs)) == wanted


def test_an_interface_round_trips_and_keeps_unknown_keys():
    data = json.loads(json.dumps({**INTERFACE.to_dict(), "later": [1, {"b": 2}]}))
    again = Interface.from_dict(data)
    assert again.extra == {"later": [1, {"b": 2}]}
    assert again.to_dict() == data
    assert again.digest != INTERFACE.digest
    assert Interface.from_dict(INTERFACE.to_dict()) == INTERFACE


def test_the_digest_is_of_what_is_said_not_how():
    data = INTERFACE.to_dict()
    shuffled = {key: data[key] for key in reversed(data)}
    assert Interface.from_dict(shuffled).digest == INTERFACE.digest
    assert INTERFACE.digest == "".join(INTERFACE.digest.split())
    assert len(INTERFACE.digest) == 64
    other = Interface(inputs=(IMAGE, IDS), outputs=(LOGITS,))
    assert other.digest != INTERFACE.digest


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float8"},
        {"dtype": "FLOAT32"},
        {"name": ""},
        {"name": "n" * 257},
        {"shape": (-1, 4)},
        {"shape": (2**31, 4)},
        {"shape": (1,) * 17, "axes": ""},
        {"axes": "N"},
        {"axes": "TN"},
        {"range": (0.0, float("inf"))},
        {"range": (float("nan"), 1.0)},
        {"range": (1.0, 0.0)},
    ],
)
def test_an_impossible_spec_is_a_format_error(options):
    with pytest.raises(FormatError):
        TensorSpec(**{"name": "t", "dtype": "int64", "shape": (None, 4), "axes": "NT", **options})


def binding(**options):
    return TensorBinding(**{"name": "image", "file_name": "x", "dtype": "int8", "shape": (1, 3, 2), **options})


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "str"},
        {"permutation": (0, 1)},
        {"permutation": (0, 1, 1)},
        {"permutation": (1, 2, 3)},
        {"scale": 0.0},
        {"scale": -1.0},
        {"scale": float("nan")},
        {"scale": float("inf")},
    ],
)
def test_an_impossible_binding_is_a_format_error(options):
    with pytest.raises(FormatError):
        binding(**options)


@pytest.mark.parametrize(
    "options", [{}, {"permutation": (0, 2, 1)}, {"scale": 0.5, "zero_point": -3}, {"shape": (None, 3, 2)}]
)
def test_a_binding_round_trips(options):
    one = binding(**options)
    assert TensorBinding.from_dict(json.loads(json.dumps(one.to_dict()))) == one


@pytest.mark.parametrize(
    "change",
    [{"permutation": [0, 2.5, 1]}, {"permutation": ["0", "2", "1"]}, {"permutation": [False, 2, True]}]
    + [{"zero_point": value} for value in (0.5, "3", True, None)],
)
def test_a_binding_is_made_of_whole_numbers(change):
    with pytest.raises(FormatError, match="binding"):
        TensorBinding.from_dict({**binding(scale=0.5).to_dict(), **change})


def test_a_binding_must_fit_its_interface():
    interface = Interface(inputs=(IMAGE,), outputs=(LOGITS,))
    out = binding(name="logits", shape=(1, 10))
    whole = Binding(inputs=(binding(),), outputs=(out,)).to_dict()
    assert Binding.from_dict(whole, interface).inputs == (binding(),)
    for wrong in (
        Binding(inputs=(binding(name="picture"),), outputs=(out,)),
        Binding(inputs=(binding(shape=(1, 6)),), outputs=(out,)),
        Binding(inputs=(), outputs=(out,)),
        Binding(inputs=(binding(), binding()), outputs=(out,)),
    ):
        with pytest.raises(FormatError):
            Binding.from_dict(wrong.to_dict(), interface)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
TENSOR_KEYS = ["name", "dtype", "shape", "axes", "range", "meaning", "file_name", "permutation", "scale", "zero_point"]


@settings(max_examples=effort(400))
@given(st.data())
def test_any_json_is_taken_or_a_format_error(data):
    tensor = st.fixed_dictionaries({}, optional=dict.fromkeys(TENSOR_KEYS, json_values)) | json_values
    near = st.builds(
        lambda base, key, value: {**base, key: value},
        st.sampled_from([IMAGE.to_dict(), LOGITS.to_dict(), binding(scale=0.5).to_dict()]),
        st.sampled_from(TENSOR_KEYS),
        json_values,
    )
    item = data.draw(tensor | near)
    for parse in (
        TensorSpec.from_dict,
        TensorBinding.from_dict,
        Interface.from_dict,
        lambda d: Interface.from_dict({"inputs": [d], "outputs": [LOGITS.to_dict()]}),
        lambda d: Binding.from_dict({"inputs": [d], "outputs": []}, INTERFACE),
        lambda d: Binding.from_dict(d, INTERFACE),
    ):
        with contextlib.suppress(FormatError):
            parse(item)


@pytest.mark.parametrize("value", [None, 5, np.float32(3), [np.zeros(3)], "image"])
def test_what_is_no_mapping_is_refused(value):
    interface = Interface(
        inputs=(TensorSpec(name="image", dtype="float32", shape=(3,)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(3,)),),
    )
    with pytest.raises(UnknownTensor, match="not arrays by name"):
        check_inputs(interface, value)
