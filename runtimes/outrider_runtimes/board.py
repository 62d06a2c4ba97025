"""What this machine is to a model: architecture, CPU features, CPUs that may be used, memory."""

from __future__ import annotations

import math
import os
import platform
import struct
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from outrider_runtimes.nouns import dataclass

X86_FEATURES = frozenset(
    ["sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni", "amx_int8"]
)
_AT_HWCAP, _AT_HWCAP2 = 16, 26
# Bit numbers of the kernel's asm/hwcap.h, for what decides between kernels of an engine; names as in its cpuinfo.
_HWCAP = {
    "aarch64": {"asimd": 1, "atomics": 8, "fphp": 9, "asimdhp": 10, "asimddp": 20, "sve": 22},
    "arm": {"neon": 12, "vfpv4": 16, "asimdhp": 23, "asimddp": 24},
}
_HWCAP2 = {"aarch64": {"sve2": 1, "i8mm": 13, "bf16": 14}, "arm": {}}


@dataclass(frozen=True, kw_only=True)
class Board:
    """This machine as this process sees it.

    Attributes:
        machine: the interpreter's architecture, not the kernel's: ``x86_64``, ``aarch64``, ``arm`` (32 bits), ...
        features: CPU features that decide how fast a model runs, by their names in Linux; empty where unknown.
        cpus: how many CPUs may be used at once: affinity, and the control group's quota rounded up.
        memory_bytes: RAM, or the control group's limit where that is less; 0 where unknown.
        python: the interpreter's version, ``3.11.9``.
    """

    machine: str
    features: frozenset[str]
    cpus: int
    memory_bytes: int
    python: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "machine": self.machine,
            "features": sorted(self.features),
            "cpus": self.cpus,
            "memory_bytes": self.memory_bytes,
            "python": self.python,
        }


def this_board(root: Path = Path("/"), *, affinity: int | None = None, machine: str | None = None) -> Board:
    """Look at this machine.

    Args:
        root: where ``proc`` and ``sys`` are.
        affinity: how many CPUs the process is bound to; asked of the system when None.
        machine: an architecture as in ``Board``; the interpreter's when None.
    """
    machine = machine or interpreter_machine()
    bound_to = affinity if affinity is not None else _affinity()
    quota = _cpu_quota(root)
    cpus = bound_to if quota is None else min(bound_to, max(1, math.ceil(quota)))
    limits = [size for size in (_total_memory(root), _memory_limit(root)) if size]
    return Board(
        machine=machine,
        features=_features(root, machine),
        cpus=cpus,
        memory_bytes=min(limits, default=0),
        python=platform.python_version(),
    )


def usable_threads(board: Board) -> int:
    """The most threads that an engine should be given here: one a CPU that may be used, at least 1."""
    return max(1, board.cpus)


def interpreter_machine() -> str:
    """The architecture that this interpreter was built for; uname names the kernel's, which may be wider."""
    built_for = getattr(sys.implementation, "_multiarch", "")  # where it is there, the others need not be read
    if not built_for:
        import sysconfig

        built_for = str(sysconfig.get_config_var("HOST_GNU_TYPE") or sysconfig.get_config_var("MULTIARCH") or "")
    return normal_machine(built_for.split("-", maxsplit=1)[0] or platform.machine(), pointer_bytes=struct.calcsize("P"))


def normal_machine(name: str, *, pointer_bytes: int) -> str:
    """One name for each architecture: ``amd64`` is ``x86_64``; a 32-bit interpreter on an ARM kernel is ``arm``."""
    name = name.lower()
    if name in ("x86_64", "amd64", "i386", "i486", "i586", "i686", "x86"):
        return "x86_64" if pointer_bytes == 8 else "i686"
    if name.startswith(("aarch64", "arm")):
        return "aarch64" if pointer_bytes == 8 else "arm"
    return name


def _affinity() -> int:
    ask = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(ask(0)) if ask else os.cpu_count() or 1


def _features(root: Path, machine: str) -> frozenset[str]:
    if machine in ("x86_64", "i686"):
        return frozenset(_cpuinfo_flags(root)) & X86_FEATURES
    if machine not in _HWCAP:
        return frozenset()
    vector = _auxiliary_vector(root, pointer_bytes=8 if machine == "aarch64" else 4)
    found = [name for name, bit in _HWCAP[machine].items() if vector.get(_AT_HWCAP, 0) >> bit & 1]
    found += [name for name, bit in _HWCAP2[machine].items() if vector.get(_AT_HWCAP2, 0) >> bit & 1]
    return frozenset(found)


def _cpuinfo_flags(root: Path) -> list[str]:
    for line in _read(root / "proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            return line.partition(":")[2].split()
    return []


def _auxiliary_vector(root: Path, *, pointer_bytes: int) -> dict[int, int]:
    """What the kernel told this process at its start. On ARM /proc/cpuinfo can be another machine's, under qemu."""
    try:
        data = (root / "proc/self/auxv").read_bytes()
    except OSError:
        return {}
    pair = struct.Struct("=QQ" if pointer_bytes == 8 else "=LL")
    whole = data[: len(data) - len(data) % pair.size]
    return dict(pair.iter_unpack(whole))


def _total_memory(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _cpu_quota(root: Path) -> float | None:
    """The least quota in CPUs of the control groups that this process is in; None when there is none."""
    quotas = []
    for folder in _groups(root, "cpu"):
        words = _read(folder / "cpu.max").split()
        if not words:
            words = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _memory_limit(root: Path) -> int | None:
    limits = []
    for folder in _groups(root, "memory"):
        text = (_read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")).strip()
        if text.isdigit():
            limits.append(int(text))
    return min(limits, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups, version 1 and 2, each with those above it, which bind it too.

    In a container the path may be the host's, whose folders are not there; the mount's own root then remains.
    """
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        inside = PurePosixPath(*[part for part in path.split("/") if part not in ("", "..")])
        if not names:
            bases = [mount, mount / "unified"]
        elif controller in names.split(","):
            bases = list({mount / names, mount / controller})  # most often the same
        else:
            continue
        for base in bases:
            yield from (base / group for group in (inside, *inside.parents))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
