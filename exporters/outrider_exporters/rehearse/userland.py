"""A board's userland from Debian's packages and the engines' own wheels: made once, then kept in a cache folder."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from outrider_exporters.rehearse.plan import (
    PYTHON,
    RELEASE,
    Recipe,
    apt_options,
    guest_environment,
    identity,
    pip_options,
    simulated,
)
from outrider_runtimes.errors import RehearsalError

Say = Callable[[str], None]

STEP_S = 900.0  # of one download; what is slower than this is stuck
_APT_HINT = f"check the network, and that apt's sources have {RELEASE} for {{debian}}; --sources FILE names others"


@dataclass(frozen=True, kw_only=True)
class Userland:
    """A folder that is whole. ``packages`` are ``name=version``; ``wheels`` are file names."""

    folder: Path
    recipe: Recipe
    packages: tuple[str, ...]
    wheels: tuple[str, ...]

    @property
    def root(self) -> Path:
        """What the emulator takes for ``/``."""
        return self.folder / "root"

    @property
    def site(self) -> Path:
        """The unpacked wheels."""
        return self.folder / "site"

    @property
    def python(self) -> Path:
        """The interpreter, a program of the other architecture."""
        return self.root / "usr/bin" / PYTHON


def find_cache(cache: Path | None, environ: Mapping[str, str] = os.environ) -> Path:
    """The argument, else ``$XDG_CACHE_HOME/outrider``, else ``~/.cache/outrider``; made where it is not there.

    Raises RehearsalError when it cannot be made.
    """
    xdg = environ.get("XDG_CACHE_HOME", "")
    base = Path(xdg) if xdg.startswith("/") else Path("~/.cache").expanduser()
    path = (cache or base / "outrider").absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RehearsalError(
            f"the cache folder {path} cannot be made: {error.strerror}", hint="--cache FOLDER names another"
        ) from None
    return path


def find_tool(name: str, package: str) -> str:
    """The path of a program. Raises RehearsalError that names the Debian package that has it."""
    found = shutil.which(name)
    if found is None:
        raise RehearsalError(f"{name} is not installed", hint=f"apt-get install {package}")
    return found


def userland(recipe: Recipe, cache: Path, *, sources: Path | None = None, say: Say) -> Userland:
    """The userland of an architecture, from the cache or made now.

    It appears under its name whole or not at all: one that was being made when the process was killed is made again.
    Two processes that want the same one wait for each other.

    Args:
        sources: a ``sources.list`` for apt; this machine's where it is None.
        say: is told, in one line, what is being done when that takes a while.

    Raises:
        RehearsalError: a tool is missing, a package or a wheel cannot be had, or what was made does not run.
    """
    pins = Path(__file__).with_name(recipe.wheels)
    folder = cache / identity(recipe, pins.read_text(encoding="utf-8"))

    def make(staging: Path) -> None:
        _check_tools(recipe)
        say(f"making the {recipe.debian} userland in {folder}, once")
        told = {
            "packages": _make_root(recipe, staging, sources, say),
            "wheels": add_wheels(recipe, pins, staging / "site"),
        }
        _prove(recipe, staging)
        (staging / "made.json").write_text(json.dumps(told), encoding="utf-8")

    made_once(folder, make)
    made = json.loads((folder / "made.json").read_text(encoding="utf-8"))
    return Userland(folder=folder, recipe=recipe, packages=tuple(made["packages"]), wheels=tuple(made["wheels"]))


def made_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Have ``make`` fill an empty folder that becomes ``folder`` when it is whole; nothing where that is there already.

    What earlier, killed attempts left behind is removed first. Raises RehearsalError for what the system refuses.
    """
    with _system_errors(folder), _locked(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return
        for left in folder.parent.glob(f".{folder.name}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
        staging.mkdir()
        try:
            make(staging)
            staging.replace(folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def add_wheels(recipe: Recipe, pins: Path, site: Path) -> list[str]:
    """Download the wheels that a file of pins names and unpack them into ``site``. Raises RehearsalError."""
    if importlib.util.find_spec("pip") is None:
        raise RehearsalError("this Python has no pip to download wheels with", hint="python -m ensurepip")
    wheels = site.with_name(f"{site.name}.wheels")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    _step(
        [*command, *pip_options(recipe), "--requirement", str(pins), "--dest", str(wheels)],
        f"pip found no wheels for {recipe.debian}",
        "check the network and pip's configuration (pip config list)",
    )
    found = sorted(wheels.glob("*.whl"))
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    shutil.rmtree(wheels)
    return [wheel.name for wheel in found]


def _check_tools(recipe: Recipe) -> None:
    find_tool("apt-get", "apt (the userland is made of Debian's packages)")
    find_tool("dpkg", "dpkg")
    find_tool(recipe.emulator, "qemu-user-static")


def _make_root(recipe: Recipe, staging: Path, sources: Path | None, say: Say) -> list[str]:
    """Download the packages and all that they need, and unpack them; ``name=version`` of each."""
    hint = _APT_HINT.format(debian=recipe.debian)
    state, archives, root = staging / "apt", staging / "debs", staging / "root"
    for folder in (state / "lists/partial", state / "archives/partial", archives, root):
        folder.mkdir(parents=True)
    (state / "status").touch()
    apt = ["apt-get", "--quiet", *apt_options(recipe, state, sources)]
    # One index that cannot be had leaves the others, and apt takes only what a signed index names: the next step says.
    updated = _run([*apt, "update"])
    asked = f"apt has no {' '.join(recipe.packages)} for {recipe.debian}"
    plan = _run([*apt, "install", "--simulate", *recipe.packages])
    wanted = simulated(plan.stdout)
    if plan.returncode or not wanted:
        first = updated if updated.returncode else plan
        raise RehearsalError(f"{asked}: {_reason(first)}", hint=hint)
    if updated.returncode:
        say(f"apt could not read all of its indexes, and takes what the others have ({_reason(updated)})")
    _step([*apt, "download", *wanted], asked, hint, cwd=archives)
    for archive in sorted(archives.glob("*.deb")):
        _step(["dpkg", "--extract", str(archive), str(root)], f"{archive.name} cannot be unpacked", "free disk space")
    for link, target in recipe.links.items():
        (root / link).symlink_to(target)
    shutil.rmtree(state)
    shutil.rmtree(archives)
    return wanted


def _prove(recipe: Recipe, staging: Path) -> None:
    """The userland's Python imports numpy; else there would be a folder that looks whole."""
    root = staging / "root"
    environment = guest_environment([staging / "site"], staging / "bytecode")
    command = [recipe.emulator, "-L", str(root), str(root / "usr/bin" / PYTHON), "-c", "import numpy"]
    _step(command, f"the {recipe.debian} userland does not run", "upgrade qemu-user-static", environment=environment)
    shutil.rmtree(staging / "bytecode", ignore_errors=True)


def _step(
    command: Sequence[str],
    what: str,
    hint: str,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    done = _run(command, cwd=cwd, environment=environment)
    if done.returncode:
        raise RehearsalError(f"{what}: {_reason(done)}", hint=hint)


def _run(
    command: Sequence[str], *, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"} if environment is None else environment
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=STEP_S,
        )
    except subprocess.TimeoutExpired:
        raise RehearsalError(f"{command[0]} did not end within {STEP_S:g} s", hint="check the network") from None


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The line of a tool's output that says most: apt's first ``E:``, pip's last ``ERROR:``, else the last."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E: ")] or [
        line for line in lines if line.startswith("ERROR: ")
    ][-1:]
    return (errors or lines[-1:] or [f"exit code {done.returncode}"])[0][:300]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _system_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RehearsalError(
            f"{error.filename or folder}: {error.strerror or error}",
            hint="a userland takes 300 MB; --cache FOLDER names another place",
        ) from None
