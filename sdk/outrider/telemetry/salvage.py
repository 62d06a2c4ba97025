"""What can still be read of a damaged spool: every row whose bytes are those that were written."""

from __future__ import annotations

import contextlib
import sqlite3
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

from outrider.telemetry.spoolfile import APPLICATION_ID, is_corruption
from outrider_runtimes.errors import TelemetryError

# A page holds some ten records: a step of fewer rows finds the first readable one behind a page that is not.
_STEP: Final = 8
# Where a file is damaged all over, looking for more ends here.
_MAX_PROBES: Final = 20_000


class Saved(NamedTuple):
    """One row, without its number: the stream that it was of has ended."""

    priority: int
    body: bytes


def salvage(path: Path) -> list[Saved]:
    """The rows of a damaged spool, in the order of their numbers. The file is not changed.

    A record that was delivered may come again, where the note of it was lost: a consumer then has it twice.

    Raises:
        TelemetryError: it cannot be read now, such as on a disk that is full.
    """
    try:
        # Not immutable: what only the journal has is to be read too.
        with contextlib.closing(
            sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, isolation_level=None)
        ) as db:
            saved = dict(_rows(db)) if _is_ours(db) else {}
    except sqlite3.Error as error:
        raise TelemetryError(
            f"the damaged spool {path} cannot be read now: {error}", hint="check the free space of its disk"
        ) from error
    Path(f"{path}-shm").unlink(missing_ok=True)
    return [saved[seq] for seq in sorted(saved)]


def _is_ours(db: sqlite3.Connection) -> bool:
    try:
        return bool(db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID)
    except sqlite3.Error as error:
        if not is_corruption(error):
            raise
        return False


def _rows(db: sqlite3.Connection) -> Iterator[tuple[int, Saved]]:
    """From the front to the first damage, from the back to the last, and what lies in between by probing."""
    first_bad = yield from _run(db, "SELECT seq, priority, crc, body FROM rows ORDER BY seq")
    if first_bad is None:
        return
    last_bad = yield from _run(db, "SELECT seq, priority, crc, body FROM rows ORDER BY seq DESC")
    low = max(first_bad, 0)
    high = low + _STEP * _MAX_PROBES if last_bad is None or last_bad <= 0 else last_bad
    for _, start in zip(range(_MAX_PROBES), range(low, high, _STEP), strict=False):
        query = f"SELECT seq, priority, crc, body FROM rows WHERE seq >= {start} AND seq < {start + _STEP} ORDER BY seq"
        yield from _run(db, query)


def _run(db: sqlite3.Connection, query: str) -> Generator[tuple[int, Saved], None, int | None]:
    """The sound rows of a query up to the first damage. Gives the last number before that; None where all came."""
    last = -1
    try:
        for seq, priority, crc, body in db.execute(query):
            if isinstance(seq, int):
                last = seq
            if isinstance(body, bytes) and isinstance(priority, int) and zlib.crc32(body) == crc:
                yield seq, Saved(priority, body)
    except (sqlite3.Error, OverflowError, UnicodeDecodeError):
        return last
    return None
