"""A child process within limits: whatever it does, the parent learns what it was and goes on."""

from __future__ import annotations

import json
import math
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from outrider_runtimes.environment import child_environment

OnEvent = Callable[[dict[str, Any]], None]

POLL_S = 0.02  # memory fills at about 5 GB/s, so a limit is overrun by 100 MB at most
TAIL_BYTES = 4096
OUTPUT_BYTES = 4 * 2**20  # a child's report is some kilobytes; more is a fault
ALARM_GRACE_S = 5.0  # the parent's clock comes first; the child's own alarm is for a parent that was killed
READ_BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a candidate may use.

    Attributes:
        wall_s: by the clock.
        cpu_s: of all its threads together.
        rss_bytes: resident memory: engines reserve address space that they never touch.
        open_files: at once.
        build_s: by the clock and of the processor, more than those, for each variant that an engine here compiles.
        latency_ms: what the median call of what is chosen may take; None for no bound.
    """

    wall_s: float = 120.0
    cpu_s: float = 480.0
    rss_bytes: int
    open_files: int = 256
    build_s: float = 900.0
    latency_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended. ``code`` is the exit status, or the signal's number where ``how`` is ``signal``."""

    how: Literal["exit", "signal", "wall", "memory", "output"]
    code: int
    peak_rss_bytes: int
    stderr: str

    @property
    def cause(self) -> Literal["hang", "limit", "illegal", "crash"]:
        """What kind of fault ended it; only where it did not end well."""
        if self.how == "wall" or (self.how == "signal" and self.code == signal.SIGALRM):
            return "hang"
        if self.how == "memory" or (self.how == "signal" and self.code == signal.SIGXCPU):
            return "limit"
        return "illegal" if self.how == "signal" and self.code == signal.SIGILL else "crash"

    def describe(self, limits: Limits) -> str:
        """What happened, in words that follow a subject."""
        if self.cause == "hang":
            return f"did not end within {limits.wall_s:g} s and was killed"
        if self.cause == "limit":
            memory, cpu = f"{limits.rss_bytes / 2**20:.0f} MiB of memory", f"{limits.cpu_s:g} s of CPU"
            return f"used more than {memory if self.how == 'memory' else cpu} and was killed"
        if self.cause == "illegal":
            return "was killed by SIGILL: an instruction that this CPU does not have"
        if self.how == "output":
            return "wrote what is not its protocol and was killed"
        return (
            f"was killed by {_signal_name(self.code)}" if self.how == "signal" else f"ended with exit code {self.code}"
        )


def default_rss_bytes() -> int:
    """Three quarters of what is free now: a candidate must not push out what is serving."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 * 3 // 4
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4


def resident_bytes(pid: int | str = "self") -> int:
    """The memory that a process holds now; 0 for one that is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize()


def run_child(module: str, request: Mapping[str, Any], limits: Limits, on_event: OnEvent) -> Ended:
    """``run_command`` of ``python -m module``, which finds what this process finds."""
    command = [sys.executable, "-m", module]
    return run_command(command, child_environment(sys.path, os.environ), request, limits, on_event)


def run_command(
    command: Sequence[str],
    environment: Mapping[str, str],
    request: Mapping[str, Any],
    limits: Limits,
    on_event: OnEvent,
) -> Ended:
    """Run a child, ``request`` as JSON on its stdin, and give ``on_event`` each JSON line of its stdout.

    The child must call ``enter_limits`` first. Its process group is killed when it outlives ``wall_s`` or outgrows
    ``rss_bytes``, and when this call is left by an exception.
    """
    with tempfile.TemporaryFile() as stdin:
        stdin.write(json.dumps(request).encode())
        stdin.seek(0)
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env=environment,
            start_new_session=True,
        )
    try:
        return _Watch(process, limits, on_event).until_end()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def enter_limits(limits: Mapping[str, Any]) -> None:
    """In the child: take on what the operating system can enforce by itself."""
    cpu_s = math.ceil(limits["cpu_s"])
    _lower(resource.RLIMIT_CPU, cpu_s, cpu_s + 5)  # SIGXCPU at the first, SIGKILL at the second
    _lower(resource.RLIMIT_NOFILE, int(limits["open_files"]))
    _lower(resource.RLIMIT_CORE, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, float(limits["wall_s"]) + ALARM_GRACE_S)
    # Where memory runs out all the same, the kernel is to take the candidate and not what serves.
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


class _Watch:
    """The parent's side of one child."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits, on_event: OnEvent) -> None:
        self._process = process
        self._limits = limits
        self._on_event = on_event
        self._lines = b""
        self._read = 0
        self._tail = b""
        self._peak = 0

    def until_end(self) -> Ended:
        assert self._process.stdout is not None and self._process.stderr is not None
        ends_at = time.monotonic() + self._limits.wall_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ, self._take_output)
            selector.register(self._process.stderr, selectors.EVENT_READ, self._take_errors)
            while True:
                code = self._process.poll()
                if not self._drain(selector, POLL_S if code is None else 0.0):
                    return self._ended("output", 0)
                if code is not None:
                    return self._ended("signal", -code) if code < 0 else self._ended("exit", code)
                if time.monotonic() >= ends_at:
                    return self._ended("wall", 0)
                if self._outgrown():
                    return self._ended("memory", 0)

    def _drain(self, selector: selectors.BaseSelector, wait_s: float) -> bool:
        """Take what there is to read; False when it breaks the protocol."""
        ready = selector.select(wait_s) if selector.get_map() else []
        if not selector.get_map():
            time.sleep(wait_s)
        while ready:
            for key, _ in ready:
                data = os.read(key.fd, READ_BYTES)
                if not data:
                    selector.unregister(key.fileobj)
                elif not key.data(data):
                    return False
            ready = selector.select(0.0) if selector.get_map() and self._process.poll() is not None else []
        return True

    def _take_output(self, data: bytes) -> bool:
        self._read += len(data)
        *whole, self._lines = (self._lines + data).split(b"\n")
        try:
            for line in whole:
                self._on_event(_event(line))
        except ValueError:
            return False
        return self._read <= OUTPUT_BYTES

    def _take_errors(self, data: bytes) -> bool:
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        return True

    def _outgrown(self) -> bool:
        self._peak = max(self._peak, resident_bytes(self._process.pid))
        return self._peak > self._limits.rss_bytes

    def _ended(self, how: Literal["exit", "signal", "wall", "memory", "output"], code: int) -> Ended:
        text = self._tail.decode("utf-8", "replace").strip()
        return Ended(how=how, code=code, peak_rss_bytes=self._peak, stderr=text)


def _event(line: bytes) -> dict[str, Any]:
    event = json.loads(line)
    if not isinstance(event, dict):
        raise ValueError("not an object")
    return event


def _lower(kind: int, soft: int, hard: int | None = None) -> None:
    _, present = resource.getrlimit(kind)
    hard = soft if hard is None else hard
    if present != resource.RLIM_INFINITY:
        soft, hard = min(soft, present), min(hard, present)
    resource.setrlimit(kind, (soft, hard))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
