"""Two sides behind one call: the board's model and a bigger one elsewhere, by a policy."""

from __future__ import annotations

from outrider.hybrid.hybrid import Hybrid

__all__ = ["Hybrid"]
