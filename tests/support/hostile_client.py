"""A client in a process of its own, which says after every request how it ended and what memory it took at most.

    python -m support.hostile_client URL

Each line on stdin is a request's deadline in milliseconds; each line on stdout a JSON object: `error` (the type's name,
or null), `text`, `outrider` (whether the type is one of ours), `grown_bytes` (the peak above what was there before).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import OutriderError
from outrider_runtimes.remote import Remote

MAX_REPLY_BYTES = 8 << 20
X = np.float32([[1.0, 2.0], [3.0, 4.0]])


def status_bytes(key: str) -> int:
    """A figure of /proc/self/status: VmRSS, VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def main(url: str) -> None:
    with Remote(url, model="m", max_reply_bytes=MAX_REPLY_BYTES) as remote:
        for line in sys.stdin:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is there now
            before = status_bytes("VmRSS")
            error = None
            try:
                future = remote.submit({"x": X}, Deadline.after_ms(float(line)))
                right = np.array_equal(future.result(200).outputs["y"], X * 2)
            except Exception as caught:
                error, right = caught, False
            told = {
                "error": None if right else type(error).__name__,
                "text": str(error),
                "outrider": isinstance(error, OutriderError),
                "grown_bytes": status_bytes("VmHWM") - before,
            }
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
