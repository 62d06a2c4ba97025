"""Distils a small network; run as a program, also under torchrun: CHECKPOINT_FOLDER OUTPUT_FILE [EPOCH]."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from outrider_exporters import Distill
from outrider_exporters.passes import Progress
from outrider_exporters.passes.base import PassContext
from outrider_exporters.sources.module import PositionalModule
from support.exporters import Small, random_data, workshop

EPOCHS = 5


def bench(**options: object) -> tuple[PositionalModule, PassContext]:
    """The same student, teacher and data each time; the student has batch norm and no dropout.

    A bias before a batch norm has a gradient of rounding noise alone, which Adam makes as large as any other: it goes.
    """
    torch.manual_seed(0)
    student, teacher = Small(width=8), Small(width=16)
    student.head[3] = torch.nn.Identity()
    student.features[3].bias = None
    return workshop(student, random_data(rows=96), teacher=teacher.eval(), seed=3, **options)


def main(folder: str, output: str, pause: str = "0") -> None:
    """Train, and say on standard output when an epoch is done; after one, wait for a signal."""
    torch.set_num_threads(1)

    def show(progress: Progress) -> None:
        print(progress.message, flush=True)
        if progress.done == int(pause):
            signal.pause()

    network, context = bench(progress=show)
    detail = {}
    for _ in range(2 if "twice" in folder else 1):  # a second training in the same processes
        detail = dict(Distill(epochs=EPOCHS, batch_size=31, checkpoint=folder).call(network, context))
    if os.environ.get("RANK", "0") == "0":
        torch.save({"network": network.state_dict(), "detail": detail}, Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
