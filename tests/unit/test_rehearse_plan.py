"""What a userland is made of and how its Python is started: text and names alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_exporters.rehearse import plan
from outrider_exporters.rehearse.plan import RECIPES, apt_options, cpuinfo, identity, pip_options, recipe_for, simulated
from outrider_runtimes.board import this_board
from outrider_runtimes.errors import RehearsalError
from outrider_runtimes.targets import TARGETS, target_named

PINS = {machine: Path(plan.__file__).with_name(recipe.wheels).read_text() for machine, recipe in RECIPES.items()}
EMULATED = [target for target in TARGETS.values() if target.qemu_cpu]


def test_every_emulated_target_has_a_way_to_be_rehearsed():
    for target in EMULATED:
        if target.machine == "x86_64":
            with pytest.raises(RehearsalError, match="x86-avx2"):
                recipe_for(target)
        else:
            assert recipe_for(target).emulator == f"qemu-{target.machine}-static"
            assert target.cpu_part


@pytest.mark.parametrize("machine", RECIPES)
def test_every_engine_of_a_target_has_a_pinned_wheel(machine):
    distributions = {"onnxruntime": "onnxruntime", "litert": "ai-edge-litert", "tflite_runtime": "tflite-runtime"}
    pinned = {line.split("==")[0] for line in PINS[machine].splitlines() if "==" in line}
    for target in TARGETS.values():
        if target.machine == machine:
            assert {distributions[engine] for engine in target.engines} <= pinned
    assert "cryptography" in pinned


@pytest.mark.parametrize("machine", RECIPES)
def test_wheels_are_pinned_one_by_one_and_name_no_place(machine):
    lines = [line for line in PINS[machine].splitlines() if not line.startswith("#")]
    assert lines == sorted(lines)
    for line in lines:
        name, version = line.split("==")
        assert name and version[0].isdigit() and "/" not in line and " " not in line


def test_apt_gets_a_state_of_its_own_and_this_machines_sources():
    options = apt_options(RECIPES["arm"], Path("/s"), None)
    assert options[::2] == ["-o"] * (len(options) // 2)
    settings = dict(option.split("=", 1) for option in options[1::2])
    assert settings["APT::Architecture"] == settings["APT::Architectures"] == "armhf"
    assert {settings[f"Dir::{key}"] for key in ("State", "Cache")} == {"/s"}
    assert settings["Dir::State::status"] == "/s/status"
    assert not [key for key in settings if "Etc" in key]


def test_other_sources_replace_all_of_this_machines():
    options = apt_options(RECIPES["arm"], Path("/s"), Path("/x/bookworm.list"))
    assert "Dir::Etc::SourceList=/x/bookworm.list" in options
    assert "Dir::Etc::SourceParts=/dev/null" in options


def test_what_apt_would_install():
    text = (
        "Reading package lists...\n"
        "Inst gcc-12-base (12.2.0-14+deb12u1 Debian:12.15/oldstable [arm64])\n"
        "Inst libc6 (2.36-9+deb12u14 Debian:12.15/oldstable [arm64]) []\n"
        "Conf libc6 (2.36-9+deb12u14 Debian:12.15/oldstable [arm64])\n"
        "Inst python3-numpy (1:1.24.2-1+deb12u1 Debian:12.15/oldstable [armhf])\n"
    )
    assert simulated(text) == [
        "gcc-12-base=12.2.0-14+deb12u1",
        "libc6=2.36-9+deb12u14",
        "python3-numpy=1:1.24.2-1+deb12u1",
    ]


@given(st.text())
def test_any_text_of_apts_is_read(text):
    assert all("=" in item for item in simulated(text))


def test_pip_is_told_the_userlands_python_and_no_source_builds():
    options = pip_options(RECIPES["aarch64"])
    assert {"--only-binary=:all:", "--no-deps", "--python-version=3.11", "--abi=cp311", "--abi=abi3"} <= set(options)
    platforms = [option.partition("=")[2] for option in options if option.startswith("--platform=")]
    assert platforms[0] == "manylinux_2_36_aarch64"  # bookworm's C library is 2.36
    assert all(name.endswith("_aarch64") for name in platforms)


def test_another_pin_or_recipe_is_another_folder():
    recipe = RECIPES["aarch64"]
    names = {
        identity(recipe, "a==1"),
        identity(recipe, "a==2"),
        identity(dataclasses.replace(recipe, packages=("python3.11",)), "a==1"),
        identity(RECIPES["arm"], "a==1"),
    }
    assert len(names) == 4
    assert identity(recipe, "a==1") in names
    assert all(name.startswith(("arm64-", "armhf-")) for name in names)


def test_a_boards_cpuinfo_has_its_cores_and_no_feature_that_it_lacks():
    lines = cpuinfo(target_named("pi4")).splitlines()
    assert lines.count("CPU part\t: 0xd08") == lines.count("CPU implementer\t: 0x41") == 4
    assert [line for line in lines if line.startswith("processor")] == [f"processor\t: {n}" for n in range(4)]
    assert "CPU architecture: 8" in lines
    assert "CPU architecture: 7" in cpuinfo(target_named("pi-32bit")).splitlines()
    features = next(line for line in lines if line.startswith("Features")).split(":")[1].split()
    assert "asimd" in features and "asimddp" not in features


@pytest.mark.parametrize("target", EMULATED, ids=lambda target: target.name)
def test_a_cpuinfo_says_the_features_of_the_table(tmp_path, target):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo(target), encoding="ascii")
    told = (tmp_path / "proc/cpuinfo").read_text()
    assert all(feature in told.split() for feature in target.features)
    if target.machine == "x86_64":
        assert this_board(tmp_path, machine="x86_64").features == target.features


def test_nothing_of_this_machine_leaks_into_the_guest():
    environment = plan.guest_environment([Path("/a"), Path("/b")], Path("/c"))
    assert environment["PYTHONPATH"] == "/a:/b"
    assert set(environment) == {
        "HOME", "LANG", "PATH", "OMP_NUM_THREADS", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONPYCACHEPREFIX"
    }  # fmt: skip
