"""What the store keeps of a bundle on trial, and the marks of those who try it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from outrider.bundle import Trust
from outrider.store import Installed, Store
from outrider.store.marks import Mark, died_inside
from outrider_runtimes.errors import NotInstalled
from support.bundles import make_bundle

CALLS = 5


def activated(store: Store, folder: Path, version: int) -> Installed:
    path = make_bundle(folder, version=version, seed=version)
    with store.add(path, Trust()) as staged:
        return store.activate(staged, {}, trial_calls=CALLS)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


def test_the_first_bundle_of_a_name_is_not_on_trial_and_one_that_replaces_it_is(store: Store, tmp_path: Path) -> None:
    first = activated(store, tmp_path, 1)
    assert store.trial("tiny", first.digest) is None and not store.installed("tiny").on_trial
    second = activated(store, tmp_path, 2)
    trial = store.trial("tiny", second.digest)
    assert trial is not None and (trial.left, trial.strikes) == (CALLS, 0)
    assert store.installed("tiny").on_trial
    assert store.trial("tiny", first.digest) is None  # another one's trial


def test_calls_are_counted_over_processes_until_none_is_owed(store: Store, tmp_path: Path) -> None:
    activated(store, tmp_path, 1)
    second = activated(store, tmp_path, 2)
    store.tried("tiny", second.digest, 3)
    trial = Store(store.root).trial("tiny", second.digest)
    assert trial is not None and trial.left == 2
    store.tried("tiny", "0" * 64, 3)  # of a bundle that is not current any more
    store.tried("tiny", second.digest, 7)
    assert store.trial("tiny", second.digest) is None and not store.installed("tiny").on_trial
    good = store.last_good("tiny")
    assert good is not None and good.manifest.version == 1


def test_installing_the_same_again_neither_ends_nor_begins_a_trial(store: Store, tmp_path: Path) -> None:
    activated(store, tmp_path, 1)
    second = activated(store, tmp_path, 2)
    store.tried("tiny", second.digest, 1)
    activated(store, tmp_path, 2)
    trial = store.trial("tiny", second.digest)
    assert trial is not None and trial.left == CALLS - 1
    store.tried("tiny", second.digest, CALLS)
    activated(store, tmp_path, 2)
    assert store.trial("tiny", second.digest) is None


@pytest.mark.parametrize("proven", [False, True])
def test_what_never_proved_itself_does_not_become_the_last_good(store: Store, tmp_path: Path, proven: bool) -> None:
    activated(store, tmp_path, 1)
    second = activated(store, tmp_path, 2)
    if proven:
        store.tried("tiny", second.digest, CALLS)
    third = activated(store, tmp_path, 3)
    back = store.rollback("tiny", failed=third.digest)
    assert back.manifest.version == (2 if proven else 1)
    for member in back.present:
        back.read(member)


def test_a_failure_is_remembered_and_only_the_current_one_can_fail(store: Store, tmp_path: Path) -> None:
    first, second = activated(store, tmp_path, 1), activated(store, tmp_path, 2)
    assert store.rollback("tiny", failed=second.digest).digest == first.digest
    assert store.has_failed("tiny", second.digest) and not store.has_failed("tiny", first.digest)
    assert not store.has_failed("none", second.digest)
    assert store.rollback("tiny", failed=second.digest).digest == first.digest  # another process was first
    with pytest.raises(NotInstalled):
        store.rollback("tiny")
    activated(store, tmp_path, 2)
    assert not store.has_failed("tiny", second.digest)


def test_no_more_failures_are_remembered_than_eight(store: Store, tmp_path: Path) -> None:
    activated(store, tmp_path, 1)
    digests = []
    for version in range(2, 12):
        digests.append(activated(store, tmp_path, version).digest)
        store.rollback("tiny", failed=digests[-1])
    assert [store.has_failed("tiny", digest) for digest in digests] == [False] * 2 + [True] * 8


DIES = """
import os, sys
from pathlib import Path
from outrider.store.marks import Mark
mark = Mark(Path(sys.argv[1]), sys.argv[2])
for inside in sys.argv[3]:
    mark.inside(inside == "1")
os.kill(os.getpid(), int(sys.argv[4]))
"""


def die(folder: Path, digest: str, steps: str, number: signal.Signals = signal.SIGKILL) -> None:
    command = [sys.executable, "-c", DIES, str(folder), digest, steps, str(int(number))]
    assert subprocess.run(command, timeout=250).returncode == -number


@pytest.mark.parametrize(("steps", "died"), [("", 0), ("1", 1), ("10", 0), ("101", 1)])
def test_a_process_that_dies_inside_is_counted_once(tmp_path: Path, steps: str, died: int) -> None:
    die(tmp_path / "marks", "a" * 64, steps)
    assert died_inside(tmp_path / "marks", "a" * 64) == died
    assert died_inside(tmp_path / "marks", "a" * 64) == 0
    assert list((tmp_path / "marks").iterdir()) == []


def test_a_death_in_another_bundle_and_a_mark_that_is_held_count_nothing(tmp_path: Path) -> None:
    die(tmp_path, "b" * 64, "1", signal.SIGSEGV)
    held = Mark(tmp_path, "a" * 64)
    held.inside(True)
    assert died_inside(tmp_path, "a" * 64) == 0
    assert len(list(tmp_path.iterdir())) == 1
    held.release()
    held.release()
    held.inside(True)  # of a model that goes on after its trial
    assert list(tmp_path.iterdir()) == []


def test_no_folder_is_no_death(tmp_path: Path) -> None:
    assert died_inside(tmp_path / "none", "a" * 64) == 0


def test_deaths_become_strikes_in_the_record(store: Store, tmp_path: Path) -> None:
    activated(store, tmp_path, 1)
    second = activated(store, tmp_path, 2)
    for strikes in (1, 2):
        die(store.root / "marks", second.digest, "1")
        trial = store.trial("tiny", second.digest)
        assert trial is not None and (trial.left, trial.strikes) == (CALLS, strikes)
