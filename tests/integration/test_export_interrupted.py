"""Exports that are stopped half-way, by a full disk or by Ctrl-C: the old bundle or the new one, and no rubbish."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider_exporters import Quantize, Recipe
from outrider_runtimes.errors import BundleError, ExportError, OutriderError
from support.exporters import Small, random_data, run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of that size, mounted for the length of the block."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "outrider-test", str(folder)]
    mounted = subprocess.run(command, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def test_a_disk_too_small_for_the_bundle_keeps_the_old_one(tmp_path):
    with disk(tmp_path / "out", 64 * 1024) as out:
        (out / "a.outrider").write_bytes(b"old")
        with pytest.raises((BundleError, ExportError), match="No space left"):
            run(Small().eval(), random_data(), out / "a.outrider")
        assert files(out) == ["a.outrider"]
        assert (out / "a.outrider").read_bytes() == b"old"


@pytest.mark.parametrize(("kind", "size_bytes"), [("tflite", 32 * 1024), ("onnx", 160 * 1024)])
def test_a_disk_too_small_for_the_work_says_so_and_is_left_as_it_was(tmp_path, monkeypatch, kind, size_bytes):
    """The smallest holds no model file; the larger one the float file, not what the quantizer writes on the way."""
    with disk(tmp_path / "work", size_bytes) as work:
        before = free_bytes(work)
        monkeypatch.setattr(tempfile, "tempdir", str(work))
        (tmp_path / "out").mkdir()
        with pytest.raises(OutriderError) as caught:
            run(
                Small().eval(), random_data(), tmp_path / "out/a.outrider",
                formats=(kind,), recipe=Recipe([Quantize("int8")]),
            )  # fmt: skip
        assert str(work) not in str(caught.value)
        assert files(work) == files(tmp_path / "out") == []
        assert free_bytes(work) == before


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
    watchdog = threading.Timer(150, process.kill)
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
