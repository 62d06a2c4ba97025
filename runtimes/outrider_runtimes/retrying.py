"""When a request to an endpoint is sent again: a pure rule, for failures of which the endpoint ran nothing."""

from __future__ import annotations

from outrider_runtimes.errors import OutriderError, RemoteRefused, RemoteUnavailable

# Nobody listened: a server that is being restarted, or whose backlog was full. Doubles with each try.
FIRST_PAUSE_S = 0.02
# An endpoint that asks for more patience is left to the caller.
LONGEST_PAUSE_S = 5.0
# Of the time that is left: what a retry may take with its usual answer. The rest is for whoever falls back.
SHARE_OF_TIME = 0.5


def pause_s(
    failure: OutriderError, *, tries: int, left_s: float, usual_s: float, draw: float, patient: bool = True
) -> float | None:
    """Seconds to wait before the request is sent again; None to give up.

    Sent again is a request that never left, and one that the endpoint refused unread with a time to come again. What
    broke on the way may have been run; sending it again would ask twice of a server that is in trouble.

    Args:
        failure: how the last try ended.
        tries: how often it was tried, 1 or more.
        left_s: the time left; ``math.inf`` for no deadline.
        usual_s: how long an answer usually takes.
        draw: uniform in [0, 1): spreads those who failed at one moment.
        patient: False where the caller has another answer in hand: it does not wait for who is not there.
    """
    step_s = FIRST_PAUSE_S * 2 ** (tries - 1)
    if isinstance(failure, RemoteUnavailable) and failure.unsent:
        if not patient:
            return None
        pause = step_s * (0.5 + draw)
    elif isinstance(failure, RemoteRefused) and failure.busy and failure.retry_after_s is not None:
        pause = failure.retry_after_s + step_s * draw
    else:
        return None
    return pause if pause <= LONGEST_PAUSE_S and pause + usual_s <= left_s * SHARE_OF_TIME else None
