"""Folders that appear whole or not at all, where they are kept, and what is missing on a machine, said in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import outrider
from outrider_exporters.rehearse.lane import device_packages, lane_for
from outrider_exporters.rehearse.plan import RECIPES
from outrider_exporters.rehearse.userland import find_cache, find_tool, made_once, userland
from outrider_runtimes.errors import RehearsalError
from outrider_runtimes.targets import target_named


def never(staging):
    raise AssertionError("made again")


def write_one(staging):
    (staging / "one").write_text("1")


def test_a_folder_is_made_once(tmp_path):
    folder = tmp_path / "land"
    made_once(folder, write_one)
    made_once(folder, never)
    assert [entry.name for entry in folder.iterdir()] == ["one"]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")] == []


@pytest.mark.parametrize("error", [RehearsalError("no network"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_leaves_nothing_and_comes_out(tmp_path, error):
    def fail(staging):
        write_one(staging)
        raise error

    with pytest.raises(type(error)):
        made_once(tmp_path / "land", fail)
    assert not (tmp_path / "land").exists()
    assert not list(tmp_path.glob(".land.*.tmp"))


def test_what_the_system_refuses_is_a_rehearsal_error(tmp_path):
    def full(staging):
        raise OSError(28, "No space left on device", str(staging / "x"))

    with pytest.raises(RehearsalError, match="No space left") as caught:
        made_once(tmp_path / "land", full)
    assert "--cache" in caught.value.hint


KILLED = """
import sys, signal
from pathlib import Path
from outrider_exporters.rehearse.userland import made_once
def hang(staging):
    (staging / "half").write_text("0")
    print("half", flush=True)
    signal.pause()
made_once(Path(sys.argv[1]), hang)
"""


def test_one_that_was_killed_in_the_middle_is_never_used_and_made_again(tmp_path):
    folder = tmp_path / "land"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert not folder.exists()
    assert len(list(tmp_path.glob(".land.*.tmp"))) == 1
    made_once(folder, write_one)
    assert [entry.name for entry in folder.iterdir()] == ["one"]
    assert not list(tmp_path.glob(".land.*.tmp"))


WAITS = """
import sys
from pathlib import Path
from outrider_exporters.rehearse.userland import made_once
def make(staging):
    with Path(sys.argv[2]).open("a") as log:
        log.write("made\\n")
    print("making", flush=True)
    sys.stdin.readline()
print("begun", flush=True)
made_once(Path(sys.argv[1]), make)
"""


def test_two_that_want_the_same_wait_for_each_other(tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", WAITS, str(tmp_path / "land"), str(log)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first:
        assert [first.stdout.readline() for _ in range(2)] == ["begun\n", "making\n"]
        with subprocess.Popen(command, **pipes) as second:
            assert second.stdout.readline() == "begun\n"
            first.communicate("\n")
            assert second.communicate("\n")[0] == ""
    assert (first.returncode, second.returncode) == (0, 0)
    assert log.read_text() == "made\n"


def test_where_userlands_are_kept(tmp_path, monkeypatch):
    assert find_cache(tmp_path / "given") == tmp_path / "given"
    assert find_cache(None, {"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "outrider"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert find_cache(None, {}) == tmp_path / "home/.cache/outrider"
    assert (tmp_path / "home/.cache/outrider").is_dir()


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RehearsalError, match="cannot be made") as caught:
        find_cache(tmp_path / "file/below")
    assert "--cache" in caught.value.hint


def test_a_missing_tool_names_its_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RehearsalError, match="qemu-aarch64-static is not installed") as caught:
        find_tool("qemu-aarch64-static", "qemu-user-static")
    assert caught.value.hint == "apt-get install qemu-user-static"


@pytest.mark.parametrize("missing", ["apt-get", "dpkg", "qemu-arm-static"])
def test_no_userland_without_its_tools(monkeypatch, tmp_path, missing):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in {"apt-get", "dpkg", "qemu-arm-static"} - {missing}:
        (tools / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(RehearsalError, match=f"{missing} is not installed"):
        userland(RECIPES["arm"], tmp_path, say=lambda line: None)
    assert not [entry for entry in tmp_path.iterdir() if entry.is_dir() and entry != tools]


def test_the_device_packages_alone_are_shown_to_the_guest(tmp_path):
    folder = device_packages(tmp_path)
    assert sorted(entry.name for entry in folder.iterdir()) == ["outrider", "outrider_runtimes"]
    assert (folder / "outrider/__init__.py").samefile(str(outrider.__file__))
    assert device_packages(tmp_path) == folder


def test_native_is_this_python_and_needs_nothing(tmp_path):
    lane = lane_for(target_named("native"), cache=tmp_path, work=tmp_path, say=lambda line: None)
    assert lane.python == (sys.executable,)
    assert not lane.emulated and lane.memory_bytes > 0
    assert not list(tmp_path.iterdir())
    assert lane.environment["HOME"] == os.environ["HOME"]
