"""What a board says of its heat, from made-up trees like those of real boards."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_runtimes import heat as heat_module
from outrider_runtimes.heat import Heat, read_heat
from support.trees import tree

THERMAL = "sys/class/thermal"


def tool(root: Path, script: str) -> None:
    path = root / "usr/bin/vcgencmd"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a busy machine takes to start a shell decides no test."""
    monkeypatch.setattr(heat_module, "VCGENCMD_S", 120.0)


def test_nothing_is_known_of_an_empty_root(tmp_path: Path) -> None:
    assert read_heat(tmp_path) == Heat()


def test_this_machine_can_be_asked() -> None:
    heat = read_heat()
    assert heat.celsius is None or -40 < heat.celsius < 150


def test_the_hottest_zone_counts_and_unwired_ones_do_not(tmp_path: Path) -> None:
    zones = {"0": "48312\n", "1": "61000", "2": "-274000", "3": "255000", "4": "", "5": "hot"}
    tree(tmp_path, {f"{THERMAL}/thermal_zone{n}/temp": text for n, text in zones.items()})
    assert read_heat(tmp_path).celsius == 61.0


@pytest.mark.parametrize(
    ("kind", "state", "throttled"),
    [
        ("cpufreq-cpu0", "0", False),
        ("thermal-cpufreq-0", "3", True),
        ("Processor", "1", True),
        ("cpu-cluster0", "2", True),
        ("pwm-fan", "4", None),
        ("thermal-cpufreq-0", "", None),
    ],
)
def test_a_cooling_device_of_the_processor_says_whether_it_is_slowed_down(
    tmp_path: Path, kind: str, state: str, throttled: bool | None
) -> None:
    device = f"{THERMAL}/cooling_device0"
    tree(tmp_path, {f"{device}/type": kind, f"{device}/cur_state": state})
    assert read_heat(tmp_path).throttled is throttled


@pytest.mark.parametrize(
    ("word", "throttled", "undervolted"),
    [
        ("0", False, False),
        ("1", False, True),
        ("2", True, False),
        ("4", True, False),
        ("8", True, False),
        ("50005", True, True),
        ("50000", False, False),  # since it booted, and not now
        ("gibberish", None, False),
    ],
)
@pytest.mark.parametrize("by", ["kernel", "tool"])
def test_the_raspberry_pis_firmware(
    tmp_path: Path, word: str, throttled: bool | None, undervolted: bool, by: str
) -> None:
    if by == "kernel":
        tree(tmp_path, {"sys/devices/platform/soc/soc:firmware/get_throttled": word + "\n"})
    else:
        tool(tmp_path, f'[ "$1" = get_throttled ] && echo throttled=0x{word}')
    heat = read_heat(tmp_path)
    assert (heat.throttled, heat.undervolted) == (throttled, undervolted)


@pytest.mark.parametrize("script", ["exit 1", "echo", "printf '\\377'"])
def test_a_tool_that_fails_is_unknown(tmp_path: Path, script: str) -> None:
    tool(tmp_path, script)
    assert read_heat(tmp_path) == Heat()


def test_the_lowest_ceiling_of_all_clusters_counts(tmp_path: Path) -> None:
    policies = {"0": ("1500000", "1500000"), "4": ("1200000", "2400000"), "7": ("", "1000"), "8": ("5", "0")}
    files = {}
    for number, (allowed, own) in policies.items():
        folder = f"sys/devices/system/cpu/cpufreq/policy{number}"
        files |= {f"{folder}/scaling_max_freq": allowed, f"{folder}/cpuinfo_max_freq": own}
    assert read_heat(tree(tmp_path, files)).ceiling == 0.5


@given(st.binary(max_size=20))
def test_whatever_a_file_says_it_is_no_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    root = tree(tmp_path_factory.mktemp("root"), {f"{THERMAL}/cooling_device0/type": "Processor"})
    for name in (f"{THERMAL}/thermal_zone0/temp", f"{THERMAL}/cooling_device0/cur_state"):
        tree(root, {name: ""})
        (root / name).write_bytes(data)
    heat = read_heat(root)
    assert heat.celsius is None or -40 < heat.celsius < 150
