"""What a device reports, and that every record of it is accounted for: docs/telemetry.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outrider.telemetry.record import Record
from outrider.telemetry.spool import Account, Spool

if TYPE_CHECKING:
    from outrider.telemetry.attachment import Attachment
    from outrider.telemetry.inputs import InputPolicy
    from outrider.telemetry.mqtt import Message
    from outrider.telemetry.publisher import Limits
    from outrider.telemetry.reporter import Level, Reporter
    from outrider.telemetry.sink import Sink, SinkCount, StreamCount
    from outrider.telemetry.writer import ReporterAccount

__all__ = [
    "Account",
    "Attachment",
    "InputPolicy",
    "Level",
    "Limits",
    "Message",
    "Record",
    "Reporter",
    "ReporterAccount",
    "Sink",
    "SinkCount",
    "Spool",
    "StreamCount",
]

_HOMES = {
    "Attachment": "attachment",
    "InputPolicy": "inputs",
    "Level": "reporter",
    "Limits": "publisher",
    "Message": "mqtt",
    "Reporter": "reporter",
    "ReporterAccount": "writer",
    "Sink": "sink",
    "SinkCount": "sink",
    "StreamCount": "sink",
}


def __getattr__(name: str) -> Any:
    # Looked up when asked for: a device needs no sink, and the sink is a program of its own (python -m).
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
