"""An agent's log: JSON, one line an event, on standard error, where systemd's journal takes it."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from typing import Any, Final

LOGGER: Final = "outrider.agent"
_log = logging.getLogger(LOGGER)


class JsonLines(logging.Formatter):
    """A record as one line: ``at``, ``level``, ``event``, and the event's own fields, or ``logger`` and ``message``."""

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object without a line break."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"at": f"{at}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        event = getattr(record, "event", None)
        if event is not None:
            line |= {"event": event, **getattr(record, "fields", {})}
        else:
            line |= {"event": "log", "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def start(level: str) -> None:
    """Send what all of Outrider logs to standard error, from that level on; and what Python would write there itself:
    warnings, and the end of a thread by an error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(level)
    logging.captureWarnings(True)
    threading.excepthook = _thread_died


def _thread_died(died: threading.ExceptHookArgs) -> None:
    name = died.thread.name if died.thread is not None else "unknown"
    error = died.exc_value if died.exc_value is not None else died.exc_type()
    logging.getLogger(__name__).error("thread %s died", name, exc_info=(died.exc_type, error, died.exc_traceback))


def set_level(level: str) -> None:
    """From now on. Other packages than ours are heard from warnings on."""
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("outrider", "outrider_runtimes"):
        logging.getLogger(name).setLevel(level.upper())


def say(event: str, /, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log one event with its fields."""
    if _log.isEnabledFor(level):
        _log.log(level, event, extra={"event": event, "fields": fields})
