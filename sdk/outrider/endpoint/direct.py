"""The short way of a request for an inference, past ASGI: for one that came whole, and for one that has no room.

Most requests come in one piece. In the turn in which it is read such a one is parsed, submitted and, where the model
answered at once, replied to: it costs no task and no messages to and fro. One that finds its model's queue full is
refused when its head is read: under overload most are, and what a refusal costs is taken from those that are answered.
Everything else about both is as if the application had been asked.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterable

from starlette.types import Scope

from outrider.endpoint.calls import Call, Calls
from outrider.endpoint.exchange import Reply
from outrider.endpoint.inference import Inference
from outrider.endpoint.intake import Intake
from outrider.endpoint.models import Served


class Direct:
    """Knows the targets at which the models are asked.

    Args:
        offered: the models. A target that is not one of theirs as they are now is left to the application.
    """

    def __init__(self, offered: Iterable[Served], inference: Inference, calls: Calls, intake: Intake) -> None:
        self.intake = intake
        self._inference = inference
        self._calls = calls
        self._targets: dict[bytes, tuple[str, dict[str, str]]] = {}
        for served in offered:
            path, version = f"/v2/models/{served.name}", str(served.version)
            self._add(f"{path}/infer", {"model": served.name})
            self._add(f"{path}/versions/{version}/infer", {"model": served.name, "version": version})

    def _add(self, path: str, parameters: dict[str, str]) -> None:
        self._targets[path.encode()] = (path, parameters)

    def knows(self, target: bytes) -> bool:
        """Whether a POST to it may go this way now. ``target``: as it stands in the request's first line."""
        return target in self._targets and not self.intake.stopping

    def refusal(self, target: bytes, scope: Scope) -> Reply | None:
        """The reply to one that it knows and whose head is here, where there is no room; else None.

        Args:
            scope: its headers and its client, in lower case, as ASGI has them.
        """
        _, parameters = self._targets[target]
        if not self.intake.is_full(parameters["model"]):
            return None
        call = self._begun(target, scope)
        reply = self._inference.refusal(scope)
        return None if reply is None else self._ended(call, scope, reply)  # None: a place was freed meanwhile

    def answer(self, target: bytes, scope: Scope, body: bytes) -> Reply | Coroutine[None, None, Reply]:
        """The reply to one that it knows and that is here whole; where that has to wait for a model, what waits."""
        call = self._begun(target, scope)
        reply = self._inference.at_once(scope, body)
        return self._ended(call, scope, reply) if isinstance(reply, Reply) else self._awaited(call, scope, reply)

    async def _awaited(self, call: Call, scope: Scope, coming: Coroutine[None, None, Reply]) -> Reply:
        return self._ended(call, scope, await coming)

    def _begun(self, target: bytes, scope: Scope) -> Call:
        path, parameters = self._targets[target]
        scope.update(method="POST", path=path, raw_path=target, path_params=parameters)
        return self._calls.begin(scope)

    def _ended(self, call: Call, scope: Scope, reply: Reply) -> Reply:
        self._calls.mark(call, reply.status, reply.headers)
        self._calls.end(call, scope)
        return reply
