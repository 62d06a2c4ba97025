"""How a target's Python is started on this machine: as it is, or under qemu with that board's CPU."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import outrider
import outrider_runtimes
from outrider.admit.supervise import default_rss_bytes
from outrider_exporters.rehearse.plan import cpuinfo, emulator_of, guest_environment, recipe_for
from outrider_exporters.rehearse.userland import Say, find_tool, made_once, userland
from outrider_runtimes.board import this_board
from outrider_runtimes.environment import child_environment
from outrider_runtimes.errors import RehearsalError
from outrider_runtimes.targets import Target

# What the emulator itself may hold above the memory of the board: about 110 MB were seen with onnxruntime loaded.
EMULATOR_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One target on this machine.

    Attributes:
        python: the command that is its Python; arguments follow.
        environment: the whole environment of that command.
        memory_bytes: what a process of it may hold: the board's RAM and the emulator's own, or what is free here.
        packages, wheels: what its userland was made of; empty where it has none.
    """

    target: Target
    python: tuple[str, ...]
    environment: Mapping[str, str]
    memory_bytes: int
    packages: tuple[str, ...] = ()
    wheels: tuple[str, ...] = ()

    @property
    def emulated(self) -> bool:
        """Whether it runs under qemu."""
        return bool(self.target.qemu_cpu)


def lane_for(
    target: Target, *, cache: Path, work: Path, sources: Path | None = None, say: Say, extra: Sequence[Path] = ()
) -> Lane:
    """Make ready what a target needs.

    Args:
        cache: where userlands are kept.
        work: a folder of the caller's, to be thrown away after the last run; the board's ``/proc/cpuinfo`` goes there.
        sources: see ``userland``.
        extra: more folders for the emulated Python's module search path, before all others.

    Raises:
        RehearsalError: see ``userland``; or this is no machine for the target.
    """
    if not target.qemu_cpu:
        environment = child_environment([*map(str, extra), *sys.path], os.environ)
        return Lane(target=target, python=(sys.executable,), environment=environment, memory_bytes=default_rss_bytes())
    if target.machine == "x86_64":
        return _x86_lane(target, work, extra)
    land = userland(recipe_for(target), cache, sources=sources, say=say)
    view = _view(land.root, target, work)
    path = [*extra, land.site, device_packages(cache)]
    return Lane(
        target=target,
        python=(*_qemu(target, view), str(land.python)),
        environment=guest_environment(path, cache / f"bytecode-{land.folder.name}"),
        memory_bytes=target.memory_bytes + EMULATOR_BYTES,
        packages=land.packages,
        wheels=land.wheels,
    )


def device_packages(cache: Path) -> Path:
    """A folder with ``outrider`` and ``outrider_runtimes`` and nothing else, from where this process has them.

    They may lie in a site-packages whose other packages are for this machine's architecture.
    """
    homes = [Path(package.__path__[0]) for package in (outrider, outrider_runtimes)]
    folder = cache / f"outrider-{hashlib.sha256(repr(homes).encode()).hexdigest()[:12]}"

    def link(staging: Path) -> None:
        for home in homes:
            (staging / home.name).symlink_to(home)

    made_once(folder, link)
    return folder


def _x86_lane(target: Target, work: Path, extra: Sequence[Path]) -> Lane:
    if this_board().machine != "x86_64":
        raise RehearsalError(
            f"{target.name} runs this machine's own Python with a smaller CPU, and this is no x86-64 machine",
            hint="rehearse it on an x86-64 PC",
        )
    environment = child_environment([*map(str, extra), *sys.path], os.environ)
    return Lane(
        target=target,
        python=(*_qemu(target, _view(None, target, work)), sys.executable),
        environment={**environment, "OMP_NUM_THREADS": "1"},
        memory_bytes=target.memory_bytes + EMULATOR_BYTES,
    )


def _qemu(target: Target, view: Path) -> tuple[str, ...]:
    emulator = find_tool(emulator_of(target.machine), "qemu-user-static")
    return (emulator, "-cpu", target.qemu_cpu, "-L", str(view))


def _view(root: Path | None, target: Target, work: Path) -> Path:
    """A root that shares all of ``root`` and has this board's ``/proc/cpuinfo``: one userland serves several boards."""
    view = work / f"root-{target.name}"
    shutil.rmtree(view, ignore_errors=True)
    (view / "proc").mkdir(parents=True)
    (view / "proc/cpuinfo").write_text(cpuinfo(target), encoding="ascii")
    for entry in [] if root is None else root.iterdir():
        if entry.name != "proc":
            (view / entry.name).symlink_to(entry)
    return view
