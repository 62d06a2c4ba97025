"""What is installed on this board: blobs by sha256, and per name what is current and what was good before.

At every moment, whatever is killed, ``names/<name>.json`` is the old record or the new one, and each blob that it names
is whole: blobs are on disk before the one rename that makes them count.
"""

from __future__ import annotations

from outrider.store.blobs import Installed
from outrider.store.state import find_state_dir
from outrider.store.store import Staged, Store

__all__ = ["Installed", "Staged", "Store", "find_state_dir"]
