"""A live view of a fleet: what devices say over MQTT (docs/telemetry.md), folded into a table. docs/watch.md."""

from __future__ import annotations

from outrider.watch.fleet import Event, Fleet, Point, Row
from outrider.watch.watcher import Watch

__all__ = ["Event", "Fleet", "Point", "Row", "Watch"]
