"""``watch``: a live view of a fleet."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from outrider.cli.options import (
    LEAST_S,
    MOST_PORT,
    MOST_S,
    PASSWORD,
    add_certificates,
    certificates_of,
    login_of,
    number,
    whole_number,
)
from outrider.cli.text import shown
from outrider_runtimes.errors import TelemetryError

if TYPE_CHECKING:
    from outrider.cli import Commands
    from outrider.watch import Watch
    from outrider.watch.fleet import News

# What a broker has kept (status, info) comes within this of the subscription.
ONCE_S = 3.0
_TURN_S = 0.5
LOG_LINES = 20
# Those of watch.table, which this module does not import before it is asked to run.
SORT_BY = ("device", "state", "latency", "offload", "temperature", "heard")


def register(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "watch",
        run=_watch,
        render=lambda result: "",  # it has printed while it ran
        summary="Show the devices that report to a broker, live, until Ctrl-C. An onlooker: it takes no record from a "
        f"consumer and sends no receipt. The password of --user is in {PASSWORD}.",
        example="outrider watch mqtt://127.0.0.1:1883 --html 8080",
    )
    parser.add_argument("broker", metavar="MQTT_URL", help="mqtt://host:1883, or mqtts://host:8883 for TLS")
    parser.add_argument("--user", help="the name to log in with")
    add_certificates(parser)
    parser.add_argument("--seconds", type=number(LEAST_S, MOST_S), metavar="N", help="stop after so many seconds")
    parser.add_argument(
        "--once", action="store_true", help=f"print the table after {ONCE_S:g} s (or --seconds) and stop"
    )
    parser.add_argument(
        "--sort", choices=SORT_BY, default="device", help="the order of the table (default: %(default)s)"
    )
    parser.add_argument(
        "--stale-after",
        type=number(LEAST_S, MOST_S),
        default=180.0,
        metavar="S",
        help="a device that is quiet for so many seconds is stale (default: %(default)g)",
    )
    parser.add_argument(
        "--html",
        type=whole_number(0, MOST_PORT),
        metavar="PORT",
        help="serve a page with live charts, and /metrics for Prometheus; 0: any port",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="of --html, the address to listen on (default: this machine)"
    )


def _watch(args: argparse.Namespace) -> dict[str, Any]:
    live = not (args.once or args.json)
    painted = live and sys.stdout.isatty()
    done = threading.Event()
    news: SimpleQueue[News] = SimpleQueue()
    with ExitStack() as stack:
        if painted:
            stack.enter_context(_log_kept())
        watch = stack.enter_context(_open(args, news.put if live and not painted else lambda news: None))
        _stop_on_signals(stack, done)
        url = None if args.html is None else _serve(stack, watch, host=args.host, port=args.html)
        if painted:
            stack.enter_context(_other_screen())

        def turn(left_s: float) -> None:
            if painted:
                _paint(watch, args.sort)
                done.wait(left_s)
            else:
                _print_news(news, left_s)

        _run(turn, done, span_s=args.seconds if args.seconds is not None or not args.once else ONCE_S)
        result = _result(watch, sort=args.sort, url=url)
        if not live and not result["devices"] and not watch.connected:
            raise TelemetryError(
                f"{watch.broker}: {watch.last_error or 'no answer yet'}",
                hint="check the address, and that a broker is there",
            )
        text = _text(watch, args.sort)
    if not args.json:
        print(text, flush=True)
    return result


def _open(args: argparse.Namespace, on_news: Callable[[News], None]) -> Watch:
    from outrider.watch import Watch

    return Watch(
        args.broker,
        tls=certificates_of(args),
        credentials=login_of(args),
        stale_after_s=args.stale_after,
        on_news=on_news,
    )


def _serve(stack: ExitStack, watch: Watch, *, host: str, port: int) -> str:
    from outrider.watch.server import Server

    server = stack.enter_context(Server(watch, host=host, port=port))
    print(f"the fleet is on {server.url}", file=sys.stderr, flush=True)
    return server.url


def _run(turn: Callable[[float], None], done: threading.Event, *, span_s: float | None) -> None:
    """Until the time is over or a signal came. A turn takes as long as it is given."""
    until = math.inf if span_s is None else time.monotonic() + span_s
    while not done.is_set() and (left_s := until - time.monotonic()) > 0:
        turn(min(_TURN_S, left_s))


def _paint(watch: Watch, sort: str) -> None:
    from outrider.watch.table import repaint, summary

    size = shutil.get_terminal_size()
    where = str(watch.broker) if watch.connected else f"{watch.broker}: {watch.last_error or 'connecting'}"
    head = f"{summary(watch.rows())}  [{where}]"[: size.columns]
    text = f"{head}\n\n{_table(watch, sort, width=size.columns, colour='NO_COLOR' not in os.environ)}"
    sys.stdout.write(repaint(text, height=size.lines))
    sys.stdout.flush()


def _table(watch: Watch, sort: str, *, width: int | None = None, colour: bool = False) -> str:
    from outrider.watch.table import render, sort_rows

    return render(sort_rows(watch.rows(), sort), now_s=watch.now_s(), width=width, colour=colour)


def _text(watch: Watch, sort: str) -> str:
    from outrider.watch.table import summary

    rows = watch.rows()
    return f"{summary(rows)}\n\n{_table(watch, sort)}" if rows else summary(rows)


def _result(watch: Watch, *, sort: str, url: str | None) -> dict[str, Any]:
    from outrider.watch.table import row_to_json, sort_rows

    return {
        "broker": str(watch.broker),
        "connected": watch.connected,
        "now_s": round(watch.now_s(), 3),
        "malformed": watch.malformed,
        "url": url,
        "devices": [row_to_json(row) for row in sort_rows(watch.rows(), sort)],
    }


def _print_news(news: SimpleQueue[News], left_s: float) -> None:
    """What comes in that time, line by line, on the command's thread: it sees a reader that hung up."""
    until = time.monotonic() + left_s
    while (wait_s := until - time.monotonic()) > 0:
        try:
            each = news.get(timeout=wait_s)
        except Empty:
            return
        at = time.strftime("%H:%M:%S", time.localtime(each.at_s))
        print(f"{at}  {each.device}  {each.text}", flush=True)


@contextmanager
def _log_kept() -> Iterator[None]:
    """On a terminal, what is logged in the block is written after it: the last lines of it, not over the table."""
    kept: deque[str] = deque(maxlen=LOG_LINES)

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(self.format(record))

    keeper = Keeper()
    if sys.stderr.isatty():
        logging.getLogger().addHandler(keeper)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(keeper)
        for line in kept:
            print(shown(line), file=sys.stderr)


@contextmanager
def _other_screen() -> Iterator[None]:
    """What the terminal showed before is there again after the block."""
    sys.stdout.write("\x1b[?1049h\x1b[?25l")
    try:
        yield
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()


def _stop_on_signals(stack: ExitStack, done: threading.Event) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):
        stack.callback(signal.signal, each, signal.signal(each, lambda *_: done.set()))
