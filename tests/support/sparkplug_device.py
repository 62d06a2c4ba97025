"""A program that is a Sparkplug node until it is killed: URL and state directory."""

from __future__ import annotations

import sys
import threading

from outrider.telemetry.sparkplug import SparkplugNode
from outrider.telemetry.vitals import Vitals

if __name__ == "__main__":
    with SparkplugNode(sys.argv[1], group="plant", device="pi-07", state=sys.argv[2]) as node:
        node.tell(Vitals(predictions=1))
        threading.Event().wait()
