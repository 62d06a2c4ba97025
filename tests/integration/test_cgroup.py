"""Threads and memory as the kernel grants them: real groups with a quota, and a process inside."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.realbundles import make_real_bundle

pytestmark = pytest.mark.slow

MOUNT = Path("/sys/fs/cgroup")
PERIOD_US = 100_000
REPORT = """
import json, sys
import outrider
from outrider_runtimes.board import this_board
board = this_board()
with outrider.load(sys.argv[1], state=sys.argv[2]) as model:
    print(json.dumps({"cpus": board.cpus, "memory_bytes": board.memory_bytes, "threads": model.threads}))
"""


@contextlib.contextmanager
def group(controller: str, settings: dict[str, str]) -> Iterator[Path]:
    """A new group of one controller: of version 2 where that has it, else of version 1."""
    unified = (MOUNT / "cgroup.controllers").exists()
    folder = MOUNT / ("" if unified else controller) / f"outrider-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
        for name, value in settings.items():
            if (folder / name).exists():
                (folder / name).write_text(value)
    except OSError as error:
        pytest.skip(f"no cgroup of {controller} can be made here: {error}")
    try:
        yield folder
    finally:
        folder.rmdir()


def reported(folder: Path | None, bundle: Path) -> dict[str, int]:
    """What a process says of itself that was put into the group before its Python began."""
    join = "" if folder is None else f"echo $$ > {folder}/cgroup.procs && "
    command = [
        "sh",
        "-c",
        f'{join}exec "$@"',
        "sh",
        sys.executable,
        "-c",
        REPORT,
        str(bundle),
        tempfile.mkdtemp(dir=bundle.parent),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=250)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny.outrider"
    make_real_bundle(path)
    return path


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor: a quota of one changes nothing")
@pytest.mark.parametrize(("quota_us", "cpus"), [(50_000, 1), (100_000, 1), (150_000, 2), (200_000, 2)])
def test_threads_are_what_the_quota_grants_and_not_the_machines_cores(bundle: Path, quota_us: int, cpus: int) -> None:
    settings = {
        "cpu.max": f"{quota_us} {PERIOD_US}",
        "cpu.cfs_period_us": str(PERIOD_US),
        "cpu.cfs_quota_us": str(quota_us),
    }
    with group("cpu", settings) as folder:
        inside = reported(folder, bundle)
    assert inside["cpus"] == cpus
    assert 1 <= inside["threads"] <= cpus


def test_memory_is_what_the_group_may_have(bundle: Path) -> None:
    limit = 700 << 20
    with group("memory", {"memory.max": str(limit), "memory.limit_in_bytes": str(limit)}) as folder:
        assert reported(folder, bundle)["memory_bytes"] == limit
    assert reported(None, bundle)["memory_bytes"] > limit
