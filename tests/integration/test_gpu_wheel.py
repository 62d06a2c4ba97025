"""NVIDIA's onnxruntime on a machine without a GPU: its providers are there, and none of them starts.

The wheel is the real one, with its `libonnxruntime_providers_cuda.so` and `_tensorrt.so`, in an environment of its own
that is kept. What this cannot show: a provider that does start, and what TensorRT builds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider_runtimes.engines.onnxruntime import CUDA, TENSORRT, has_nvidia_gpu
from support.pythons import venv_of
from support.realbundles import expected, images, make_real_bundle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(has_nvidia_gpu(Path("/")), reason="there is a GPU here, on which the providers may start"),
]

ROOT = Path(__file__).parents[2]
PINS = Path(__file__).with_name("gpu.txt")
FIRST = {"onnxruntime-tensorrt": TENSORRT, "onnxruntime-cuda": CUDA}
Run = Callable[..., subprocess.CompletedProcess[str]]

EACH_WAY = """
import json, sys
from pathlib import Path
from outrider_runtimes.engines import find_engines
from outrider_runtimes.errors import OutriderError
import onnxruntime
said = {"providers": onnxruntime.get_available_providers(), "engines": [], "checks": {}, "prepared": {}}
for engine in find_engines():
    if "onnx" in engine.formats:
        said["engines"].append([engine.name, engine.builds])
        said["checks"][engine.name] = engine.check()
        try:
            engine.prepare(Path(sys.argv[1]), threads=1, cache=Path(sys.argv[2])).close()
        except OutriderError as error:
            said["prepared"][engine.name] = [type(error).__name__, str(error), error.hint]
print(json.dumps(said))
"""
CHOSEN_WHEN_THE_DRIVER_WAS_THERE = """
import dataclasses, json, logging, sys
from outrider import load
from outrider.admit.admission import remember, remembered
from outrider.store import Store
logging.basicConfig(stream=sys.stderr)
store = Store(__import__("pathlib").Path(sys.argv[1]))
installed = store.installed("tiny")
(found,) = remembered(installed.choice)
fast = [dataclasses.replace(row, engine=sys.argv[2], p50_ms=row.p50_ms / 10) for row in found.measured]
choice = dataclasses.replace(found.choice, engine=sys.argv[2], p50_ms=found.choice.p50_ms / 10)
engines = {**found.engines, sys.argv[2]: found.engines["onnxruntime"]}
then = dataclasses.replace(found, choice=choice, measured=(*fast, *found.measured), engines=engines)
store.rechoose("tiny", installed.digest, remember(then))
with load("tiny", state=sys.argv[1]) as model:
    print(model.engine)
"""


@pytest.fixture(scope="session")
def outrider_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Outrider alone, as its wheel installs it."""
    site = tmp_path_factory.mktemp("outrider")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(site), str(ROOT)], check=True)
    return site


@pytest.fixture
def run(outrider_site: Path, tmp_path: Path) -> Run:
    """``run(python, *arguments)``: that interpreter, which finds Outrider, with a state directory of this test's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment = {**kept, "PYTHONPATH": str(outrider_site), "STATE_DIRECTORY": str(tmp_path / "state")}

    def start(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [str(python), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)

    return start


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    make_real_bundle(tmp_path / "tiny.outrider")
    return tmp_path / "tiny.outrider"


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_each_way_says_what_its_provider_lacks_and_none_goes_on_without_it(run: Run, tmp_path: Path) -> None:
    from support import tinymodels

    (tmp_path / "m.onnx").write_bytes(tinymodels.classifier_onnx(tinymodels.weights()))
    said = answer(run(venv_of(PINS), "-c", EACH_WAY, tmp_path / "m.onnx", tmp_path / "cache"))
    assert said["providers"][:2] == [TENSORRT, CUDA]  # that the wheel has them says nothing of whether they start
    assert said["engines"] == [["onnxruntime-tensorrt", False], ["onnxruntime-cuda", False], ["onnxruntime", False]]
    assert said["checks"]["onnxruntime"] is None
    assert set(said["prepared"]) == set(FIRST)
    for name, provider in FIRST.items():
        kind, message, hint = said["prepared"][name]
        assert kind == "NoEngine"
        assert message.startswith(f"{provider} does not start here: lib") and "cannot open" in message
        assert str(tmp_path) not in message and "site-packages" not in message
        assert "install onnxruntime in the place of onnxruntime-gpu" in hint
        assert said["checks"][name] == f"{message}; {hint}"


def test_an_install_takes_the_processor_and_reports_why_not_the_gpu(run: Run, bundle: Path, tmp_path: Path) -> None:
    python = venv_of(PINS)
    report = answer(run(python, "-m", "outrider.cli", "install", bundle, "--json"))
    assert report["choice"]["engine"] == "onnxruntime"
    assert {row["engine"] for row in report["measured"]} == {"onnxruntime"}
    skipped = {row["engine"]: row["reason"] for row in report["skipped"]}
    assert set(skipped) == set(FIRST)
    assert all(skipped[name].startswith(f"{FIRST[name]} does not start here: ") for name in FIRST)
    np.savez(tmp_path / "in.npz", image=images(4))
    source, out = tmp_path / "in.npz", tmp_path / "out.npz"
    answer(run(python, "-m", "outrider.cli", "infer", "tiny", "--input", source, "--output", out, "--json"))
    with np.load(out) as outputs:
        np.testing.assert_allclose(outputs["logits"], expected(images(4)), atol=1e-4)
    code = "import outrider, sys; outrider.load('tiny', engine=sys.argv[1])"
    for name, provider in FIRST.items():
        refused = run(python, "-c", code, name)
        assert refused.returncode != 0
        assert f"NoEngine: 'tiny' was not run as {name} when it was installed" in refused.stderr
        assert f"{provider} does not start here" in refused.stderr


@pytest.mark.parametrize("engine", list(FIRST))
def test_a_choice_whose_driver_has_gone_is_served_by_the_processor_and_says_so(
    run: Run, bundle: Path, tmp_path: Path, engine: str
) -> None:
    python = venv_of(PINS)
    answer(run(python, "-m", "outrider.cli", "install", bundle, "--json"))
    done = run(python, "-c", CHOSEN_WHEN_THE_DRIVER_WAS_THERE, tmp_path / "state", engine)
    assert (done.returncode, done.stdout.strip()) == (0, "onnxruntime"), done.stderr
    assert f"{engine} was measured best for tiny but is gone: {FIRST[engine]} does not start here" in done.stderr


def doctor(run: Run, python: Path) -> dict[str, dict[str, str]]:
    done = run(python, "-m", "outrider.cli", "doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    broken = any(check["status"] == "broken" for check in checks.values())
    assert done.returncode == int(broken), done.stderr
    return checks


def test_the_doctor_names_the_ways_that_do_not_start_and_the_cure(run: Run) -> None:
    checks = doctor(run, venv_of(PINS))
    assert checks["engine onnxruntime"]["status"] == "ok"
    for name, provider in FIRST.items():
        check = checks[f"engine {name}"]
        assert (check["status"], check["found"]) == ("warning", "")
        assert check["cause"].startswith(f"{provider} does not start here: ")
        assert "install onnxruntime in the place of onnxruntime-gpu" in check["cure"]
    assert "package onnxruntime" not in checks


def test_the_doctor_finds_the_two_distributions_of_one_package(run: Run) -> None:
    python = venv_of(PINS, over="onnxruntime==1.31.1")
    check = doctor(run, python)["package onnxruntime"]
    assert (check["status"], check["found"]) == ("broken", "onnxruntime and onnxruntime-gpu")
    assert check["cure"].startswith("pip uninstall -y onnxruntime onnxruntime-gpu")
