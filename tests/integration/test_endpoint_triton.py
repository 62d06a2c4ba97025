"""Triton's own HTTP client against the endpoint: health, metadata, infer, and what is not offered."""

from __future__ import annotations

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from support.endpoint_child import VERSION, Child, expected, write_models

pytestmark = pytest.mark.slow

X = np.random.default_rng(5).standard_normal((5, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    child = Child(folder, queue=64)
    yield child
    assert "Traceback" not in child.stop()


@pytest.fixture
def client(child):
    with triton.InferenceServerClient(child.url.removeprefix("http://"), concurrency=4) as client:
        yield client


def tensor(x: np.ndarray = X, *, binary: bool = True) -> triton.InferInput:
    wanted = triton.InferInput("x", list(x.shape), "FP32")
    wanted.set_data_from_numpy(x, binary_data=binary)
    return wanted


def test_health_and_metadata(client):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("linear") and client.is_model_ready("linear", str(VERSION))
    assert not client.is_model_ready("linear", "99") and not client.is_model_ready("other")
    server = client.get_server_metadata()
    assert server["name"] == "outrider" and "binary_tensor_data" in server["extensions"]
    model = client.get_model_metadata("linear", str(VERSION))
    assert (model["name"], model["versions"]) == ("linear", [str(VERSION)])
    assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_infer_in_every_form(client, binary_in, binary_out):
    outputs = [triton.InferRequestedOutput("y", binary_data=binary_out)]
    result = client.infer("linear", [tensor(binary=binary_in)], outputs=outputs, request_id="seven")
    np.testing.assert_allclose(result.as_numpy("y"), expected(X), rtol=1e-5)
    reply = result.get_response()
    assert (reply["id"], reply["model_name"], reply["model_version"]) == ("seven", "linear", str(VERSION))


def test_infer_as_the_client_asks_by_itself(client):
    result = client.infer("linear", [tensor()], model_version=str(VERSION), timeout=30_000_000)
    np.testing.assert_allclose(result.as_numpy("y"), expected(X), rtol=1e-5)
    assert result.get_output("other") is None


def test_many_at_once(client):
    waiting = [client.async_infer("linear", [tensor(X[: 1 + at % 5])]) for at in range(32)]
    for at, each in enumerate(waiting):
        np.testing.assert_allclose(each.get_result().as_numpy("y"), expected(X[: 1 + at % 5]), rtol=1e-5)


@pytest.mark.parametrize(
    ("asked", "status", "says"),
    [
        (lambda c: c.infer("other", [tensor()]), "404", "no model 'other'"),
        (lambda c: c.infer("linear", [tensor()], model_version="7"), "404", "no version '7'"),
        (lambda c: c.infer("linear", [tensor(X[:, :3])]), "400", "expected"),
        (lambda c: c.infer("linear", [tensor()], request_compression_algorithm="gzip"), "415", "compressed"),
        (lambda c: c.infer("linear", [tensor()], sequence_id=4, sequence_start=True, timeout=1), "504", "passed"),
        (lambda c: c.get_model_config("linear"), "404", "Not Found"),
        (lambda c: c.get_inference_statistics("linear"), "404", "Not Found"),
        (lambda c: c.get_model_repository_index(), "404", "Not Found"),
        (lambda c: c.load_model("linear"), "404", "Not Found"),
        (lambda c: c.unload_model("linear"), "404", "Not Found"),
        (lambda c: c.get_system_shared_memory_status(), "404", "Not Found"),
        (lambda c: c.register_system_shared_memory("a", "/a", 8), "404", "Not Found"),
        (lambda c: c.get_cuda_shared_memory_status(), "404", "Not Found"),
        (lambda c: c.get_trace_settings(), "404", "Not Found"),
        (lambda c: c.update_trace_settings(settings={"trace_level": "OFF"}), "404", "Not Found"),
        (lambda c: c.get_log_settings(), "404", "Not Found"),
    ],
)
def test_what_is_refused_or_not_offered_reaches_the_client_as_its_own_error(client, asked, status, says):
    with pytest.raises(InferenceServerException, match=says) as caught:
        asked(client)
    assert caught.value.status() == status
    assert "/root" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert client.is_server_ready()


def test_a_model_does_not_become_ready_by_being_asked_for_shared_memory(client):
    wanted = triton.InferInput("x", [5, 4], "FP32")
    wanted.set_shared_memory("region", 80)
    with pytest.raises(InferenceServerException):
        client.infer("linear", [wanted])
    np.testing.assert_allclose(client.infer("linear", [tensor()]).as_numpy("y"), expected(X), rtol=1e-5)
