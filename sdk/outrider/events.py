"""What a fleet should know of a Hybrid beside its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from outrider.serving import Change

EventName = Literal["drift", "rollback", "step_down", "step_up"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridEvent:
    """One event.

    Attributes:
        name: ``drift``: edge and cloud disagree more often than the certificate allows, told once an episode;
            ``rollback``, ``step_down``, ``step_up``: the edge serves something else, see ``outrider.Change``.
        fields: plain JSON values. Of ``drift``: ``sample`` ("audit": confident answers, drawn by chance; "uncertain":
            those that were offloaded), ``bundle`` and ``variant`` of the edge, ``bound`` (the share of answers that may
            differ), ``share`` (of those that did), ``answers`` (how many that is of). Of a change: ``reason``, and
            ``bundle``, ``variant`` and ``engine`` of what serves, with ``_before`` at the end of what served.
    """

    name: EventName
    fields: Mapping[str, str | int | float]


OnEvent = Callable[[HybridEvent], None]


def event_of(change: Change) -> HybridEvent:
    """A model's change as an event."""
    before, after = change.before, change.after
    return HybridEvent(
        name=change.kind,
        fields={
            "reason": change.reason,
            "bundle": after.bundle,
            "variant": after.variant,
            "engine": after.engine,
            "bundle_before": before.bundle,
            "variant_before": before.variant,
            "engine_before": before.engine,
        },
    )
