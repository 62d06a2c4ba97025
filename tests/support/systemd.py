"""A real systemd as the first process of namespaces of its own, over a copy-on-write root that is gone with it.

It needs root, and a kernel with overlayfs and cgroup2. Its root is this machine's with files of the test's over it: so
this machine has to have systemd. What is written there stays in memory. Its network is a loopback of its own, its units
are those of the folder ``UNITS`` alone, so that no service of this machine is started. What a container's manager has
to set up for it is in https://systemd.io/CONTAINER_INTERFACE.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import TracebackType

import pytest

from support.broker import wait_until

ROOT = Path(__file__).parents[2]
SYSTEMD = Path("/lib/systemd/systemd")
UNITS = Path("etc/systemd/trial")
LIBRARIES = "/opt/outrider/python/lib"
USER_ID = 64_113  # of the range that Debian gives to nobody

BUILD = """
group=$1 prefix=$2 site=$3 project=$4
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs work
mkdir work/groups work/upper work/work work/root
mount -t cgroup2 cgroup2 work/groups
mkdir work/groups/$group
echo $$ > work/groups/$group/cgroup.procs
mount -t overlay -o lowerdir=/,upperdir=work/upper,workdir=work/work overlay work/root
cp -a files/. work/root
mount --rbind "$prefix" work/root/opt/outrider/python
mount --rbind "$site" work/root/opt/outrider/site
mount --rbind "$project" work/root/opt/outrider/project
cd work/root
exec unshare --cgroup --mount --pid --fork --kill-child --uts --ipc --net sh -euc "$INSIDE"
"""
INSIDE = """
mount -t proc -o nosuid,noexec,nodev proc proc
mount --bind proc/sys proc/sys
mount -o remount,ro,bind proc/sys
mount -t sysfs -o ro,nosuid,noexec,nodev sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755,nosuid tmpfs dev
for name in null zero full random urandom tty; do : > dev/$name; mount --bind /dev/$name dev/$name; done
mkdir dev/shm dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
hostname board
pivot_root . mnt
umount -l /mnt
mount --make-rshared /
exec env -i container=trial PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH=$UNITS \
    $SYSTEMD --unit=basic.target --show-status=false
"""
CLEAN = 'mount -t cgroup2 cgroup2 work; find "work/$1" -depth -type d -exec rmdir {} +'


class Board:
    """A machine that systemd runs, with this project's Python as a service's user finds it below /opt/outrider."""

    def __init__(self, folder: Path) -> None:
        """``files`` is laid over the root at the start; write there what the machine is to have."""
        if os.geteuid() != 0 or not SYSTEMD.exists():
            pytest.fail("a systemd of its own takes root, and the Debian package systemd")
        self._folder = folder
        self.files = folder / "files"
        self._group = f"outrider-trial-{os.getpid()}"
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = 0
        (folder / "work").mkdir()
        for unit in ("basic", "sysinit", "shutdown", "multi-user", "umount"):
            self.write(UNITS / f"{unit}.target", "[Unit]\nDefaultDependencies=no\n")
        self._add_user("outrider")
        self._add_python()

    def write(self, path: Path | str, text: str, *, mode: int = 0o644) -> None:
        """A file over the root, before the start."""
        file = self.files / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        file.chmod(mode)

    def _add_user(self, name: str) -> None:
        """With the groups that Raspberry Pi OS has; Debian itself has no i2c."""
        users, groups = Path("/etc/passwd").read_text(), Path("/etc/group").read_text()
        there = {line.split(":")[0] for line in groups.splitlines()}
        wanted = [name, "video", "dialout", "i2c", "audio"]
        new = [f"{each}:x:{USER_ID + number}:\n" for number, each in enumerate(wanted) if each not in there]
        self.write("etc/group", groups + "".join(new))
        self.write("etc/passwd", f"{users}{name}:x:{USER_ID}:{USER_ID}::/nonexistent:/usr/sbin/nologin\n")

    def _add_python(self) -> None:
        """A virtual environment at /opt/outrider/venv, as the unit names it; its Python may lie in somebody's home."""
        for name in ("python", "site", "project"):
            (self.files / "opt/outrider" / name).mkdir(parents=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        paths = ["site", "project/sdk", "project/runtimes", "project/exporters"]
        venv = Path("opt/outrider/venv")
        self.write(venv / "pyvenv.cfg", "home = /opt/outrider/python/bin\n")
        self.write(venv / f"lib/{version}/site-packages/outrider.pth", "".join(f"/opt/outrider/{p}\n" for p in paths))
        (self.files / venv / "bin").mkdir()
        (self.files / venv / "bin/python").symlink_to(f"/opt/outrider/python/bin/{version}")
        script = "#!/opt/outrider/venv/bin/python\nimport sys\nfrom outrider.cli import main\nsys.exit(main())\n"
        self.write(venv / "bin/outrider", script, mode=0o755)

    @property
    def root(self) -> Path:
        """Its root directory as this process sees it."""
        return Path(f"/proc/{self._pid}/root")

    def systemctl(self, *words: str, code: int = 0) -> str:
        """What ``systemctl`` prints in it."""
        enter = ["nsenter", "--target", str(self._pid), "--mount", "--pid", "--net", "--cgroup"]
        done = subprocess.run([*enter, "systemctl", *words], capture_output=True, text=True, timeout=180)
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stdout

    def shown(self, unit: str, *names: str) -> dict[str, str]:
        """Properties of a unit, as ``systemctl show`` has them."""
        out = self.systemctl("show", unit, *(f"--property={name}" for name in names))
        return dict(line.split("=", 1) for line in out.splitlines())

    def __enter__(self) -> Board:
        programs = {"INSIDE": INSIDE, "UNITS": f"/{UNITS}", "SYSTEMD": str(SYSTEMD)}
        paths = [sys.base_prefix, sysconfig.get_path("platlib"), str(ROOT)]
        log = (self._folder / "machine.log").open("wb")
        self._process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-euc", BUILD, "sh", self._group, *paths],
            cwd=self._folder,
            env={**os.environ, **programs},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        log.close()
        wait_until(self._is_up, what=f"systemd runs; {self._said()}")
        return self

    def _said(self) -> str:
        return (self._folder / "machine.log").read_text(errors="replace")[-2000:]

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._said()
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if not children or Path(f"/proc/{children[0]}/comm").read_text().strip() != "systemd":
            return False
        self._pid = int(children[0])
        return (self.root / "run/systemd/private").exists()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)  # the kernel kills with it what is in its namespace
        self._process.wait()
        first = Path(f"/proc/{self._pid}")
        wait_until(lambda: not first.exists(), what="the namespace's end")
        subprocess.run(["unshare", "--mount", "sh", "-euc", CLEAN, "sh", self._group], cwd=self._folder, check=True)
        shutil.rmtree(self._folder)
