"""Which bundle an agent answers by at its start: the file that is new, or what the store has."""

from __future__ import annotations

from pathlib import Path

import pytest

import outrider
from outrider.agent.answering import install_named, open_model, undo_install
from outrider.agent.config import ModelConfig
from outrider_runtimes.errors import BundleError
from support.realbundles import make_real_bundle

pytestmark = pytest.mark.slow


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def bundle(folder: Path, version: int, *, seed: int = 0, name: str = "tiny") -> str:
    return make_real_bundle(folder / "tiny.outrider", version=version, seed=seed, name=name)


def test_a_bundle_file_is_installed_when_it_is_new_and_then_the_store_counts(tmp_path: Path, state: Path) -> None:
    config = ModelConfig(bundle=str(tmp_path / "tiny.outrider"))
    first = bundle(tmp_path, 1)
    assert install_named(config, state, seeded="") == ("tiny", first)
    second = make_real_bundle(tmp_path / "second.outrider", version=2, seed=1)
    outrider.install(tmp_path / "second.outrider", state=state)
    assert install_named(config, state, seeded=first) == ("tiny", first)
    with open_model(config, "tiny", state) as model:
        assert model.bundle.digest == second
    undo_install("tiny", second, state)
    with open_model(config, "tiny", state) as model:
        assert model.bundle.digest == second, "it is what is current"
    undo_install("tiny", first, state)
    with open_model(config, "tiny", state) as model:
        assert model.bundle.digest == first
    third = bundle(tmp_path, 3, seed=2)
    assert install_named(config, state, seeded=first) == ("tiny", third)


def test_a_file_that_is_refused_leaves_what_is_installed(tmp_path: Path, state: Path) -> None:
    config = ModelConfig(bundle=str(tmp_path / "tiny.outrider"))
    with pytest.raises(BundleError):
        install_named(config, state, seeded="")
    two = bundle(tmp_path, 2)
    install_named(config, state, seeded="")
    one = bundle(tmp_path, 1)
    assert install_named(config, state, seeded=two) == ("tiny", one), "older than what is installed: that serves on"
    with open_model(config, "tiny", state) as model:
        assert model.bundle.digest == two
    assert install_named(ModelConfig(bundle="tiny"), state, seeded="x") == ("tiny", "")
