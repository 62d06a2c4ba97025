"""Real bundles on emulated boards: what is right, what is wrong, what dies, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outrider.bundle import verify_bundle
from outrider_exporters.rehearse.lane import lane_for
from outrider_exporters.rehearse.plan import RECIPES
from outrider_exporters.rehearse.report import Pair, Rehearsal, render
from outrider_exporters.rehearse.run import rehearse
from outrider_exporters.rehearse.userland import add_wheels, find_cache
from outrider_runtimes.errors import RehearsalError
from outrider_runtimes.targets import TARGETS, target_named
from support import tinymodels
from support.keys import private_key
from support.realbundles import make_real_bundle
from support.rehearsals import VARIANTS, make_bundle, unknown_operator_onnx

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BOARDS = ("native", "x86-avx2", "pi-zero-2", "pi3", "pi4", "pi5", "pi-32bit")
# A dot product of bytes, and return: in the Pi 5's CPU, not in the Pi 4's and 3's.
UDOT = "<II", 0x6E809400, 0xD65F03C0
SHADOW = f"""
import ctypes, mmap, struct, sys
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(struct.pack{UDOT})
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
here = __file__.rsplit("/", 2)[0]
sys.path.remove(here)
del sys.modules["onnxruntime"]
import onnxruntime
"""


def pairs(found: Rehearsal, target: str) -> dict[tuple[str, str], Pair]:
    report = next(report for report in found.targets if report.target == target)
    return {(pair.variant, pair.engine): pair for pair in report.pairs if pair.verdict != "absent"}


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    """One rehearsal of a good bundle on every kind of board."""
    path = tmp_path_factory.mktemp("bundle") / "tiny.outrider"
    make_bundle(path)
    return rehearse(path, BOARDS)


@pytest.mark.parametrize("target", BOARDS)
def test_a_good_bundle_passes_with_every_variant_on_every_engine(everywhere: Rehearsal, target: str) -> None:
    found = pairs(everywhere, target)
    engines = {"tflite_runtime"} if target == "pi-32bit" else {"onnxruntime", "litert"}
    assert {engine for _, engine in found} >= engines
    assert {variant for variant, _ in found} == {v for v in VARIANTS if target != "pi-32bit" or "tflite" in v}
    for pair in found.values():
        assert (pair.verdict, pair.detail) == ("right", "")
        assert pair.agreement is not None and pair.agreement >= 0.75
        assert pair.max_error["logits"] is not None and pair.max_error["logits"] <= 0.05
        assert pair.peak_rss_bytes > 20e6 and pair.engine_version[0].isdigit()


@pytest.mark.parametrize("target", [name for name in BOARDS if name != "native"])
def test_the_boards_python_sees_the_board(everywhere: Rehearsal, target: str) -> None:
    report = next(report for report in everywhere.targets if report.target == target)
    row = TARGETS[target]
    assert report.emulated and report.cpu == row.qemu_cpu
    assert report.board["machine"] == row.machine  # the interpreter's: this machine's uname says another
    assert set(report.board["features"]) == row.features
    if row.machine != "x86_64":
        assert report.board["python"].startswith("3.11.")
        assert any(package.startswith("python3.11=") for package in report.packages)
        assert any(row.machine in wheel or "armv7l" in wheel for wheel in report.wheels)


def test_no_time_is_given_anywhere(everywhere: Rehearsal) -> None:
    text = json.dumps(everywhere.to_dict())
    assert not re.search(r'"[a-z_]*(_ms|_s|_us|seconds|latency|p50)"', text)
    shown = render({**everywhere.to_dict(), "written": None})
    assert not re.search(r"\d ?(ms|us|s|sec)\b", shown)
    assert "times under an emulator mean nothing" in shown


def test_the_spread_covers_what_each_board_differs_by(everywhere: Rehearsal) -> None:
    assert set(everywhere.spread) == set(VARIANTS)
    for target in BOARDS:
        for (variant, _), pair in pairs(everywhere, target).items():
            spread = everywhere.spread[variant]["logits"]
            error = pair.max_error["logits"]
            assert spread is not None and error is not None
            assert error <= spread + 1e-12  # the stored answer is this machine's, one of those that are compared
    assert everywhere.passed


def test_an_old_interpreter_that_misreads_a_file_in_silence_is_caught(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b.outrider", per_channel=True)
    found = rehearse(tmp_path / "b.outrider", ["native", "pi-32bit"])
    assert pairs(found, "native")["tflite-int8", "litert"].verdict == "right"
    wrong = pairs(found, "pi-32bit")["tflite-int8", "tflite_runtime"]
    assert wrong.verdict == "wrong" and not wrong.only_tolerance
    assert "differs by" in wrong.detail
    assert not found.passed


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "outrider.cli", "rehearse", *map(str, args)]


def run(*args: str | Path) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(command(*args, "--json"), capture_output=True, text=True, timeout=600)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_a_wrong_golden_is_refused_with_exit_code_1(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider", golden_shift=1.0)
    code, result, errors = run(tmp_path / "b.outrider", "--target", "pi3")
    assert code == 1
    assert result["passed"] is False and result["written"] is None
    (pair,) = result["targets"][0]["pairs"]
    assert (pair["verdict"], pair["only_tolerance"]) == ("wrong", True)
    assert "pi3: onnx-float32 on onnxruntime" in errors
    assert "Traceback" not in errors


def test_the_measured_spread_becomes_the_tolerance(tmp_path: Path) -> None:
    source, output = tmp_path / "b.outrider", tmp_path / "new.outrider"
    make_bundle(source, golden_shift=1e-3, tolerance=0.0, signing_keys=[private_key(1)])
    code, result, _ = run(source, "--target", "pi-32bit", "--write-tolerance", output)
    assert code == 0
    assert (result["passed"], result["written"]["dropped_signatures"]) == (False, 1)
    bounds = verify_bundle(output).manifest.golden.tolerance
    assert 1e-3 <= bounds["tflite-float32"]["logits"] < 1e-2
    assert bounds["onnx-float32"] == {"logits": 0.0}
    code, result, _ = run(output, "--target", "pi-32bit")
    assert (code, result["passed"]) == (0, True)


def test_an_instruction_that_the_cpu_does_not_have_is_named(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider", formats=("onnx", "tflite"))
    shadow = tmp_path / "shadow"
    (shadow / "onnxruntime").mkdir(parents=True)
    (shadow / "onnxruntime/__init__.py").write_text(SHADOW)
    found = rehearse(tmp_path / "b.outrider", ["pi3", "pi5"], extra=[shadow])
    illegal = pairs(found, "pi3")["onnx-float32", "onnxruntime"]
    assert illegal.verdict == "illegal"
    assert illegal.detail.startswith("importing onnxruntime, it was killed by SIGILL")
    assert "cortex-a53" in illegal.detail
    assert pairs(found, "pi3")["tflite-float32", "litert"].verdict == "right"
    assert {pair.verdict for pair in pairs(found, "pi5").values()} == {"right"}
    assert [report.passed for report in found.targets] == [False, True]


def test_a_missing_operator_is_named_and_another_variant_serves(tmp_path: Path) -> None:
    files = {"onnx": unknown_operator_onnx()}
    make_real_bundle(tmp_path / "b.outrider", formats=("onnx", "tflite"), files=files)
    found = rehearse(tmp_path / "b.outrider", ["pi4"])
    refused = pairs(found, "pi4")["onnx-float32", "onnxruntime"]
    assert (refused.verdict, refused.missing_operator) == ("refused", "Softsign(1)")
    assert pairs(found, "pi4")["tflite-float32", "litert"].verdict == "right"
    assert found.passed


def test_one_that_never_answers_is_killed(tmp_path: Path) -> None:
    endless = tinymodels.endless_onnx(tinymodels.weights())
    make_real_bundle(tmp_path / "b.outrider", files={"onnx": endless})
    (pair,) = pairs(rehearse(tmp_path / "b.outrider", ["pi4"], timeout_s=12.0), "pi4").values()
    assert pair.verdict == "hung"
    assert "did not end within 12 s and was killed" in pair.detail


def mentioned(text: str) -> list[int]:
    """The processes whose command line names it."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and text in (folder / "cmdline").read_text(errors="replace"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider", files={"onnx": tinymodels.endless_onnx(tinymodels.weights())})
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        command(tmp_path / "b.outrider", "--target", "pi4"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert process.stderr is not None
    said = [next(line for line in process.stderr if "onnx-float32" in line)]
    while not mentioned(str(scratch)):  # the emulator is up once its command line names the view of its root
        assert process.poll() is None, said
    process.send_signal(signal.SIGINT)
    assert "error: interrupted" in process.stderr.read()
    assert process.wait(200) == 130
    process.stderr.close()
    assert mentioned(str(scratch)) == []
    assert list(scratch.iterdir()) == []


def test_what_does_not_fit_the_board_is_stopped(tmp_path: Path) -> None:
    hungry = tinymodels.hungry_onnx(tinymodels.weights(), 3 * 10**8)
    make_real_bundle(tmp_path / "b.outrider", formats=("onnx", "tflite"), files={"onnx": hungry})
    found = pairs(rehearse(tmp_path / "b.outrider", ["pi-zero-2"]), "pi-zero-2")
    assert found["onnx-float32", "onnxruntime"].verdict == "memory"
    assert "768 MiB" in found["onnx-float32", "onnxruntime"].detail
    assert found["tflite-float32", "litert"].verdict == "right"


def test_no_packages_are_an_error_that_says_what_apt_lacks(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider")
    (tmp_path / "empty.list").write_text("")
    options = ["--cache", tmp_path / "cache", "--sources", tmp_path / "empty.list"]
    code, result, errors = run(tmp_path / "b.outrider", "--target", "pi-32bit", *options)
    assert code == 1
    assert result["error"]["type"] == "RehearsalError"
    assert "apt has no python3.11" in result["error"]["message"] and "armhf" in result["error"]["message"]
    assert "bookworm" in result["error"]["hint"]
    assert "Traceback" not in errors
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def test_wheels_that_cannot_be_had_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    pins = tmp_path / "pins.txt"
    pins.write_text("tflite-runtime==2.14.0\n")
    with pytest.raises(RehearsalError, match=r"no wheels for armhf.*tflite-runtime==2\.14\.0") as caught:
        add_wheels(RECIPES["arm"], pins, tmp_path / "site")
    assert "network" in caught.value.hint


def test_a_userland_is_made_again_after_a_kill_in_the_middle(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider", formats=("tflite",))
    cache = tmp_path / "cache"
    options = [tmp_path / "b.outrider", "--target", "pi-32bit", "--cache", cache]
    with subprocess.Popen(command(*options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(cache.glob(".armhf-*.tmp/root/usr")):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert not list(cache.glob("armhf-*"))
    code, result, _ = run(*options)
    assert (code, result["passed"]) == (0, True)
    assert len(list(cache.glob("armhf-*"))) == 1
    assert not list(cache.glob(".*.tmp"))


def test_a_lane_shares_one_userland_between_boards(tmp_path: Path) -> None:
    lanes = [
        lane_for(target_named(name), cache=find_cache(None), work=tmp_path, say=lambda line: None)
        for name in ("pi3", "pi5")
    ]
    assert lanes[0].python[-1] == lanes[1].python[-1]
    told = [subprocess.check_output([*lane.python, "-c", "print(open('/proc/cpuinfo').read())"]) for lane in lanes]
    assert b"0xd03" in told[0] and b"0xd0b" in told[1]
