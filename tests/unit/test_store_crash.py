"""The store across kill -9 and full disks: the old bundle or the new one, and always a whole one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from outrider.bundle import Trust
from outrider.store import Store, find_state_dir
from outrider_runtimes.errors import StateDirectoryError, StoreError
from support.bundles import make_bundle

SCRIPT = Path(__file__).parents[1] / "support" / "storekill.py"
MEMBER = "models/onnx-float32.onnx"


def install(store: Store, path: Path) -> None:
    with store.add(path, Trust()) as staged:
        store.activate(staged, {})


def check_whole(store: Store) -> int:
    """Every installed bundle loads, every blob of it is whole; the version that is current."""
    found = store.installed("tiny")
    for member in found.present:
        found.read(member)
    return found.manifest.version


def check_clean(store: Store) -> None:
    """After a sweep there is nothing but what records name."""
    store.sweep()
    assert list((store.root / "tmp").iterdir()) == []
    assert [path.name for path in (store.root / "names").iterdir()] == ["tiny.json"]


def run(*arguments: object) -> subprocess.Popen[str]:
    environ = dict(os.environ, OPENBLAS_NUM_THREADS="1")
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)


@pytest.mark.slow
def test_killed_before_every_event_of_an_install(tmp_path):
    """Step by step until an install gets through; each time the store is checked and the install tried again."""
    one, two = make_bundle(tmp_path, version=1, seed=1), make_bundle(tmp_path, version=2, seed=2)
    seen = []
    for step in range(1, 1000):
        store = Store(find_state_dir(tmp_path / f"state{step}", {}))
        install(store, one)
        process = run(store.root, step, two)
        output, _ = process.communicate(timeout=250)
        version = check_whole(store)
        seen.append(version)
        if output == "done\n":
            break
        assert process.returncode == -9
        install(store, two)
        assert check_whole(store) == 2
        if version == 1:
            assert store.rollback("tiny").manifest.version == 1
        check_clean(store)
    assert len(seen) > 30
    assert seen == sorted(seen), "there is one moment at which the new one takes over"
    assert set(seen) == {1, 2}


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    bundles = [make_bundle(tmp_path, version=v, seed=v, size_bytes=200_000) for v in range(1, 41)]
    rng = random.Random(11)
    store = Store(find_state_dir(tmp_path / "state", {}))
    install(store, bundles[0])
    for _ in range(12):
        current = check_whole(store)
        process = run(store.root, "loop", *bundles[current - 1 :])
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.1))
        process.kill()
        process.communicate(timeout=250)
        after = check_whole(store)
        assert after >= current
        check_clean(store)
        if after > 35:
            store = Store(find_state_dir(tmp_path / f"state{rng.random()}", {}))
            install(store, bundles[0])


@contextmanager
def small_disk(folder: Path, size_bytes: int):
    """A file system of its own in ``folder``."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "outrider-test", str(folder)],
        check=False,
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system needs the right to mount: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_at_any_point_leaves_the_old_bundle(tmp_path):
    one = make_bundle(tmp_path, version=1, seed=1, size_bytes=20_000)
    two = make_bundle(tmp_path, version=2, seed=2, size_bytes=20_000)
    with small_disk(tmp_path / "disk", 1 << 20):
        store = Store(find_state_dir(tmp_path / "disk" / "state", {}))
        install(store, one)
        filler = tmp_path / "disk" / "filler"
        blobs = sorted(path.name for path in (store.root / "blobs" / "sha256").iterdir())
        page, results = os.sysconf("SC_PAGE_SIZE"), []
        for free_pages in range(40):
            _fill(filler, leave=free_pages * page)
            try:
                install(store, two)
            except StoreError as error:
                assert str(store.root) in str(error)
                assert "space" in str(error)
                assert error.hint
                assert check_whole(store) == 1
                assert sorted(path.name for path in (store.root / "blobs" / "sha256").iterdir()) == blobs
                assert list((store.root / "tmp").iterdir()) == []
                results.append(False)
            else:
                assert check_whole(store) == 2
                results.append(True)
                break
        assert results[-1] is True
        assert len(results) > 8
        assert store.rollback("tiny").manifest.version == 1


def _fill(filler: Path, *, leave: int) -> None:
    """Take all space of the file system but so much."""
    filler.unlink(missing_ok=True)
    room = os.statvfs(filler.parent)
    with filler.open("wb") as file:
        file.write(bytes(room.f_bavail * room.f_frsize - leave))


def test_a_read_only_disk_is_named_and_what_is_installed_still_loads(tmp_path):
    one, two = make_bundle(tmp_path, version=1, seed=1), make_bundle(tmp_path, version=2, seed=2)
    with small_disk(tmp_path / "disk", 1 << 20):
        state = tmp_path / "disk" / "state"
        store = Store(find_state_dir(state, {}))
        install(store, one)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        with pytest.raises(StateDirectoryError, match="cannot be written") as caught:
            find_state_dir(state, {})
        assert str(state) in str(caught.value)
        for call in (lambda: install(store, two), lambda: store.rollback("tiny"), store.sweep):
            with pytest.raises(StateDirectoryError, match=str(state)) as caught:
                call()
            assert caught.value.hint
        assert check_whole(store) == 1
