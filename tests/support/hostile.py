"""Replies of servers that are broken or hostile, by what is wrong with them. Each asks a client for a typed error."""

from __future__ import annotations

import gzip
import json
import socket
import zlib

import numpy as np

from outrider_runtimes import oip
from support import servers
from support.servers import Asked, Behave, Server, http

X = np.float32([[1.0, 2.0], [3.0, 4.0]])

OK_HEAD = b"HTTP/1.1 200 OK\r\n"
DRIP_BODY = http(b"{" + b" " * 10_000)

# By the deadline: DeadlineExceeded.
LATE: dict[str, Behave] = {
    "drips its status line": servers.drips(b"HTTP/1.1 200 OK" + b"K" * 10_000),
    "drips its headers": servers.drips(OK_HEAD + b"X: " + b"x" * 10_000),
    "drips its body": servers.drips(DRIP_BODY),
    "drips chunks": servers.drips(OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 5000),
    "drips 100 Continue": servers.drips(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "says nothing": servers.silent,
    "stops in the head": servers.says(OK_HEAD),
    "stops in the body": servers.says(http(b"{", length=100)),
}

CHUNKED = OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
# RemoteUnavailable.
BROKEN: dict[str, Behave] = {
    "resets": servers.resets,
    "closes": servers.says_and_closes(b""),
    "closes in the head": servers.says_and_closes(OK_HEAD),
    "closes in the body": servers.says_and_closes(http(b"{", length=100)),
    "closes in a chunk": servers.says_and_closes(CHUNKED + b"5\r\nab"),
}


def truncated(server: Server, connection: socket.socket, asked: servers.Asked) -> None:
    """The right reply without its last four bytes, under a length that is right for that."""
    message = servers.right_reply(server, asked)
    connection.sendall(servers.sent(oip.Message(parts=(message.body[:-4],), json_bytes=message.json_bytes)))


def streams(head: bytes, part: bytes) -> Behave:
    """The head once, and then the part until the client goes away."""

    def behave(server: Server, connection: socket.socket, asked: Asked) -> None:
        connection.sendall(head)
        servers.endless(part)(server, connection, asked)

    return behave


def altered_binary(outputs: list[dict[str, object]], tensors: bytes) -> Behave:
    """A reply in binary with these entries and these bytes."""

    def behave(server: Server, connection: socket.socket, asked: Asked) -> None:
        head = json.dumps({"model_name": "m", "id": asked.decoded().id, "outputs": outputs}).encode()
        connection.sendall(http(head + tensors, headers=f"{oip.LENGTH_HEADER}: {len(head)}\r\n"))

    return behave


def sized(size: object, tensors: bytes = bytes(16), **changes: object) -> Behave:
    entry = {"name": "y", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": size}}
    return altered_binary([entry | changes], tensors)


def packed(coding: str, data: bytes) -> Behave:
    return servers.says(http(data, headers=f"Content-Encoding: {coding}\r\n"))


def written(text: str) -> Behave:
    """A JSON body as it stands; `ID` is the request's."""

    def behave(server: Server, connection: socket.socket, asked: Asked) -> None:
        connection.sendall(http(text.replace("ID", asked.decoded().id).encode("utf-8", "surrogatepass")))

    return behave


def rows(values: str) -> Behave:
    """A JSON reply that is right but for its output's data."""
    entry = '{"name": "y", "datatype": "FP32", "shape": [2, 2], "data": [VALUES]}'
    return written(
        '{"model_name": "m", "id": "ID", "outputs": [ENTRY]}'.replace("ENTRY", entry).replace("VALUES", values)
    )


def shortened(server: Server, connection: socket.socket, asked: Asked) -> None:
    """The right reply under a length that is too short: the rest stays on the connection."""
    message = servers.right_reply(server, asked)
    headers = "".join(f"{k}: {v}\r\n" for k, v in message.headers.items())
    connection.sendall(http(message.body, headers=headers, length=len(message.body) - 5))


RIGHT = {"name": "y", "datatype": "FP32", "shape": [2, 2], "data": [2.0, 4.0, 6.0, 8.0]}
BINARY = {"name": "y", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": 16}}

# ReplyError.
WRONG: dict[str, Behave] = {
    "endless 100 Continue": servers.endless(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "endless headers": servers.endless(OK_HEAD + b"X: y\r\n" * 1000),
    "endless header": servers.endless(b"x" * 10_000),
    "1000 headers": servers.says(OK_HEAD + b"X: y\r\n" * 1000 + b"\r\n"),
    "101 Switching Protocols": servers.says(b"HTTP/1.1 101 Switching\r\n\r\n"),
    "not HTTP": servers.says(b"SSH-2.0-OpenSSH_9\r\n\r\n"),
    "HTTP/2": servers.says(b"HTTP/2 200\r\n\r\n"),
    "folded header": servers.says(OK_HEAD + b"A: b\r\n c\r\n\r\n"),
    "header without a colon": servers.says(OK_HEAD + b"A\r\n\r\n"),
    "two lengths": servers.says(OK_HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}"),
    "length and chunks": servers.says(OK_HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}"),
    "negative length": servers.says(OK_HEAD + b"Content-Length: -1\r\n\r\n"),
    "a gigabyte announced": servers.says(http(b"", length=10**9)),
    "10^30 bytes announced": servers.says(http(b"", length=10**30)),
    "a chunk of 10^12": servers.says(CHUNKED + b"e8d4a51000\r\n"),
    "a chunk of x": servers.says(CHUNKED + b"x\r\n"),
    "an endless chunk length": servers.says(CHUNKED + b"0" * 1000),
    "a chunk longer than it says": servers.says(CHUNKED + b"2\r\nabc\r\n0\r\n\r\n"),
    "gzip": servers.says(http(b"\x1f\x8b", headers="Content-Encoding: gzip\r\n")),
    "no JSON": servers.says(http(b"<html>")),
    "an empty body": servers.says(http(b"")),
    "a list": servers.says(http(b"[]")),
    "deep JSON": servers.says(http(b"[" * 100_000 + b"]" * 100_000)),
    "no outputs": servers.altered(outputs=None),
    "no id": servers.altered(id=None),
    "another id": servers.altered(id="0"),
    "another name": servers.altered_output(name="z"),
    "another datatype": servers.altered_output(datatype="FP64"),
    "BYTES": servers.altered_output(datatype="BYTES", data=["a"] * 4),
    "another shape": servers.altered_output(shape=[4, 1]),
    "another N": servers.answers({"y": np.zeros((1, 2), np.float32)}),
    "another rank": servers.answers({"y": np.zeros((2, 2, 1), np.float32)}),
    "too few elements": servers.altered_output(data=[1.0]),
    "a huge shape": servers.altered_output(shape=[2**30, 2**30]),
    "text": servers.altered_output(data=["1", "2", "3", "4"]),
    "an output more": servers.answers({"y": X, "z": X}),
    "NaN": servers.answers({"y": np.full((2, 2), np.nan, np.float32)}),
    "infinity": servers.answers({"y": np.full((2, 2), np.inf, np.float32)}),
    "NaN in JSON": servers.says(http(b'{"id": "1", "outputs": [{"name": "y", "data": [NaN]}]}')),
    "a lying header length": servers.says(http(b"{}", headers=f"{oip.LENGTH_HEADER}: 900\r\n")),
    "a negative header length": servers.says(http(b"{}", headers=f"{oip.LENGTH_HEADER}: -1\r\n")),
    "header length 0": servers.says(http(b"{}", headers=f"{oip.LENGTH_HEADER}: 0\r\n")),
    "another bundle": servers.answers({"y": X * 2}, bundle="c" * 64),
    # Size.
    "a gigabyte streamed": streams(OK_HEAD + b"\r\n", b" " * 65536),
    "a gigabyte in chunks": streams(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"),
    "a gigabyte of chunks of a byte": streams(CHUNKED, b"1\r\n \r\n" * 4096),
    "endless trailers": streams(CHUNKED + b"2\r\n{}\r\n0\r\n", b"X: y\r\n" * 1000),
    "an endless trailer": streams(CHUNKED + b"2\r\n{}\r\n0\r\nX: ", b"y" * 65536),
    "an endless chunk extension": streams(CHUNKED + b"2;", b"x" * 65536),
    "a gzip bomb": packed("gzip", gzip.compress(bytes(200_000_000), 1)),
    "a deflate bomb": packed("deflate", zlib.compress(bytes(50_000_000), 1)),
    "gzip that is none": packed("gzip, gzip", b"{}"),
    "gzip in the transfer": servers.says(OK_HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    "a million empty lists": rows("[]," * 1_300_000 + "1"),
    "a million empty objects": rows("{}," * 1_300_000 + "1"),
    "a million keys": written("{" + "".join(f'"{n:x}":1,' for n in range(400_000)) + '"id": "ID"}'),
    "a million strings": rows('"ab",' * 750_000 + '"c"'),
    "an integer of a million digits": rows("9" * 1_000_000 + ",1,1,1"),
    "objects of depth 100,000": servers.says(http(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)),
    # The head.
    "a status of 0": servers.says(b"HTTP/1.1 000 OK\r\n\r\n"),
    "a status of 99999": servers.says(b"HTTP/1.1 99999 OK\r\n\r\n"),
    "103 Early Hints": servers.says(b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "lines that end in LF": servers.endless(b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}"),
    "a space before the colon": servers.says(OK_HEAD + b"Content-Length : 2\r\n\r\n{}"),
    "a NUL in a header's name": servers.says(OK_HEAD + b"X\0: y\r\n\r\n"),
    "a hexadecimal length": servers.says(OK_HEAD + b"Content-Length: 0x2\r\n\r\n{}"),
    "a length with a sign": servers.says(OK_HEAD + b"Content-Length: +2\r\n\r\n{}"),
    "a list of lengths": servers.says(OK_HEAD + b"Content-Length: 2, 2\r\n\r\n{}"),
    "an empty length": servers.says(OK_HEAD + b"Content-Length:\r\n\r\n{}"),
    "a chunk of a negative length": servers.says(CHUNKED + b"-1\r\n"),
    "two transfer encodings": servers.says(OK_HEAD + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n"),
    "two header lengths": servers.says(http(b"{}", headers=f"{oip.LENGTH_HEADER}: 2\r\n" * 2)),
    "a header length of 10^20": servers.says(http(b"{}", headers=f"{oip.LENGTH_HEADER}: {10**20}\r\n")),
    "a length that is too short": shortened,
    # The document.
    "not UTF-8": servers.says(http(b'{"id": "\xff\xfe"}')),
    "UTF-16": servers.says(http("{}".encode("utf-16"))),
    "a number": servers.says(http(b"5")),
    "a string": servers.says(http(b'"outputs"')),
    "null": servers.says(http(b"null")),
    "two documents": servers.says(http(b"{}{}")),
    "a key twice": written('{"id": "0", "id": "ID", "outputs": []}'),
    "half a surrogate pair": written('{"id": "ID", "model_name": "\\ud800", "outputs": []}'),
    "200 with an error object": servers.says(http(b'{"error": "out of memory"}')),
    "no output": servers.altered(outputs=[]),
    "outputs as an object": servers.altered(outputs={"y": RIGHT}),
    "an output twice": servers.altered(outputs=[RIGHT, RIGHT]),
    "an output that is null": servers.altered(outputs=[RIGHT, None]),
    "300 outputs": servers.altered(outputs=[RIGHT | {"name": str(n)} for n in range(300)]),
    "an id that is a number": servers.altered(id=1),
    "parameters that are a list": servers.altered(parameters=[]),
    "a model's name that is a number": servers.altered(model_name=5),
    # The tensor.
    "no name": servers.altered_output(name=""),
    "a name of a megabyte": servers.altered_output(name="y" * 1_000_000),
    "an unknown datatype": servers.altered_output(datatype="FP8"),
    "a datatype that is a list": servers.altered_output(datatype=["FP32"]),
    "a negative shape": servers.altered_output(shape=[-2, -2]),
    "a shape that overflows": servers.altered_output(shape=[2**62, 4]),
    "a shape of text": servers.altered_output(shape=["2", "2"]),
    "a shape of rank 1000": servers.altered_output(shape=[1] * 1000),
    "no shape": servers.altered_output(shape=None),
    "rows that are ragged": servers.altered_output(data=[[1.0, 2.0], [3.0]]),
    "too many elements": servers.altered_output(data=[1.0] * 5),
    "a number that is too large": rows("1e300,1,1,1"),
    "a number beyond all": rows("1e999,1,1,1"),
    "data that are true": servers.altered_output(data=[True] * 4),
    "data that are null": servers.altered_output(data=None),
    # Binary.
    "a binary size that is too small": sized(15),
    "a binary size that is too large": sized(17, bytes(17)),
    "a binary size below 0": sized(-16),
    "a binary size of 2^62": sized(2**62),
    "a binary size of text": sized("16"),
    "a binary size that is true": sized(True),
    "binary that is not there": sized(16, b""),
    "binary and a list": sized(16, data=[1.0] * 4),
    "more bytes than tensors": sized(16, bytes(24)),
    "an output twice in binary": altered_binary([BINARY, BINARY], bytes(32)),
    "BYTES with a lying length": sized(8, b"\xff\xff\xff\x7fabcd", datatype="BYTES", shape=[1]),
    "a binary shape of nothing 2^31 times": sized(0, b"", shape=[2**31 - 1, 0]),
    "NaN among the numbers": sized(16, np.float32([1, np.nan, 3, 4]).tobytes()),
    "truncated binary": truncated,
}

# An error status: RemoteRefused.
REFUSED: dict[str, Behave] = {
    f"{status} to elsewhere": servers.says(
        http(b"", status=f"{status} No", headers="Location: http://127.0.0.1:1/\r\n")
    )
    for status in (301, 302, 303, 307, 308)
} | {
    "an error with a gigabyte announced": servers.says(http(b"", status="500 No", length=10**9)),
    "an error with a gigabyte streamed": streams(b"HTTP/1.1 500 No\r\n\r\n", b"x" * 65536),
    "an error of depth 100,000": servers.says(http(b"[" * 60_000, status="500 No")),
    "an error that is a gzip bomb": servers.says(
        http(gzip.compress(bytes(50_000_000), 1), status="502 Bad Gateway", headers="Content-Encoding: gzip\r\n")
    ),
    "an empty 204": servers.says(b"HTTP/1.1 204 No Content\r\n\r\n"),
}
