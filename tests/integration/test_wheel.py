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
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.conftest import write_model
from conformance.known_gaps import KNOWN_GAPS, UNSTEADY
from outrider_runtimes.tensors import DTYPES

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
    assert {f"outrider/watch/page.{kind}" for kind in ("html", "css", "js")} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """``environment("onnx")``: the interpreter of a virtual environment with the wheel and that extra, made once."""
    made: dict[str, str] = {}

    def make(extra: str) -> str:
        if extra not in made:
            folder = tmp_path_factory.mktemp(f"venv-{extra}")
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            python = made[extra] = str(folder / "bin" / "python")
            what = f"{wheel}[{extra}]" if extra else str(wheel)
            # The legacy engine wants an older numpy than the one that the constraints name.
            pins = [] if extra == "tflite-legacy" else ["-c", str(ROOT / ".ci" / "constraints.txt")]
            subprocess.run([python, "-m", "pip", "install", "--quiet", *pins, what], check=True)
        return made[extra]

    return make


ENGINE_OF_EXTRA = {"tflite": "litert", "onnx": "onnxruntime", "tflite-legacy": "tflite_runtime"}


@pytest.mark.parametrize(("extra", "engine"), list(ENGINE_OF_EXTRA.items()))
def test_one_engine_is_enough(
    environment: Callable[[str], str], extra: str, engine: str, demo_run: dict[str, Any], tmp_path: Path
) -> None:
    python = environment(extra)
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


@pytest.mark.parametrize("extra", list(ENGINE_OF_EXTRA))
def test_one_engine_brings_no_compiler_and_states_its_size(environment: Callable[[str], str], extra: str) -> None:
    """None brings a build tool, and all together are under 200 MB: 106 to 165 MB were measured, half of it numpy."""
    python = environment(extra)
    code = "import json, sysconfig; print(json.dumps(sysconfig.get_path('purelib')))"
    packages = Path(json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True).stdout))
    size_bytes = {
        entry.name: sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
        for entry in packages.iterdir()
        if entry.is_dir() and not entry.name.startswith(("pip", "setuptools", "_distutils", "pkg_resources"))
    }
    print(f"{extra}: {sum(size_bytes.values()) / 1e6:.0f} MB: {size_bytes}")
    assert not {"torch", "triton", "jax", "tensorflow", "Cython", "pybind11", "ninja", "onnx"} & set(size_bytes)
    executables = {file.name for file in packages.rglob("*") if file.name in ("gcc", "clang", "cc1", "nvcc", "ld")}
    assert executables == set()
    assert 0 < sum(size_bytes.values()) < 200e6


def test_the_legacy_engine_passes_the_conformance_suite(environment: Callable[[str], str], tmp_path: Path) -> None:
    """In an environment of its own: it wants numpy 1. The model files are written here, where there is a schema."""
    python = environment("tflite-legacy")
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"pytest=={version('pytest')}"], check=True)
    models = tmp_path / "models"
    models.mkdir()
    kinds = ["linear", "fixed-2", "several", "doubled", "int8"]
    kinds += [f"same-{dtype}" for dtype in (*DTYPES, "STRING", "COMPLEX64", "BFLOAT16")]
    for name in ("onnx-linear", *(f"tflite-{kind}" for kind in kinds)):
        write_model(models, name)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n", encoding="utf-8")
    suite = [str(ROOT / "tests" / "conformance" / name) for name in ("test_engines.py", "test_calls.py")]
    result = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini"),
         "--rootdir", str(ROOT), "-k", "tflite_runtime", *suite],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "CONFORMANCE_MODELS": str(models)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.search(r"^(\d+) passed, \d+ deselected(?:, (\d+) xfailed)?", result.stdout, re.MULTILINE)
    assert found is not None and int(found[1]) > 80, result.stdout
    gaps = KNOWN_GAPS["tflite_runtime"]
    assert len(gaps) - len(UNSTEADY) <= int(found[2] or 0) <= len(gaps), result.stdout


def test_a_missing_engine_names_the_pip_command(
    environment: Callable[[str], str], demo_run: dict[str, Any], tmp_path: Path
) -> None:
    python = environment("")
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
