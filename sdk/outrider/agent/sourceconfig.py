"""What the table ``[source]`` says, by its ``kind``."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from outrider.agent.fields import MAX_PATH, Location, flag
from outrider_runtimes.processing.fields import Choice, Many, Number, Text, Whole

_Name = Text(1, 256)
_MAX_WINDOW: Final = 2**22


def _register_format(value: Any) -> str:
    try:
        if type(value) is str and 0 < struct.calcsize(value) <= 32 and not set(value) & set("spPc?x"):
            return value
    except struct.error:
        pass
    raise ValueError(f"expected numbers in the struct module's letters, such as >h, not {value!r:.40}")


def _suffixes(value: Any) -> tuple[str, ...]:
    found: tuple[str, ...] = Many(Text(2, 16), 1, 32)(value)
    if any(not suffix.startswith(".") for suffix in found):
        raise ValueError(f"expected endings such as .npy, not {value!r:.80}")
    return tuple(suffix.lower() for suffix in found)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What every source has: how its values become the model's input."""

    input: Annotated[str | None, _Name, "the model's input that is fed, where it has several"] = None
    scale: Annotated[float, Number(-1e12, 1e12), "pictures, sounds and readings are multiplied by it"] = 1.0
    offset: Annotated[float, Number(-1e12, 1e12), "and then this is added"] = 0.0


@dataclass(frozen=True, kw_only=True)
class Windowed(Fitted):
    """What a source of samples has: how many of them are one input."""

    window: Annotated[int, Whole(1, _MAX_WINDOW), "samples in one input"]
    hop: Annotated[
        int | None, Whole(1, _MAX_WINDOW), "samples from one input to the next; without it a whole window"
    ] = None


@dataclass(frozen=True, kw_only=True)
class FolderConfig(Fitted):
    """Files that come into a folder."""

    path: Annotated[Path, Location(), "the folder"]
    suffixes: Annotated[tuple[str, ...], _suffixes, "the files that count"] = (
        ".npy",
        ".npz",
        ".json",
        ".wav",
        ".png",
        ".jpg",
        ".jpeg",
    )
    settle_s: Annotated[float, Number(0, 3600), "a file is whole when it has not changed for so long"] = 1.0
    poll_s: Annotated[float, Number(0.01, 3600), "how often it is looked at"] = 0.5
    once: Annotated[bool, flag, "end when all that is there is done"] = False
    colour: Annotated[str, Choice(("rgb", "grey")), "what pictures are read as"] = "rgb"
    window: Annotated[
        int | None, Whole(1, _MAX_WINDOW), "samples of a sound in one input; without it the whole file"
    ] = None
    hop: Annotated[
        int | None, Whole(1, _MAX_WINDOW), "samples from one input to the next; without it a whole window"
    ] = None
    rate_hz: Annotated[int | None, Whole(1, 1_000_000), "a sound of another rate is refused"] = None


@dataclass(frozen=True, kw_only=True)
class StdinConfig(Fitted):
    """JSON, one input a line, on standard input; its end ends the agent."""


@dataclass(frozen=True, kw_only=True)
class TopicConfig(Fitted):
    """Messages on an MQTT topic: JSON, .npy or .npz."""

    topic: Annotated[str, Text(1, 1024), "what is subscribed to; + and # as in MQTT"]
    url: Annotated[str | None, Text(1, 2048), "another broker, without a password; without it the one of [broker]"] = (
        None
    )
    queue: Annotated[
        int, Whole(1, 10_000), "messages that wait; beyond it, or 64 MiB, the oldest is dropped and counted"
    ] = 64


@dataclass(frozen=True, kw_only=True)
class MicrophoneConfig(Windowed):
    """Sound from ALSA, by the program arecord."""

    device: Annotated[str, _Name, "of `arecord -L`"] = "default"
    rate_hz: Annotated[int, Whole(1000, 384_000), "samples a second"] = 16_000
    channels: Annotated[int, Whole(1, 16), "they are averaged to one"] = 1


@dataclass(frozen=True, kw_only=True)
class SerialConfig(Windowed):
    """Numbers, a line of them at a time, from a serial port."""

    port: Annotated[str, Text(1, MAX_PATH), "/dev/ttyUSB0, or a name below /dev/serial/by-id that stays"]
    baud: Annotated[int, Whole(50, 4_000_000), "bits a second"] = 115_200
    separator: Annotated[str, Text(1, 8), "between two numbers; a space stands for any white space"] = ","
    columns: Annotated[tuple[int, ...] | None, Many(Whole(0, 255), 1, 256), "which numbers count; without it all"] = (
        None
    )
    silence_s: Annotated[float, Number(0.1, 86_400), "no whole line for so long is a failure"] = 60.0


@dataclass(frozen=True, kw_only=True)
class I2cConfig(Windowed):
    """Registers of a sensor on an I2C bus."""

    bus: Annotated[int, Whole(0, 255), "1 for /dev/i2c-1"] = 1
    address: Annotated[int, Whole(0x03, 0x77), "of the sensor, such as 0x68"]
    register: Annotated[int, Whole(0, 255), "the first that is read"]
    format: Annotated[
        str, _register_format, "its numbers in letters of Python's struct module: >hhh is three big-endian int16"
    ]
    interval_s: Annotated[float, Number(0.001, 86_400), "from one reading to the next"] = 0.1


@dataclass(frozen=True, kw_only=True)
class CameraConfig(Fitted):
    """A V4L2 camera, or a video file, by OpenCV."""

    device: Annotated[str, Text(1, MAX_PATH), "/dev/video0, or a video file"] = "/dev/video0"
    width: Annotated[int | None, Whole(1, 8192), "what the camera is asked for"] = None
    height: Annotated[int | None, Whole(1, 8192), "what the camera is asked for"] = None
    interval_s: Annotated[float, Number(0, 86_400), "from one picture to the next; 0 takes all that the model can"] = (
        0.0
    )
    colour: Annotated[str, Choice(("rgb", "grey")), "what pictures are read as"] = "rgb"
    silence_s: Annotated[float, Number(0.1, 86_400), "no picture for so long is a failure"] = 10.0


SourceConfig = FolderConfig | StdinConfig | TopicConfig | MicrophoneConfig | SerialConfig | I2cConfig | CameraConfig

SOURCES: Final[Mapping[str, type[Any]]] = {
    "folder": FolderConfig,
    "stdin": StdinConfig,
    "mqtt": TopicConfig,
    "microphone": MicrophoneConfig,
    "serial": SerialConfig,
    "i2c": I2cConfig,
    "camera": CameraConfig,
}
