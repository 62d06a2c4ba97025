"""What `outrider doctor` finds: each thing sound, and each thing broken on purpose."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from outrider import doctor
from outrider.bundle import save_keypair
from outrider.doctor import Check, Patient, duplicates, examine
from outrider.installer import install
from outrider_runtimes.clock import clock_is_synchronised
from support.realbundles import make_real_bundle

NOW_S = 1_790_000_000.0


@pytest.fixture
def patient(tmp_path: Path) -> Patient:
    """A healthy board: an arm64 by its trees, on this machine's interpreter."""
    return Patient(
        state=tmp_path / "state",
        root=tmp_path / "root",
        environ={},
        now_s=lambda: NOW_S,
        synchronised=lambda: True,
    )


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def look(name: str, patient: Patient) -> list[Check]:
    return list(doctor._CHECKS[name][0](patient))


def one(name: str, patient: Patient) -> Check:
    (check,) = look(name, patient)
    return check


def changed(patient: Patient, **fields: Any) -> Patient:
    return dataclasses.replace(patient, **fields)


@pytest.mark.slow
def test_every_check_that_finds_fault_has_a_cause_and_a_cure(patient: Patient, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    sick = changed(
        patient,
        state=tmp_path / "file" / "state",
        trust=tmp_path / "no keys",
        broker="http://not-a-broker",
        endpoint="ftp://not-an-endpoint",
        now_s=lambda: 0.0,
    )
    checks = examine(sick)
    broken = {check.name for check in checks if check.status == "broken"}
    assert broken >= {"clock", "state", "trust", "broker", "endpoint"}
    for check in checks:
        assert (check.status == "ok") == (check.cause == "") == (check.cure == ""), check


@pytest.mark.slow
def test_a_check_that_fails_itself_is_a_broken_one_and_the_others_go_on(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> bool:
        raise ZeroDivisionError("a bug")

    checks = {check.name: check for check in examine(changed(patient, synchronised=fail))}
    assert (checks["clock"].status, checks["clock"].cause) == ("broken", "a bug")
    assert "report" in checks["clock"].cure
    assert "state" in checks


@pytest.mark.parametrize(
    ("synchronised", "now_s", "status"),
    [(True, NOW_S, "ok"), (None, NOW_S, "ok"), (False, NOW_S, "warning"), (True, 86400.0, "broken")],
)
def test_a_clock_that_nobody_sets_is_a_warning_and_a_wrong_one_is_broken(
    patient: Patient, synchronised: bool | None, now_s: float, status: str
) -> None:
    check = one("clock", changed(patient, synchronised=lambda: synchronised, now_s=lambda: now_s))
    assert check.status == status
    assert time.strftime("%Y", time.gmtime(now_s)) in check.found
    assert ("timedatectl" in check.cure) == (status != "ok")


def test_the_kernel_can_be_asked_about_its_clock() -> None:
    assert clock_is_synchronised() in (True, False, None)


@pytest.mark.parametrize(
    ("throttled", "temperature", "status", "cause"),
    [
        ("0", "45000", "ok", ""),
        ("1", "45000", "warning", "supply"),
        ("4", "82000", "warning", "slowed down for its heat"),
        ("0", "81000", "warning", "begins to slow down"),
    ],
)
def test_a_hot_or_undervolted_board_is_a_warning_with_its_cause(
    patient: Patient, throttled: str, temperature: str, status: str, cause: str
) -> None:
    write(
        patient.root,
        sys__devices__platform__soc__firmware__get_throttled=throttled,
        sys__class__thermal__thermal_zone0__temp=temperature,
    )
    check = one("heat", patient)
    assert check.status == status
    assert cause in check.cause
    assert f"{int(temperature) // 1000} C" in check.found


def test_a_board_without_sensors_is_not_ill(patient: Patient) -> None:
    assert one("heat", patient) == Check(name="heat", status="ok", found="no sensor")


def test_the_processor_threads_and_memory(patient: Patient) -> None:
    write(
        patient.root,
        proc__cpuinfo="flags\t\t: fpu avx2 fma\n",
        proc__self__cgroup="0::/\n",
        sys__fs__cgroup__cpu="",
        proc__meminfo="MemTotal: 500000 kB\nMemAvailable: 30000 kB\n",
    )
    checks = {check.name: check for check in look("processor", patient)}
    assert "memory" in checks and checks["memory"].status == "warning"
    assert checks["memory"].found == "488 MiB, 29 MiB free"
    assert "CPUs may be used at once" in checks["threads"].found
    write(patient.root, proc__meminfo="MemTotal: 500000 kB\nMemAvailable: 300000 kB\n", dev__nvhost_gpu="")
    (patient.root / "dev/nvhost-gpu").touch()
    checks = {check.name: check for check in look("processor", patient)}
    assert checks["memory"].status == "ok"
    assert "NVIDIA" in checks["gpu"].found


def test_a_processor_of_which_nothing_is_known_is_said(patient: Patient) -> None:
    assert look("processor", patient)[0].status == "warning"
    assert look("processor", changed(patient, root=Path("/")))[0].status == "ok"


@pytest.mark.slow
def test_the_state_directory_and_what_is_installed(patient: Patient, tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider")
    install(tmp_path / "b.outrider", state=patient.state)
    assert [(check.name, check.status) for check in look("state", patient)] == [("state", "ok"), ("bundle tiny", "ok")]
    assert patient.state is not None
    assert not list(patient.state.glob(".doctor*"))
    for blob in (patient.state / "blobs/sha256").iterdir():
        data = bytearray(blob.read_bytes())
        if not data.startswith(b"{"):
            data[len(data) // 2] ^= 1
            blob.write_bytes(data)
    damaged = look("state", patient)[1]
    assert (damaged.status, "was damaged" in damaged.cause, "install" in damaged.cure) == ("broken", True, True)
    (patient.state / "names/tiny.json").write_text("{")
    assert look("state", patient)[1].status == "broken"


@pytest.mark.parametrize(("free", "status"), [(2**30, "ok"), (100 * 2**20, "warning"), (2**20, "broken")])
def test_a_disk_that_fills_is_a_warning_and_a_full_one_is_broken(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, free: int, status: str
) -> None:
    usage = doctor.shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    check = one("state", patient)
    assert check.status == status
    assert f"{free / 2**20:.0f} MiB free" in check.found


def test_no_key_is_a_warning_and_a_folder_of_revoked_ones_is_broken(patient: Patient, tmp_path: Path) -> None:
    assert one("trust", patient).status == "warning"
    _, public = save_keypair(tmp_path / "keys", "ours")
    assert one("trust", changed(patient, trust=public)).found.startswith("1 key in ")
    assert one("trust", changed(patient, environ={"OUTRIDER_TRUST": str(public)})).status == "ok"
    (tmp_path / "keys/revoked").mkdir()
    public.rename(tmp_path / "keys/revoked" / public.name)
    check = one("trust", changed(patient, trust=tmp_path / "keys"))
    assert (check.status, "revoked" in check.cause) == ("broken", True)


def test_two_distributions_of_one_package_are_found() -> None:
    assert list(duplicates({"onnxruntime": ["onnxruntime", "onnxruntime"], "numpy": ["numpy", "other"]})) == []
    (check,) = duplicates({"onnxruntime": ["onnxruntime_gpu", "onnxruntime"]})
    assert (check.name, check.status, check.found) == (
        "package onnxruntime",
        "broken",
        "onnxruntime and onnxruntime-gpu",
    )
    assert check.cure.startswith("pip uninstall -y onnxruntime onnxruntime-gpu, then install")


@pytest.mark.slow
def test_a_second_distribution_that_is_really_there(
    patient: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "site/onnxruntime_gpu-1.20.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.20.0\n")
    (info / "top_level.txt").write_text("onnxruntime\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (check,) = [check for check in look("engines", patient) if check.name == "package onnxruntime"]
    assert check.found == "onnxruntime and onnxruntime-gpu"


@pytest.mark.slow
def test_each_engine_is_found_with_its_version_or_absent(patient: Patient) -> None:
    checks = {check.name: check for check in look("engines", patient)}
    assert checks["engine onnxruntime"].status == checks["engine litert"].status == "ok"
    assert checks["engine onnxruntime"].found.startswith("version 1.")
    absent = checks["engine tflite_runtime"]
    assert (absent.status, absent.found) == ("ok", "not installed")  # another one runs its format


@pytest.mark.slow
def test_an_engine_that_kills_its_process_and_one_that_does_not_import(
    patient: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {
        "onnxruntime": f"import os\nos.kill(os.getpid(), {int(signal.SIGILL)})\n",
        "ai_edge_litert": "raise ImportError('built for another numpy')\n",
    }
    for package, source in sources.items():
        (tmp_path / "site" / package).mkdir(parents=True)
        (tmp_path / "site" / package / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    checks = {check.name: check for check in look("engines", patient)}
    assert checks["engine onnxruntime"].status == checks["engine litert"].status == "broken"
    assert f"exit code {-signal.SIGILL}" in checks["engine onnxruntime"].cause
    assert "built for another numpy" in checks["engine litert"].cause
    assert "pip install" in checks["engine litert"].cure
    assert checks["engines"].status == "broken"
    assert checks["engine tflite_runtime"].status == "warning"


def test_nothing_is_left_behind_where_nothing_is_installed(patient: Patient) -> None:
    look("state", patient)
    assert patient.state is not None
    assert os.listdir(patient.state) == []  # noqa: PTH208
