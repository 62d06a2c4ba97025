from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from outrider_exporters.recipe import RecipeFile
from outrider_exporters.recipe.model import arguments_from
from outrider_exporters.sources.checkpoints import load_checkpoint
from outrider_runtimes.errors import ConfigError, ExportError

pytestmark = pytest.mark.slow


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def trained() -> nn.Module:
    torch.manual_seed(5)
    network = build()
    network(torch.randn(8, 3))  # moves the statistics of the batch norm
    return network


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder / "ran"),))


def safetensors_file(folder: Path, network: nn.Module) -> Path:
    save_file(network.state_dict(), folder / "w.safetensors")
    return folder / "w.safetensors"


def saved(folder: Path, content: object, **options) -> Path:
    torch.save(content, folder / "w.pt", **options)
    return folder / "w.pt"


def equal(network: nn.Module, other: nn.Module) -> bool:
    mine, theirs = network.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    "write",
    [
        safetensors_file,
        lambda folder, network: saved(folder, network.state_dict()),
        lambda folder, network: saved(folder, network.state_dict(), _use_new_zipfile_serialization=False),
        lambda folder, network: saved(folder, {"epoch": 3, "state_dict": network.state_dict(), "lr": 1e-3}),
        lambda folder, network: saved(folder, {"model_state_dict": network.state_dict()}),
        lambda folder, network: saved(folder, {k: v.double() for k, v in network.state_dict().items()}),
    ],
)
def test_weights_come_into_the_network_that_build_gives(tmp_path, write):
    network = load_checkpoint(write(tmp_path, trained()), build=build)
    assert equal(network, trained())
    assert not network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


def pickles(folder: Path) -> dict[str, bytes]:
    """By kind, files that run the canary when they are unpickled."""

    def by_torch(content: object, **options) -> bytes:
        file = io.BytesIO()
        torch.save(content, file, **options)
        return file.getvalue()

    canary = Canary(folder)
    return {
        "pickle": pickle.dumps(canary),
        "torch": by_torch(canary),
        "torch-legacy": by_torch(canary, _use_new_zipfile_serialization=False),
        "among-weights": by_torch({**trained().state_dict(), "extra": canary}),
        "module": by_torch(nn.Linear(2, 2)),
    }


@pytest.mark.parametrize("kind", ["pickle", "torch", "torch-legacy", "among-weights", "module"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
def test_a_pickled_model_is_refused_and_nothing_in_it_runs(tmp_path, kind, suffix, monkeypatch):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(pickles(tmp_path)[kind])
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    built = []
    with pytest.raises(ExportError, match=r"is refused: it is a pickled model|is no safetensors file"):
        load_checkpoint(path, build=lambda: built.append(1))
    assert not (tmp_path / "ran").exists()
    assert not built


def test_the_canary_sings_where_it_is_unpickled(tmp_path):
    """Else the test above would prove nothing."""
    torch.load(io.BytesIO(pickles(tmp_path)["torch"]), weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_torchscript_archive_is_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    with pytest.raises(ExportError, match=r"w\.pt is refused"):
        load_checkpoint(tmp_path / "w.pt", build=build)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_file_that_was_cut_short_is_refused(tmp_path, kind, share):
    path = safetensors_file(tmp_path, trained()) if kind == "safetensors" else saved(tmp_path, trained().state_dict())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ExportError, match=r"w\.(pt is refused|safetensors is no safetensors file)"):
        load_checkpoint(path, build=build)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"0.weight": torch.zeros(4, 3)}, r"lacks '0\.bias', '1\.weight', '1\.bias' and 5 more"),
        ({f"module.{k}": v for k, v in trained().state_dict().items()}, r"lacks .* and has 'module\.0\.weight'"),
        (
            {**trained().state_dict(), "0.weight": torch.zeros(4, 5)},
            r"'0\.weight' is \[4, 5\], the network's is \[4, 3\]",
        ),
        ({**trained().state_dict(), "epoch": 3}, r"holds a int under 'epoch', expected a tensor"),
        ([1, 2], "holds a list, expected weights by name"),
        ({}, "holds a dict, expected weights by name"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, content, words):
    with pytest.raises(ExportError, match=words):
        load_checkpoint(saved(tmp_path, content), build=build)


def test_build_must_give_a_network(tmp_path):
    path = saved(tmp_path, trained().state_dict())
    with pytest.raises(ExportError, match="build gave a dict"):
        load_checkpoint(path, build=dict)
    with pytest.raises(ExportError, match="there is no file"):
        load_checkpoint(tmp_path / "none.pt", build=build)
    for reference, words in (
        ("nocolon", "build is 'nocolon'"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("json:nothing", "no function 'nothing'"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_checkpoint(path, build=reference)


# --- in a recipe file

NETWORK = """
import numpy as np
from torch import nn
from outrider_exporters import Data

def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

def rest():
    x = np.zeros((2, 3), np.float32)
    return {"example": {"x": x}, "outputs": ["y"], "data": Data(test={"x": x}), "evaluate": lambda p, t: {"a": 1.0}}

def raises():
    raise ValueError("no such width")
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "my_checkpointed.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "my_checkpointed", raising=False)

    def write(table: str) -> RecipeFile:
        (tmp_path / "recipe.toml").write_text(f"[model]\n{table}\n")
        return RecipeFile.from_toml(tmp_path / "recipe.toml")

    return write


def test_a_recipe_names_a_checkpoint_and_what_builds_the_network(tmp_path, recipe):
    safetensors_file(tmp_path, trained())
    file = recipe('source = "my_checkpointed:rest"\ncheckpoint = "w.safetensors"\nbuild = "my_checkpointed:net"')
    given = arguments_from(file)
    assert equal(given["model"], trained())
    assert given["outputs"] == ["y"]
    assert RecipeFile.from_dict(file.to_dict()).to_dict() == file.to_dict()


def test_a_recipe_names_a_model_file_beside_it(tmp_path, recipe):
    file = recipe('source = "my_checkpointed:rest"\nfile = "m.onnx"')
    assert arguments_from(file)["model"] == tmp_path / "m.onnx"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('checkpoint = "w.pt"', "model.build is missing"),
        ('build = "my_checkpointed:net"', "model.checkpoint is missing"),
        ('checkpoint = "w.pt"\nbuild = "a:b"\nfile = "m.onnx"', "model.file and model.checkpoint are both given"),
        (
            'checkpoint = "w.pt"\nbuild = "my_checkpointed:raises"',
            "model.build 'my_checkpointed:raises' raised ValueError",
        ),
        ("", "gave no 'model'"),
    ],
)
def test_a_table_that_says_too_little_or_too_much(tmp_path, recipe, table, words):
    saved(tmp_path, trained().state_dict())
    with pytest.raises(ConfigError, match=words):
        arguments_from(recipe(f'source = "my_checkpointed:rest"\n{table}'))


def test_an_unknown_key_of_the_model_is_named(recipe):
    with pytest.raises(ConfigError, match=r"model\.chekpoint: unknown key") as caught:
        recipe('chekpoint = "w.pt"')
    assert "checkpoint" in caught.value.hint
