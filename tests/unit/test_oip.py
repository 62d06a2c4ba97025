"""The Open Inference Protocol: every tensor comes back as it went, and no bytes get further than a typed error."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from outrider_runtimes import oip
from outrider_runtimes.errors import InputError, NotFiniteError, ReplyError
from outrider_runtimes.tensors import DTYPES, Interface, TensorSpec
from support.effort import effort
from support.peaks import peak_bytes

REQUEST = oip.Request(id="7", inputs={}, binary=True)


def arrays(dtypes: list[str] | None = None):
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    return st.sampled_from(dtypes or sorted(DTYPES)).flatmap(
        lambda dtype: hnp.arrays(
            np.dtype(dtype), shapes, elements=hnp.from_dtype(np.dtype(dtype), allow_nan=False, allow_infinity=False)
        )
    )


def tensors():
    names = st.text(min_size=1, max_size=20).filter(lambda s: s.isprintable())
    return st.dictionaries(names, arrays(), min_size=1, max_size=4)


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert list(left) == list(right)
    for name, array in left.items():
        assert right[name].dtype == array.dtype
        assert right[name].shape == array.shape
        assert right[name].tobytes() == array.tobytes()


@settings(max_examples=effort(150), deadline=None)
@given(tensors(), st.booleans(), st.integers(1, oip.MAX_TIMEOUT_US) | st.none())
def test_a_request_comes_back_as_it_went(inputs, binary, timeout_us):
    message = oip.encode_request(inputs, id="abc", timeout_us=timeout_us, binary=binary)
    request = oip.decode_request(bytearray(message.body), message.json_bytes)
    assert (request.id, request.binary, request.timeout_us) == ("abc", binary, timeout_us)
    same(inputs, request.inputs)


@settings(max_examples=effort(150), deadline=None)
@given(tensors(), st.booleans())
def test_a_reply_comes_back_as_it_went(outputs, binary):
    request = oip.Request(id="1", inputs={}, binary=binary)
    message = oip.encode_reply(outputs, model="m", version="3", request=request, parameters={"infer_ms": 1.5})
    reply = oip.decode_reply(message.body, message.json_bytes)
    assert (reply.model, reply.version, reply.id, reply.parameters) == ("m", "3", "1", {"infer_ms": 1.5})
    same(outputs, reply.outputs)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_floats_in_json_are_read_back_to_the_bit(dtype):
    """Nine digits, through a float64, for every exponent: zeros of both signs, subnormals, neighbours of 2^n."""
    width = np.dtype(dtype).itemsize * 8
    bits = np.random.default_rng(4).integers(0, 2**width, 5_000, dtype=np.int64)
    powers = np.arange(2 ** (np.finfo(dtype).nexp)) << np.finfo(dtype).nmant
    around = np.concatenate([powers - 1, powers, powers + 1]) % 2**width
    every = np.concatenate([bits, around, around + 2 ** (width - 1)]).astype(f"u{width // 8}").view(dtype)
    least = np.finfo(dtype).tiny
    if not (np.full(64, least) / dtype(2)).any():  # tflite-runtime on 32-bit ARM: below the least normal number is zero
        every = every[np.abs(every) > least]
    values = np.concatenate([every[np.isfinite(every)], np.array([-0.0, 0.0, 1.0, -0.0], dtype)])
    message = oip.encode_request({"x": values}, binary=False)
    same({"x": values}, oip.decode_request(message.body, None).inputs)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_at_its_limits(dtype):
    kind = np.dtype(dtype)
    if kind.kind == "b":
        edge = np.array([True, False])
    else:
        limits = np.finfo(kind) if kind.kind == "f" else np.iinfo(kind)
        edge = np.array([limits.min, limits.max, 0], kind)
    for binary in (True, False):
        message = oip.encode_request({"x": edge}, binary=binary)
        same({"x": edge}, oip.decode_request(message.body, message.json_bytes).inputs)


def test_memory_order_and_byte_order_do_not_matter():
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    for given_ in (array, np.asfortranarray(array), array[:, ::-1]):
        message = oip.encode_request({"x": given_})
        decoded = oip.decode_request(message.body, message.json_bytes).inputs["x"]
        np.testing.assert_array_equal(decoded, given_)
        assert decoded.dtype.isnative
        assert decoded.flags.c_contiguous and decoded.flags.aligned and decoded.flags.writeable


def test_the_binary_layout_is_the_published_one():
    message = oip.encode_request({"a": np.array([1, 2], np.int16), "b": np.array([True])}, id="q", timeout_us=5)
    head = json.loads(message.body[: message.json_bytes])
    assert head == {
        "id": "q",
        "parameters": {"timeout": 5, "binary_data_output": True},
        "inputs": [
            {"name": "a", "shape": [2], "datatype": "INT16", "parameters": {"binary_data_size": 4}},
            {"name": "b", "shape": [1], "datatype": "BOOL", "parameters": {"binary_data_size": 1}},
        ],
    }
    assert message.body[message.json_bytes :] == b"\x01\x00\x02\x00\x01"
    assert message.headers[oip.LENGTH_HEADER] == str(message.json_bytes)


def test_outputs_go_out_as_each_was_asked_for():
    body = {
        "inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}],
        "outputs": [{"name": "b", "parameters": {"binary_data": True}}, {"name": "a"}],
    }
    request = oip.decode_request(json.dumps(body).encode(), None)
    outputs = {name: np.array([1.0], np.float32) for name in "abc"}
    message = oip.encode_reply(outputs, model="m", version="1", request=request, parameters={})
    head = json.loads(message.body[: message.json_bytes])
    assert [list(entry) for entry in head["outputs"]] == [
        ["name", "shape", "datatype", "parameters"],
        ["name", "shape", "datatype", "data"],
    ]
    assert list(oip.decode_reply(message.body, message.json_bytes).outputs) == ["b", "a"]
    with pytest.raises(InputError, match="no output 'b'"):
        oip.encode_reply({"a": outputs["a"]}, model="m", version="1", request=request, parameters={})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_json_has_no_nan_and_binary_has(value):
    outputs = {"y": np.array([value], np.float16)}
    with pytest.raises(NotFiniteError, match="'y'"):
        oip.encode_reply(outputs, model="m", version="1", request=oip.Request(id="", inputs={}), parameters={})
    message = oip.encode_reply(outputs, model="m", version="1", request=REQUEST, parameters={})
    same(outputs, oip.decode_reply(message.body, message.json_bytes).outputs)


def test_nested_and_flat_data_are_the_same():
    for data in ([1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]):
        body = json.dumps({"inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP32", "data": data}]})
        decoded = oip.decode_request(body.encode(), None).inputs["x"]
        np.testing.assert_array_equal(decoded, [[1, 2, 3], [4, 5, 6]])


def entry(**changes) -> dict:
    return {"name": "x", "shape": [2], "datatype": "FP32", "data": [1.0, 2.0]} | changes


BAD_TENSORS = {
    "no name": entry(name=""),
    "name of another type": entry(name=7),
    "long name": entry(name="x" * 257),
    "BYTES": entry(datatype="BYTES", data=["a", "b"]),
    "unknown datatype": entry(datatype="FP128"),
    "datatype of another type": entry(datatype=["FP32"]),
    "no shape": entry(shape=None),
    "negative size": entry(shape=[-1]),
    "huge size": entry(shape=[2**31]),
    "size true": entry(shape=[True, 2]),
    "size 2.0": entry(shape=[2.0]),
    "rank 17": entry(shape=[1] * 16 + [2]),
    "huge shape": entry(shape=[2**30, 2**30]),
    "endless rows of nothing": entry(shape=[2**31 - 1, 0], data=[]),
    "too few": entry(data=[1.0]),
    "too many": entry(data=[1.0, 2.0, 3.0]),
    "ragged": entry(shape=[2, 2], data=[[1.0, 2.0], [3.0]]),
    "nested wrongly": entry(shape=[2], data=[[1.0, 2.0]]),
    "nested deeper than its shape": entry(shape=[2], data=[[1.0], [2.0]]),
    "text": entry(data=["1", "2"]),
    "null": entry(data=[None, 1.0]),
    "an object": entry(data={"0": 1.0}),
    "no data": {"name": "x", "shape": [2], "datatype": "FP32"},
    "does not fit FP32": entry(data=[1e300, 0.0]),
    "does not fit a double": entry(data=[10**400, 0.0]),
    "bool for a float": entry(data=[True, 1.0]),
    "float for an int": entry(datatype="INT32", data=[1.0, 2]),
    "int8 too big": entry(datatype="INT8", data=[128, 0]),
    "uint8 negative": entry(datatype="UINT8", data=[-1, 0]),
    "uint64 too big": entry(datatype="UINT64", data=[2**64, 0]),
    "int for a bool": entry(datatype="BOOL", data=[1, 0]),
    "binary that is not there": {**entry(parameters={"binary_data_size": 8}), "data": None},
    "parameters of another type": entry(parameters=[]),
    "shared memory": entry(parameters={"shared_memory_region": "a", "shared_memory_byte_size": 8}),
    "not an object": "x",
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_refused(name):
    tensor = BAD_TENSORS[name]
    for key, decode, error in (
        ("inputs", oip.decode_request, InputError),
        ("outputs", oip.decode_reply, ReplyError),
    ):
        with pytest.raises(error):
            decode(json.dumps({key: [tensor]}).encode(), None)


BAD_DOCUMENTS = {
    "empty": b"",
    "not JSON": b"{",
    "a list": b"[]",
    "NaN": b'{"inputs": [{"name":"x","shape":[1],"datatype":"FP32","data":[NaN]}]}',
    "Infinity": b'{"inputs": [{"name":"x","shape":[1],"datatype":"FP32","data":[-Infinity]}]}',
    "1e999": b'{"inputs": [{"name":"x","shape":[1],"datatype":"FP64","data":[1e999]}]}',
    "not UTF-8": b'{"id": "\xff"}',
    "UTF-16": '{"inputs": []}'.encode("utf-16"),
    "key twice": b'{"id": "a", "id": "b"}',
    "no inputs": b"{}",
    "empty inputs": b'{"inputs": []}',
    "inputs null": b'{"inputs": null}',
    "name twice": json.dumps({"inputs": [entry(), entry()]}).encode(),
    "257 tensors": json.dumps({"inputs": [entry(name=str(n)) for n in range(257)]}).encode(),
    "id a number": json.dumps({"id": 1, "inputs": [entry()]}).encode(),
    "id too long": json.dumps({"id": "x" * 257, "inputs": [entry()]}).encode(),
    "parameters a list": json.dumps({"parameters": [], "inputs": [entry()]}).encode(),
    "timeout negative": json.dumps({"parameters": {"timeout": -1}, "inputs": [entry()]}).encode(),
    "timeout text": json.dumps({"parameters": {"timeout": "5"}, "inputs": [entry()]}).encode(),
    "timeout 1.5": json.dumps({"parameters": {"timeout": 1.5}, "inputs": [entry()]}).encode(),
    "timeout huge": json.dumps({"parameters": {"timeout": 2**64}, "inputs": [entry()]}).encode(),
    "binary_data_output 1": json.dumps({"parameters": {"binary_data_output": 1}, "inputs": [entry()]}).encode(),
    "outputs empty": json.dumps({"inputs": [entry()], "outputs": []}).encode(),
    "output twice": json.dumps({"inputs": [entry()], "outputs": [{"name": "y"}, {"name": "y"}]}).encode(),
    "output without a name": json.dumps({"inputs": [entry()], "outputs": [{}]}).encode(),
    "classification": json.dumps(
        {"inputs": [entry()], "outputs": [{"name": "y", "parameters": {"classification": 3}}]}
    ).encode(),
    "an integer of a million digits": b'{"id": ' + b"9" * 1_000_000 + b"}",
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_bad_documents_are_refused(name):
    with pytest.raises(InputError):
        oip.decode_request(BAD_DOCUMENTS[name], None)


DEEP = {
    "lists": b"[" * 100_000 + b"]" * 100_000,
    "objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "unclosed": b"[" * 5_000_000,
    "behind a string with brackets": b'{"a":"]]]]]]]]' + b"]" * 70 + b'","b":' + b"[" * 100 + b"]" * 100 + b"}",
    "behind an escaped quote": b'{"a":"\\"' + b"]" * 100 + b'","b":' + b"[" * 100 + b"]" * 100 + b"}",
    "behind escaped backslashes": b'{"a":"\\\\","b":' + b"[" * 100 + b"]" * 100 + b',"c":"]"}',
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_json_is_refused_before_it_is_parsed(name):
    with pytest.raises(InputError, match=r"nested deeper|lists and objects"):
        oip.decode_request(DEEP[name], None)


def test_brackets_inside_strings_are_not_depth():
    text = "[" * 1000 + '"\\'
    assert oip.decode_json(json.dumps({"a": text}).encode(), ReplyError) == {"a": text}


@pytest.mark.parametrize("size", [-1, 0, 7, 9, 2**40, True, "8", 8.0])
def test_lying_binary_sizes_are_refused(size):
    head = json.dumps({"inputs": [{**entry(parameters={"binary_data_size": size})}]}).replace(
        '"data": [1.0, 2.0], ', ""
    )
    with pytest.raises(InputError, match="binary_data_size"):
        oip.decode_request(head.encode() + b"\0" * 8, len(head))


def good() -> oip.Message:
    return oip.encode_request({"x": np.zeros((2, 3), np.float32), "flags": np.array([True, False])}, id="1")


@pytest.mark.parametrize("json_bytes", [0, -1, 1, 10**6, 2**62])
def test_lying_header_lengths_are_refused(json_bytes):
    with pytest.raises(InputError):
        oip.decode_request(good().body, json_bytes)


def test_missing_and_surplus_bytes_are_refused():
    message = good()
    for cut in range(1, 26):
        with pytest.raises(InputError):
            oip.decode_request(message.body[:-cut], message.json_bytes)
    with pytest.raises(InputError, match="1 bytes follow"):
        oip.decode_request(message.body + b"\0", message.json_bytes)


def test_a_bool_is_zero_or_one():
    message = good()
    with pytest.raises(InputError, match="BOOL"):
        oip.decode_request(message.body[:-1] + b"\2", message.json_bytes)


@settings(max_examples=effort(300), deadline=None)
@given(st.data())
def test_mutated_messages_are_decoded_or_refused(data):
    message = good()
    body = bytearray(message.body)
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    json_bytes = data.draw(st.sampled_from([message.json_bytes, None, len(body), 3]))
    try:
        request = oip.decode_request(body, json_bytes)
    except InputError:
        return
    assert sum(array.nbytes for array in request.inputs.values()) <= len(body) * 8


@settings(max_examples=effort(200), deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["inputs", "outputs", "name", "shape", "datatype", "data", "parameters"]), inner
            )
        ),
    )
)
def test_any_json_is_decoded_or_refused(document):
    body = json.dumps(document).encode()
    with pytest.raises(InputError):
        oip.decode_request(body, None)
    with pytest.raises(ReplyError):
        oip.decode_reply(body, None)


def test_limits_come_before_memory():
    limits = oip.Limits(body_bytes=10_000, json_bytes=1000)
    with pytest.raises(InputError, match="at most 10000"):
        oip.decode_request(b" " * 10_001, None, limits=limits)
    with pytest.raises(InputError, match="at most 1000"):
        oip.decode_request(b" " * 1001, None, limits=limits)
    shape = {"inputs": [entry(shape=[2**20, 2**20], parameters={"binary_data_size": 2**42})]}
    del shape["inputs"][0]["data"]
    body = json.dumps(shape).encode()

    def decode() -> None:
        with pytest.raises(InputError, match="is more than"):
            oip.decode_request(body, len(body))

    assert peak_bytes(decode) < 1_000_000


def interface() -> Interface:
    return Interface(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 2), axes="NC"),),
        outputs=(
            TensorSpec(name="y", dtype="float32", shape=(None, 3), axes="NC"),
            TensorSpec(name="n", dtype="int64", shape=()),
        ),
    )


def reply(**changes) -> oip.Reply:
    outputs = {"n": np.array(4, np.int64), "y": np.zeros((2, 3), np.float32)} | changes.pop("outputs", {})
    return oip.Reply(**{"model": "m", "version": "1", "id": "5", "outputs": outputs} | changes)


def test_a_right_reply_comes_in_the_order_of_the_interface():
    assert list(oip.check_reply(interface(), reply(), id="5", rows=2)) == ["y", "n"]


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (reply(id="6"), "id is '6'"),
        (reply(id=""), "id is ''"),
        (reply(outputs={"z": np.zeros(1)}), "expected \\['y', 'n'\\]"),
        (reply(outputs={"y": np.zeros((2, 3))}), "dtype float64, expected float32"),
        (reply(outputs={"y": np.zeros((2, 4), np.float32)}), "shape \\[2, 4\\], expected \\[2, 3\\]"),
        (reply(outputs={"y": np.zeros((1, 3), np.float32)}), "shape \\[1, 3\\]"),
        (reply(outputs={"y": np.zeros(6, np.float32)}), "shape \\[6\\]"),
        (reply(outputs={"n": np.array([4])}), "'n'"),
        (reply(outputs={"y": np.full((2, 3), np.nan, np.float32)}), "NaN"),
    ],
)
def test_a_wrong_reply_is_refused_by_name(bad, match):
    with pytest.raises(ReplyError, match=match):
        oip.check_reply(interface(), bad, id="5", rows=2)
    check = oip.compile_reply_check(interface())
    for _ in range(2):
        check(reply(), "5", 2)
        with pytest.raises(ReplyError, match=match):
            check(bad, "5", 2)


def test_the_compiled_check_of_replies_is_the_rule_whatever_the_rows():
    check = oip.compile_reply_check(interface())
    for rows in (2, 2, 3, 2, None, 3):
        wide = reply(outputs={"y": np.zeros((rows or 7, 3), np.float32)})
        assert list(check(wide, "5", rows)) == ["y", "n"]
        with pytest.raises(ReplyError, match="shape"):
            check(wide, "5", (rows or 7) + 1)
        # Another byte order is another dtype, to both.
        swapped = reply(outputs={"y": np.zeros((2, 3), ">f4")})
        with pytest.raises(ReplyError, match="dtype"):
            check(swapped, "5", 2)
        with pytest.raises(ReplyError, match="dtype"):
            oip.check_reply(interface(), swapped, id="5", rows=2)


def metadata(**ours) -> dict:
    parameters = {"interface": interface().to_dict(), "interface_digest": interface().digest} | ours
    document = oip.model_metadata("m", interface(), versions=[3], platform="outrider", parameters=parameters)
    return json.loads(json.dumps(document))


def test_metadata_carries_the_interface_whole():
    document = metadata()
    assert document["versions"] == ["3"]
    assert document["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
    assert oip.interface_from_metadata(document) == interface()


def test_a_foreign_servers_metadata_becomes_an_interface():
    document = metadata()
    del document["parameters"]
    found = oip.interface_from_metadata(document)
    assert [(s.name, s.dtype, s.shape) for s in found.inputs + found.outputs] == [
        ("x", "float32", (None, 2)),
        ("y", "float32", (None, 3)),
        ("n", "int64", ()),
    ]


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"inputs": [], "outputs": []},
        {"inputs": "x", "outputs": "y"},
        {**metadata(), "parameters": {"outrider": {"interface": {}}}},
        {**metadata(), "parameters": {"outrider": {"interface": 5}}},
        metadata(interface_digest="0" * 64),
        {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1]}], "outputs": []},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-2]}], "outputs": []},
        {"inputs": [{"name": "x", "datatype": "FP32"}], "outputs": []},
        {"inputs": [{"datatype": "FP32", "shape": [1]}], "outputs": []},
        {"inputs": [{"name": "", "datatype": "FP32", "shape": [1]}], "outputs": []},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2**40]}], "outputs": []},
    ],
)
def test_bad_metadata_is_refused(document):
    with pytest.raises(ReplyError):
        oip.interface_from_metadata(document)


def test_outputs_are_asked_for_by_name():
    for binary in (True, False):
        message = oip.encode_request({"x": np.zeros(1, np.float32)}, binary=binary, outputs=["b", "a"])
        request = oip.decode_request(message.body, message.json_bytes)
        assert request.outputs == {"b": binary, "a": binary}


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"[" + b"[]," * 1_100_000 + b"1]", "lists and objects"),
        (b'{"a":[' + b'"",' * 140_000 + b"1]}", "strings and keys"),
    ],
)
def test_json_that_would_take_many_times_its_bytes_is_refused_unparsed(body, match):
    def decode() -> None:
        with pytest.raises(ReplyError, match=match):
            oip.decode_json(body, ReplyError)

    assert peak_bytes(decode) < 100_000
