"""What the endpoint says over HTTP and gRPC alike."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from outrider.endpoint.intake import Intake
from outrider.endpoint.models import Models, Served
from outrider_runtimes import oip
from outrider_runtimes.errors import InputError, UnknownModel
from outrider_runtimes.runner import Answer

# A caller that names no time, or more than this, is answered within it or not at all.
MAX_TIME_S = 60.0
# JSON has a shorter bound than a client has for replies: while it is decoded nobody else is answered over HTTP.
LIMITS = oip.Limits(json_bytes=4 << 20)
# What preprocessing makes of one request: three bytes of a pixel may become a whole image. Some 1,700 of 224 x 224.
MAX_PREPARED_BYTES = 1 << 30


def is_ready(models: Models, intake: Intake) -> bool:
    """Whether every model can answer and new requests are taken."""
    return not intake.stopping and all(served.ready for served in models)


def described(models: Models, served: Served) -> dict[str, Any]:
    """A model's metadata, as ``oip.model_metadata`` makes it."""
    parameters = {
        "interface": served.interface.offered(),
        "interface_digest": served.interface.digest,
        "bundle": served.bundle,
        "variant": served.variant,
        "engine": served.engine,
    }
    versions = models.versions(served.name)
    return oip.model_metadata(
        served.name, served.interface, versions=versions, platform="outrider", parameters=parameters
    )


def check_wanted(served: Served, asked: oip.Request) -> None:
    """Refuse an output that is not there before anything is run. Raises InputError."""
    if asked.outputs is None:
        return
    names = [spec.name for spec in served.interface.outputs]
    for name in asked.outputs:
        if name not in names:
            raise InputError(f"there is no output {name!r}", tensor=name, hint=f"the outputs are {names}")


def check_rows(served: Served, asked: oip.Request) -> None:
    """Refuse more rows than preprocessing may make into the network's inputs, as far as these are fixed in size.

    Raises:
        InputError: they would have more than ``MAX_PREPARED_BYTES``.
    """
    interface = served.interface
    if interface.processing is None:
        return
    batched = [asked.inputs[spec.name] for spec in interface.inputs if spec.batched and spec.name in asked.inputs]
    rows = max((len(array) for array in batched if array.ndim), default=1)
    row_bytes = sum(
        math.prod(size or 1 for size in spec.shape[1:]) * np.dtype(spec.dtype).itemsize
        for spec in interface.network.inputs
        if spec.batched
    )
    if rows * row_bytes > MAX_PREPARED_BYTES:
        raise InputError(
            f"{rows} rows become {rows * row_bytes} bytes before the network, at most {MAX_PREPARED_BYTES} are taken",
            hint="fewer rows in a request",
        )


def version_after(served: Served, wanted: str) -> str:
    """Which version answered: the very request may have rolled the model back.

    Raises:
        UnknownModel: another one was asked for. ``wanted``: empty for any.
    """
    version = str(served.version)
    if wanted not in ("", version):
        raise UnknownModel(f"model {served.name!r} was rolled back to version {version}")
    return version


def told(served: Served, answer: Answer) -> dict[str, Any]:
    """What a reply says of itself beside its tensors."""
    return {
        "infer_ms": round(answer.timing_ms.infer, 4),
        "queue_ms": round(answer.timing_ms.queue, 4),
        "bundle": served.bundle if answer.served is None else answer.served.bundle,
    }
