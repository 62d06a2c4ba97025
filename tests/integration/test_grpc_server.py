"""The gRPC face with Triton's own client, unchanged, with ours, with raw calls, and within `outrider serve`.

The models are of numpy and held by the test where one has to wait; sockets, threads and messages are real.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from outrider.admit.curve import BatchCurve, BatchPlan, Point
from outrider.endpoint import Listening, ServerTls
from outrider.endpoint.batching import Batcher
from outrider.endpoint.faces import LIMITS
from outrider.endpoint.grpc_reading import AT_ONCE
from outrider.endpoint.grpc_server import MAX_MESSAGE_BYTES, PUSHBACK, REQUEST_ID, GrpcServer
from outrider.endpoint.intake import BODIES_AT_ONCE, Intake
from outrider.endpoint.metrics import Metrics
from outrider.endpoint.models import Models, Served
from outrider.model import BundleInfo
from outrider_runtimes import oip, oip_grpc
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import ConfigError, InferenceError
from outrider_runtimes.protowire import bytes_field
from outrider_runtimes.remote import Remote
from outrider_runtimes.tensors import Interface, TensorSpec
from support.certificates import issue
from support.endpoint_child import Child, named, write_models
from support.endpoint_child import expected as linear
from support.realbundles import expected as expected_of_bundle
from support.realbundles import images, make_real_bundle
from support.runners import CLASSES, NumpyRunner

pytestmark = pytest.mark.slow

WAIT_S = 120.0
QUEUE = 3
X = np.arange(2 * CLASSES, dtype=np.float32).reshape(2, CLASSES)
TINY = oip.Limits(body_bytes=1 << 16, json_bytes=1 << 16)


class Held(NumpyRunner):
    """A numpy model that says which bundle it is over; ``started`` counts what it was given."""

    sick = False
    variant, engine = "numpy-float32", "numpy"

    def __init__(self, name: str, version: int) -> None:
        super().__init__(gain=float(version))
        self.bundle = BundleInfo(name=name, version=version, digest=name * 8, verified=False)
        self.started = threading.Semaphore(0)

    def submit(self, inputs: Any, deadline: Deadline) -> Any:
        future = super().submit(inputs, deadline)
        self.started.release()
        return future


@dataclass
class Endpoint:
    server: GrpcServer
    runners: dict[int, Held]
    intake: Intake
    metrics: Metrics

    @property
    def where(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def counted(self) -> dict[tuple[str, str, str], int]:
        rows = self.metrics.quality()["models"]
        return {(m["model"], m["version"], r["reason"]): r["requests"] for m in rows for r in m["reasons"]}


class Unhurried(GrpcServer):
    message_timeout_s = 300.0


@contextlib.contextmanager
def serving(
    *,
    token: str | None = None,
    limits: oip.Limits = LIMITS,
    other: str = "",
    kind: type[GrpcServer] = Unhurried,
    **where: Any,
) -> Iterator[Endpoint]:
    runners = {version: Held("twice", version) for version in (1, 2)}
    offered = [Served(name="twice", runner=runner) for runner in runners.values()]
    models = Models([*offered, *([Served(name=other, runner=runners[1])] if other else [])])
    intake = Intake(queue=QUEUE, body_bytes=limits.body_bytes)
    metrics = Metrics(models, intake)
    listening = Listening(port=0, **where)
    try:
        with kind(models, intake, metrics, listening, queue=QUEUE, token=token, limits=limits) as server:
            yield Endpoint(server, runners, intake, metrics)
    finally:
        for runner in runners.values():
            runner.close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as found:
        yield found


@contextlib.contextmanager
def raw(where: str, method: str = "ModelInfer") -> Iterator[Any]:
    with grpc.insecure_channel(where, options=[("grpc.max_receive_message_length", -1)]) as channel:
        yield channel.unary_unary(oip_grpc.path(method))


def triton_input(x: np.ndarray) -> triton.InferInput:
    tensor = triton.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    return tensor


def code_of(error: grpc.RpcError) -> str:
    return str(error.code().name)


def test_tritons_client_finds_health_metadata_and_answers(endpoint: Endpoint) -> None:
    with triton.InferenceServerClient(endpoint.where) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("twice")
        assert not_found(lambda: client.is_model_ready("nothing"))
        assert client.get_server_metadata().name == "outrider"
        metadata = client.get_model_metadata("twice")
        assert list(metadata.versions) == ["1", "2"] and metadata.platform == "outrider"
        assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("x", "FP32", [-1, CLASSES])]
        result = client.infer("twice", [triton_input(X)], request_id="seven")
        np.testing.assert_array_equal(result.as_numpy("logits"), X * 2)
        response = result.get_response()
        assert (response.id, response.model_name, response.model_version) == ("seven", "twice", "2")
        first = client.infer(
            "twice", [triton_input(X)], model_version="1", outputs=[triton.InferRequestedOutput("logits")]
        )
        np.testing.assert_array_equal(first.as_numpy("logits"), X)
    assert endpoint.counted() == {("twice", "1", "ok"): 1, ("twice", "2", "ok"): 1}


def test_many_callers_over_one_batched_session_get_their_own_rows(tmp_path: Path) -> None:
    write_models(tmp_path)
    points = tuple(Point(rows=rows, best_ms=10.0 + rows, runs=3) for rows in (1, 8))
    curve = BatchCurve(variant="v", engine="e", threads=1, points=points)
    runner = Batcher(named(tmp_path, "linear"), BatchPlan(rows=8, delay_ms=5.0, gain=4.0, curve=curve))
    models = Models([Served(name="linear", runner=runner)])
    intake = Intake(queue=64, body_bytes=LIMITS.body_bytes)
    rows = [np.random.default_rng(n).uniform(-1, 1, (1 + n % 3, 4)).astype(np.float32) for n in range(48)]
    server = GrpcServer(models, intake, Metrics(models, intake), Listening(port=0), queue=64)
    with server, raw(f"127.0.0.1:{server.port}") as call:
        replies = [call.future(oip_grpc.encode_request({"x": x}, model="linear"), timeout=WAIT_S) for x in rows]
        answers = [oip_grpc.decode_reply(each.result(WAIT_S)).outputs["y"] for each in replies]
    runner.close()
    for x, y in zip(rows, answers, strict=True):
        np.testing.assert_allclose(y, linear(x), rtol=1e-5, atol=1e-6)


def not_found(call: Any) -> bool:
    with pytest.raises(InferenceServerException, match="NOT_FOUND"):
        call()
    return True


def test_tritons_client_answers_asynchronously_for_many_at_once(endpoint: Endpoint) -> None:
    done: list[tuple[Any, Any]] = []
    ended = threading.Semaphore(0)

    def note(result: Any, error: Any) -> None:
        done.append((result, error))
        ended.release()

    with triton.InferenceServerClient(endpoint.where) as client:
        for _ in range(QUEUE):
            client.async_infer("twice", [triton_input(X)], note)
        assert all(ended.acquire(timeout=WAIT_S) for _ in range(QUEUE))
    assert [error for _, error in done] == [None] * QUEUE
    assert all((result.as_numpy("logits") == X * 2).all() for result, _ in done)


def test_our_own_remote_is_answered_and_the_time_left_travels(endpoint: Endpoint) -> None:
    with Remote(f"grpc://{endpoint.where}", model="twice") as remote:
        answer = remote.submit({"x": X}, Deadline.after_ms(100_000)).result(WAIT_S)
        np.testing.assert_array_equal(answer.outputs["logits"], X * 2)
        assert remote.interface.digest == endpoint.runners[2].interface.digest


def test_model_control_shared_memory_trace_and_streams_are_unimplemented(endpoint: Endpoint) -> None:
    for method in (*oip_grpc.NOT_SERVED, "NoSuchMethod"):
        with raw(endpoint.where, method) as call, pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=WAIT_S)
        assert code_of(caught.value) == "UNIMPLEMENTED", method
    with triton.InferenceServerClient(endpoint.where) as client:
        for ask in (
            client.get_model_repository_index,
            client.get_trace_settings,
            client.get_system_shared_memory_status,
        ):
            with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
                ask()


BAD = {
    "no protobuf": (b"\xff\xff\xff", "INVALID_ARGUMENT", "bad_input"),
    "no inputs": (b"\x0a\x05twice", "INVALID_ARGUMENT", "bad_input"),
    "no such model": (oip_grpc.encode_request({"x": X}, model="../../etc/passwd"), "NOT_FOUND", "unknown"),
    "no such version": (oip_grpc.encode_request({"x": X}, model="twice", version="9"), "NOT_FOUND", "unknown"),
    "another shape": (oip_grpc.encode_request({"x": X[:, :2]}, model="twice"), "INVALID_ARGUMENT", "bad_input"),
    "another name": (oip_grpc.encode_request({"z": X}, model="twice"), "INVALID_ARGUMENT", "bad_input"),
    "not a number": (oip_grpc.encode_request({"x": X * np.nan}, model="twice"), "INVALID_ARGUMENT", "bad_input"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_request_gets_its_status_and_the_next_good_one_is_answered(endpoint: Endpoint, case: str) -> None:
    data, code, reason = BAD[case]
    with raw(endpoint.where) as call:
        with pytest.raises(grpc.RpcError) as caught:
            call(data, timeout=WAIT_S)
        assert code_of(caught.value) == code
        assert "/" not in caught.value.details().replace("GET /v2/models", "").replace("../../etc/passwd", "")
        reply = oip_grpc.decode_reply(call(oip_grpc.encode_request({"x": X}, model="twice"), timeout=WAIT_S))
        np.testing.assert_array_equal(reply.outputs["logits"], X * 2)
    assert reason in {key[2] for key in endpoint.counted()}


def test_a_model_that_fails_is_internal_and_no_path_leaves(endpoint: Endpoint) -> None:
    endpoint.runners[2].error = lambda: InferenceError("cannot read /root/models/secret.onnx")
    with raw(endpoint.where) as call, pytest.raises(grpc.RpcError) as caught:
        call(oip_grpc.encode_request({"x": X}, model="twice"), timeout=WAIT_S)
    assert code_of(caught.value) == "INTERNAL" and "root" not in caught.value.details()


def test_a_message_beyond_its_bound_is_refused() -> None:
    with serving(limits=TINY) as endpoint, raw(endpoint.where) as call:
        with pytest.raises(grpc.RpcError) as caught:
            call(oip_grpc.encode_request({"x": np.zeros((9000, CLASSES), np.float32)}, model="twice"), timeout=WAIT_S)
        assert code_of(caught.value) == "RESOURCE_EXHAUSTED"
        assert call(oip_grpc.encode_request({"x": X}, model="twice"), timeout=WAIT_S)


def test_more_than_may_wait_are_refused_at_once_with_a_time_to_come_again(endpoint: Endpoint) -> None:
    runner = endpoint.runners[2]
    runner.hold()
    data = oip_grpc.encode_request({"x": X}, model="twice")
    with raw(endpoint.where) as call:
        inside = [call.future(data, timeout=WAIT_S) for _ in range(QUEUE)]
        assert all(runner.started.acquire(timeout=WAIT_S) for _ in range(QUEUE))
        with pytest.raises(grpc.RpcError) as caught:
            call(data, timeout=WAIT_S)
        assert code_of(caught.value) == "RESOURCE_EXHAUSTED"
        trailing = dict(caught.value.trailing_metadata())
        assert int(trailing[PUSHBACK]) >= 1000 and trailing[REQUEST_ID]
        with triton.InferenceServerClient(endpoint.where) as client:
            assert client.is_server_ready()  # health does not wait behind the model
        runner.let_go()
        for future in inside:
            assert oip_grpc.decode_reply(future.result(WAIT_S)).outputs["logits"].shape == X.shape
    assert endpoint.counted()["", "", "queue_full"] == 1
    wait_for(lambda: endpoint.intake.inside() == 0)


@contextlib.contextmanager
def opened_only(where: str) -> Iterator[grpc.Future]:
    """A ModelInfer whose caller has sent no message yet, and none until it is left."""
    end = threading.Event()

    def messages() -> Iterator[bytes]:
        end.wait(WAIT_S)
        yield from ()

    with grpc.insecure_channel(where) as channel:
        try:
            yield channel.stream_unary(oip_grpc.path("ModelInfer")).future(messages(), timeout=WAIT_S)
        finally:
            end.set()


@pytest.mark.parametrize("reason", ["stopping", "queue_full", "no_memory"])
def test_where_there_is_no_room_a_call_is_refused_before_its_message_is_read(endpoint: Endpoint, reason: str) -> None:
    with contextlib.ExitStack() as stack:
        if reason == "stopping":
            endpoint.intake.stop()
        for _ in range(0 if reason == "stopping" else QUEUE):
            visit = stack.enter_context(endpoint.intake.visit("twice", estimate_ms=lambda: None))
            if reason == "queue_full":
                stack.enter_context(visit.queued())
            else:
                visit.hold(LIMITS.body_bytes * 4 // QUEUE)
        with opened_only(endpoint.where) as call:
            error = call.exception(WAIT_S)
    assert code_of(error) == ("UNAVAILABLE" if reason == "stopping" else "RESOURCE_EXHAUSTED")
    assert dict(error.trailing_metadata())[PUSHBACK] == "1000"
    assert endpoint.counted() == {("", "", reason): 1}


def test_messages_that_do_not_come_take_no_more_room_than_there_is_and_give_it_back() -> None:
    """Each holds room for the longest that it may have; health has threads of its own all the while."""
    data = oip_grpc.encode_request({"x": X}, model="twice")
    with serving(limits=TINY) as endpoint, raw(endpoint.where) as call:
        with contextlib.ExitStack() as stack:
            opened = []  # a call that nobody refers to any more is cancelled
            for n in range(BODIES_AT_ONCE):
                opened.append(stack.enter_context(opened_only(endpoint.where)))
                wait_for(lambda n=n: endpoint.intake.held_bytes == (n + 1) * TINY.body_bytes)
            with pytest.raises(grpc.RpcError) as caught:
                call(data, timeout=WAIT_S)
            assert code_of(caught.value) == "RESOURCE_EXHAUSTED"
            assert dict(caught.value.trailing_metadata())[PUSHBACK] == "1000"
            with triton.InferenceServerClient(endpoint.where) as client:
                assert client.is_server_ready()
        wait_for(lambda: endpoint.intake.held_bytes == 0)
        assert call(data, timeout=WAIT_S)
        wait_for(lambda: endpoint.counted().get(("twice", "2", "ok")) == 1)
    assert endpoint.counted()["", "", "no_memory"] == 1


def test_the_padding_of_files_counts_among_the_bytes_of_all_bodies(endpoint: Endpoint) -> None:
    photo = TensorSpec(name="photo", dtype="uint8", shape=(None, None), axes="NT", content_type="image/jpeg")
    runner = endpoint.runners[2]
    runner.interface = Interface(inputs=(photo,), outputs=runner.interface.outputs)
    message = triton.service_pb2.ModelInferRequest(model_name="twice")
    message.inputs.add(name="photo", datatype="BYTES", shape=[20]).contents.bytes_contents.extend(
        [bytes(1 << 20), *[b""] * 19]
    )
    others = endpoint.intake.holding()
    others.become(BODIES_AT_ONCE * LIMITS.body_bytes - MAX_MESSAGE_BYTES)
    with raw(endpoint.where) as call, pytest.raises(grpc.RpcError) as caught:
        call(message.SerializeToString(), timeout=WAIT_S)
    assert code_of(caught.value) == "RESOURCE_EXHAUSTED" and "too many bytes" in str(caught.value)
    others.free()
    wait_for(lambda: endpoint.intake.held_bytes == 0)
    assert runner.submitted == 0


def test_calls_whose_messages_do_not_come_leave_threads_for_health(endpoint: Endpoint) -> None:
    calls = QUEUE * len(endpoint.runners) + AT_ONCE
    with contextlib.ExitStack() as stack, raw(endpoint.where) as call:
        opened = [stack.enter_context(opened_only(endpoint.where)) for _ in range(calls)]
        wait_for(lambda: endpoint.intake.held_bytes == AT_ONCE * MAX_MESSAGE_BYTES)
        with pytest.raises(grpc.RpcError) as caught:
            call(oip_grpc.encode_request({"x": X}, model="twice"), timeout=WAIT_S)
        assert code_of(caught.value) == "RESOURCE_EXHAUSTED"
        with triton.InferenceServerClient(endpoint.where) as client:
            assert client.is_server_ready()
        assert sum(not each.done() for each in opened) >= AT_ONCE
    wait_for(lambda: endpoint.intake.held_bytes == 0)


class Hasty(GrpcServer):
    message_timeout_s = 0.2


def test_a_message_that_is_not_whole_in_time_is_not_waited_for() -> None:
    """More of them than are asked for at once; each is ended, and the next one has its turn."""
    with serving(kind=Hasty) as endpoint, raw(endpoint.where) as call, contextlib.ExitStack() as stack:
        calls = [stack.enter_context(opened_only(endpoint.where)) for _ in range(AT_ONCE + 3)]
        assert {code_of(each.exception(WAIT_S)) for each in calls} == {"CANCELLED"}
        ended, answered = len(calls), False
        while not answered:
            try:
                answered = bool(call(oip_grpc.encode_request({"x": X}, model="twice"), timeout=WAIT_S))
            except grpc.RpcError as error:  # on a machine that stalls
                assert code_of(error) == "CANCELLED"
                ended += 1
        wait_for(lambda: endpoint.metrics.quality()["turned_away"] == ended)
        wait_for(lambda: endpoint.intake.held_bytes == 0)


def test_a_call_without_a_message_is_refused_and_of_several_the_first_counts(endpoint: Endpoint) -> None:
    data = oip_grpc.encode_request({"x": X}, model="twice")
    with grpc.insecure_channel(endpoint.where) as channel:
        call = channel.stream_unary(oip_grpc.path("ModelInfer"))
        with pytest.raises(grpc.RpcError) as caught:
            call(iter(()), timeout=WAIT_S)
        assert code_of(caught.value) == "INVALID_ARGUMENT" and "no message" in caught.value.details()
        reply = oip_grpc.decode_reply(call(iter([data, SPOILT]), timeout=WAIT_S))
        np.testing.assert_array_equal(reply.outputs["logits"], X * 2)


CALLERS = 64
LONG_ROWS = (7 << 20) // 16
# What is counted at its most, and as much again: beside a message that comes, and a reply, there is a copy of grpc's.
MAX_GROWTH_BYTES = 2 * BODIES_AT_ONCE * LIMITS.body_bytes


def test_many_long_messages_at_once_hold_no_more_memory_than_there_is_room_for(tmp_path: Path) -> None:
    write_models(tmp_path)
    x = np.random.default_rng(0).uniform(-1, 1, (LONG_ROWS, 4)).astype(np.float32)
    long, short = (oip_grpc.encode_request({"x": each}, model="linear") for each in (x, x[:2]))
    child = Child(tmp_path, queue=CALLERS, grpc=True, message_timeout_s=200.0)
    codes = []
    try:
        with contextlib.ExitStack() as stack:
            calls = [stack.enter_context(raw(f"127.0.0.1:{child.grpc_port}")) for _ in range(4)]
            assert calls[0](long, timeout=WAIT_S) and calls[0](short, timeout=WAIT_S)
            before = child.rss_bytes()
            for _ in range(2):
                futures = [calls[n % len(calls)].future(long, timeout=2 * WAIT_S) for n in range(CALLERS)]
                codes += [each.code().name for each in futures if each.exception(3 * WAIT_S) or True]
            y = oip_grpc.decode_reply(calls[0](short, timeout=WAIT_S)).outputs["y"]
            np.testing.assert_allclose(y, linear(x[:2]), rtol=1e-5, atol=1e-6)
        grown = child.peak_rss_bytes() - before
        assert "Traceback" not in child.stop()
    finally:
        child.kill()
    assert set(codes) <= {"OK", "RESOURCE_EXHAUSTED"} and codes.count("OK") >= CALLERS // 4
    assert grown < MAX_GROWTH_BYTES, f"{grown >> 20} MiB, {codes.count('OK')} of {len(codes)} answered"


NAMED = bytes_field(1, b"twice") + bytes_field(2, b"2")
SPOILT = b"\xff\xff\xff"


def test_a_full_model_refuses_before_the_message_is_decoded() -> None:
    with serving(other="other") as endpoint, contextlib.ExitStack() as stack, raw(endpoint.where) as call:
        with pytest.raises(grpc.RpcError) as caught:
            call(NAMED + SPOILT, timeout=WAIT_S)
        assert code_of(caught.value) == "INVALID_ARGUMENT"
        for _ in range(QUEUE):
            visit = stack.enter_context(endpoint.intake.visit("twice", estimate_ms=lambda: None))
            stack.enter_context(visit.queued())
        with pytest.raises(grpc.RpcError) as caught:
            call(NAMED + SPOILT, timeout=WAIT_S)
        assert code_of(caught.value) == "RESOURCE_EXHAUSTED"
    assert endpoint.counted()["twice", "2", "queue_full"] == 1


@pytest.mark.parametrize("second", [bytes_field(1, b"other"), bytes_field(2, b"1")])
def test_a_message_that_names_two_models_or_versions_is_refused(second: bytes) -> None:
    with serving(other="other") as endpoint, raw(endpoint.where) as call, pytest.raises(grpc.RpcError) as caught:
        call(oip_grpc.encode_request({"x": X}, model="twice", version="2") + second, timeout=WAIT_S)
    assert code_of(caught.value) == "INVALID_ARGUMENT" and "twice" in caught.value.details()


def test_a_message_has_a_shorter_bound_than_a_body_over_http(endpoint: Endpoint) -> None:
    rows = MAX_MESSAGE_BYTES // (4 * CLASSES)
    with raw(endpoint.where) as call, pytest.raises(grpc.RpcError) as caught:
        call(oip_grpc.encode_request({"x": np.zeros((rows, CLASSES), np.float32)}, model="twice"), timeout=WAIT_S)
    assert code_of(caught.value) == "RESOURCE_EXHAUSTED" and str(MAX_MESSAGE_BYTES) in caught.value.details()


def test_a_drain_waits_for_a_reply_that_is_read_slowly(endpoint: Endpoint) -> None:
    x = np.ones((MAX_MESSAGE_BYTES // (12 * CLASSES), CLASSES), np.float32)
    with grpc.insecure_channel(endpoint.where, options=[("grpc.http2.bdp_probe", 0)]) as channel:
        # As a stream: grpc then reads no more than a window of 64 KiB until it is asked for the reply.
        replies = channel.unary_stream(oip_grpc.path("ModelInfer"))(
            oip_grpc.encode_request({"x": x}, model="twice"), timeout=WAIT_S
        )
        wait_for(lambda: endpoint.counted().get(("twice", "2", "ok")) == 1)
        assert endpoint.intake.inside() == 1 and endpoint.intake.held_bytes > x.nbytes  # the reply's
        (reply,) = replies
        np.testing.assert_array_equal(oip_grpc.decode_reply(reply).outputs["logits"], x * 2)
    wait_for(lambda: endpoint.intake.inside() == 0 and endpoint.intake.held_bytes == 0)


def test_work_whose_time_has_passed_or_whose_caller_has_gone_is_not_run(endpoint: Endpoint) -> None:
    runner = endpoint.runners[2]
    runner.hold()
    with raw(endpoint.where) as call:
        first = call.future(oip_grpc.encode_request({"x": X}, model="twice"), timeout=WAIT_S)
        assert runner.started.acquire(timeout=WAIT_S)
        for ours in (True, False):  # by the deadline in the request, by grpc's own
            late_once_it_waits(runner, call, ours=ours)
        gone = call.future(oip_grpc.encode_request({"x": X}, model="twice"), timeout=WAIT_S)
        assert runner.started.acquire(timeout=WAIT_S)
        gone.cancel()
        wait_for(lambda: endpoint.counted().get(("twice", "2", "gone")) == 1)
        runner.let_go()
        assert first.result(WAIT_S)
    wait_for(lambda: endpoint.counted().get(("twice", "2", "deadline"), 0) >= 2)


def late_once_it_waits(runner: Held, call: Any, *, ours: bool) -> None:
    """Ask with a little time, and with more where a stalled machine took all of it on the way to the model."""
    for left_s in (0.05, 0.5, 5.0, 50.0):
        data = oip_grpc.encode_request({"x": X}, model="twice", timeout_us=int(1e6 * left_s) if ours else None)
        with pytest.raises(grpc.RpcError) as caught:
            call(data, timeout=WAIT_S if ours else left_s)
        assert code_of(caught.value) == "DEADLINE_EXCEEDED"
        if runner.started.acquire(timeout=2.0):
            return
    raise AssertionError("it never waited for the model")


def wait_for(condition: Any) -> None:
    """Until it holds, for as long as a slow machine may take."""
    again = threading.Event()
    for _ in range(int(WAIT_S / 0.01)):
        if condition():
            return
        again.wait(0.01)
    raise AssertionError("it never came")


def test_a_token_is_asked_for_before_the_message_is_read_and_health_needs_none() -> None:
    with serving(token="s3cret") as endpoint:
        data = oip_grpc.encode_request({"x": X}, model="twice")
        with raw(endpoint.where) as call:
            for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "s3cret"),)):
                with pytest.raises(grpc.RpcError) as caught:
                    call(data, timeout=WAIT_S, metadata=metadata)
                assert code_of(caught.value) == "UNAUTHENTICATED"
            assert call(data, timeout=WAIT_S, metadata=(("authorization", "Bearer s3cret"),))
            twice = (("authorization", "Bearer s3cret"),) * 2
            with pytest.raises(grpc.RpcError, match="a bearer token is required"):
                call(data, timeout=WAIT_S, metadata=twice)
        with triton.InferenceServerClient(endpoint.where) as client:
            assert client.is_server_live() and client.is_server_ready()
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                client.get_model_metadata("twice")
            assert client.get_model_metadata("twice", headers={"authorization": "bearer s3cret"}).name == "twice"
        assert endpoint.counted() == {("", "", "no_token"): 4, ("twice", "2", "ok"): 1}


def test_a_request_id_is_echoed_where_it_is_one(endpoint: Endpoint) -> None:
    with raw(endpoint.where, "ServerLive") as call:
        for given, echoed in (("abc-1", True), ("no spaces, please", False)):
            _, done = call.with_call(b"", timeout=WAIT_S, metadata=((REQUEST_ID, given),))
            assert (dict(done.trailing_metadata())[REQUEST_ID] == given) == echoed


def test_tls_and_client_certificates(tmp_path: Path) -> None:
    authority = issue(tmp_path, host="authority")
    server, client = issue(tmp_path, by=authority), issue(tmp_path, host="pi-07", by=authority)
    tls = ServerTls(cert=server.certificate, key=server.key, client_ca=authority.certificate)
    known = {"root_certificates": authority.certificate.read_bytes()}
    ours = {"private_key": client.key.read_bytes(), "certificate_chain": client.certificate.read_bytes()}
    with serving(tls=tls) as endpoint:
        where = f"localhost:{endpoint.server.port}"
        for shown, welcome in ((ours, True), ({}, False)):
            with grpc.secure_channel(where, grpc.ssl_channel_credentials(**known, **shown)) as channel:
                call = channel.unary_unary(oip_grpc.path("ServerLive"))
                if welcome:
                    assert call(b"", timeout=WAIT_S, wait_for_ready=True)
                    continue
                with pytest.raises(grpc.RpcError) as caught:
                    call(b"", timeout=WAIT_S)
                assert code_of(caught.value) == "UNAVAILABLE"


def test_an_address_that_cannot_be_used_or_lets_anyone_in_is_refused(endpoint: Endpoint, tmp_path: Path) -> None:
    models, intake = Models(), Intake(queue=1, body_bytes=1)
    none = tmp_path / "none.pem"
    for listening, why in (
        (Listening(port=endpoint.server.port), "cannot listen on 127.0.0.1"),
        (Listening(host="0.0.0.0", port=0), "would let anyone in"),
        (Listening(port=0, tls=ServerTls(cert=none, key=none)), "none.pem"),
    ):
        with pytest.raises(ConfigError, match=why):
            GrpcServer(models, intake, Metrics(models, intake), listening, queue=1)


def test_once_the_endpoint_is_being_stopped_it_is_not_ready_and_takes_nothing_new(endpoint: Endpoint) -> None:
    endpoint.intake.stop()
    with triton.InferenceServerClient(endpoint.where) as client:
        assert client.is_server_live() and not client.is_server_ready() and not client.is_model_ready("twice")
        with pytest.raises(InferenceServerException, match="UNAVAILABLE"):
            client.infer("twice", [triton_input(X)])


def test_serve_speaks_both_and_ends_well_on_sigterm(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider")
    command = [sys.executable, "-m", "outrider.cli", "serve", str(tmp_path / "b.outrider"), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--grpc-port", "0", "--state", str(tmp_path / "state")],
        env=os.environ | {"OUTRIDER_TOKEN": "s3cret"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        x = images(3)
        for url in two_urls(process):
            with Remote(url, model="tiny", token="s3cret") as remote:
                outputs = remote.submit({"image": x}, Deadline.after_ms(100_000)).result(WAIT_S).outputs
            np.testing.assert_allclose(outputs["logits"], expected_of_bundle(x), atol=1e-3)
    finally:
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "2 of 2 requests answered" in out


def two_urls(process: subprocess.Popen[str]) -> list[str]:
    assert process.stderr is not None
    urls: list[str] = []
    while len(urls) < 2:
        line = process.stderr.readline()
        assert line, "it ended before it served"
        if line.startswith("serving "):
            urls.append(line.split()[-1])
    return urls
