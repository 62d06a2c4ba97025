"""The wheel alone, with one engine, in an environment without torch, runs `outrider infer` on the demo's bundle."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

ROOT = Path(__file__).parents[2]
NOT_ON_A_BOARD = ("torch", "onnx", "rich", "jax", "sklearn", "matplotlib")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    return next(folder.glob("outrider-*.whl"))


def test_it_holds_the_three_packages_and_their_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("outrider", "outrider_exporters", "outrider_runtimes"):
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
    assert "outrider_exporters/demo/device.py" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


ENGINE_OF_EXTRA = {"tflite": "litert", "onnx": "onnxruntime", "tflite-legacy": "tflite_runtime"}


@pytest.mark.parametrize(("extra", "engine"), list(ENGINE_OF_EXTRA.items()))
def test_one_engine_is_enough(wheel: Path, extra: str, engine: str, demo_run: dict[str, Any], tmp_path: Path) -> None:
    python = _environment(wheel, extra, tmp_path / "venv")
    source = tmp_path / "in.npz"
    with np.load(Path(demo_run["bundle"]["path"]).parent / "stream.npz") as stream:
        np.savez(source, image=stream["image"][:16])
    output = tmp_path / "out.npz"
    command = [
        "-m",
        "outrider.cli",
        "infer",
        demo_run["bundle"]["path"],
        "--input",
        str(source),
        "--output",
        str(output),
    ]
    result = subprocess.run(
        [python, *command],
        capture_output=True,
        text=True,
        env={**os.environ, "STATE_DIRECTORY": str(tmp_path / "state"), "PYTHONPATH": ""},
    )
    assert result.returncode == 0, result.stderr
    assert engine in result.stdout
    with np.load(output) as out:
        assert out["logits"].shape == (16, 10)
    listed = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True).stdout
    installed = {line.partition("==")[0].lower() for line in listed.splitlines()}
    assert not installed.intersection(NOT_ON_A_BOARD)


def test_a_missing_engine_names_the_pip_command(wheel: Path, demo_run: dict[str, Any], tmp_path: Path) -> None:
    python = _environment(wheel, "", tmp_path / "venv")
    result = subprocess.run(
        [python, "-m", "outrider.cli", "install", demo_run["bundle"]["path"]],
        capture_output=True,
        text=True,
        env={**os.environ, "STATE_DIRECTORY": str(tmp_path / "state"), "PYTHONPATH": ""},
    )
    assert result.returncode == 1
    assert "pip install 'outrider[" in result.stderr
    assert "Traceback" not in result.stderr
    demo = subprocess.run([python, "-m", "outrider.cli", "demo"], cwd=tmp_path, capture_output=True, text=True)
    assert demo.returncode == 1
    assert "pip install 'outrider[demo]'" in demo.stderr
    assert "Traceback" not in demo.stderr
    assert not (tmp_path / "demo-output").exists()


def _environment(wheel: Path, extra: str, folder: Path) -> str:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    what = f"{wheel}[{extra}]" if extra else str(wheel)
    # The legacy engine wants an older numpy than the one that the constraints name.
    pins = [] if extra == "tflite-legacy" else ["-c", str(ROOT / ".ci" / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *pins, what], check=True)
    return python


def test_the_four_commands_of_the_readme_work_as_they_stand(
    wheel: Path, demo_run: dict[str, Any], tmp_path: Path
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"in four commands.*?```\n(.*?)```", readme, re.DOTALL)
    assert found is not None
    commands = found.group(1).strip()
    assert len(commands.splitlines()) == 4
    _pi_folder(wheel, Path(demo_run["bundle"]["path"]).parent, tmp_path)
    result = subprocess.run(
        ["bash", "-euc", f'python3() {{ {shlex.quote(sys.executable)} "$@"; }}\n{commands}'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "STATE_DIRECTORY": str(tmp_path / "state"), "PYTHONPATH": ""},
    )
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 20
    assert all(answer["source"] in {"edge", "edge_degraded"} for answer in answers)


def _pi_folder(wheel: Path, demo: Path, folder: Path) -> None:
    """What the README says to copy, with servers that are not there and 20 inputs."""
    example = ROOT / "firmware_examples" / "raspberry_pi"
    for file in (wheel, demo / "digits.outrider", example / "device.py"):
        shutil.copy(file, folder)
    config = (example / "config.toml").read_text(encoding="utf-8")
    for there, nowhere in (("192.0.2.10:8000", "127.0.0.1:9"), ("192.0.2.10:1883", "127.0.0.1:9"), ("= 10.0", "= 0.1")):
        assert there in config
        config = config.replace(there, nowhere)
    (folder / "config.toml").write_text(config, encoding="utf-8")
    with np.load(demo / "stream.npz") as stream:
        np.savez(folder / "stream.npz", image=stream["image"][:20])
