"""A photograph goes to the endpoint as the JPEG that the camera made, and is decoded where it is served."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import struct

import numpy as np
import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from PIL import Image
from torch import nn
from tritonclient.utils import InferenceServerException

import outrider
from outrider_exporters import Data, export
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import InputError, RemoteRefused
from outrider_runtimes.http import HttpClient
from outrider_runtimes.processing import DecodeImage, Layout, Normalise, Resize, encode_images
from support.hybrids import EndpointProcess

pytestmark = pytest.mark.slow

BEFORE = [
    DecodeImage(tensor="photo"),
    Resize(tensor="photo", height=16, width=16),
    Normalise(tensor="photo", mean=[0.5], std=[0.25], divided_by=255.0),
    Layout(tensor="photo", to="NCHW"),
]
HEIGHT, WIDTH = 480, 640


def photo(seed: int) -> bytes:
    """A JPEG of soft blobs and a little noise, of which a camera makes tens of kB."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    blobs = [rng.uniform(50, 120) * np.sin(x / rng.uniform(20, 60) + y / rng.uniform(20, 60)) for _ in range(3)]
    pixels = 128 + np.stack(blobs, -1) + rng.normal(0, 4, (HEIGHT, WIDTH, 3))
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
    return stream.getvalue()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
    photos = {"photo": encode_images([photo(seed) for seed in range(12)])}
    report = export(
        network,
        example={"photo": photos["photo"][:1]},
        outputs=["logits"],
        data=Data(test=(photos, np.zeros(12, np.int64))),
        evaluate=lambda predict, test: {"mean": float(predict(test[0])["logits"].mean())},
        formats=("onnx",),
        preprocessing=BEFORE,
        output=tmp_path_factory.mktemp("photos") / "photos.outrider",
    )
    return report.bundle


@pytest.fixture(scope="module")
def endpoint(bundle, tmp_path_factory):
    endpoint = EndpointProcess(bundle, model="photos", state=tmp_path_factory.mktemp("served") / "state", grpc=True)
    try:
        endpoint.start()
        yield endpoint
    finally:
        endpoint.stop()


def test_the_bundle_says_what_kind_of_file_it_takes(bundle):
    with outrider.load(bundle) as model:
        (spec,) = model.interface.inputs
        assert (spec.content_type, spec.dtype, spec.axes, spec.shape) == ("image/jpeg", "uint8", "NT", (None, None))


def test_a_jpeg_is_answered_by_the_endpoint_as_here_and_costs_its_own_bytes(bundle, endpoint, monkeypatch):
    sent = []
    send = HttpClient.send

    def counted(self, head, body, *args):  # and then sent, as ever
        sent.append(len(body))
        return send(self, head, body, *args)

    monkeypatch.setattr(HttpClient, "send", counted)
    file = photo(99)
    inputs = {"photo": encode_images([file])}
    with outrider.load(bundle) as model:
        here = model.predict(inputs)["logits"]
    with outrider.Remote(endpoint.url, model="photos") as remote:
        deadline = Deadline.after_ms(120_000.0)
        there = remote.submit(inputs, deadline).result().outputs["logits"]
        np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-5)
        assert len(file) < max(sent) < len(file) + 1000
        assert max(sent) < HEIGHT * WIDTH * 3 / 8
        with pytest.raises((RemoteRefused, InputError), match="row 0 is no image/jpeg"):
            remote.submit({"photo": encode_images([b"GIF89a"])}, Deadline.after_ms(120_000.0)).result()
        again = remote.submit(inputs, Deadline.after_ms(120_000.0)).result().outputs["logits"]
        np.testing.assert_array_equal(again, there)


@contextlib.contextmanager
def triton(endpoint, over):
    """Triton's own client, unchanged, and the module that it is from."""
    kit = {"http": tritonclient.http, "grpc": tritonclient.grpc}[over]
    port = {"http": endpoint.port, "grpc": endpoint.grpc_port}[over]
    with kit.InferenceServerClient(f"127.0.0.1:{port}") as client:
        yield client, kit


def asked(client, kit, files, shape):
    tensor = kit.InferInput("photo", shape, "BYTES")
    tensor.set_data_from_numpy(np.array(files, dtype=object).reshape(shape))
    return client.infer("photos", [tensor]).as_numpy("logits")


@pytest.mark.parametrize("over", ["http", "grpc"])
def test_tritons_client_finds_a_file_in_the_metadata_and_sends_it_as_bytes(bundle, endpoint, over):
    files = [photo(3), photo(4)]
    with outrider.load(bundle) as model:
        here = model.predict({"photo": encode_images(files)})["logits"]
    with triton(endpoint, over) as (client, kit):
        options = {} if over == "http" else {"as_json": True}
        (described,) = client.get_model_metadata("photos", **options)["inputs"]
        assert (described["datatype"], list(map(int, described["shape"]))) == ("BYTES", [-1])
        for shape in ([2], [2, 1]):
            np.testing.assert_allclose(asked(client, kit, files, shape), here, rtol=1e-5, atol=1e-5)
        with pytest.raises(InferenceServerException, match="row 1 is no image/jpeg"):
            asked(client, kit, [files[0], b"GIF89a"], [2])
        with pytest.raises(InferenceServerException, match=r"expected a file a row: \[N\] or \[N, 1\]"):
            asked(client, kit, files, [1, 2])
        np.testing.assert_allclose(asked(client, kit, files[:1], [1]), here[:1], rtol=1e-5, atol=1e-5)


def test_typed_contents_over_grpc_are_the_same(bundle, endpoint):
    request = tritonclient.grpc.service_pb2.ModelInferRequest(model_name="photos")
    tensor = request.inputs.add(name="photo", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(photo(3))
    with outrider.load(bundle) as model:
        here = model.predict({"photo": encode_images([photo(3)])})["logits"]
    with triton(endpoint, "grpc") as (client, _):
        reply = client._client_stub.ModelInfer(request)
        there = np.frombuffer(reply.raw_output_contents[0], "<f4").reshape(1, 5)
        np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-5)


def posted(endpoint, tensor, raw=b""):
    """Status and JSON of one request over a bare socket."""
    head = json.dumps({"inputs": [{"name": "photo", "datatype": "BYTES", "shape": [1]} | tensor]}).encode()
    length = f"Inference-Header-Content-Length: {len(head)}\r\n" if raw else ""
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=120) as connection:
        begin = "POST /v2/models/photos/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        connection.sendall(f"{begin}{length}Content-Length: {len(head) + len(raw)}\r\n\r\n".encode() + head + raw)
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def sized(raw: bytes, **changes) -> tuple[dict, bytes]:
    return {"parameters": {"binary_data_size": len(raw)}} | changes, raw


def blank(side: int) -> bytes:
    """A JPEG of one colour, which costs a sixtieth of a byte a pixel."""
    stream = io.BytesIO()
    Image.new("RGB", (side, side)).save(stream, "JPEG")
    return struct.pack("<I", len(stream.getvalue())) + stream.getvalue()


REFUSED = {
    "JSON has no form for it": ({"data": ["/9j/4AAQSkZJRg=="]}, b""),
    "a length beyond the end": sized(struct.pack("<I", 2**32 - 1) + b"abc"),
    "a length that is cut": sized(b"\1\0\0"),
    "more than its shape": sized(struct.pack("<I", 1) + b"a" + struct.pack("<I", 0)),
    "fewer than its shape": sized(struct.pack("<I", 1) + b"a", shape=[3]),
    "rows beyond all bounds": sized(b"\0\0\0\0", shape=[2**31 - 1]),
    "too many files": sized(bytes(4) * 20_000, shape=[20_000]),
    "gigabytes of padding": sized(struct.pack("<I", 1 << 20) + bytes(1 << 20) + bytes(4) * 16_000, shape=[16_001]),
    "gigabytes of pixels": sized(blank(4096) * 200, shape=[200]),
    "an empty file": sized(bytes(4)),
    "a file that ends early": sized(struct.pack("<I", 4000) + photo(1)[:4000]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_lie_are_400_and_the_next_one_is_answered(endpoint, name):
    status, body = posted(endpoint, *REFUSED[name])
    assert status == 400 and "'photo'" in body["error"] and len(body["error"]) < 300
    file = photo(5)
    status, body = posted(endpoint, *sized(struct.pack("<I", len(file)) + file))
    assert status == 200 and len(body["outputs"][0]["data"]) == 5
