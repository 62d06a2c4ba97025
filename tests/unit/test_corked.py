"""What is written within one turn of the loop leaves in one piece, in its order, and nothing is lost at the end."""

from __future__ import annotations

import asyncio
import socket

from outrider.endpoint.corked import MAX_HELD_BYTES, Corked


class Counted(asyncio.Protocol):
    """Notes what came, and what its own transport was given to send."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.ended = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.pieces.append(data)

    def eof_received(self) -> bool:
        self.ended.set_result(None)
        return False


async def written(*turns: list[bytes], end: str = "close") -> list[bytes]:
    """Each turn's writes, one turn of the loop after the other; what came at the other side, a piece a read."""
    loop = asyncio.get_running_loop()
    near, far = socket.socketpair()
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=near)
    _, other = await loop.create_connection(Counted, sock=far)
    corked = Corked(transport, loop)
    for number, turn in enumerate(turns):
        for data in turn:
            corked.write(data)
        if number < len(turns) - 1:
            while len(b"".join(other.pieces)) < sum(len(data) for each in turns[: number + 1] for data in each):
                await asyncio.sleep(0)
    getattr(corked, end)()
    await asyncio.wait_for(other.ended, 20)
    transport.close()
    return other.pieces


def test_a_head_and_its_body_leave_together() -> None:
    assert asyncio.run(written([b"head", b"body"], [b"next"])) == [b"headbody", b"next"]


def test_what_is_held_leaves_before_the_end() -> None:
    for end in ("close", "write_eof"):
        assert b"".join(asyncio.run(written([b"last", b"words"], end=end))) == b"lastwords"


def test_a_long_body_is_not_held_and_order_is_kept() -> None:
    body = bytes(range(256)) * (MAX_HELD_BYTES // 128)
    assert b"".join(asyncio.run(written([b"head", body, b"tail"]))) == b"head" + body + b"tail"


def test_after_its_end_nothing_is_sent_and_nothing_raises() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        near, far = socket.socketpair()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=near)
        corked = Corked(transport, loop)
        corked.write(b"lost")
        corked.abort()
        corked.write(b"more")
        await asyncio.sleep(0)
        assert corked.is_closing()
        far.close()

    asyncio.run(scenario())
