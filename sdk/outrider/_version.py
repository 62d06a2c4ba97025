"""The version, where every room can ask for it without the public surface."""

__version__ = "0.1.0"
