"""What is known of the boards that a bundle can be made for, in one table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from outrider_runtimes.board import Board
from outrider_runtimes.errors import ConfigError

MIB = 1024 * 1024

_ARMV8_0 = frozenset(["asimd"])
_ARMV8_2 = frozenset(["asimd", "atomics", "fphp", "asimdhp", "asimddp"])
_BOTH = ("onnxruntime", "litert")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of board.

    Attributes:
        name: what ``targets=`` and ``--target`` call it.
        machine: the architecture, as in ``board.Board``; empty for whatever this machine is.
        features: the CPU features that every such board has, as in ``board.Board``.
        qemu_cpu: the CPU model under which qemu traps what the board's CPU does not have; empty where none is used.
        cpu_part: ARM's number of that CPU, as the board's own /proc/cpuinfo says it; 0 where it is not ARM's.
        memory_bytes: RAM of the smallest such board; 0 where that is not known.
        int8_scheme: ``"U8S8"`` (uint8 activations) where the CPU has VNNI, ``"S8S8"`` elsewhere: S8S8 is what ARM's
            dot products take, and on AVX2 without VNNI U8S8 can saturate.
        engines: the names of the engines that have a package for it.
    """

    name: str
    machine: str
    features: frozenset[str]
    qemu_cpu: str
    cpu_part: int
    memory_bytes: int
    int8_scheme: str
    engines: tuple[str, ...]


_TABLE = (
    Target(
        name="native",
        machine="",
        features=frozenset(),
        qemu_cpu="",
        cpu_part=0,
        memory_bytes=0,
        int8_scheme="S8S8",
        engines=(*_BOTH, "tflite_runtime"),
    ),
    Target(
        name="x86-avx2",
        machine="x86_64",
        features=frozenset(["sse4_2", "avx", "avx2", "fma", "f16c"]),
        qemu_cpu="Haswell",
        cpu_part=0,
        memory_bytes=2048 * MIB,
        int8_scheme="S8S8",
        engines=_BOTH,
    ),
    Target(
        name="pi-zero-2",
        machine="aarch64",
        features=_ARMV8_0,
        qemu_cpu="cortex-a53",
        cpu_part=0xD03,
        memory_bytes=512 * MIB,
        int8_scheme="S8S8",
        engines=_BOTH,
    ),
    Target(
        name="pi3",
        machine="aarch64",
        features=_ARMV8_0,
        qemu_cpu="cortex-a53",
        cpu_part=0xD03,
        memory_bytes=1024 * MIB,
        int8_scheme="S8S8",
        engines=_BOTH,
    ),
    Target(
        name="pi4",
        machine="aarch64",
        features=_ARMV8_0,
        qemu_cpu="cortex-a72",
        cpu_part=0xD08,
        memory_bytes=1024 * MIB,
        int8_scheme="S8S8",
        engines=_BOTH,
    ),
    Target(
        name="pi5",
        machine="aarch64",
        features=_ARMV8_2,
        qemu_cpu="cortex-a76",
        cpu_part=0xD0B,
        memory_bytes=1024 * MIB,
        int8_scheme="S8S8",
        engines=_BOTH,
    ),
    Target(
        name="pi-32bit",
        machine="arm",
        features=frozenset(["neon", "vfpv4"]),
        qemu_cpu="cortex-a7",
        cpu_part=0xC07,
        memory_bytes=512 * MIB,
        int8_scheme="S8S8",
        engines=("tflite_runtime",),
    ),
    Target(
        name="jetson-orin",
        machine="aarch64",
        features=_ARMV8_2,
        qemu_cpu="cortex-a76",  # qemu has no Cortex-A78AE; this one has the same features
        cpu_part=0xD0B,
        memory_bytes=4096 * MIB,
        int8_scheme="S8S8",
        engines=_BOTH,
    ),
)
TARGETS: Mapping[str, Target] = MappingProxyType({target.name: target for target in _TABLE})


def target_named(name: str) -> Target:
    """The row of that name. Raises ConfigError that lists the names."""
    try:
        return TARGETS[name]
    except KeyError:
        raise ConfigError(f"there is no target {name!r}", hint=f"the targets are {', '.join(TARGETS)}") from None


def native_target(board: Board) -> Target:
    """The row ``native`` filled in for this machine."""
    vnni = not board.features.isdisjoint(["avx512_vnni", "avx_vnni"])
    return dataclasses.replace(
        TARGETS["native"],
        machine=board.machine,
        features=board.features,
        memory_bytes=board.memory_bytes,
        int8_scheme="U8S8" if vnni else "S8S8",
    )
