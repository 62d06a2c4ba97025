"""An endpoint that misbehaves, in a process of its own: ``python -m benchmarks.faults SECONDS`` with an interface as
JSON on standard input; prints ``{"port": ..., "tls_port": ...}``.

Every model's metadata is good, and its name says what becomes of a request: see ``FAULTS``. On the port for TLS the
handshake is dripped. A fault ends after so many seconds, so that a client without a deadline comes back at all.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from outrider_runtimes import oip
from outrider_runtimes.tensors import Interface

DRIP_S = 0.02  # below every time-out of a single read that anybody would set
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
HANDSHAKE = b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc"  # a record of 16 kB, and in it a ServerHello of that size

Fault = Callable[[socket.socket, "Request", float], None]


class Request:
    """One HTTP request; ``path`` is of a model."""

    def __init__(self, line: bytes, headers: dict[str, str], body: bytes) -> None:
        self.method, self.path, _ = line.decode().split()
        self.headers = headers
        self.body = body
        self.model = (self.path.split("/") + [""] * 4)[3]


def requests(connection: socket.socket) -> Iterator[Request]:
    """What comes, until the client goes."""
    with connection.makefile("rb") as stream:
        while line := stream.readline():
            headers = {}
            while header := stream.readline().decode().strip():
                name, _, value = header.partition(":")
                headers[name.lower()] = value.strip()
            yield Request(line, headers, stream.read(int(headers.get("content-length", "0"))))


def http(body: bytes, *, status: str = "200 OK", headers: str = "") -> bytes:
    """A whole reply."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def drip(connection: socket.socket, piece: bytes, until_s: float) -> None:
    """The same again and again, or its bytes one after the other, until then or until the client goes."""
    while time.monotonic() < until_s:
        connection.sendall(piece)
        if select.select([connection], [], [], DRIP_S)[0] and not connection.recv(1, socket.MSG_PEEK):
            return


def drips_headers(connection: socket.socket, request: Request, until_s: float) -> None:
    """One byte of an endless header at a time."""
    connection.sendall(OK + b"X: ")
    drip(connection, b"x", until_s)


def drips_body(connection: socket.socket, request: Request, until_s: float) -> None:
    """A whole head, and one byte of the body at a time."""
    connection.sendall(OK + b"Content-Length: 100000\r\n\r\n")
    drip(connection, b" ", until_s)


def black_hole(connection: socket.socket, request: Request, until_s: float) -> None:
    """Nothing."""
    while time.monotonic() < until_s:
        if select.select([connection], [], [], DRIP_S)[0] and not connection.recv(1, socket.MSG_PEEK):
            return


def resets(connection: socket.socket, request: Request, until_s: float) -> None:
    """RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    raise OSError("reset")


def status_503(connection: socket.socket, request: Request, until_s: float) -> None:
    """503 at once."""
    connection.sendall(http(b'{"error": "busy"}', status="503 Service Unavailable"))


def endless_100(connection: socket.socket, request: Request, until_s: float) -> None:
    """``100 Continue``, one after the other."""
    drip(connection, CONTINUE, until_s)


FAULTS: dict[str, Fault] = {
    "drip in headers": drips_headers,
    "drip in body": drips_body,
    "black hole": black_hole,
    "reset": resets,
    "503": status_503,
    "endless 100 Continue": endless_100,
}
GOOD = "good"


def model_of(fault: str) -> str:
    """A fault's name in a URL."""
    return fault.lower().replace(" ", "-")


class Endpoint:
    """The server; ``interface`` is that of every model."""

    def __init__(self, interface: Interface, lasts_s: float) -> None:
        self._interface = interface
        self._lasts_s = lasts_s
        self._faults = {model_of(name): fault for name, fault in FAULTS.items()}

    def listen(self, behave: Callable[[socket.socket], None]) -> int:
        """In threads of its own; the port."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)

        def accept() -> None:
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._guarded, args=(behave, connection), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return int(listener.getsockname()[1])

    def serve(self, connection: socket.socket) -> None:
        """Answer, or do what the model's name says."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for request in requests(connection):
            if request.method == "GET":
                connection.sendall(http(self._metadata(request)))
            elif request.model in self._faults:
                self._faults[request.model](connection, request, time.monotonic() + self._lasts_s)
                return
            else:
                connection.sendall(self._answer(request))

    def shake_slowly(self, connection: socket.socket) -> None:
        """A handshake whose first message never ends."""
        connection.recv(65536)  # the ClientHello, or ``drip`` would take it for the client's going away
        connection.sendall(HANDSHAKE)
        drip(connection, b"\0", time.monotonic() + self._lasts_s)

    def _metadata(self, request: Request) -> bytes:
        if request.path == "/v2":
            return json.dumps({"name": "faults", "version": "1", "extensions": [oip.BINARY_EXTENSION]}).encode()
        interface = self._interface
        ours = {"interface": interface.to_dict(), "interface_digest": interface.digest, "bundle": "", "variant": ""}
        model = oip.model_metadata(request.model, interface, versions=[1], platform="faults", parameters=ours)
        return json.dumps(model).encode()

    def _answer(self, request: Request) -> bytes:
        length = request.headers.get(oip.LENGTH_HEADER.lower())
        asked = oip.decode_request(request.body, None if length is None else int(length))
        rows = len(next(iter(asked.inputs.values())))
        outputs = {
            spec.name: np.zeros([rows if size is None else size for size in spec.shape], spec.dtype)
            for spec in self._interface.outputs
        }
        message = oip.encode_reply(outputs, model=request.model, version="1", request=asked, parameters={})
        headers = "".join(f"{name}: {value}\r\n" for name, value in message.headers.items())
        return http(bytes(message.body), headers=headers)

    @staticmethod
    def _guarded(behave: Callable[[socket.socket], None], connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection:
            behave(connection)


def main() -> None:
    """Serve until standard input, which began with the interface, ends."""
    interface = Interface.from_dict(json.loads(sys.stdin.readline()))
    endpoint = Endpoint(interface, float(sys.argv[1]))
    ports = {"port": endpoint.listen(endpoint.serve), "tls_port": endpoint.listen(endpoint.shake_slowly)}
    print(json.dumps(ports), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
