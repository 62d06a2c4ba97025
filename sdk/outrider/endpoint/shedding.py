"""Requests that find their model's queue full are refused in the turn in which their head is read.

Under overload most requests are refused, and what a refusal costs is taken from those that are answered. This one costs
no task, no ASGI messages and no look at the body; everything else about it is as if the application had been asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from starlette.types import Scope

from outrider.endpoint.calls import Calls
from outrider.endpoint.inference import Inference
from outrider.endpoint.intake import Intake
from outrider.endpoint.models import Served


class Refusal(NamedTuple):
    """A whole reply, with all of its headers."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Shedding:
    """Knows the targets at which the models are asked, and says at once which requests have no room.

    Args:
        offered: the models. A target that is not one of theirs as they are now is left to the application.
    """

    def __init__(self, offered: Iterable[Served], inference: Inference, calls: Calls, intake: Intake) -> None:
        self._inference = inference
        self._calls = calls
        self._intake = intake
        self._targets: dict[bytes, dict[str, str]] = {}
        for served in offered:
            path, version = f"/v2/models/{served.name}", str(served.version)
            self._targets[f"{path}/infer".encode()] = {"model": served.name}
            self._targets[f"{path}/versions/{version}/infer".encode()] = {"model": served.name, "version": version}

    def refusal(self, target: bytes, scope: Scope) -> Refusal | None:
        """The reply to a POST whose head is here, counted and logged; None where the application is to be asked.

        Args:
            target: as it stands in the request's first line.
            scope: its headers and its client, in lower case, as ASGI has them.
        """
        parameters = self._targets.get(target)
        if parameters is None or self._intake.stopping or not self._intake.is_full(parameters["model"]):
            return None
        scope.update(method="POST", path=target.decode(), raw_path=target, path_params=parameters)
        call = self._calls.begin(scope)
        reply = self._inference.refusal(scope)
        if reply is None:  # a place was freed meanwhile
            return None
        headers = reply.fields()
        self._calls.mark(call, reply.status, headers)
        self._calls.end(call, scope)
        return Refusal(reply.status, headers, reply.body)
