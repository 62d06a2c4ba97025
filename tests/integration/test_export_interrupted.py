"""Exports that are stopped half-way, by a full disk or by Ctrl-C: the old bundle or the new one, and no rubbish."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch

from outrider_exporters import Quantize, Recipe
from outrider_runtimes.errors import BundleError, ExportError, OutriderError
from support.exporters import Small, random_data, run
from support.tmpfs import small_disk

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def held(folder: Path) -> list[str]:
    """What of a folder this process has open or mapped: it takes room on the disk although its name is gone."""
    opened = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists
            opened.append(str(descriptor.readlink()))
    return [line for line in [*opened, *Path("/proc/self/maps").read_text().splitlines()] if f"{folder}/" in line]


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def test_a_disk_too_small_for_the_bundle_keeps_the_old_one(tmp_path):
    with small_disk(tmp_path / "out", size_kib=64) as out:
        (out / "a.outrider").write_bytes(b"old")
        with pytest.raises((BundleError, ExportError), match="No space left"):
            run(small(), random_data(), out / "a.outrider")
        assert files(out) == ["a.outrider"]
        assert (out / "a.outrider").read_bytes() == b"old"


@pytest.mark.parametrize(("kind", "size_kib"), [("tflite", 32), ("onnx", 160)])
def test_a_disk_too_small_for_the_work_says_so_and_is_left_as_it_was(tmp_path, monkeypatch, kind, size_kib):
    """The smallest holds no model file; the larger one the float file, not what the quantizer writes on the way."""
    with small_disk(tmp_path / "work", size_kib=size_kib) as work:
        monkeypatch.setattr(tempfile, "tempdir", str(work))
        (tmp_path / "out").mkdir()
        with pytest.raises(OutriderError) as caught:
            run(
                small(), random_data(), tmp_path / "out/a.outrider",
                formats=(kind,), recipe=Recipe([Quantize("int8")]),
            )  # fmt: skip
        assert str(work) not in str(caught.value)
        assert files(work) == files(tmp_path / "out") == []
        assert held(work) == []


SCRIPT = """
import sys
from outrider_exporters import Quantize, Recipe
from support.exporters import Small, random_data, run
print("ready", flush=True)
run(Small().eval(), random_data(), sys.argv[1], formats=(sys.argv[2],), recipe=Recipe([Quantize("int8")]),
    progress=lambda progress: print(progress.step, progress.message.split(",")[0], flush=True))
"""


@pytest.mark.parametrize("step", ["convert onnx-int8", "convert tflite-float32"])
def test_ctrl_c_in_the_middle_of_a_conversion_leaves_nothing(tmp_path, step):
    """A real SIGINT to a real process that has begun to convert."""
    for folder in ("out", "tmp"):
        (tmp_path / folder).mkdir()
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(tmp_path / "tmp"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [sys.executable, str(script), str(tmp_path / "out/a.outrider"), step.partition(" ")[2].partition("-")[0]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    watchdog = threading.Timer(250, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            if line.startswith(step):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate()
    finally:
        watchdog.cancel()
        process.kill()
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert files(tmp_path / "out") == []
    assert set(files(tmp_path / "tmp")) <= {".ses"}  # ONNX Runtime's own
