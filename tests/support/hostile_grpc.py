"""Replies of gRPC servers that are broken or hostile, by what is wrong with them."""

from __future__ import annotations

import grpc
import numpy as np

from support.grpc_servers import Behave, GrpcServer, altered, answers, says

X = np.float32([[1.0, 2.0], [3.0, 4.0]])


def bomb(server: GrpcServer, asked: bytes, context: grpc.ServicerContext) -> bytes:
    """50 MB of zeros, 50 kB on the way."""
    context.set_compression(grpc.Compression.Gzip)
    return bytes(50_000_000)


# ReplyError.
WRONG: dict[str, Behave] = {
    "no message": says(b"\xff\xff\xff"),
    "an empty message": says(b""),
    "another id": answers({"y": X}, id="0"),
    "another name": altered(name="z"),
    "an output more": answers({"y": X, "z": X}),
    "another datatype": altered(datatype="INT32"),
    "BYTES with a lying length": altered(datatype="BYTES", shape=[1], raw=[b"\xff\xff\xff\xff"]),
    "an unknown datatype": altered(datatype="FP8"),
    "another shape": altered(shape=[4, 1]),
    "a negative shape": altered(shape=[-2, -2]),
    "an overflowing shape": altered(shape=[2**62, 4]),
    "another N": answers({"y": np.zeros((1, 2), np.float32)}),
    "truncated": altered(raw=[b"\0" * 15]),
    "too long": altered(raw=[b"\0" * 17]),
    "contents twice": altered(raw=[b"\0" * 16, b""]),
    "no contents": altered(raw=[]),
    "NaN": answers({"y": np.full((2, 2), np.nan, np.float32)}),
    "another bundle": answers({"y": X * 2}, bundle="c" * 64),
    "ten thousand outputs": says(b"\x2a\x00" * 10_000),
    "a gzip bomb": bomb,
    "64 MiB and more": lambda server, asked, context: b"\0" * ((64 << 20) + 1),
}
