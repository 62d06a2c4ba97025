"""Commands over MQTT: their bytes, and which of them a device takes. Pure; docs/telemetry.md has the specification.

The signature is over the command's text as it was sent, so that nobody has to agree on how JSON is written.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from outrider.bundle import Trust, key_id
from outrider.telemetry.record import VERSION, check_device
from outrider_runtimes import strictjson
from outrider_runtimes.errors import AgentError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAX_COMMAND_BYTES: Final = 16 * 1024
MAX_DEPTH: Final = 8
MAX_VALUES: Final = 256
MAX_SEQUENCE: Final = 2**53 - 1  # what every JSON reader holds exactly
# A signed command cannot move the sequence so far that none is left.
MAX_STEP: Final = 1_000_000
# Of the same key a signature for another purpose, a bundle's say, is none of these.
DOMAIN: Final = b"outrider command signature, version 1\x00"

Result = Literal["ok", "refused", "failed"]
Check = Callable[[object], bool]

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_KEY_ID = re.compile(r"[0-9a-f]{16}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def _matches(pattern: re.Pattern[str]) -> Check:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One command.

    Attributes:
        signed: whether it changes what the device does, and so has to be signed and numbered.
        needs, may_have: its arguments, and what each must be.
    """

    signed: bool
    needs: Mapping[str, Check] = field(default_factory=dict)
    may_have: Mapping[str, Check] = field(default_factory=dict)


KINDS: Final[Mapping[str, Kind]] = {
    "ping": Kind(signed=False),
    "stats": Kind(signed=False),
    "set_policy": Kind(signed=True, needs={"policy": _is_object}),
    "install": Kind(signed=True, needs={"file": _matches(_FILE)}, may_have={"digest": _matches(_DIGEST)}),
    "rollback": Kind(signed=True),
    "pause": Kind(signed=True),
    "resume": Kind(signed=True),
}


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a sender asks of one device.

    Attributes:
        id: the sender's own name for it; the acknowledgement has it too.
        sequence: of a signed one, above that of every one before it.
        expires_s: of a signed one, when it is too late for it, in seconds since 1970.
    """

    id: str
    device: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sequence: int | None = None
    expires_s: int | None = None


@dataclass(frozen=True, kw_only=True)
class Received:
    """A command as it came: read, and nothing of it believed.

    Attributes:
        text: the bytes that the signature is over.
        key, signature: who is said to have signed it; empty where it is not signed.
    """

    command: Command
    text: bytes
    key: str = ""
    signature: bytes = b""

    @property
    def digest(self) -> str:
        """sha256 of the text: two commands with the same number are the same one where this is the same."""
        return hashlib.sha256(self.text).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Acknowledgement:
    """What became of a command.

    Attributes:
        command: its ``id``.
        reason: why it was refused or failed, in one word; empty for ok.
        detail: the same in a sentence.
        sequence: the highest number that the device has taken, so that a sender knows the next.
        data: what it gave.
    """

    command: str
    device: str
    name: str
    result: Result
    reason: str = ""
    detail: str = ""
    sequence: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)


class Refusal(AgentError):
    """A command that is not taken. ``reason`` is one word of docs/telemetry.md."""

    def __init__(self, reason: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Past:
    """What a device remembers of the commands that it took.

    Attributes:
        last: the highest number.
        digests: of the texts of the latest ones, by number.
    """

    last: int = 0
    digests: Mapping[int, str] = field(default_factory=dict)


def command_topic(device: str) -> str:
    """Where a device listens. Raises ConfigError for an unusable device id."""
    return f"outrider/v1/{check_device(device)}/command"


def acknowledgement_topic(device: str) -> str:
    """Where it answers. Raises ConfigError for an unusable device id."""
    return f"outrider/v1/{check_device(device)}/acknowledgement"


def write_command(command: Command, key: Ed25519PrivateKey | None = None) -> bytes:
    """The message that asks for it, signed where a key is given."""
    fields = {name: value for name, value in vars(command).items() if value is not None}
    text = json.dumps(fields, separators=(",", ":"), allow_nan=False)
    message: dict[str, Any] = {"v": VERSION, "command": text}
    if key is not None:
        signature = key.sign(DOMAIN + text.encode())
        public = key.public_key().public_bytes_raw()
        message["signature"] = {"key": key_id(public), "value": base64.b64encode(signature).decode()}
    return json.dumps(message, separators=(",", ":")).encode()


def read_command(payload: bytes) -> Received:
    """The inverse of ``write_command``; checks its form alone.

    Raises:
        Refusal: ``malformed``; nothing in it can be believed, so nobody is answered.
    """
    message = _parsed(payload, "message")
    _only(message, {"v", "command", "signature"}, "message")
    if type(message.get("v")) is not int or message["v"] != VERSION:
        raise _malformed(f"v is not {VERSION}")
    text = message.get("command")
    if not isinstance(text, str):
        raise _malformed("command is not a string of JSON")
    raw = text.encode()
    key, signature = _signature(message["signature"]) if "signature" in message else ("", b"")
    return Received(command=_command(_parsed(raw, "command")), text=raw, key=key, signature=signature)


def check_signature(received: Received, trust: Trust) -> None:
    """Whether a key that may command signed the text. Raises Refusal."""
    if not trust.keys:
        raise Refusal("no_keys", "this device has no key that may command it", hint="commands.keys in its config")
    if not received.signature:
        raise Refusal("not_signed", f"{received.command.name} must be signed", hint="--key FILE.key")
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    keys = {key_id(key): key for key in trust.keys if key_id(key) not in trust.revoked}
    if received.key not in keys:
        raise Refusal("key_not_trusted", f"key {received.key} may not command this device")
    try:
        Ed25519PublicKey.from_public_bytes(keys[received.key]).verify(received.signature, DOMAIN + received.text)
    except (InvalidSignature, ValueError):
        raise Refusal("bad_signature", "the signature is not that key's over this command") from None


def judge(received: Received, *, device: str, trust: Trust, past: Past, now_s: float | None) -> bool:
    """Whether the device acts on it.

    Args:
        device: this one.
        trust: the keys that may command.
        past: what was taken before.
        now_s: seconds since 1970; None where the clock is not known to be right, and then nothing expires.

    Returns:
        False where it was taken before, not long ago: it is answered as it was then and not done again.

    Raises:
        Refusal: it is not taken.
    """
    command = received.command
    if command.device != device:
        raise Refusal("other_device", f"it is for {command.device}, this is {device}")
    if not KINDS[command.name].signed:
        return True
    check_signature(received, trust)
    sequence, expires_s = command.sequence, command.expires_s
    if sequence is None or expires_s is None:
        raise Refusal("malformed", f"{command.name} needs sequence and expires_s")
    if past.digests.get(sequence) == received.digest:
        return False
    if sequence <= past.last:
        raise Refusal("old_sequence", f"sequence {sequence} is not above {past.last}", hint="ping says the last one")
    if sequence > past.last + MAX_STEP:
        raise Refusal("far_sequence", f"sequence {sequence} is more than {MAX_STEP} above {past.last}")
    if now_s is not None and now_s >= expires_s:
        raise Refusal("expired", f"it expired {now_s - expires_s:.0f} s ago by this device's clock")
    return True


def write_acknowledgement(acknowledgement: Acknowledgement) -> bytes:
    """The message that says what became of a command."""
    return json.dumps({"v": VERSION, **vars(acknowledgement)}, separators=(",", ":"), allow_nan=False).encode()


def read_acknowledgement(payload: bytes) -> Acknowledgement:
    """The inverse of ``write_acknowledgement``; unknown keys pass. Raises Refusal, ``malformed``."""
    fields = strictjson.parse(
        payload,
        _malformed,
        max_bytes=256 * 1024,
        max_depth=16,
        parse_int=strictjson.integer_64,
        parse_float=strictjson.finite_float,
    )
    kinds = {"command": str, "device": str, "name": str, "result": str, "reason": str, "detail": str, "data": dict}
    for name, kind in kinds.items():
        if not isinstance(fields.get(name), kind):
            raise _malformed(f"{name} is not {'an object' if kind is dict else 'a string'}")
    if fields["result"] not in ("ok", "refused", "failed"):
        raise _malformed("result is not ok, refused or failed")
    if not _is_count(fields.get("sequence")):
        raise _malformed("sequence is not a whole number")
    return Acknowledgement(**{name: fields[name] for name in (*kinds, "sequence")})


def _parsed(raw: bytes, what: str) -> dict[str, Any]:
    return strictjson.parse(
        raw,
        lambda problem: _malformed(f"{what}: {problem}"),
        max_bytes=MAX_COMMAND_BYTES,
        max_depth=MAX_DEPTH,
        max_values=MAX_VALUES,
        parse_int=strictjson.integer_64,
        parse_float=strictjson.finite_float,
    )


def _command(fields: Mapping[str, Any]) -> Command:
    _only(fields, {"id", "device", "name", "arguments", "sequence", "expires_s"}, "command")
    if not _matches(_ID)(fields.get("id")):
        raise _malformed("id is not 1 to 64 letters, digits, _ and -")
    name = fields.get("name")
    if not isinstance(name, str) or name not in KINDS:
        raise _malformed(f"name is none of {', '.join(KINDS)}")
    if not isinstance(fields.get("device"), str) or len(fields["device"]) > 64:
        raise _malformed("device is no device id")
    arguments = fields.get("arguments", {})
    if not isinstance(arguments, dict):
        raise _malformed("arguments is not an object")
    _check_arguments(KINDS[name], arguments)
    for key in ("sequence", "expires_s"):
        if key in fields and not (_is_count(fields[key]) and fields[key] > 0):
            raise _malformed(f"{key} is not a whole number of 1 to 2^53 - 1")
    return Command(**{**fields, "arguments": arguments})


def _check_arguments(kind: Kind, arguments: Mapping[str, Any]) -> None:
    checks = {**kind.needs, **kind.may_have}
    _only(arguments, set(checks), "arguments")
    for key, check in checks.items():
        if key not in arguments and key in kind.may_have:
            continue
        if key not in arguments or not check(arguments[key]):
            raise _malformed(f"arguments.{key} is missing, or not what the command takes")


def _signature(value: Any) -> tuple[str, bytes]:
    if not isinstance(value, dict):
        raise _malformed("signature is not an object")
    _only(value, {"key", "value"}, "signature")
    if not _matches(_KEY_ID)(value.get("key")) or not isinstance(value.get("value"), str):
        raise _malformed("signature has no key id and value")
    try:
        signature = base64.b64decode(value["value"], validate=True)
    except (ValueError, binascii.Error):
        signature = b""
    if len(signature) != 64 or base64.b64encode(signature).decode() != value["value"]:  # one way to write it
        raise _malformed("signature.value is not base64 of 64 bytes")
    return value["key"], signature


def _only(fields: Mapping[str, Any], known: set[str], what: str) -> None:
    stray = sorted(set(fields) - known)
    if stray:
        raise _malformed(f"{what} has the unknown key {stray[0]!r:.40}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_SEQUENCE


def _malformed(problem: str) -> Refusal:
    return Refusal("malformed", f"a command that cannot be read: {problem}")
