"""Structures that can be cut out of a network, each proven on the network itself before it is touched."""

from __future__ import annotations

from outrider_exporters.passes.slicing.slicer import Slicer, find_prunable

__all__ = ["Slicer", "find_prunable"]
