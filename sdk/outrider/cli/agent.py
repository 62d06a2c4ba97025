"""``agent``: the daemon of a board; ``command``: what is asked of one over MQTT."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.cli.options import LEAST_S, MOST_S, PASSWORD, add_certificates, certificates_of, login_of, number
from outrider.cli.text import aligned
from outrider_runtimes.errors import ConfigError

if TYPE_CHECKING:
    from outrider.cli import Commands

NAMES = ("ping", "stats", "install", "rollback", "set_policy", "pause", "resume")


def register(commands: Commands) -> None:
    """Add the commands."""
    agent = commands.add(
        "agent",
        run=_agent,
        render=lambda result: "",
        summary="Run a board: read a source, answer by one model, report over MQTT and take signed commands, until "
        "SIGTERM. SIGHUP reads the configuration again. Logs are JSON lines on standard error.",
        example="outrider agent agent.toml",
    )
    agent.add_argument("config", type=Path, metavar="CONFIG.toml")

    command = commands.add(
        "command",
        run=_command,
        render=_render,
        failed=lambda result: result["result"] != "ok",
        summary="Ask something of a device's agent and wait for its acknowledgement. "
        f"The broker gets the password in {PASSWORD}, if there is one.",
        example="outrider command mqtt://broker:1883 pi-07 install digits-2.outrider --key keys/operator.key\n"
        "  outrider command mqtt://broker:1883 pi-07 set_policy deadline_ms=50 min_margin=0.4 --key keys/operator.key",
    )
    command.add_argument("url", metavar="MQTT_URL")
    command.add_argument("device", metavar="DEVICE")
    command.add_argument("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    command.add_argument(
        "arguments", nargs="*", metavar="ARGUMENT", help="install: the bundle's file; set_policy: FIELD=VALUE..."
    )
    command.add_argument("--key", type=Path, help="the private key that signs; ping and stats need none")
    command.add_argument("--digest", help="install: only the bundle with this digest")
    add_certificates(command)
    command.add_argument("--user", help="the broker's user")
    command.add_argument(
        "--expires-s", type=number(LEAST_S, MOST_S), default=60.0, help="after this it is not done any more (60)"
    )
    command.add_argument(
        "--timeout-s", type=number(LEAST_S, MOST_S), default=120.0, help="wait for the acknowledgement so long (120)"
    )


def _agent(args: argparse.Namespace) -> dict[str, Any]:
    from outrider.agent.daemon import run_agent

    return run_agent(args.config)


def _command(args: argparse.Namespace) -> dict[str, Any]:
    from outrider.agent.sender import Sender
    from outrider.bundle import load_private_key
    from outrider.telemetry.mqtt import parse_broker, to_credentials

    arguments = command_arguments(args.name, args.arguments, args.digest)
    sender = Sender(
        broker=parse_broker(args.url, tls=certificates_of(args)),
        device=args.device,
        credentials=to_credentials(login_of(args)),
        key=None if args.key is None else load_private_key(args.key),
        expires_s=args.expires_s,
        timeout_s=args.timeout_s,
    )
    return dict(vars(sender.send(args.name, arguments)))


def command_arguments(name: str, words: list[str], digest: str | None = None) -> dict[str, Any]:
    """The arguments of a command as words of the command line. Raises ConfigError."""
    if name == "install":
        if len(words) != 1:
            raise ConfigError("install takes one bundle", hint="the name of a file in the device's folder of bundles")
        return {"file": words[0]} if digest is None else {"file": words[0], "digest": digest}
    if name == "set_policy" and words:
        return {"policy": dict(_field(word) for word in words)}
    if words or name == "set_policy":
        hint = "set_policy deadline_ms=50" if name == "set_policy" else f"outrider command URL DEVICE {name}"
        raise ConfigError(f"{name} does not take {' '.join(words) or 'nothing'}", hint=hint)
    return {}


def _field(word: str) -> tuple[str, Any]:
    key, separator, text = word.partition("=")
    if not separator or not key:
        raise ConfigError(f"{word!r} is not FIELD=VALUE", hint="set_policy deadline_ms=50 offload_when_queued=false")
    try:
        return key, json.loads(text)
    except ValueError:
        return key, text


def _render(result: dict[str, Any]) -> str:
    what = result["result"] if result["result"] == "ok" else f"{result['result']}: {result['reason']}"
    rows = [[result["name"], what]]
    if result["detail"]:
        rows.append(["", result["detail"]])
    for key, value in result["data"].items():
        rows.append([f"  {key}", value if isinstance(value, str) else json.dumps(value)])
    return aligned(rows)
