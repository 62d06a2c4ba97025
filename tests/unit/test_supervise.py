"""Whatever a child does, the parent learns what it was; real children that really do it."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from outrider.admit import supervise
from outrider.admit.supervise import (
    Ended,
    Limits,
    default_rss_bytes,
    resident_bytes,
    run_child,
    run_command,
    session_pids,
)
from outrider_runtimes.environment import child_environment

pytestmark = pytest.mark.slow

LIMITS = Limits(wall_s=30.0, cpu_s=30.0, rss_bytes=400 * 2**20, open_files=64)


def run(do: str, **changes: Any) -> tuple[Ended, list[dict[str, Any]]]:
    limits = dataclasses.replace(LIMITS, **changes)
    events: list[dict[str, Any]] = []
    request = {"limits": dataclasses.asdict(limits), "do": do}
    return run_child("support.misbehave", request, limits, events.append), events


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_gone(pid: int) -> None:
    ends_at = time.monotonic() + 120.0
    while not gone(pid):
        assert time.monotonic() < ends_at, f"process {pid} still lives"
        time.sleep(0.01)


def test_a_child_that_answers_is_heard_and_its_memory_known(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def look(pid: int) -> int:
        seen.append(resident_bytes(pid))
        os.kill(pid, signal.SIGCONT)  # it may end from now on
        return seen[-1]

    monkeypatch.setattr(supervise, "resident_bytes", look)
    ended, events = run("answer_when_seen")
    assert (ended.how, ended.code) == ("exit", 0)
    assert [event["event"] for event in events] == ["begun", "answer"]
    assert events[1]["value"] == 42
    assert 0 < ended.peak_rss_bytes < LIMITS.rss_bytes
    assert ended.peak_rss_bytes == max(seen)


def test_an_interrupt_in_the_moment_in_which_it_starts_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Interrupting(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self.pid)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run("hang")
    finally:
        signal.signal(signal.SIGINT, before)
    (pid,) = started
    assert gone(pid)


def test_a_child_that_cannot_be_started_is_an_error_of_the_system() -> None:
    with pytest.raises(FileNotFoundError):
        run_command(["/nowhere/python"], {}, {}, LIMITS, print)


def test_the_tail_of_stderr_is_kept_and_no_more() -> None:
    ended, _ = run("complain")
    assert (ended.how, ended.code) == ("exit", 3)
    assert ended.stderr.endswith("the last words")
    assert len(ended.stderr) <= 4096
    assert ended.describe(LIMITS) == "ended with exit code 3"


def test_a_crash_is_named_by_its_signal() -> None:
    ended, events = run("crash")
    assert (ended.how, ended.code) == ("signal", signal.SIGSEGV)
    assert ended.describe(LIMITS) == "was killed by SIGSEGV"
    assert [event["event"] for event in events] == ["begun"]


@pytest.mark.parametrize("do", ["hang", "hang_deaf"])
def test_a_child_that_hangs_is_killed_at_the_wall(do: str) -> None:
    for wall_s in (1.0, 10.0):  # the second for a machine on which a child has not begun within one
        ended, events = run(do, wall_s=wall_s)
        if events:
            break
    assert ended.how == "wall"
    assert ended.describe(dataclasses.replace(LIMITS, wall_s=1.0)) == "did not end within 1 s and was killed"
    assert gone(events[0]["pid"])


def test_what_a_child_started_is_killed_with_it() -> None:
    for wall_s in (1.0, 10.0):  # as above
        _, events = run("leave_a_child", wall_s=wall_s)
        if events:
            break
    pid = events[0]["pid"]
    left = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _group(int(p.name)) == pid]
    for each in left:
        wait_gone(each)


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def test_a_child_that_burns_the_processor_is_stopped_by_the_kernel() -> None:
    ended, _ = run("burn", cpu_s=1.0)
    assert (ended.how, ended.code) == ("signal", signal.SIGXCPU)
    assert "of CPU" in ended.describe(LIMITS)


def test_a_child_that_fills_memory_is_killed() -> None:
    ended, _ = run("fill")
    assert ended.how == "memory"
    assert ended.peak_rss_bytes > LIMITS.rss_bytes
    assert ended.describe(LIMITS) == "used more than 400 MiB of memory and was killed"


@pytest.mark.parametrize("do", ["fill_below", "fill_in_shares"])
def test_what_a_child_started_counts_as_its_memory(do: str) -> None:
    ended, events = run(do)
    assert ended.how == "memory"
    assert ended.peak_rss_bytes > LIMITS.rss_bytes
    assert [pid for pid in session_pids(events[0]["pid"]) if not gone(pid)] == []


def test_memory_that_processes_share_counts_once() -> None:
    ended, events = run("share")
    assert (ended.how, events[-1]["event"]) == ("exit", "shared")
    wait_gone(events[0]["pid"])


def test_what_a_child_leaves_behind_is_ended_when_it_ends_well() -> None:
    ended, events = run("leave_a_group")
    assert (ended.how, ended.code) == ("exit", 0)
    wait_gone(events[1]["pid"])


def test_a_child_cannot_open_more_files_than_allowed() -> None:
    _, events = run("open_files", open_files=32)
    assert events[-1]["count"] < 32


@pytest.mark.parametrize("do", ["babble", "flood"])
def test_a_child_that_breaks_the_protocol_is_killed(do: str) -> None:
    ended, events = run(do)
    assert ended.how == "output"
    assert gone(events[0]["pid"])


def test_an_exception_in_the_parent_kills_the_child() -> None:
    seen: list[int] = []

    def stop(event: dict[str, Any]) -> None:
        seen.append(event["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child("support.misbehave", {"limits": dataclasses.asdict(LIMITS), "do": "hang"}, LIMITS, stop)
    wait_gone(seen[0])


def test_the_child_searches_where_the_parent_does_and_not_in_the_current_folder() -> None:
    environment = child_environment(["", "/a", "b"], {"HOME": "/h", "PYTHONPATH": "/old"})
    assert environment["PYTHONPATH"] == f"/a{os.pathsep}{Path.cwd()}/b"
    assert environment["HOME"] == "/h"
    _, events = run("answer")
    assert "" not in events[0]["path"]


def test_the_default_memory_limit_is_a_share_of_what_is_free() -> None:
    said = Path("/proc/meminfo").read_text(encoding="ascii")
    free_bytes = next(int(line.split()[1]) * 1024 for line in said.splitlines() if line.startswith("MemAvailable:"))
    assert default_rss_bytes() == pytest.approx(0.75 * free_bytes, rel=0.2)  # others take and give in between
