"""Why a request is not answered, for HTTP and gRPC alike: one status, one word and one line for each error.

| status | reason | when |
|---|---|---|
| 400 | bad_input | the request is not what the protocol or the model's interface says |
| 401 | no_token | a token is required and this is not it |
| 404 | unknown | no such route, model or version |
| 405 | bad_method | the route does not have that method |
| 413 | too_long | the body is beyond its bound |
| 415 | compressed | the body is compressed |
| 429 | queue_full | as many requests as may be are inside: nothing was run, mostly nothing was read |
| 499 | gone | the caller hung up |
| 500 | model_failed | the engine failed |
| 500 | not_finite | the answer has no JSON form |
| 500 | fault | anything else |
| 503 | no_memory | too many bytes of requests are on their way |
| 503 | no_time | the queue is longer than the time that the caller has |
| 503 | stuck | a call is stuck in the model's engine |
| 503 | stopping | the endpoint, or the model, is being stopped |
| 504 | deadline | the caller's time passed first; what had not begun was not run |

429 and 503 come with ``Retry-After``.
"""

from __future__ import annotations

import re

from outrider_runtimes.errors import (
    DeadlineExceeded,
    InferenceError,
    InputError,
    NotFiniteError,
    OutriderError,
    QueueFull,
    RunnerClosed,
    RunnerStuck,
    UnknownModel,
)

MAX_TEXT = 1000
RETRY_AFTER_S = 1

_KINDS: tuple[tuple[type[OutriderError], tuple[int, str]], ...] = (
    (UnknownModel, (404, "unknown")),
    (InputError, (400, "bad_input")),
    (RunnerStuck, (503, "stuck")),
    (QueueFull, (429, "queue_full")),
    (RunnerClosed, (503, "stopping")),
    (DeadlineExceeded, (504, "deadline")),
)
_PATH = re.compile(r"(?:[A-Za-z]:)?(?:[/\\][^\s'\"/\\]+){2,}[/\\]?")


class Refused(Exception):
    """A request that is not answered. ``str`` of it is what the caller is told.

    Attributes:
        status: as HTTP has it.
        reason: one of the words above.
        retry_after_s: when it may be worth to come again; None where it is not.
    """

    def __init__(self, status: int, reason: str, text: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(text[:MAX_TEXT])
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s


def refusal(error: Exception) -> Refused:
    """What the caller is told of ``error``: no path, and nothing of what is not meant for it."""
    if isinstance(error, Refused):
        return error
    if not isinstance(error, OutriderError):
        return Refused(500, "fault", "internal error")
    status, reason = next((row for kind, row in _KINDS if isinstance(error, kind)), (500, "model_failed"))
    text = f"{error}; {error.hint}" if error.hint and status in (400, 404, 500) else str(error)
    if status == 500:
        text = _PATH.sub("(path)", text) if isinstance(error, InferenceError) else "the model could not answer"
    return Refused(status, reason, text, retry_after_s=RETRY_AFTER_S if status in (429, 503) else None)


def not_finite(error: NotFiniteError) -> Refused:
    """The refusal of an answer, not of an input, that JSON cannot express."""
    return Refused(500, "not_finite", f"{error}; {error.hint}")
