"""What a board's userland is made of and how its Python is started: rules over names and text, no I/O."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from outrider_runtimes.errors import RehearsalError
from outrider_runtimes.targets import Target

LAYOUT = 1  # of a userland's folder; another number makes every userland again
PYTHON = "python3.11"  # Debian bookworm's
RELEASE = "Debian 12 (bookworm)"
CORES = 4
TIMEOUT_S = 300.0  # of one variant on one engine; an emulator is about twenty times slower than this machine
_ARM_IMPLEMENTER = 0x41
# What every 64-bit x86 CPU says, beside what the table of targets has of it.
_X86_BASE = "fpu tsc cx8 cmov mmx fxsr sse sse2 lm pni ssse3 sse4_1 popcnt"
_SIMULATED = re.compile(r"^Inst (\S+) \((\S+) ", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the userland of one architecture is made.

    Attributes:
        machine: as in ``targets.Target``.
        debian: what Debian calls it.
        packages: those that are asked for; apt adds what they depend on.
        wheels: the file beside this one that pins the wheels.
        platforms: pip's tags of what Debian bookworm's C library runs there, newest first.
        links: path in the root, and what it leads to: what the packages' own scripts would have linked.
    """

    machine: str
    debian: str
    packages: tuple[str, ...]
    wheels: str
    platforms: tuple[str, ...]
    links: Mapping[str, str]

    @property
    def emulator(self) -> str:
        """The qemu program."""
        return emulator_of(self.machine)


def _manylinux(machine: str, minors: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"manylinux_2_{minor}_{machine}" for minor in minors)


_NATIVE_PACKAGES = (PYTHON, "libgomp1", "libstdc++6")
_LIBRARIES = "usr/lib/arm-linux-gnueabihf"
_BLAS = ("libblas.so.3", "liblapack.so.3", "libopenblas.so.0")
RECIPES: Mapping[str, Recipe] = {
    "aarch64": Recipe(
        machine="aarch64",
        debian="arm64",
        packages=_NATIVE_PACKAGES,
        wheels="wheels-aarch64.txt",
        platforms=(*_manylinux("aarch64", range(36, 16, -1)), "manylinux2014_aarch64"),
        links={},
    ),
    "arm": Recipe(
        machine="arm",
        debian="armhf",
        packages=(*_NATIVE_PACKAGES, "python3-numpy", "libopenblas0-serial", "python3-cffi-backend"),
        wheels="wheels-arm.txt",
        platforms=(*_manylinux("armv7l", range(36, 16, -1)), "manylinux2014_armv7l"),
        links={f"{_LIBRARIES}/{name}": f"openblas-serial/{name}" for name in _BLAS},
    ),
}


def emulator_of(machine: str) -> str:
    """The program that runs that architecture's programs here."""
    return f"qemu-{machine}-static"


def recipe_for(target: Target) -> Recipe:
    """The recipe of a target's architecture. Raises RehearsalError where there is none."""
    try:
        return RECIPES[target.machine]
    except KeyError:
        raise RehearsalError(f"there is no userland for {target.name} ({target.machine})") from None


def identity(recipe: Recipe, pins: str) -> str:
    """The folder name of a userland: another recipe or another pin is another folder."""
    told = repr((LAYOUT, recipe, sorted(recipe.links.items()), pins))
    return f"{recipe.debian}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def apt_options(recipe: Recipe, state: Path, sources: Path | None) -> list[str]:
    """Options that give apt a state of its own, for another architecture, from this machine's sources.

    Args:
        state: an empty folder with ``lists/partial``, ``archives/partial`` and an empty ``status``.
        sources: a ``sources.list`` to take in place of this machine's.
    """
    settings = {
        "APT::Architecture": recipe.debian,
        "APT::Architectures": recipe.debian,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",  # else apt cannot write where only this user may
        "Acquire::Languages": "none",
        "Dir::State": state,
        "Dir::State::lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state,
    }
    if sources is not None:
        settings |= {"Dir::Etc::SourceList": sources.absolute(), "Dir::Etc::SourceParts": "/dev/null"}
    return [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]


def simulated(text: str) -> list[str]:
    """``package=version`` of every ``Inst`` line of ``apt-get install --simulate``, in its order."""
    return [f"{name}={version}" for name, version in _SIMULATED.findall(text)]


def pip_options(recipe: Recipe) -> list[str]:
    """What makes ``pip download`` take wheels for the userland's Python and nothing else."""
    tags = [f"--platform={platform}" for platform in recipe.platforms]
    version = PYTHON.removeprefix("python")
    abi = f"cp{version.replace('.', '')}"
    return [
        "--only-binary=:all:",
        "--no-deps",
        "--implementation=cp",
        f"--python-version={version}",
        *(f"--abi={name}" for name in (abi, "abi3", "none")),
        *tags,
    ]


def cpuinfo(target: Target) -> str:
    """The board's ``/proc/cpuinfo``: engines read it, and qemu would show them this machine's."""
    if target.machine == "x86_64":
        flags = " ".join([*_X86_BASE.split(), *sorted(target.features)])
        lines = ["vendor_id\t: GenuineIntel", f"model name\t: {target.qemu_cpu}", f"flags\t\t: {flags}"]
    else:
        lines = [
            f"Features\t: {' '.join(_arm_features(target))}",
            f"CPU implementer\t: {_ARM_IMPLEMENTER:#04x}",
            f"CPU architecture: {7 if target.machine == 'arm' else 8}",
            "CPU variant\t: 0x0",
            f"CPU part\t: {target.cpu_part:#05x}",
            "CPU revision\t: 3",
        ]
    return "".join(f"processor\t: {core}\n" + "\n".join(lines) + "\n\n" for core in range(CORES))


def _arm_features(target: Target) -> list[str]:
    base = ["half", "thumb", "fastmult", "vfp", "edsp", "vfpv3"] if target.machine == "arm" else ["fp", "crc32"]
    return [*base, *sorted(target.features)]


def guest_environment(path: Sequence[Path], bytecode: Path) -> dict[str, str]:
    """What the emulated Python is given; nothing of this machine's libraries leaks into it.

    Args:
        path: folders for its module search path.
        bytecode: where it keeps compiled modules: an emulator takes seconds to compile what it imports.
    """
    return {
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": ":".join(map(str, path)),
        "PYTHONSAFEPATH": "1",
        "PYTHONPYCACHEPREFIX": str(bytecode),
    }
