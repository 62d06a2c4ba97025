"""A store that is damaged beneath a loaded model: it answers on, another load is told, installing again heals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from outrider.installer import TRIAL_CALLS, install
from outrider.model import Model, load
from outrider.store import Installed, Store
from outrider_runtimes.errors import ModelLoadError, NotInstalled, OutriderError, StoreError
from support.realbundles import ONNX, TFLITE, close_to, images, make_real_bundle

pytestmark = pytest.mark.slow


def manifest(installed: Installed) -> Path:
    return installed.root / "blobs" / "sha256" / installed.digest


def record(installed: Installed) -> Path:
    return installed.root / "names" / f"{installed.name}.json"


def models(installed: Installed) -> list[Path]:
    return [installed.blob_path(variant.member) for variant in installed.manifest.variants]


def cut(path: Path) -> None:
    """In place: who has it open, or mapped, sees it.

    LiteRT maps a file. Of the network here it has copies by its first call; one that looks into the file at each call,
    such as a GATHER of a large table, dies of SIGBUS when another hand cuts it.
    """
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def wipe(path: Path) -> None:
    """In place, at its length."""
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


Files = Callable[[Installed], list[Path]]
Damage = tuple[Files, Callable[[Path], None], type[OutriderError]]
DAMAGES: dict[str, Damage] = {
    "no record": (lambda at: [record(at)], Path.unlink, NotInstalled),
    "a record that was cut": (lambda at: [record(at)], cut, StoreError),
    "a record that was wiped": (lambda at: [record(at)], wipe, StoreError),
    "no manifest": (lambda at: [manifest(at)], Path.unlink, StoreError),
    "a manifest that was wiped": (lambda at: [manifest(at)], wipe, StoreError),
    "no model": (models, Path.unlink, StoreError),
    "a model that was cut": (models, cut, StoreError),
    "a model that was wiped": (models, wipe, ModelLoadError),
}


def damage(state: Path, name: str) -> type[OutriderError]:
    """Do it to what is current; gives what a load of it raises from then on."""
    files, do, error = DAMAGES[name]
    for path in files(Store(state).installed("tiny")):
        do(path)
    return error


def bits(model: Model) -> bytes:
    return model.infer(images(1, 3)).outputs["logits"].tobytes()


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_loaded_answers_on_and_an_install_heals(tmp_path: Path, name: str) -> None:
    path, state = tmp_path / "b.outrider", tmp_path / "state"
    make_real_bundle(path, formats=("onnx", "tflite"))
    install(path, state=state)
    with load("tiny", state=state, variant=ONNX) as onnx, load("tiny", state=state, variant=TFLITE) as tflite:
        before = {ONNX: bits(onnx), TFLITE: bits(tflite)}
        error = damage(state, name)
        for variant in (ONNX, TFLITE):
            with pytest.raises(error) as caught:
                load("tiny", state=state, variant=variant)
            assert caught.value.hint
        assert {ONNX: bits(onnx), TFLITE: bits(tflite)} == before
        install(path, state=state)
        for variant in (ONNX, TFLITE):
            with load("tiny", state=state, variant=variant) as again:
                assert bits(again) == before[variant]
        assert {ONNX: bits(onnx), TFLITE: bits(tflite)} == before


@pytest.fixture
def on_trial(tmp_path: Path) -> Path:
    """A state directory in which version 2, of seed 1, is on trial after version 1, of seed 0."""
    for version in (1, 2):
        make_real_bundle(tmp_path / f"{version}.outrider", version=version, seed=version - 1)
        install(tmp_path / f"{version}.outrider", state=tmp_path / "state")
    return tmp_path / "state"


@pytest.mark.parametrize("name", ["no record", "a record that was wiped", "no manifest"])
def test_what_is_on_trial_answers_on_beyond_its_trial(on_trial: Path, name: str) -> None:
    with load("tiny", state=on_trial) as model:
        damage(on_trial, name)
        for seed in range(TRIAL_CALLS + 5):
            assert close_to(model.infer(images(1, seed)).outputs, images(1, seed), seed=1)
        assert model.bundle.version == 2


def test_a_model_on_trial_that_was_wiped_gives_way_to_what_was_good_before(tmp_path: Path, on_trial: Path) -> None:
    with load("tiny", state=on_trial) as model:
        damage(on_trial, "a model that was wiped")
        with load("tiny", state=on_trial) as good:
            assert (good.bundle.version, [change.kind for change in good.changes]) == (1, ["rollback"])
            assert close_to(good.infer(images(1)).outputs, images(1))
        assert close_to(model.infer(images(1)).outputs, images(1), seed=1)
    install(tmp_path / "2.outrider", state=on_trial)
    with load("tiny", state=on_trial) as healed:
        assert close_to(healed.infer(images(1)).outputs, images(1), seed=1)
