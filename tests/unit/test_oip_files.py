"""Inputs that are files, sent as BYTES over HTTP and gRPC: they arrive as uint8 rows, and no bytes get further."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2
from tritonclient.utils import serialize_byte_tensor

from outrider.endpoint.app import build_app
from outrider.endpoint.faces import MAX_PREPARED_BYTES, check_rows
from outrider.endpoint.intake import BODIES_AT_ONCE, Intake
from outrider.endpoint.models import Models, Served
from outrider_runtimes import oip, oip_grpc
from outrider_runtimes._oip_files import MAX_FILES
from outrider_runtimes.errors import InputError
from outrider_runtimes.processing import DecodeImage, Resize, around, encode_images
from outrider_runtimes.tensors import Interface, TensorSpec
from support.asgi import ask
from support.effort import effort
from support.endpoints import Named
from support.peaks import peak_bytes

PHOTO = TensorSpec(name="photo", dtype="uint8", shape=(None, None), axes="NT", content_type="image/jpeg")
SCORES = TensorSpec(name="scores", dtype="float32", shape=(None, 2), axes="NC")
INTERFACE = Interface(inputs=(PHOTO,), outputs=(SCORES,))
ANY, EIGHT = {"photo": None}, {"photo": 8}
FILES = [b"\xff\xd8\xff\xe0one", b"", b"\0\0"]


def entry(size: int, **changes) -> dict:
    entry = {"name": "photo", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
    return entry | changes


def over_http(raw: bytes, *, files=ANY, limits=oip.DEFAULT_LIMITS, **changes) -> np.ndarray:
    head = json.dumps({"inputs": [entry(len(raw), **changes)]}).encode()
    return oip.decode_request(head + raw, len(head), limits=limits, files=files).inputs["photo"]


def over_grpc(raw: bytes, *, files=ANY, limits=oip.DEFAULT_LIMITS, **changes) -> np.ndarray:
    message = service_pb2.ModelInferRequest(raw_input_contents=[raw])
    message.inputs.add(**({"name": "photo", "datatype": "BYTES", "shape": [1]} | changes))
    call = oip_grpc.decode_request(message.SerializeToString(), limits=limits, files=files)
    return call.request.inputs["photo"]


def typed(elements: list[bytes], *, files=ANY, shape: list[int] | None = None) -> np.ndarray:
    message = service_pb2.ModelInferRequest()
    tensor = message.inputs.add(name="photo", datatype="BYTES", shape=[len(elements)] if shape is None else shape)
    tensor.contents.bytes_contents.extend(elements)
    return oip_grpc.decode_request(message.SerializeToString(), files=files).request.inputs["photo"]


def raw_of(*files: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(file)) + file for file in files)


@settings(max_examples=effort(60), deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=6), st.booleans())
def test_files_arrive_as_the_rows_that_encode_images_makes(files, second_axis):
    shape = [len(files), 1] if second_axis else [len(files)]
    serialized = serialize_byte_tensor(np.array(files, dtype=object))
    raw = serialized.item() if serialized.size else b""
    assert raw == raw_of(*files)
    expected = encode_images(files)
    for got in (over_http(raw, shape=shape), over_grpc(raw, shape=shape), typed(files, shape=shape)):
        assert got.dtype == np.uint8 and got.flags.writeable
        np.testing.assert_array_equal(got, expected)


def test_rows_of_a_length_that_the_interface_fixes_are_padded_to_it():
    assert oip.files_in(INTERFACE) == ANY
    fixed = TensorSpec(name="photo", dtype="uint8", shape=(None, 8), axes="NT", content_type="image/jpeg")
    files = oip.files_in(Interface(inputs=(fixed,), outputs=(SCORES,)))
    assert files == EIGHT
    for got in (over_http(raw_of(*FILES), files=files, shape=[3]), typed(FILES, files=files)):
        np.testing.assert_array_equal(got, encode_images(FILES, 8))
    with pytest.raises(InputError, match="an element has 9 bytes, at most 8"):
        over_http(raw_of(bytes(9)), files=files)


ONE = raw_of(b"abc")
BAD = {
    "a length beyond the end": (b"\x04\0\0\0abc", {}),
    "the greatest length": (b"\xff\xff\xff\xffabc", {}),
    "a length that is cut": (b"\x03\0\0", {}),
    "no bytes for an element": (b"", {}),
    "bytes after the last": (ONE + b"\0", {}),
    "an element more than the shape": (ONE * 2, {}),
    "an element fewer": (ONE, {"shape": [2]}),
    "rows and no elements": (b"", {"shape": [2]}),
    "no shape": (ONE, {"shape": []}),
    "two to a row": (ONE * 2, {"shape": [1, 2]}),
    "three axes": (ONE, {"shape": [1, 1, 1]}),
    "a negative shape": (ONE, {"shape": [-1]}),
    "a huge shape": (ONE, {"shape": [2**31 - 1]}),
    "rows of nothing": (b"", {"shape": [2**31 - 1, 0]}),
    "more files than are taken": (raw_of(b"") * (MAX_FILES + 1), {"shape": [MAX_FILES + 1]}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_lies_about_its_files_is_refused(name):
    raw, changes = BAD[name]
    for decoded in (over_http, over_grpc):
        with pytest.raises(InputError, match="tensor 'photo'"):
            decoded(raw, **changes)


@pytest.mark.parametrize("size", [-7, 6, 8, 2**62, 7.0, "7", True, None, []])
def test_a_binary_size_that_is_none_is_refused(size):
    with pytest.raises(InputError):
        over_http(ONE, parameters={"binary_data_size": size})


def test_only_an_input_that_is_a_file_may_come_as_bytes():
    for files in ({}, {"other": None}):
        for refused in (
            lambda files=files: over_http(ONE, files=files),
            lambda files=files: over_grpc(ONE, files=files),
            lambda files=files: typed([b"abc"], files=files),
        ):
            with pytest.raises(InputError, match=r"'BYTES', which is not served; one of BOOL, INT8"):
                refused()
    with pytest.raises(InputError, match=r"one of BOOL, .*, BYTES"):
        over_http(ONE, datatype="FP128")


def test_json_has_no_form_for_a_file():
    for data in (["abc"], [[255, 216]], [None], [1], []):
        body = json.dumps({"inputs": [{"name": "photo", "shape": [1], "datatype": "BYTES", "data": data}]})
        with pytest.raises(InputError, match="'photo'"):
            oip.decode_request(body.encode(), None, files=ANY)
    for count in (0, 2):
        with pytest.raises(InputError, match=f"has {count} elements, its shape needs 1"):
            typed([b"a"] * count, shape=[1])


def test_padding_is_bounded_before_it_is_made():
    """A megabyte beside sixteen thousand empty files would be sixteen gigabytes of zeros."""
    raw = raw_of(bytes(1 << 20)) + raw_of(b"") * (MAX_FILES - 1)

    def refused() -> None:
        for decoded in (over_http, over_grpc):
            with pytest.raises(InputError, match="more than the 67108864 that are taken"):
                decoded(raw, shape=[MAX_FILES])

    assert peak_bytes(refused) < 20 << 20
    with pytest.raises(InputError, match="99 rows of 16 bytes are more than the 800 that are taken"):
        over_http(raw_of(b"") * 99, files={"photo": 16}, shape=[99], limits=oip.Limits(body_bytes=800))


@settings(max_examples=effort(150), deadline=None)
@given(st.data())
def test_spoilt_bytes_are_a_typed_error_or_rows(data):
    raw = bytearray(raw_of(*FILES))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 5))] = data.draw(st.binary(max_size=5))
    rows = data.draw(st.integers(0, 5))
    for decoded in (over_http, over_grpc):
        try:
            got = decoded(bytes(raw), shape=[rows])
        except InputError:
            continue
        assert got.shape[0] == rows and got.size <= max(1, rows) * max(1, len(raw))


def test_metadata_says_that_the_input_is_a_file_and_our_client_reads_the_interface():
    ours = {"interface": INTERFACE.to_dict(), "interface_digest": INTERFACE.digest}
    document = oip.model_metadata("m", INTERFACE, versions=[1], platform="outrider", parameters=ours)
    assert document["inputs"] == [{"name": "photo", "datatype": "BYTES", "shape": [-1]}]
    assert document["outputs"] == [{"name": "scores", "datatype": "FP32", "shape": [-1, 2]}]
    assert oip.interface_from_metadata(document) == INTERFACE
    data = oip_grpc.encode_model_metadata(document)
    assert oip.interface_from_metadata(oip_grpc.decode_model_metadata(data)) == INTERFACE


def test_rows_are_bounded_by_what_preprocessing_makes_of_them():
    """Two bytes of a file may become an image: what is refused here would be a gigabyte and more."""
    steps = [DecodeImage(tensor="photo"), Resize(tensor="photo", height=256, width=256)]
    image = TensorSpec(name="photo", dtype="uint8", shape=(None, 256, 256, 3), axes="NHWC", range=(0.0, 255.0))
    runner = Named()
    runner.interface = around(Interface(inputs=(image,), outputs=(SCORES,)), [PHOTO], steps, [])
    served = Served(name="digits", runner=runner)
    most = MAX_PREPARED_BYTES // (3 << 16)
    check_rows(served, oip.Request(id="", inputs={"photo": np.zeros((most, 2), np.uint8)}))
    raw = raw_of(*[b"ab"] * (most + 1))
    head = json.dumps({"inputs": [entry(len(raw), shape=[most + 1])]}).encode()
    app = build_app(Models([served]))
    reply = ask(app, "/v2/models/digits/infer", head + raw, inference_header_content_length=str(len(head)))
    assert reply.status == 400 and f"{most + 1} rows become" in reply.json()["error"]
    assert (runner.submitted, app.state.endpoint.intake.held_bytes) == (0, 0)
    runner.close()


def test_padding_counts_among_the_bytes_of_all_bodies():
    runner = Named()
    runner.interface = INTERFACE
    intake = Intake(body_bytes=1000)
    app = build_app(Models([Served(name="digits", runner=runner)]), intake=intake)
    raw = raw_of(bytes(500), *[b""] * 19)
    head = json.dumps({"inputs": [entry(len(raw), shape=[20])]}).encode()
    assert len(head) + len(raw) < 1000 and BODIES_AT_ONCE * 1000 < 20 * 500
    reply = ask(
        app, "/v2/models/digits/infer", head + raw, content_type="x/y", inference_header_content_length=str(len(head))
    )
    assert reply.status == 503 and "too many bytes" in reply.json()["error"]
    assert (intake.held_bytes, runner.submitted) == (0, 0)
    runner.close()
