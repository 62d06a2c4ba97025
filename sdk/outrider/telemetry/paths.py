"""Texts that go over a wire say nothing of where things lie on this machine."""

from __future__ import annotations

import re
from typing import Final

_MAX_TEXT: Final = 500
# An absolute path of two parts or more; in an address such as mqtt://host/a it begins after a slash.
_PATH: Final = re.compile(r"(?<![\w/.])/[^\s/'\",:;]+(?:/[^\s/'\",:;]+)+")


def without_paths(text: str) -> str:
    """A message without the places of this machine: it goes over a wire.

    >>> without_paths("cannot read '/var/lib/outrider/x.onnx': gone")
    "cannot read '...': gone"
    """
    return _PATH.sub("...", text)[:_MAX_TEXT]
