"""A process that installs bundles and is killed. Run as a script: STATE STEP BUNDLE... or STATE loop BUNDLE...

STEP is a number: the process kills itself before the STEP-th event of the file system that the installation of the last
bundle causes, and prints ``done`` when there are fewer. ``loop`` installs the bundles one after the other, without end
in versions, until it is killed from outside.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from outrider.bundle import Trust
from outrider.store import Store

# What Python's audit hooks report of the calls that change or order something on disk.
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "fcntl.flock", "os.truncate"}


def install(store: Store, bundle: str) -> None:
    """Add and activate."""
    with store.add(bundle, Trust()) as staged:
        store.activate(staged, {"from": Path(bundle).name})


def kill_at(step: int) -> None:
    """Die without a trace before the step-th event from now."""
    left = step

    def hook(event: str, _: object) -> None:
        nonlocal left
        if event in EVENTS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(state: str, mode: str, *bundles: str) -> None:
    """See the module."""
    store = Store(Path(state))
    if mode == "loop":
        for bundle in bundles:
            print(bundle, flush=True)
            install(store, bundle)
        return
    kill_at(int(mode))
    install(store, bundles[-1])
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
