"""Options that several commands have, each told in one place."""

from __future__ import annotations

import argparse
import math
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from outrider_runtimes.errors import ConfigError

if TYPE_CHECKING:
    from outrider_runtimes.tls import Tls

WHOLE = re.compile(r"-?[0-9]{1,18}\Z")
LEAST_MS, MOST_MS = 1e-6, 1e9
LEAST_S = 1e-3
MOST_S = threading.TIMEOUT_MAX  # what a thread can wait for
MOST_PORT = 65535
PASSWORD = "OUTRIDER_MQTT_PASSWORD"  # of a broker: on a command line others would see it


def add_trust(parser: argparse.ArgumentParser) -> None:
    """``--trust``, as ``outrider.load`` takes it."""
    parser.add_argument("--trust", type=Path, help="a .pub file or a folder of them (default: OUTRIDER_TRUST)")


def add_state(parser: argparse.ArgumentParser) -> None:
    """``--state``, as ``outrider.load`` takes it."""
    parser.add_argument("--state", type=Path, help="the state directory (default: the user's)")


def number(least: float, most: float) -> Callable[[str], float]:
    """The type of an option that is a number from ``least`` to ``most``; argparse ends with 2 for anything else."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number from {least:g} to {most:g}")
        return value

    return parse


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """As ``number``, of whole numbers."""

    def parse(text: str) -> int:
        if not WHOLE.match(text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number from {least} to {most}")
        return int(text)

    return parse


def add_certificates(parser: argparse.ArgumentParser) -> None:
    """``--ca``, ``--cert`` and ``--cert-key``: how ``mqtts://`` is spoken."""
    parser.add_argument(
        "--ca", type=Path, metavar="FILE", help="for mqtts: PEM certificates to trust, else the system's"
    )
    parser.add_argument(
        "--cert", type=Path, metavar="FILE", help="for mqtts: your PEM certificate, where the broker asks for one"
    )
    parser.add_argument(
        "--cert-key", type=Path, metavar="FILE", help="the key of that certificate, where it is another file"
    )


def certificates_of(args: argparse.Namespace) -> Tls | None:
    """What ``add_certificates`` was given; None for nothing. Raises ConfigError where it does not go together."""
    if args.ca is None and args.cert is None and args.cert_key is None:
        return None
    from outrider_runtimes.tls import Tls

    return Tls(authority=args.ca, certificate=args.cert, key=args.cert_key)


def login_of(args: argparse.Namespace) -> tuple[str, str | None] | None:
    """Who logs in at the broker: ``--user``, with the password in the environment. None for nobody.

    Raises:
        ConfigError: a password, and nobody whose it is.
    """
    password = os.environ.get(PASSWORD)
    if args.user is None and password:
        raise ConfigError(f"{PASSWORD} is set and --user is not given", hint="say whose password it is by --user")
    return None if args.user is None else (args.user, password)
