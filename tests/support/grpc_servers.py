"""A small gRPC server on a real socket: the model of `support.servers`, answered rightly or misbehaving in one way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import numpy as np

from outrider_runtimes import oip, oip_grpc
from outrider_runtimes.errors import InputError
from support.certificates import Issued
from support.servers import INTERFACE

Behave = Callable[["GrpcServer", bytes, grpc.ServicerContext], bytes]


@dataclass
class GrpcServer:
    """`infer` may be changed between requests.

    Attributes:
        asked: of every infer request, its metadata.
        clients: with `tls`, the authority of the certificates that clients must have.
        max_request_bytes: a longer one is refused by gRPC itself.
    """

    infer: Behave | None = None
    metadata: Behave | None = None
    ours: dict[str, object] = field(default_factory=lambda: {"bundle": "b" * 64, "variant": "v"})
    tls: Issued | None = None
    clients: Issued | None = None
    compression: grpc.Compression | None = None
    max_request_bytes: int = 64 << 20
    asked: list[dict[str, str]] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self.stopping = threading.Event()
        self._server = grpc.server(
            ThreadPoolExecutor(8),
            handlers=[_Handlers(self)],
            compression=self.compression,
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", self.max_request_bytes)],
        )
        address = f"127.0.0.1:{self.port}"
        if self.tls is None:
            self.port = self._server.add_insecure_port(address)
        else:
            pair = (self.tls.key.read_bytes(), self.tls.certificate.read_bytes())
            trusted = None if self.clients is None else self.clients.certificate.read_bytes()
            credentials = grpc.ssl_server_credentials([pair], trusted, require_client_auth=trusted is not None)
            self.port = self._server.add_secure_port(address, credentials)
        self._server.start()

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}" if self.tls is None else f"grpcs://localhost:{self.port}"

    def __enter__(self) -> GrpcServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.stopping.set()
        self._server.stop(0).wait()

    def answer(self, path: str, asked: bytes, context: grpc.ServicerContext) -> bytes:
        if path == oip_grpc.path("ModelInfer"):
            self.asked.append(dict(context.invocation_metadata()))
            return (self.infer or good)(self, asked, context)
        return (self.metadata or good_metadata)(self, asked, context)


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, server: GrpcServer) -> None:
        self._server = server

    def service(self, details):
        if details.method not in (oip_grpc.path("ModelInfer"), oip_grpc.path("ModelMetadata")):
            return None
        return grpc.unary_unary_rpc_method_handler(
            lambda asked, context: self._server.answer(details.method, asked, context)
        )


def good_metadata(server: GrpcServer, asked: bytes, context: grpc.ServicerContext) -> bytes:
    name = oip_grpc.decode("ModelMetadataRequest", asked, InputError).name
    ours = {"interface": INTERFACE.to_dict(), "interface_digest": INTERFACE.digest} | server.ours
    document = oip.model_metadata(name, INTERFACE, versions=[1], platform="raw", parameters=ours)
    if not server.ours:
        document["parameters"] = {}
    return oip_grpc.encode_model_metadata(document)


def right_reply(server: GrpcServer, asked: bytes) -> bytes:
    call = oip_grpc.decode_request(asked)
    parameters = {"infer_ms": 0.001} | ({"bundle": server.ours["bundle"]} if server.ours else {})
    outputs = {"y": call.request.inputs["x"] * np.float32(2)}
    return oip_grpc.encode_reply(outputs, model=call.model, version="1", request=call.request, parameters=parameters)


def good(server: GrpcServer, asked: bytes, context: grpc.ServicerContext) -> bytes:
    return right_reply(server, asked)


def says(data: bytes) -> Behave:
    return lambda server, asked, context: data


def aborts(code: grpc.StatusCode, text: str = "", **trailing: str) -> Behave:
    def behave(server: GrpcServer, asked: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata(tuple((key.replace("_", "-"), value) for key, value in trailing.items()))
        context.abort(code, text)

    return behave


def silent(server: GrpcServer, asked: bytes, context: grpc.ServicerContext) -> bytes:
    server.stopping.wait()
    return b""


def answers(outputs: dict[str, np.ndarray], *, id: str | None = None, **parameters: object) -> Behave:
    """Another answer than the right one, well-formed."""

    def behave(server: GrpcServer, asked: bytes, context: grpc.ServicerContext) -> bytes:
        request = oip.Request(id=oip_grpc.decode_request(asked).request.id if id is None else id, inputs={})
        return oip_grpc.encode_reply(outputs, model="m", version="1", request=request, parameters=parameters)

    return behave


def altered(**changes: object) -> Behave:
    """The right reply with fields of its output changed."""

    def behave(server: GrpcServer, asked: bytes, context: grpc.ServicerContext) -> bytes:
        from tritonclient.grpc import service_pb2

        message = service_pb2.ModelInferResponse.FromString(right_reply(server, asked))
        raw = changes.get("raw")
        for key, value in changes.items():
            if key == "shape":
                del message.outputs[0].shape[:]
                message.outputs[0].shape.extend(value)
            elif key != "raw":
                setattr(message.outputs[0], key, value)
        if raw is not None:
            del message.raw_output_contents[:]
            message.raw_output_contents.extend(raw)
        return message.SerializeToString()

    return behave
