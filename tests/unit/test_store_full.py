"""A store whose disk is full or read-only: what has proven itself serves, and the way back is open."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

import pytest

from outrider.bundle import Trust
from outrider.installer import install, rollback
from outrider.model import load
from outrider.store import Store, find_state_dir
from outrider.store.marks import Mark, died_inside
from outrider_runtimes.errors import StateDirectoryError, StoreError
from support.bundles import make_bundle
from support.realbundles import images, make_real_bundle
from support.tmpfs import fill, small_disk

X = images(2)
TRIAL_CALLS = 20


def activated(store: Store, folder: Path, version: int) -> str:
    path = make_bundle(folder, version=version)
    with store.add(path, Trust()) as staged:
        return store.activate(staged, {}, trial_calls=TRIAL_CALLS).digest


def test_on_a_full_disk_rollback_takes_the_record_that_was_written_for_it(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_kib=2048) as disk:
        store = Store(disk)
        good, fresh = activated(store, tmp_path, 1), activated(store, tmp_path, 2)
        fill(disk)
        assert store.rollback("tiny", failed=fresh).digest == good
        found = store.installed("tiny")
        assert (found.digest, found.on_trial) == (good, False)
        assert store.has_failed("tiny", fresh)
        assert list((disk / "back").iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"{}", None], ids=["empty", "another", "of an earlier install"])
def test_a_way_back_that_is_not_todays_is_not_taken(tmp_path: Path, damage: bytes | None) -> None:
    with small_disk(tmp_path / "disk", size_kib=2048) as disk:
        store = Store(disk)
        activated(store, tmp_path, 1)
        activated(store, tmp_path, 2)
        prepared = disk / "back/tiny.json"
        stale = prepared.read_bytes()
        store.tried("tiny", store.installed("tiny").digest, TRIAL_CALLS)
        third = activated(store, tmp_path, 3)
        assert prepared.read_bytes() != stale
        prepared.write_bytes(stale if damage is None else damage)
        fill(disk)
        with pytest.raises(StoreError, match="no space is left") as caught:
            store.rollback("tiny")
        assert "free space" in caught.value.hint
        assert store.installed("tiny").digest == third


def test_a_rollback_with_space_leaves_no_way_back_of_yesterday(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    activated(store, tmp_path, 1)
    activated(store, tmp_path, 2)
    assert (store.root / "back/tiny.json").exists()
    store.rollback("tiny")
    assert not (store.root / "back/tiny.json").exists()


def test_a_mark_that_cannot_be_made_leaves_no_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_kib=256) as disk:
        (disk / "marks").mkdir()
        fill(disk)
        with pytest.raises(OSError, match="No space"):
            Mark(disk / "marks", "0" * 64)
        assert list((disk / "marks").iterdir()) == []


@pytest.mark.slow
def test_a_fresh_bundle_waits_for_space_while_what_was_good_before_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", size_kib=4096) as disk:
        good = make_real_bundle(tmp_path / "1.outrider", version=1, seed=1)
        fresh = make_real_bundle(tmp_path / "2.outrider", version=2, seed=2)
        install(tmp_path / "1.outrider", state=disk)
        install(tmp_path / "2.outrider", state=disk)
        ballast = fill(disk)
        with load("tiny", state=disk) as model, caplog.at_level(logging.WARNING):
            assert (model.infer(X).bundle, model.bundle.version) == (good, 1)
        assert "version 1 serves: 2 cannot be tried" in caplog.text
        ballast.unlink()
        with load("tiny", state=disk) as model:  # nothing was forgotten: it is tried now
            assert (model.infer(X).bundle, model.bundle.version) == (fresh, 2)
        fill(disk)
        assert rollback("tiny", state=disk).version == 1
        with load("tiny", state=disk) as model:
            assert model.infer(X).bundle == good


@pytest.mark.slow
def test_a_bundle_that_killed_its_processes_does_not_serve_from_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_kib=4096) as disk:
        good = make_real_bundle(tmp_path / "1.outrider", version=1, seed=1)
        fresh = make_real_bundle(tmp_path / "2.outrider", version=2, seed=2)
        install(tmp_path / "1.outrider", state=disk)
        install(tmp_path / "2.outrider", state=disk)
        (disk / "marks").mkdir(exist_ok=True)
        for name in ("a", "b"):
            (disk / "marks" / name).write_bytes(b"1" + fresh.encode())
        assert Store(disk).trial("tiny", fresh).strikes == 2  # type: ignore[union-attr]
        (disk / "back/tiny.json").unlink()  # as an earlier version of Outrider leaves it
        fill(disk)
        with load("tiny", state=disk) as model:
            assert model.infer(X).bundle == good
            assert [change.kind for change in model.changes] == ["rollback"]


@pytest.mark.slow
def test_a_read_only_disk_serves_what_is_proven_and_what_was_before_a_trial(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_kib=4096) as disk:
        paths = [tmp_path / "1.outrider", tmp_path / "2.outrider"]
        good, _ = (make_real_bundle(path, version=n, seed=n) for n, path in enumerate(paths, 1))

        def remount(how: str) -> None:
            subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

        install(paths[0], state=disk)
        remount("ro")
        for source in ("tiny", paths[0]):
            with load(source, state=disk) as model:
                assert model.infer(X).bundle == good
        with pytest.raises(StateDirectoryError, match="cannot be written"):
            install(paths[1], state=disk)
        remount("rw")
        install(paths[1], state=disk)
        remount("ro")
        with load("tiny", state=disk) as model:
            assert model.infer(X).bundle == good
        with pytest.raises(StateDirectoryError):
            rollback("tiny", state=disk)


def test_a_directory_that_cannot_be_read_is_refused_to_readers_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "access", lambda _, mode: bool(asked.append(mode)))  # root may do anything
    with pytest.raises(StateDirectoryError, match="cannot be read"):
        find_state_dir(tmp_path, {}, writing=False)
    assert asked == [os.R_OK | os.X_OK]


def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_no_wait(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    digest = activated(store, tmp_path, 1)
    os.mkfifo(store.root / "names/other.json")
    assert store.names() == ("other", "tiny")
    with pytest.raises(StoreError, match="not a regular file"):
        store.installed("other")
    blob = next((store.root / "blobs/sha256").iterdir())
    blob.unlink()
    os.mkfifo(blob)
    with pytest.raises(StoreError):
        store.installed("tiny")
    assert activated(store, tmp_path, 1) == digest  # an install heals it
    assert blob.is_file()
    marks = store.root / "marks"
    (marks / "folder").mkdir(parents=True)
    os.mkfifo(marks / "pipe")
    (marks / "link").symlink_to(blob)
    assert died_inside(marks, digest) == 0
    assert len(list(marks.iterdir())) == 3
