"""The device part of the test suite, run by an emulated board's Python."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from boards.selection import DESELECTED, MARKERS, TESTS, device_tests
from conformance.conftest import write_model
from outrider_exporters.rehearse.lane import Lane, lane_for
from outrider_exporters.rehearse.plan import guest_environment, recipe_for
from outrider_exporters.rehearse.userland import add_wheels, find_cache, made_once
from outrider_runtimes.targets import target_named
from outrider_runtimes.tensors import DTYPES

PINS = TESTS / "boards/wheels.txt"
HANG_S = 1800.0
# The public surface on a board: install, which tries the bundle in a child and chooses, then load by name and answer.
INSTALL_AND_ANSWER = """
import json
import numpy as np
import outrider
bundle, state, image = sys.argv[1:]
report = outrider.install(bundle, state=state)
with outrider.load("tiny", state=state) as model:
    logits = model.infer({"image": np.load(image)}).outputs["logits"]
    print(json.dumps({"engine": model.engine, "logits": logits.tolist(), "measured": len(report.measured)}))
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the board's pytest counted, and the end of what it printed."""

    passed: int
    skipped: int
    failed: list[str]
    text: str


def say(line: str) -> None:
    print(line, file=sys.stderr)


def pytest_lane(target: str, work: Path) -> Lane:
    """A lane whose Python has pytest and hypothesis too."""
    return lane_for(target_named(target), cache=find_cache(None), work=work, say=say, extra=[_pytest_site(target)])


def guest_python(lane: Lane, work: Path) -> Path:
    """A program that is the board's Python to whoever starts it, with the packages that it would have installed."""
    script = work / "python"
    path = lane.environment["PYTHONPATH"]
    script.write_text(
        f'#!/bin/sh\nexport PYTHONPATH="${{PYTHONPATH:+$PYTHONPATH:}}{path}"\nexec {" ".join(lane.python)} "$@"\n'
    )
    script.chmod(0o755)
    return script


def run_device_tests(target: str, work: Path, *, has: Collection[str]) -> Outcome:
    """Run the tests that need no more than the board has, and the packages ``has``."""
    lane = pytest_lane(target, work)
    return run_tests(lane.python, lane.environment, guest_python(lane, work), work, has=has)


def run_tests(
    python: Sequence[str], environment: Mapping[str, str], executable: Path, work: Path, *, has: Collection[str]
) -> Outcome:
    """Run the device part of the suite.

    Args:
        python: the command that starts the device's Python.
        environment: its environment, with the packages on its path.
        executable: what a test starts as its own interpreter.
        has: the packages that it has beyond what every board has.
    """
    report = work / "report.json"
    environment = {
        **environment,
        "PYTHONPATH": f"{environment['PYTHONPATH']}:{TESTS}",
        "OUTRIDER_GUEST_PYTHON": str(executable),
        "OUTRIDER_GUEST_REPORT": str(report),
        "CONFORMANCE_MODELS": str(_models(work / "models")),
    }
    options = ["-q", "-p", "boards.guest", "-p", "no:cacheprovider", "--basetemp", str(work / "tests"), "-m", MARKERS]
    deselected = [f"--deselect=tests/{name}" for name in DESELECTED]
    files = [f"tests/{name}" for name in device_tests(has)]
    done = subprocess.run(
        [*python, "-m", "pytest", *options, *deselected, *files],
        cwd=TESTS.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    text = (done.stdout + done.stderr)[-8000:]
    assert report.is_file(), text
    told = json.loads(report.read_text())
    counts = told["counts"]
    return Outcome(passed=counts["passed"], skipped=counts["skipped"], failed=told["failed"], text=text)


def run_on_board(target: str, work: Path, code: str, *args: str | Path, site: Path | None = None) -> str:
    """What a script prints under the board's Python, whose children are the board's too.

    ``site``: the packages that it has beside Debian's; None for those of a rehearsal.
    """
    lane = lane_for(target_named(target), cache=find_cache(None), work=work, say=say)
    if site is not None:
        lane = replace(lane, environment=guest_environment([site], work / "bytecode"))
    starts = "import os, sys; sys.executable = os.environ['OUTRIDER_GUEST_PYTHON']\n"
    done = subprocess.run(
        [*lane.python, "-c", starts + code, *map(str, args)],
        cwd=work,
        env={**lane.environment, "OUTRIDER_GUEST_PYTHON": str(guest_python(lane, work))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _pytest_site(target: str) -> Path:
    recipe = recipe_for(target_named(target))
    folder = find_cache(None) / f"pytest-{recipe.debian}-{hashlib.sha256(PINS.read_bytes()).hexdigest()[:12]}"

    def fill(staging: Path) -> None:
        add_wheels(recipe, PINS, staging / "site")

    made_once(folder, fill)
    return folder / "site"


def _models(folder: Path) -> Path:
    """The conformance suite's model files, written on this machine, which has the schemas."""
    kinds = ["linear", "int8", "fixed-2", "several", "doubled", *(f"same-{dtype}" for dtype in DTYPES)]
    odd = ["same-STRING", "same-COMPLEX64", "same-BFLOAT16"]
    folder.mkdir()
    for name in (*(f"onnx-{kind}" for kind in kinds), *(f"tflite-{kind}" for kind in (*kinds, *odd))):
        write_model(folder, name)
    return folder
