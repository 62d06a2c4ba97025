"""Commands for one device, signed or not; hands that write down what they were asked for; and forgeries by the seed."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from outrider.agent.commands import (
    KINDS,
    Acknowledgement,
    Command,
    read_acknowledgement,
    write_command,
)
from outrider.agent.control import Control
from outrider.bundle import Trust, public_bytes
from outrider.telemetry.mqtt import Message
from support.keys import private_key

DEVICE = "pi-07"
NOW_S = 1_764_000_000.0
TRUST = Trust(keys=frozenset([public_bytes(private_key(1))]))
ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "install": {"file": "digits-2.outrider", "digest": "ab" * 32},
    "set_policy": {"policy": {"deadline_ms": 50.0, "min_margin": 0.25}},
}


def a_command(name: str = "pause", **changes: Any) -> Command:
    fields: dict[str, Any] = {
        "id": f"test-{name}",
        "device": DEVICE,
        "name": name,
        "arguments": ARGUMENTS.get(name, {}),
        "sequence": 5,
        "expires_s": int(NOW_S) + 60,
    }
    return Command(**(fields | changes))


def signed(command: Command, key: int = 1) -> bytes:
    return write_command(command, private_key(key))


class WritingHands:
    """Does nothing, and has it in ``actions``; ``fail`` is raised instead where it is set."""

    def __init__(self) -> None:
        self.actions: list[tuple[Any, ...]] = []
        self.fail: Exception | None = None
        self.before: Callable[[], None] = lambda: None

    def stats(self) -> dict[str, Any]:
        return {"answered": 7}

    def install(self, file: str, digest: str | None) -> dict[str, Any]:
        return self._do("install", file, digest)

    def rollback(self) -> dict[str, Any]:
        return self._do("rollback")

    def set_policy(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return self._do("set_policy", dict(fields))

    def set_paused(self, paused: bool) -> dict[str, Any]:
        return self._do("set_paused", paused)

    def _do(self, *action: Any) -> dict[str, Any]:
        self.before()
        self.actions.append(action)
        if self.fail is not None:
            raise self.fail
        return {"done": action[0]}


class Desk:
    """A Control over hands that write down, and what it answered. Its thread is not started: ``handle`` is called."""

    def __init__(self, folder: Path, *, trust: Trust = TRUST, now_s: float | None = NOW_S) -> None:
        self.hands = WritingHands()
        self.posted: list[Message] = []
        self.control = Control(
            self.hands, device=DEVICE, trust=trust, folder=folder, post=self._post, now_s=lambda: now_s
        )

    def _post(self, message: Message) -> bool:
        self.posted.append(message)
        return True

    @property
    def answers(self) -> list[Acknowledgement]:
        return [read_acknowledgement(message.payload) for message in self.posted]

    def handle(self, payload: bytes) -> Acknowledgement | None:
        """What was answered, if anything was."""
        count = len(self.posted)
        self.control.handle(payload)
        return read_acknowledgement(self.posted[-1].payload) if len(self.posted) > count else None


def forgeries(count: int, seed: int, *, clock: bool = True) -> list[bytes]:
    """Messages of which none may be acted on after sequence 4: valid commands broken in one way or several.

    Without ``clock`` none that is only too late: a device that does not know the time takes it.
    """
    rng = random.Random(seed)
    ways = [_bytes, _bytes, _field, _field, _envelope, _swap, _stranger, _unsigned, _noise, *([_late] if clock else [])]
    return [rng.choice(ways)(rng) for _ in range(count)]


def _valid(rng: random.Random, **changes: Any) -> Command:
    names = [name for name, kind in KINDS.items() if kind.signed]
    return a_command(rng.choice(names), sequence=rng.randint(5, 50), **changes)


def _bytes(rng: random.Random) -> bytes:
    """Bytes flipped, cut, doubled or put in. Only those after which another message is left."""
    payload = signed(_valid(rng))
    changed = bytearray(payload)
    while True:
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(changed))
            how = rng.randrange(4)
            if how == 0:
                changed[at] = rng.randrange(256)
            elif how == 1:
                del changed[at : at + rng.randint(1, 9)]
            elif how == 2:
                changed[at:at] = changed[at : at + rng.randint(1, 9)]
            else:
                changed[at:at] = rng.randbytes(rng.randint(1, 9))
        if not _says_the_same(bytes(changed), payload):
            return bytes(changed)


def _says_the_same(changed: bytes, payload: bytes) -> bool:
    """Whether it holds the same text and the same signature: a space more around them is no forgery."""
    try:
        return bool(json.loads(changed) == json.loads(payload))
    except ValueError:
        return False


def _field(rng: random.Random) -> bytes:
    """Something else is said than what was signed."""
    message = json.loads(signed(_valid(rng)))
    text = json.loads(message["command"])
    key = rng.choice(list(text))
    text[key] = rng.choice(
        [None, True, -1, 0, 2**53, 2**70, 1e308, "", "pi-08", "x" * 300, [], {}, {"file": "/etc/passwd"}, "rollback"]
    )
    if rng.random() < 0.3:
        text[rng.choice(["more", "", "\u0000", "name "])] = 1
    message["command"] = json.dumps(text)
    return json.dumps(message).encode()


def _envelope(rng: random.Random) -> bytes:
    message = json.loads(signed(_valid(rng)))
    signature = message["signature"]
    key = rng.choice(["v", "command", "signature", "value", "key"])
    junk = rng.choice([None, True, 1.0, 2, "", "x", [], {}, "A" * 88, base64.b64encode(rng.randbytes(64)).decode()])
    if key in ("value", "key"):
        signature[key] = junk
    elif key == "signature" and rng.random() < 0.5:
        del message["signature"]
    else:
        message[key] = 3 if key == "v" else junk
    return json.dumps(message).encode()


def _swap(rng: random.Random) -> bytes:
    """One command's signature under another."""
    one, other = json.loads(signed(_valid(rng))), json.loads(signed(_valid(rng, id="other")))
    return json.dumps({**one, "signature": other["signature"]}).encode()


def _stranger(rng: random.Random) -> bytes:
    """Signed by someone else; or for another device, or out of order, by the right one."""
    how = rng.randrange(3)
    if how == 0:
        return signed(_valid(rng), key=rng.randint(2, 200))
    if how == 1:
        return signed(_valid(rng, device=rng.choice(["pi-08", "PI-07", "pi-07 ", "+", "#"])))
    sequence = rng.choice([rng.randint(1, 4), rng.randint(2**40, 2**53 - 1)])
    return signed(a_command(rng.choice(["pause", "rollback"]), sequence=sequence))


def _late(rng: random.Random) -> bytes:
    return signed(_valid(rng, expires_s=rng.randint(1, int(NOW_S))))


def _unsigned(rng: random.Random) -> bytes:
    return write_command(_valid(rng))


def _noise(rng: random.Random) -> bytes:
    how = rng.randrange(3)
    if how == 0:
        return rng.randbytes(rng.randint(0, 400))
    if how == 1:
        return (rng.choice(["[", '{"v":1,"command":', "{", '"']) * rng.randint(1, 4000)).encode()
    return json.dumps({"v": 1, "command": rng.choice(["{}", "[]", "null", '{"id":"' + "x" * 20_000])}).encode()
