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
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from outrider_runtimes.environment import child_environment

OnEvent = Callable[[dict[str, Any]], None]

POLL_S = 0.02  # memory fills at about 5 GB/s, so a limit is overrun by 100 MB at most
LOOK_POLLS = 50  # for processes that a kernel which does not number them as Linux does would hide
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
        rss_bytes: resident memory, of all processes of its session together: engines reserve address space that they
            never touch.
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


def proportional_bytes(pid: int) -> int:
    """As ``resident_bytes``, with what several processes share divided among them. Takes milliseconds."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resident_bytes(pid)  # a kernel before 4.14, or gone


def session_pids(session: int) -> list[int]:
    """The processes of a session: its leader, and what was started below it, until one begins another session."""
    found = []
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdigit():
                with suppress(OSError):  # gone, or not ours to ask
                    if os.getsid(int(entry.name)) == session:
                        found.append(int(entry.name))
    return found


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

    The child must call ``enter_limits`` first. Its session is killed when it outlives ``wall_s`` or outgrows
    ``rss_bytes``, and when this call is left by an exception; what it started and left behind, in any case.
    """
    starting: Future[subprocess.Popen[bytes]] = Future()

    def start() -> None:
        if starting.set_running_or_notify_cancel():
            try:
                starting.set_result(_started(command, environment, request))
            except BaseException as error:
                starting.set_exception(error)

    try:
        # A signal's exception comes in the main thread: none comes between the child's beginning and who ends it.
        threading.Thread(target=start, name="outrider-start", daemon=True).start()
        return _Watch(starting.result(), limits, on_event).until_end()
    finally:
        if not starting.cancel() and starting.exception() is None:
            process = starting.result()
            _end_session(process)
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


def _started(
    command: Sequence[str], environment: Mapping[str, str], request: Mapping[str, Any]
) -> subprocess.Popen[bytes]:
    with tempfile.TemporaryFile() as stdin:
        stdin.write(json.dumps(request).encode())
        stdin.seek(0)
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env=environment,
            start_new_session=True,
        )


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a session, until nothing is: a process that forks may be ahead of one look."""
    ends_at = time.monotonic() + ALARM_GRACE_S  # a process that waits for a disk may die later than that
    while left := [pid for pid in session_pids(process.pid) if not _is_zombie(pid)]:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        if time.monotonic() >= ends_at:
            break
        time.sleep(POLL_S)
    process.wait()


def _is_zombie(pid: int) -> bool:
    """Whether it is dead, and its parent has not asked for it yet."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] == "Z"
        )
    except (OSError, IndexError):
        return True


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


class _Family:
    """The processes of a session. They are looked for when one was started somewhere on this machine, not each time."""

    def __init__(self, session: int) -> None:
        self._session = session
        self._pids = [session]
        self._last_started = ""
        self._polls = 0

    def held_bytes(self, limit_bytes: int) -> int:
        """The memory that they hold together; where that seems to be too much, with what they share counted once."""
        last_started = _last_started()
        if self._polls % LOOK_POLLS == 0 or last_started != self._last_started:
            self._last_started = last_started
            self._pids = session_pids(self._session)
        self._polls += 1
        held = sum(map(resident_bytes, self._pids))
        if held > limit_bytes and len(self._pids) > 1:
            return sum(map(proportional_bytes, self._pids))
        return held


def _last_started() -> str:
    """The number of the process, or thread, that was started last; "" where the kernel does not say."""
    try:
        return Path("/proc/loadavg").read_text(encoding="ascii").rpartition(" ")[2]
    except OSError:
        return ""


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
        self._family = _Family(process.pid)

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
        now = self._family.held_bytes(self._limits.rss_bytes)
        self._peak = max(self._peak, now)
        return now > self._limits.rss_bytes

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
