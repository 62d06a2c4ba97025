"""What a machine is, read from made-up proc and sys trees; and the table of targets."""

from __future__ import annotations

import dataclasses
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider_runtimes.board import Board, interpreter_machine, normal_machine, this_board, usable_threads
from outrider_runtimes.engines import find_engines
from outrider_runtimes.errors import ConfigError
from outrider_runtimes.targets import TARGETS, native_target, target_named


@pytest.fixture
def tree(tmp_path):
    """Writes files under a root: ``tree({"proc/meminfo": "..."})``."""

    def write(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return write


def auxv(hwcap, hwcap2=0, *, pair="=QQ"):
    pairs = [(33, 0x7F00), (16, hwcap), (6, 4096), (26, hwcap2), (0, 0)]
    return b"".join(struct.pack(pair, *item) for item in pairs)


def test_this_machine_is_described():
    board = this_board()
    assert board.cpus >= 1
    assert board.memory_bytes > 2**26
    assert board.python.count(".") == 2
    assert board.machine == interpreter_machine()
    assert usable_threads(board) == board.cpus


def test_an_empty_root_says_unknown_and_does_not_fail(tmp_path):
    board = this_board(tmp_path, affinity=3, machine="aarch64")
    assert (board.cpus, board.memory_bytes, board.features) == (3, 0, frozenset())


@pytest.mark.parametrize(
    ("name", "pointer_bytes", "machine"),
    [
        ("x86_64", 8, "x86_64"),
        ("AMD64", 8, "x86_64"),
        ("x86_64", 4, "i686"),
        ("aarch64", 8, "aarch64"),
        ("arm64", 8, "aarch64"),
        ("aarch64", 4, "arm"),
        ("armv7l", 4, "arm"),
        ("arm", 4, "arm"),
        ("riscv64", 8, "riscv64"),
    ],
)
def test_one_name_for_an_architecture(name, pointer_bytes, machine):
    assert normal_machine(name, pointer_bytes=pointer_bytes) == machine


@pytest.mark.parametrize(
    ("quota", "affinity", "cpus"),
    [
        ("max 100000", 4, 4),
        ("200000 100000", 4, 2),
        ("150000 100000", 4, 2),
        ("50000 100000", 4, 1),
        ("800000 100000", 4, 4),
        ("1000 100000", 4, 1),
        ("", 4, 4),
        ("nonsense", 4, 4),
        ("100000 0", 4, 4),
    ],
)
def test_cgroup_2_quota(tree, quota, affinity, cpus):
    root = tree({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": quota})
    assert this_board(root, affinity=affinity).cpus == cpus


def test_a_group_above_binds_too(tree):
    root = tree(
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            "sys/fs/cgroup/a/cpu.max": "100000 100000",
            "sys/fs/cgroup/a/memory.max": "300000000",
            "sys/fs/cgroup/a/b/memory.max": "max",
            "proc/meminfo": "MemTotal:  1000000 kB\n",
        }
    )
    board = this_board(root, affinity=8)
    assert (board.cpus, board.memory_bytes) == (1, 300000000)


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
def test_cgroup_1_quota_and_memory(tree, folder):
    root = tree(
        {
            "proc/self/cgroup": "4:memory:/d\n3:cpu,cpuacct:/d\n1:name=systemd:/\n0::/\n",
            f"sys/fs/cgroup/{folder}/d/cpu.cfs_quota_us": "250000\n",
            f"sys/fs/cgroup/{folder}/d/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/d/memory.limit_in_bytes": "268435456\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "proc/meminfo": "MemFree: 5 kB\nMemTotal:  500000 kB\n",
        }
    )
    board = this_board(root, affinity=4)
    assert (board.cpus, board.memory_bytes) == (3, 268435456)


def test_cgroup_1_without_a_quota(tree):
    root = tree(
        {
            "proc/self/cgroup": "3:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        }
    )
    assert this_board(root, affinity=4).cpus == 4


def test_in_a_container_the_hosts_path_is_not_there(tree):
    root = tree({"proc/self/cgroup": "0::/docker/abc\n", "sys/fs/cgroup/cpu.max": "100000 100000"})
    assert this_board(root, affinity=4).cpus == 1


def test_a_path_upwards_stays_inside(tree, tmp_path):
    root = tree({"root/proc/self/cgroup": "0::/../../../x\n", "cpu.max": "100000 100000"}) / "root"
    assert this_board(root, affinity=4).cpus == 4


def test_features_by_hwcap_on_arm(tree):
    pi5 = tree({"proc/self/auxv": auxv(1 << 0 | 1 << 1 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 20)})
    assert this_board(pi5, machine="aarch64").features == TARGETS["pi5"].features
    pi4 = tree({"proc/self/auxv": auxv(1 << 0 | 1 << 1 | 1 << 7), "proc/cpuinfo": "Features : asimddp\nflags: avx2\n"})
    assert this_board(pi4, machine="aarch64").features == TARGETS["pi4"].features
    newer = tree({"proc/self/auxv": auxv(1 << 1, 1 << 13 | 1 << 14)})
    assert this_board(newer, machine="aarch64").features == {"asimd", "i8mm", "bf16"}


def test_features_by_hwcap_on_32_bit_arm(tree):
    root = tree({"proc/self/auxv": auxv(1 << 12 | 1 << 16, pair="=LL")})
    assert this_board(root, machine="arm").features == TARGETS["pi-32bit"].features


def test_features_by_flags_on_x86(tree):
    root = tree({"proc/cpuinfo": "model name : X\nflags\t\t: fpu sse4_2 avx avx2 fma f16c vmx\nflags : avx512f\n"})
    assert this_board(root, machine="x86_64").features == TARGETS["x86-avx2"].features


@given(st.binary(max_size=200))
def test_any_auxiliary_vector_is_read_or_ignored(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("root")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/auxv").write_bytes(data)
    assert isinstance(this_board(root, affinity=1, machine="aarch64"), Board)


def test_the_table_is_whole():
    assert list(TARGETS) == ["native", "x86-avx2", "pi-zero-2", "pi3", "pi4", "pi5", "pi-32bit", "jetson-orin"]
    engines = {engine.name for engine in find_engines()}
    for name, target in TARGETS.items():
        assert target.name == name
        assert target.int8_scheme in ("S8S8", "U8S8")
        assert target.engines and set(target.engines) <= engines
        assert (target.qemu_cpu == "") == (name == "native")


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        TARGETS["pi6"] = TARGETS["pi5"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        TARGETS["pi5"].memory_bytes = 0  # type: ignore[misc]


def test_a_target_by_name():
    assert target_named("pi4") is TARGETS["pi4"]
    with pytest.raises(ConfigError, match="pi6") as caught:
        target_named("pi6")
    assert all(name in caught.value.hint for name in TARGETS)


@pytest.mark.parametrize(
    ("features", "scheme"),
    [({"avx2"}, "S8S8"), ({"avx2", "avx512_vnni"}, "U8S8"), ({"avx_vnni"}, "U8S8"), ({"asimddp"}, "S8S8")],
)
def test_native_takes_the_boards_scheme(features, scheme):
    board = Board(machine="m", features=frozenset(features), cpus=2, memory_bytes=5, python="3.11.0")
    target = native_target(board)
    assert (target.machine, target.memory_bytes, target.int8_scheme) == ("m", 5, scheme)
    assert target.features == features


def test_a_board_as_json_is_all_of_it():
    board = this_board()
    told = board.to_dict()
    assert set(told) == {field.name for field in dataclasses.fields(Board)}
    assert Board(**{**told, "features": frozenset(told["features"])}) == board
    assert told == json.loads(json.dumps(told))
