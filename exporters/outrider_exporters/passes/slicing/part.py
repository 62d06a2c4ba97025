"""What can be cut out of a network: one kind of structure each, behind one face."""

from __future__ import annotations

from typing import Protocol

from outrider_exporters.passes.plan import Group


class Part(Protocol):
    """A group of units in one network, with the hands to remove them."""

    group: Group
    exact: bool  # whether units that nothing reads can go without a trace; a norm over them makes this false

    def silence(self, count: int) -> None:
        """Set to zero whatever reads the ``count`` least important units."""
        ...

    def remove(self, count: int) -> None:
        """Cut the ``count`` least important units out."""
        ...
