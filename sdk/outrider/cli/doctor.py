"""``doctor``: what is wrong with this installation, cause and cure."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from outrider.cli.options import PASSWORD, add_certificates, add_state, add_trust, certificates_of, login_of
from outrider.cli.text import aligned

if TYPE_CHECKING:
    from outrider.cli import Commands


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "doctor",
        run=_doctor,
        render=_render,
        failed=lambda result: not result["healthy"],
        summary="Look for what is wrong here: engines, processor, heat, clock, state, trust, broker, endpoint. "
        f"Exit code 1 where something is broken. The password of --user is in {PASSWORD}, an endpoint's token in "
        "OUTRIDER_TOKEN.",
        example="outrider doctor --broker mqtt://broker:1883 --endpoint http://host:8000/digits-large",
    )
    parser.add_argument("--broker", metavar="URL", help="an MQTT broker to try: mqtt://HOST[:PORT] or mqtts://...")
    parser.add_argument("--user", help="the name to log in with at the broker")
    add_certificates(parser)
    parser.add_argument("--endpoint", metavar="URL[/MODEL]", help="an inference endpoint to try")
    add_trust(parser)
    add_state(parser)


def _doctor(args: argparse.Namespace) -> dict[str, Any]:
    from outrider.doctor import Patient, examine
    from outrider_runtimes.clock import clock_is_synchronised

    patient = Patient(
        state=args.state,
        trust=args.trust,
        broker=args.broker,
        login=None if args.broker is None else login_of(args),
        tls=certificates_of(args),
        endpoint=args.endpoint,
        token=os.environ.get("OUTRIDER_TOKEN"),
        environ=os.environ,
        synchronised=clock_is_synchronised,
    )
    checks = examine(patient)
    return {
        "healthy": all(check.status != "broken" for check in checks),
        "checks": [check.to_dict() for check in checks],
    }


def _render(result: dict[str, Any]) -> str:
    lines = []
    names = aligned([[check["status"], check["name"]] for check in result["checks"]]).splitlines()
    width = max(map(len, names))
    for head, check in zip(names, result["checks"], strict=True):
        lines.append(f"{head.ljust(width)}  {check['found'] or check['cause']}")
        if check["cause"] and check["found"]:
            lines.append(f"{'':{width}}  cause: {check['cause']}")
        if check["cure"]:
            lines.append(f"{'':{width}}  cure: {check['cure']}")
    return "\n".join(lines)
