"""A child process that does what its request says: `python -m support.misbehave` with {"limits": ..., "do": ...}."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from outrider.admit.supervise import enter_limits


def main() -> None:
    request = json.load(sys.stdin)
    enter_limits(request["limits"])
    print(json.dumps({"event": "begun", "pid": os.getpid(), "path": sys.path}), flush=True)
    ACTIONS[request["do"]]()


def answer() -> None:
    print(json.dumps({"event": "answer", "value": 42}), flush=True)


def answer_when_seen() -> None:
    """It stands still until SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)
    answer()


def complain() -> None:
    print("x" * 100_000, file=sys.stderr)
    print("the last words", file=sys.stderr)
    sys.exit(3)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    signal.pause()


def hang_deaf() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    os.close(1)
    os.close(2)
    while True:
        time.sleep(60)


def leave_a_child() -> None:
    if os.fork() == 0:
        hang()
    hang()


def burn() -> None:
    while True:
        pass


def fill() -> None:
    kept = []
    while True:
        kept.append(b"\1" * 2**24)


def fill_below() -> None:
    """A grandchild fills memory, whose parent is gone: it is of the session and of no tree."""
    if os.fork() == 0:
        if os.fork() == 0:
            fill()
        os._exit(0)
    hang()


def fill_in_shares() -> None:
    """Four processes that hold half of the limit each, together twice as much."""
    for _ in range(4):
        if os.fork() == 0:
            kept = b"\1" * (200 * 2**20)
            while kept:
                hang()
    hang()


def share() -> None:
    """Three forks of one that holds half of the limit, and share that with it."""
    kept = b"\1" * (200 * 2**20)
    for _ in range(3):
        if os.fork() == 0:
            hang()
    time.sleep(0.5)
    print(json.dumps({"event": "shared", "bytes": len(kept)}), flush=True)


def leave_a_group() -> None:
    """It ends well and leaves a process behind, in a process group of its own."""
    if (pid := os.fork()) == 0:
        os.setpgid(0, 0)
        hang()
    print(json.dumps({"event": "left", "pid": pid}), flush=True)


def open_files() -> None:
    kept = []
    try:
        while True:
            kept.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        count = len(kept)
    print(json.dumps({"event": "opened", "count": count}), flush=True)


def babble() -> None:
    print("this is not JSON", flush=True)
    hang()


def flood() -> None:
    while True:
        sys.stdout.write("1" * 65536)


ACTIONS = {action.__name__: action for action in (answer, complain, crash, hang, hang_deaf, leave_a_child)}
ACTIONS |= {action.__name__: action for action in (burn, fill, open_files, babble, flood, answer_when_seen)}
ACTIONS |= {action.__name__: action for action in (fill_below, fill_in_shares, share, leave_a_group)}

if __name__ == "__main__":
    main()
