"""What `pip install outrider[ENGINE,mqtt]` gives an ARM board, as ``benchmarks/install.py`` weighs it, installs and
runs a bundle there, with nothing else on its path.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from benchmarks.install import NOT_ON_A_BOARD, SUBJECTS, unpack

from support.boards import INSTALL_AND_ANSWER, run_on_board
from support.realbundles import expected, images, make_real_bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2000)]

ROOT = Path(__file__).parents[2]
BOARD = {"aarch64": "pi4", "arm": "pi-32bit"}
ENGINE = {"onnx": "onnxruntime", "tflite": "litert", "tflite-legacy": "tflite_runtime"}
WHERE_FROM = """
import importlib.util
import paho.mqtt.client
there = [name for name in {unwanted!r} if importlib.util.find_spec(name)]
print(json.dumps({{"unwanted": there, "outrider": outrider.__file__}}))
"""


def unpack_outrider(site: Path, folder: Path) -> None:
    """Outrider's own wheel."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    with zipfile.ZipFile(next(folder.glob("outrider-*.whl"))) as wheel:
        wheel.extractall(site)


@pytest.mark.parametrize(("machine", "extras"), [subject[1:] for subject in SUBJECTS], ids=lambda value: str(value[0]))
def test_what_is_weighed_installs_a_bundle_and_answers(tmp_path: Path, machine: str, extras: tuple[str, ...]) -> None:
    site = tmp_path / "site"
    unpack(site, machine, extras)
    unpack_outrider(site, tmp_path / "wheel")
    make_real_bundle(tmp_path / "tiny.outrider", formats=("onnx", "tflite"))
    np.save(tmp_path / "image.npy", images(4))
    paths = [tmp_path / name for name in ("tiny.outrider", "state", "image.npy")]
    code = INSTALL_AND_ANSWER + WHERE_FROM.format(unwanted=sorted(NOT_ON_A_BOARD))
    answer, where = map(json.loads, run_on_board(BOARD[machine], tmp_path, code, *paths, site=site).splitlines()[-2:])
    np.testing.assert_allclose(answer["logits"], expected(images(4)), atol=1e-4)
    assert answer["engine"] == ENGINE[extras[0]]
    assert where == {"unwanted": [], "outrider": str(site / "outrider/__init__.py")}
