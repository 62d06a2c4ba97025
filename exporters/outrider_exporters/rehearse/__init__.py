"""A bundle rehearsed on a PC: with the board's own packages and wheels, on the board's CPU under qemu."""

from __future__ import annotations
