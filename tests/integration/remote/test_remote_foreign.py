"""An endpoint that is not ours, with names of its own, bound to our interface by an explicit mapping."""

from __future__ import annotations

import json
import socket
from dataclasses import replace

import numpy as np
import pytest

from outrider.hybrid import Hybrid
from outrider.policy import Policy
from outrider_runtimes import oip
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import ConfigError, InterfaceMismatch, RemoteUnavailable, ReplyError
from outrider_runtimes.remote import Remote
from outrider_runtimes.tensors import Interface, TensorSpec
from support import grpc_servers
from support.grpc_servers import GrpcServer
from support.hybrids import onnx_model
from support.realbundles import INTERFACE, expected, images
from support.servers import Asked, Server, http, sent

pytestmark = pytest.mark.slow

MAPPING = {"image": "input_0", "logits": "output_0"}
X = images(2)
LATER = 120_000.0


def foreign(side: tuple[TensorSpec, ...], name: str) -> TensorSpec:
    """As a server writes metadata that knows no axes."""
    return replace(side[0], name=name, axes="", meaning="", range=None)


THEIRS = Interface(
    inputs=(foreign(INTERFACE.inputs, "input_0"),),
    outputs=(
        foreign(INTERFACE.outputs, "output_0"),
        TensorSpec(name="features", dtype="float32", shape=(None, 7)),
    ),
)


def metadata(interface: Interface = THEIRS):
    def behave(server: Server, connection: socket.socket, asked: Asked) -> None:
        document = {"name": "kit", "version": "2", "extensions": list(server.extensions)}
        if asked.path != "/v2":
            document = oip.model_metadata("m", interface, versions=[1], platform="kit", parameters={})
            del document["parameters"]
        connection.sendall(http(json.dumps(document).encode()))

    return behave


def infer(server: Server, connection: socket.socket, asked: Asked) -> None:
    """The network of seed 1, under names of its own; all outputs, or those that are asked for."""
    request = asked.decoded()
    image = request.inputs["input_0"]
    outputs = {"output_0": expected(image, seed=1), "features": np.zeros((len(image), 7), np.float32)}
    connection.sendall(sent(oip.encode_reply(outputs, model="m", version="1", request=request, parameters={})))


@pytest.fixture(params=["binary", "json"])
def server(request):
    extensions = (oip.BINARY_EXTENSION,) if request.param == "binary" else ()
    with Server(infer=infer, metadata=metadata(), extensions=extensions) as server:
        yield server


def bound(server: Server, **changes) -> Remote:
    return Remote(server.url, **{"model": "m", "interface": INTERFACE, "mapping": MAPPING} | changes)


def test_it_answers_at_our_interface(server):
    with bound(server) as remote:
        assert remote.interface == INTERFACE
        with pytest.raises(RemoteUnavailable, match="not known yet"):
            _ = remote.interface_digest
        outputs = remote.submit({"image": X}, Deadline.after_ms(LATER)).result(200).outputs
        assert (remote.interface_digest, remote.bundle) == (INTERFACE.digest, "")
    assert list(outputs) == ["logits"]
    np.testing.assert_allclose(outputs["logits"], expected(X, seed=1), atol=1e-5)
    asked = server.asked[-1].decoded()
    assert list(asked.inputs) == ["input_0"] and list(asked.outputs) == ["output_0"]


def test_a_hybrid_takes_it_where_it_is_bound_and_not_where_it_is_not(server, tmp_path):
    with onnx_model(tmp_path, seed=0) as edge, bound(server, interface=edge.interface) as remote:
        prediction = Hybrid(edge, remote, Policy(LATER, min_margin=1.0)).infer({"image": X[:1]})
        assert prediction.source == "cloud"
        np.testing.assert_allclose(prediction.outputs["logits"], expected(X[:1], seed=1), atol=1e-5)
        with Remote(server.url, model="m") as unbound, pytest.raises(InterfaceMismatch):
            Hybrid(edge, unbound, Policy(LATER, min_margin=1.0))


@pytest.mark.parametrize(
    ("theirs", "mapping", "match"),
    [
        (THEIRS, {}, "no input 'image', only"),
        (replace(THEIRS, outputs=THEIRS.outputs[1:]), MAPPING, "no output 'output_0'"),
        (replace(THEIRS, inputs=(replace(THEIRS.inputs[0], dtype="uint8"),)), MAPPING, "uint8 there, float32 here"),
        (replace(THEIRS, inputs=(replace(THEIRS.inputs[0], shape=(None, 3)),)), MAPPING, "shape"),
    ],
)
def test_what_does_not_fit_is_a_mismatch_until_it_does(theirs, mapping, match):
    with Server(infer=infer, metadata=metadata(theirs)) as server, bound(server, mapping=mapping) as remote:
        for _ in range(2):
            with pytest.raises(InterfaceMismatch, match=match):
                remote.connect(Deadline.after_ms(LATER))
        with pytest.raises(InterfaceMismatch, match=match):
            remote.submit({"image": X}, Deadline.after_ms(LATER)).result(200)
        assert all(asked.method == "GET" for asked in server.asked)
        server.metadata = metadata()
        if mapping:
            assert remote.connect(Deadline.after_ms(LATER)) == INTERFACE


def test_what_the_reply_has_is_checked_at_our_interface(server):
    def narrow(server, connection, asked):
        request = asked.decoded()
        outputs = {"output_0": np.zeros((1, 3), np.float32)}
        connection.sendall(sent(oip.encode_reply(outputs, model="m", version="1", request=request, parameters={})))

    def all_of_them(server, connection, asked):
        infer(server, connection, replace(asked, body=asked.body.replace(b"output_0", b"features")))

    with bound(server) as remote:
        for behave, match in ((narrow, "output 'logits' of the reply"), (all_of_them, r"\['features'\]")):
            server.infer = behave
            with pytest.raises(ReplyError, match=match):
                remote.submit({"image": X}, Deadline.after_ms(LATER)).result(200)
        server.infer = infer
        remote.submit({"image": X}, Deadline.after_ms(LATER)).result(200)


def test_it_may_speak_grpc():
    ours = Interface(
        inputs=(TensorSpec(name="pair", dtype="float32", shape=(None, 2), axes="NC"),),
        outputs=(TensorSpec(name="twice", dtype="float32", shape=(None, 2), axes="NC"),),
    )
    with (
        GrpcServer(ours={}, infer=grpc_servers.good) as server,
        Remote(server.url, model="m", interface=ours, mapping={"pair": "x", "twice": "y"}) as remote,
    ):
        outputs = remote.submit({"pair": X[:, 0, 0, :2]}, Deadline.after_ms(LATER)).result(200).outputs
    np.testing.assert_array_equal(outputs["twice"], 2 * X[:, 0, 0, :2])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"interface": None}, "pass interface=|mapping= says"),
        ({"mapping": {"imge": "input_0"}}, "no tensor 'imge'"),
        ({"interface": "image"}, "interface= is a str"),
    ],
)
def test_what_cannot_be_bound_is_refused_when_it_is_named(options, match):
    with pytest.raises(ConfigError, match=match) as caught:
        Remote("http://127.0.0.1:9", **{"model": "m", "interface": INTERFACE, "mapping": MAPPING} | options)
    assert caught.value.hint
