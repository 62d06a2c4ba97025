"""``outrider demo``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from outrider.cli import Commands
from outrider.telemetry.mqtt import parse_broker
from outrider_runtimes.errors import ConfigError, MissingExtra

SMALLEST_STREAM = 5_000
FASTEST_RATE_HZ = 10_000.0  # the stream must last longer than a server takes to start
NEEDS = ("torch", "onnx", "onnxruntime", "ai_edge_litert", "litert_torch", "sklearn", "amqtt", "matplotlib", "rich",
         "paho", "starlette", "uvicorn")  # fmt: skip


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "demo",
        run=_run,
        render=lambda result: "",
        summary="The whole way on this machine: train, export, run, report over MQTT, fall back to the cloud.",
        example="outrider demo --output demo-output",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder for what it writes (default: %(default)s)"
    )
    parser.add_argument("--broker", help="use this broker, mqtt://host:port, not the demo's own")
    parser.add_argument(
        "--stream", type=int, default=6_000, help="inputs that the device answers, 5000 or more (default: %(default)s)"
    )
    parser.add_argument("--rate", type=float, default=200.0, help="inputs a second (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: %(default)s)")


def _run(args: argparse.Namespace) -> dict[str, Any]:
    for package in NEEDS:
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, extra="demo", purpose="outrider demo")
    if args.stream < SMALLEST_STREAM:
        raise ConfigError(f"--stream {args.stream} is under {SMALLEST_STREAM}, too few to tell two accuracies apart")
    if not 0 < args.rate < FASTEST_RATE_HZ:
        raise ConfigError(f"--rate {args.rate} is not above 0 and below {FASTEST_RATE_HZ:g}")
    if args.broker is not None:
        parse_broker(args.broker)
    from outrider_exporters.demo.console import Narrator
    from outrider_exporters.demo.run import STEPS, Settings, run_demo, say_tables

    say = Narrator(sys.stderr if args.json else sys.stdout, steps=STEPS)
    settings = Settings(output=args.output, broker=args.broker, stream=args.stream, rate_hz=args.rate, seed=args.seed)
    result = run_demo(settings, say)
    say_tables(result, say)
    return result
