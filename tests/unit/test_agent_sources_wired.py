"""A serial port and a camera that misbehave; with packages of the extras [sensors] and [camera]."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
from typing import Any

import cv2  # noqa: F401  # boards have neither of the two: a file that does not import them would be run there
import numpy as np
import pytest
import serial as pyserial  # noqa: F401

from outrider.agent.payload import Signal
from outrider.agent.sourceconfig import CameraConfig, SerialConfig
from outrider.agent.sources.camera import CameraSource
from outrider.agent.sources.serial import SerialSource
from outrider_runtimes.errors import SourceError
from support.sources import QUIET, dealt_with, pty_pair, serial, taken


def test_bytes_that_never_make_a_line_are_a_failure_of_the_port() -> None:
    now = itertools.count(0.0, 1.0)
    with pty_pair() as (sensor, port):
        source = SerialSource(SerialConfig(port=port, window=1, silence_s=12.0), clock=lambda: next(now))
        with pytest.raises(SourceError, match="gave no line for 12 s") as caught:
            for _ in itertools.islice(source.frames(), QUIET):
                os.write(sensor, b"\xff\x00\x80")
    assert "baud" in caught.value.hint


def test_what_a_sensor_says_before_its_readings_does_not_refuse_them_for_ever() -> None:
    with pty_pair() as (sensor, port):
        frames = serial(port, window=2).frames()
        assert next(frames) is None
        os.write(sensor, b"boot\n17\n1,2,3\n4,5,6\n7,8,9\n10,11\n10,11,12\n13,14,15\n")
        found = [dealt_with(frame) for frame in itertools.islice(filter(None, frames), 4)]
    windows = [payload.array.tolist() for _, payload in found if isinstance(payload, Signal)]
    assert windows == [[[4, 5, 6], [7, 8, 9]], [[10, 11, 12], [13, 14, 15]]]
    assert [payload for _, payload in found if isinstance(payload, str)] == [
        "a line of 3 numbers after lines of 1",
        "a line of 2 numbers after lines of 3",
    ]


# a camera: no V4L2 device is here, so what OpenCV would give for one is stood in for; the file's way is a real one


class Capture:
    """Gives the pictures that it is told to, each all of its number; None is a camera that is unplugged.

    Attributes:
        told: lists of numbers, which come one after the other without a pause; each is done when more is asked for.
    """

    def __init__(self) -> None:
        self.told: queue.Queue[list[int | None]] = queue.Queue()
        self.released = threading.Event()
        self._begun = False
        self._left: list[int | None] = []

    def read(self) -> tuple[bool, np.ndarray | None]:
        while not self._left:
            if self._begun:
                self.told.task_done()
            self._left, self._begun = self.told.get(), True
        number = self._left.pop(0)
        return number is not None, None if number is None else np.full((2, 3, 3), number, np.uint8)

    def release(self) -> None:
        self.released.set()


class StandIn(CameraSource):
    """A camera whose driver is a Capture."""

    def __init__(self, capture: Capture, **options: Any) -> None:
        super().__init__(CameraConfig(silence_s=60.0), **options)
        self._capture = capture

    def _open(self, is_camera: bool) -> Capture:
        assert is_camera
        return self._capture


def test_of_a_camera_the_newest_picture_comes_and_what_the_model_was_too_slow_for_does_not() -> None:
    capture = Capture()
    with contextlib.closing(StandIn(capture).frames()) as frames:  # type: ignore[type-var]

        def next_number() -> int:
            payload = next(filter(None, frames)).read()
            assert isinstance(payload, Signal)
            return int(payload.array.max())

        capture.told.put([1])
        assert next_number() == 1
        capture.told.put(list(range(2, 51)))
        capture.told.join()
        assert next_number() == 50
        capture.told.put([51])
        assert next_number() == 51
    capture.told.put([52])
    assert capture.released.wait(60.0), "the camera is free for the next one"


def test_a_camera_that_is_unplugged_or_hangs_is_a_source_error() -> None:
    unplugged = Capture()
    unplugged.told.put([1, None])
    with pytest.raises(SourceError, match="went away"):
        taken(StandIn(unplugged), 2)
    assert unplugged.released.wait(60.0)
    hanging, now = Capture(), itertools.count(0.0, 12.0)
    with pytest.raises(SourceError, match="gave nothing for 60 s"):
        taken(StandIn(hanging, clock=lambda: next(now)), 1)
    hanging.told.put([None])
    assert hanging.released.wait(60.0)
