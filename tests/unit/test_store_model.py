"""Any order of adding, activating, leaving, going back and sweeping, held against a model of a few lines."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from outrider.bundle import Trust, verify_bundle
from outrider.store import Staged, Store, find_state_dir
from outrider_runtimes.errors import NotInstalled, StoreError
from support.bundles import make_bundle
from support.effort import effort

NAMES, VERSIONS, SEEDS = ("a", "b"), (1, 2, 3), (1, 2)


@dataclass
class Expected:
    """What a name should have: digests and versions."""

    current: tuple[str, int] | None = None
    last_good: tuple[str, int] | None = None


@dataclass
class Files:
    """All bundles that the machine installs, made once."""

    folder: Path
    paths: dict[tuple[str, int, int], Path] = field(default_factory=dict)
    digests: dict[Path, str] = field(default_factory=dict)
    blobs: dict[str, set[str]] = field(default_factory=dict)


def _make_files() -> Files:
    files = Files(Path(tempfile.mkdtemp(prefix="outrider-model-")))
    for name in NAMES:
        for version in VERSIONS:
            for seed in SEEDS:
                path = make_bundle(files.folder, name=name, version=version, seed=seed)
                manifest = verify_bundle(path).manifest
                files.paths[name, version, seed] = path
                files.digests[path] = manifest.digest
                files.blobs[manifest.digest] = {manifest.digest, *(member.sha256 for member in manifest.members)}
    return files


class StoreMachine(RuleBasedStateMachine):
    """Two processes' worth of Store objects over one directory."""

    files: Files
    staged = Bundle("staged")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="outrider-model-"))
        state = find_state_dir(self.root / "state", {})
        self.stores = (Store(state), Store(state))
        self.expected = {name: Expected() for name in NAMES}
        self.open: list[Staged] = []

    def teardown(self) -> None:
        for staged in self.open:
            staged.close()
        shutil.rmtree(self.root)

    @rule(
        target=staged,
        which=st.integers(0, 1),
        key=st.tuples(st.sampled_from(NAMES), st.sampled_from(VERSIONS), st.sampled_from(SEEDS)),
    )
    def add(self, which, key):
        name, version, _ = key
        current = self.expected[name].current
        if current is not None and version < current[1]:
            with pytest.raises(StoreError, match="older"):
                self.stores[which].add(self.files.paths[key], Trust())
            return None
        staged = self.stores[which].add(self.files.paths[key], Trust())
        self.open.append(staged)
        return which, staged

    @rule(item=consumes(staged))
    def activate(self, item):
        if item is None:
            return
        which, staged = item
        manifest, expected = staged.bundle.manifest, self.expected[staged.bundle.name]
        self.open.remove(staged)
        with staged:
            if expected.current is not None and manifest.version < expected.current[1]:
                with pytest.raises(StoreError, match="older"):
                    self.stores[which].activate(staged, {})
                return
            made = self.stores[which].activate(staged, {"by": which})
        assert made.digest == manifest.digest
        if expected.current is None or expected.current[0] != manifest.digest:
            expected.last_good = expected.current
            expected.current = (manifest.digest, manifest.version)

    @rule(item=consumes(staged))
    def leave(self, item):
        if item is not None:
            self.open.remove(item[1])
            item[1].close()

    @rule(which=st.integers(0, 1), name=st.sampled_from(NAMES))
    def rollback(self, which, name):
        expected = self.expected[name]
        if expected.last_good is None:
            with pytest.raises(NotInstalled):
                self.stores[which].rollback(name)
            return
        assert self.stores[which].rollback(name).digest == expected.last_good[0]
        expected.current, expected.last_good = expected.last_good, None

    @rule(which=st.integers(0, 1))
    def sweep(self, which):
        if self.stores[which].names() or self.open:
            self.stores[which].sweep()

    @invariant()
    def what_is_installed_is_what_is_expected(self):
        wanted = [name for name in NAMES if self.expected[name].current is not None]
        assert list(self.stores[0].names()) == wanted
        for name in wanted:
            found = self.stores[1].installed(name)
            assert (found.digest, found.manifest.version) == self.expected[name].current
            assert all(found.read(member.path) for member in found.manifest.members)

    @invariant()
    def every_blob_that_anything_needs_is_there(self):
        folder = self.stores[0].root / "blobs" / "sha256"
        there = {path.name for path in folder.iterdir()} if folder.exists() else set()
        kept = [e for expected in self.expected.values() for e in (expected.current, expected.last_good) if e]
        needed = [self.files.blobs[digest] for digest, _ in kept]
        needed += [self.files.blobs[staged.bundle.digest] for staged in self.open]
        assert set().union(*needed) <= there
        if not self.open:
            self.stores[0].sweep() if there else None
            assert {path.name for path in folder.iterdir()} == set().union(*needed) if there else True


@pytest.fixture(scope="module", autouse=True)
def _files():
    StoreMachine.files = _make_files()
    yield
    shutil.rmtree(StoreMachine.files.folder)


TestStoreModel = StoreMachine.TestCase
TestStoreModel.settings = settings(max_examples=effort(25), stateful_step_count=20, deadline=None)
