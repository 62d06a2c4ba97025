"""``serve``: the cloud endpoint."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.cli.options import MOST_PORT, MOST_S, add_state, add_trust, number, whole_number
from outrider_runtimes.errors import ConfigError

if TYPE_CHECKING:
    from outrider.cli import Commands
    from outrider.endpoint import Listening


MOST_QUEUE = 10**6


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "serve",
        run=_serve,
        render=_render,
        summary="Serve bundles over the Open Inference Protocol v2 until SIGTERM or Ctrl-C. "
        "Callers must send the token in OUTRIDER_TOKEN, if there is one.",
        example="outrider serve digits-large.outrider --port 8000\n"
        "  OUTRIDER_TOKEN=... outrider serve digits.outrider cats.outrider --host 0.0.0.0 "
        "--tls-cert cert.pem --tls-key key.pem",
    )
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE", help="bundle files, or names of what is installed")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument(
        "--port", type=whole_number(0, MOST_PORT), default=8000, help="0 takes any free port (default: %(default)s)"
    )
    parser.add_argument("--tls-cert", type=Path, help="the server's certificate chain in PEM; then it speaks https")
    parser.add_argument("--tls-key", type=Path, help="the certificate's private key in PEM, without a passphrase")
    parser.add_argument("--client-ca", type=Path, help="callers must show a certificate that this authority signed")
    parser.add_argument(
        "--anyone", action="store_true", help="listen beyond this machine with neither a token nor client certificates"
    )
    parser.add_argument(
        "--queue",
        type=whole_number(1, MOST_QUEUE),
        help="requests that may wait for a model before callers get 429 (default: 64)",
    )
    parser.add_argument(
        "--drain-s",
        type=number(0, MOST_S),
        help="how long requests may take that are inside when it is stopped (default: 20)",
    )
    parser.add_argument(
        "--grpc-port",
        type=whole_number(0, MOST_PORT),
        help="speak gRPC too, on this port of the same address; 0 takes any free port",
    )
    parser.add_argument(
        "--on", choices=["ray"], help="serve as a Ray deployment, on this machine or the cluster of RAY_ADDRESS"
    )
    parser.add_argument(
        "--replicas", metavar="N|N-M", help="with --on ray: how many processes serve; 1-4 goes by the load (default: 1)"
    )
    parser.add_argument(
        "--access-log", action="store_true", help="write a line of JSON for every HTTP request to stderr"
    )
    add_trust(parser)
    add_state(parser)


def _serve(args: argparse.Namespace) -> dict[str, Any]:
    from outrider.endpoint import serve
    from outrider.endpoint.serve import leave_stuck_calls

    served: list[str] = []

    def ready(url: str) -> None:
        served.append(url)
        print(f"serving {', '.join(args.bundles)} on {url}", file=sys.stderr, flush=True)

    if args.on == "ray":
        quality = _on_ray(args, ready)
        return {"url": served[0], **({} if quality is None else {"quality": quality})}
    if args.replicas is not None:
        raise ConfigError("--replicas is for --on ray", hint="one process serves here")
    quality = serve(
        args.bundles,
        listening=_listening(args),
        trust=args.trust,
        state=args.state,
        token=os.environ.get("OUTRIDER_TOKEN"),
        queue=args.queue,
        grpc_port=args.grpc_port,
        access_log=args.access_log,
        ready=ready,
    )
    leave_stuck_calls()
    http, grpc = [*served, None, None][:2]
    return {"url": http, "grpc_url": grpc, "quality": quality}


def _on_ray(args: argparse.Namespace, ready: Callable[[str], None]) -> dict[str, Any] | None:
    from outrider.endpoint.ray_serve import Replicas, serve_on_ray

    if args.grpc_port is not None or args.access_log:
        raise ConfigError("Ray has neither --grpc-port nor --access-log", hint="serve without --on ray")
    return serve_on_ray(
        args.bundles,
        listening=_listening(args),
        replicas=None if args.replicas is None else Replicas.parsed(args.replicas),
        trust=args.trust,
        state=args.state,
        token=os.environ.get("OUTRIDER_TOKEN"),
        queue=args.queue,
        ready=ready,
    )


def _listening(args: argparse.Namespace) -> Listening:
    from outrider.endpoint import Listening, ServerTls

    tls = None
    if args.tls_cert is not None and args.tls_key is not None:
        tls = ServerTls(cert=args.tls_cert, key=args.tls_key, client_ca=args.client_ca)
    elif any((args.tls_cert, args.tls_key, args.client_ca)):
        raise ConfigError("TLS needs both --tls-cert and --tls-key", hint="--client-ca stands beside them")
    drain = {} if args.drain_s is None else {"drain_s": args.drain_s}
    return Listening(host=args.host, port=args.port, tls=tls, anyone=args.anyone, **drain)


def _render(result: dict[str, Any]) -> str:
    from outrider.endpoint.metrics import shown

    return f"stopped; {shown(result['quality'])}" if "quality" in result else "stopped"
