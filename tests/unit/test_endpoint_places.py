"""Stores of versions side by side: each its own, kept while anyone serves from it, cleared away when long unused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from outrider.endpoint.places import KEPT_S, SERVED, USED, places
from outrider_runtimes.errors import StateDirectoryError
from support.realbundles import make_real_bundle

BEGUN_S = 1.8e9  # of a clock that the tests set
DAY_S = 86400.0


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("bundles")
    paths = [folder / f"v{version}.outrider" for version in (1, 2, 3)]
    for version, path in enumerate(paths, 1):
        make_real_bundle(path, version=version)
    return paths


def served(paths: list[Path], state: Path, now_s: float = BEGUN_S):
    return places(paths, state=state, trust=None, now=lambda: now_s)


def fill(store: Path) -> None:
    """What an install leaves there."""
    (store / "blobs").mkdir(parents=True, exist_ok=True)
    (store / "blobs" / "a").write_bytes(b"model")


def test_versions_of_one_name_have_a_store_each_and_a_single_one_has_not(bundles: list[Path], tmp_path: Path) -> None:
    with served(bundles[:2], tmp_path) as found:
        stores = [where for _, where in found]
        assert [source for source, _ in found] == bundles[:2]
        assert len(set(stores)) == 2 and {store.parent for store in stores} == {tmp_path / SERVED}
    with served(bundles[:1], tmp_path) as found:
        assert found == [(bundles[0], tmp_path)]


def test_a_store_that_is_not_served_from_for_a_month_goes_and_a_newer_one_stays(
    bundles: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "outrider.endpoint.places")
    with served(bundles[:2], tmp_path) as found:
        first, second = (where for _, where in found)
        fill(first)
        fill(second)
    with served(bundles[1:], tmp_path, BEGUN_S + 20 * DAY_S) as found:
        third = found[1][1]
        fill(third)
    with served(bundles[1:], tmp_path, BEGUN_S + KEPT_S - 1):
        assert first.is_dir()
    with served(bundles[1:], tmp_path, BEGUN_S + KEPT_S):
        assert not first.exists() and not first.with_suffix(USED).exists()
        assert (second / "blobs" / "a").is_file() and third.is_dir()
        told = [record.message for record in caplog.records if record.name == "outrider.endpoint.places"]
        assert told == [f"removed {first}, which nobody has served from for {KEPT_S / DAY_S:.0f} days"]


def test_one_that_somebody_serves_from_stays_however_long_that_takes(bundles: list[Path], tmp_path: Path) -> None:
    with served(bundles[:2], tmp_path) as found:
        for _, store in found:
            fill(store)
        with served(bundles[1:], tmp_path, BEGUN_S + 10 * KEPT_S):
            assert all(store.is_dir() for _, store in found)
    # Their owner's clock says that they were left at its own time.
    with served(bundles[:1], tmp_path, BEGUN_S + 10 * KEPT_S):
        assert not any(store.exists() for _, store in found)


def test_what_is_offered_now_is_not_cleared_away_however_old_it_is(bundles: list[Path], tmp_path: Path) -> None:
    for now_s in (BEGUN_S, BEGUN_S + 2 * KEPT_S):
        with served(bundles[:2], tmp_path, now_s) as found:
            for _, store in found:
                assert now_s == BEGUN_S or (store / "blobs" / "a").is_file()
                fill(store)


def test_what_is_no_store_is_not_touched(bundles: list[Path], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    fill(elsewhere)
    folder = tmp_path / "state" / SERVED
    folder.mkdir(parents=True)
    (folder / "notes").mkdir()
    (folder / ("a" * 32)).symlink_to(elsewhere)
    os.utime(folder / "notes", (0.0, 0.0))
    with served(bundles[:1], tmp_path / "state"):
        assert (folder / "notes").is_dir() and (elsewhere / "blobs" / "a").is_file()


def test_a_store_of_an_outrider_that_left_no_mark_is_as_old_as_its_folder(bundles: list[Path], tmp_path: Path) -> None:
    old, new = (tmp_path / SERVED / (letter * 32) for letter in "ab")
    for store, used_s in ((old, BEGUN_S - KEPT_S), (new, BEGUN_S - DAY_S)):
        fill(store)
        os.utime(store, (used_s, used_s))
    with served(bundles[:1], tmp_path):
        assert (old.exists(), new.exists()) == (False, True)


def test_a_folder_that_cannot_be_made_is_named(bundles: list[Path], tmp_path: Path) -> None:
    (tmp_path / SERVED).write_text("in the way")
    with pytest.raises(StateDirectoryError, match=SERVED), served(bundles[:2], tmp_path):
        pass
    with served(bundles[:1], tmp_path) as found:
        assert found == [(bundles[0], tmp_path)]
