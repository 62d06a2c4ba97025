"""Tiny servers on real sockets that answer one small model rightly, or misbehave in one chosen way.

The model is `x: float32 [N, 2] -> y: float32 [N, 2]`, twice its input.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from outrider_runtimes import oip
from outrider_runtimes.tensors import Interface, TensorSpec

INTERFACE = Interface(
    inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 2), axes="NC"),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=(None, 2), axes="NC"),),
)


@dataclass
class Asked:
    """One HTTP request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def decoded(self) -> oip.Request:
        length = self.headers.get(oip.LENGTH_HEADER.lower())
        return oip.decode_request(self.body, None if length is None else int(length))


Behave = Callable[["Server", socket.socket, Asked], None]


@dataclass
class Server:
    """Listens on a free port of 127.0.0.1 in threads; `infer` may be changed between requests.

    Attributes:
        infer: writes the reply to an infer request.
        hello: is called with a fresh connection before anything is read from it.
        asked: every request that was read.
    """

    infer: Behave | None = None
    metadata: Behave | None = None
    hello: Callable[[Server, socket.socket], None] | None = None
    ours: dict[str, object] = field(default_factory=lambda: {"bundle": "b" * 64, "variant": "v"})
    extensions: tuple[str, ...] = (oip.BINARY_EXTENSION,)
    tls: ssl.SSLContext | None = None
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    port: int = 0

    def __post_init__(self) -> None:
        self.stopping = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{'localhost' if self.tls else '127.0.0.1'}:{self.port}"

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()

    def drop(self) -> None:
        """Close every connection that is open."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self.stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        self.connections += 1
        with contextlib.suppress(OSError, ValueError), connection:
            self._open.add(connection)
            if self.hello is not None:
                self.hello(self, connection)
            if self.tls is not None:
                connection = self.tls.wrap_socket(connection, server_side=True)
                self._open.add(connection)
            with connection:
                for asked in requests(connection):
                    self.asked.append(asked)
                    self._behaviour(asked)(self, connection, asked)

    def _behaviour(self, asked: Asked) -> Behave:
        if asked.method == "POST":
            return self.infer or good
        return self.metadata or good_metadata


def requests(connection: socket.socket) -> Iterator[Asked]:
    with connection.makefile("rb") as stream:
        while line := stream.readline():
            method, path, _ = line.decode().split()
            headers: dict[str, str] = {}
            while (header := stream.readline().decode().strip()) != "":
                name, _, value = header.partition(":")
                headers[name.lower()] = value.strip()
            yield Asked(method, path, headers, stream.read(int(headers.get("content-length", "0"))))


def http(body: bytes, *, status: str = "200 OK", headers: str = "", length: int | None = None) -> bytes:
    """A reply as bytes."""
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{headers}\r\n".encode() + body


def good_metadata(server: Server, connection: socket.socket, asked: Asked) -> None:
    if asked.path == "/v2":
        document: dict[str, object] = {"name": "raw", "version": "1", "extensions": list(server.extensions)}
    else:
        ours = {"interface": INTERFACE.to_dict(), "interface_digest": INTERFACE.digest} | server.ours
        document = oip.model_metadata("m", INTERFACE, versions=[1], platform="raw", parameters=ours)
        if not server.ours:
            del document["parameters"]
    connection.sendall(http(json.dumps(document).encode()))


def right_reply(server: Server, asked: Asked) -> oip.Message:
    request = asked.decoded()
    parameters = {"infer_ms": 0.001} | ({"bundle": server.ours["bundle"]} if server.ours else {})
    return oip.encode_reply(
        {"y": request.inputs["x"] * np.float32(2)}, model="m", version="1", request=request, parameters=parameters
    )


def sent(message: oip.Message) -> bytes:
    return http(message.body, headers="".join(f"{k}: {v}\r\n" for k, v in message.headers.items()))


def good(server: Server, connection: socket.socket, asked: Asked) -> None:
    connection.sendall(sent(right_reply(server, asked)))


def says(data: bytes) -> Behave:
    """Sends these bytes and keeps the connection."""
    return lambda server, connection, asked: connection.sendall(data)


def says_and_closes(data: bytes) -> Behave:
    def behave(server: Server, connection: socket.socket, asked: Asked) -> None:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_RDWR)

    return behave


def drips(data: bytes, every_s: float = 0.02) -> Behave:
    """One byte at a time, for ever when it is asked to stop only by the client's going away."""

    def behave(server: Server, connection: socket.socket, asked: Asked) -> None:
        for at in range(len(data)):
            connection.sendall(data[at : at + 1])
            if server.stopping.wait(every_s):
                return

    return behave


def silent(server: Server, connection: socket.socket, asked: Asked) -> None:
    server.stopping.wait()


def endless(data: bytes) -> Behave:
    """The same bytes again and again until the client goes away."""

    def behave(server: Server, connection: socket.socket, asked: Asked) -> None:
        while not server.stopping.is_set():
            connection.sendall(data)

    return behave


def resets(server: Server, connection: socket.socket, asked: Asked) -> None:
    reset(connection)


def reset(connection: socket.socket) -> None:
    """Close with RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    raise OSError("reset")


def altered(**changes: object) -> Behave:
    """The right reply as JSON with top-level keys changed; a key of None is left out."""

    def behave(server: Server, connection: socket.socket, asked: Asked) -> None:
        document = json.loads(_as_json(server, asked)) | changes
        document = {key: value for key, value in document.items() if value is not None}
        connection.sendall(http(json.dumps(document).encode()))

    return behave


def altered_output(**changes: object) -> Behave:
    """The right reply as JSON with keys of its output changed."""

    def behave(server: Server, connection: socket.socket, asked: Asked) -> None:
        document = json.loads(_as_json(server, asked))
        document["outputs"][0] |= changes
        connection.sendall(http(json.dumps(document).encode()))

    return behave


def answers(outputs: dict[str, np.ndarray], **options: object) -> Behave:
    """Another answer than the right one, well-formed and in binary."""

    def behave(server: Server, connection: socket.socket, asked: Asked) -> None:
        request = asked.decoded()
        message = oip.encode_reply(outputs, model="m", version="1", request=request, parameters=dict(options))
        connection.sendall(sent(message))

    return behave


def _as_json(server: Server, asked: Asked) -> bytes:
    request = asked.decoded()
    return oip.encode_reply(
        {"y": request.inputs["x"] * np.float32(2)},
        model="m",
        version="1",
        request=oip.Request(id=request.id, inputs={}),
        parameters={},
    ).body
