"""The steps of a spool at which a writer can be killed, as the statements that come next."""

from __future__ import annotations

from typing import Final

AFTER_COMMIT: Final = "after commit"

# "new": of a spool that is being made; "open": of any opening; "commit": of each transaction, several in a life.
STEPS: Final = {
    "CREATE TABLE rows": "new",
    "CREATE TABLE account": "new",
    "INSERT INTO account": "new",
    "PRAGMA user_version=": "new",
    "PRAGMA journal_mode": "open",
    "UPDATE account SET clean=0": "open",
    "BEGIN": "commit",
    "DELETE FROM rows": "commit",
    "INSERT INTO rows": "commit",
    "UPDATE account SET next_seq": "commit",
    "SELECT pending, pending_bytes": "commit",
    "UPDATE account SET pending=": "commit",
    "COMMIT": "commit",
    AFTER_COMMIT: "commit",
}
