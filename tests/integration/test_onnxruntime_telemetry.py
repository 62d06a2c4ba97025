"""ONNX Runtime's own telemetry is off: it writes nothing of this device, and has nothing to send."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SESSION = """
import os
from pathlib import Path
from outrider_runtimes.engines.onnxruntime import _PASS_THROUGH, LIBRARY

runtime = LIBRARY.load()
runtime.InferenceSession(_PASS_THROUGH, providers=["CPUExecutionProvider"])
print(os.environ.get("ORT_DISABLE_TELEMETRY"))
"""


@pytest.mark.parametrize(("given", "told"), [(None, "1"), ("0", "0")])
def test_it_is_off_unless_somebody_wants_it(tmp_path: Path, given: str | None, told: str) -> None:
    environ = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environ.pop("ORT_DISABLE_TELEMETRY", None)
    environ |= {} if given is None else {"ORT_DISABLE_TELEMETRY": given}
    done = subprocess.run(
        [sys.executable, "-c", SESSION], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stdout.strip()) == (0, told), done.stderr
    if given is None:
        assert sorted(tmp_path.rglob("*")) == [], "no identifier, no store of events"
