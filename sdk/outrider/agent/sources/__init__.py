"""Where an agent's inputs come from: one small module a kind, imported when it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from outrider.agent.config import Config, broker_of, credentials_of
from outrider.agent.sourceconfig import (
    CameraConfig,
    FolderConfig,
    I2cConfig,
    MicrophoneConfig,
    SerialConfig,
    StdinConfig,
    TopicConfig,
)
from outrider.agent.sources.base import Frame, Source

__all__ = ["Frame", "Source", "is_same_source", "make_source"]

_Made = tuple[str, str, Callable[[Any, Config, Path], Mapping[str, Any]]]


def _memory(source: FolderConfig, _: Config, folder: Path) -> Mapping[str, Any]:
    name = hashlib.sha256(str(source.path).encode()).hexdigest()[:16]
    return {"memory": folder / f"folder-{name}.done"}


def _connection(source: TopicConfig, config: Config, _: Path) -> Mapping[str, Any]:
    own = source.url in (None, config.broker.url)
    return {
        "broker": broker_of(config.broker, source.url),
        "device": config.device,
        "credentials": credentials_of(config.broker) if own else None,
    }


def _nothing(*_: Any) -> Mapping[str, Any]:
    return {}


_MADE: Final[Mapping[type[Any], _Made]] = {
    FolderConfig: ("folder", "FolderSource", _memory),
    StdinConfig: ("stdin", "StdinSource", _nothing),
    TopicConfig: ("topic", "TopicSource", _connection),
    MicrophoneConfig: ("microphone", "MicrophoneSource", _nothing),
    SerialConfig: ("serial", "SerialSource", _nothing),
    I2cConfig: ("i2c", "I2cSource", _nothing),
    CameraConfig: ("camera", "CameraSource", _nothing),
}


def make_source(config: Config, folder: Path) -> Source:
    """The source that the configuration names; it is opened by ``frames``.

    Args:
        folder: the agent's private one, for what a source remembers.

    Raises:
        ConfigError: a broker, or a secret, that cannot be used.
    """
    module, name, more = _MADE[type(config.source)]
    made = getattr(import_module(f"{__name__}.{module}"), name)
    source: Source = made(config.source, **more(config.source, config, folder))
    return source


def is_same_source(old: Config, new: Config) -> bool:
    """Whether a source of the old configuration is one of the new: it is not opened anew then, nor loses what it has
    read already. How its values become inputs may be another."""
    if isinstance(new.source, StdinConfig) and isinstance(old.source, StdinConfig):
        return True  # there is but one, and lines of it may wait
    asks_broker = isinstance(new.source, TopicConfig)
    return new.source == old.source and not (asks_broker and new.broker != old.broker)
