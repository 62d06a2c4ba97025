"""Pictures from a V4L2 camera or a video file. Needs OpenCV (the extra ``camera``)."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from outrider.agent.payload import Signal
from outrider.agent.sourceconfig import CameraConfig
from outrider.agent.sources.base import TICK_S, Frame, Sleep, known
from outrider_runtimes.errors import MissingExtra, SourceError
from outrider_runtimes.tensors import Array

_END: Final = None


class CameraSource:
    """The newest picture of a camera: what came while the model was busy is left out. Of a file, every picture."""

    def __init__(
        self, config: CameraConfig, *, sleep: Sleep = time.sleep, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._sleep = sleep
        self._clock = clock

    def frames(self) -> Iterator[Frame | None]:
        """See ``Source``."""
        config = self._config
        is_camera = config.device.startswith("/dev/")
        grabber = _Grabber(self._open(is_camera), every=not is_camera)
        try:
            heard_s = self._clock()
            while True:
                try:
                    picture = grabber.pictures.get(timeout=TICK_S)
                except queue.Empty:
                    if self._clock() - heard_s >= config.silence_s:
                        raise SourceError(f"camera {config.device} gave nothing for {config.silence_s:g} s") from None
                    yield None
                    continue
                if picture is _END:
                    if is_camera:
                        raise SourceError(f"camera {config.device} went away")
                    return
                heard_s = self._clock()
                signal = Signal(
                    array=_coloured(picture, config.colour), axes="HW" if config.colour == "grey" else "HWC"
                )
                yield Frame(name=config.device, read=known(signal))
                yield from self._rest(heard_s + config.interval_s)
        finally:
            grabber.close()

    def _rest(self, until_s: float) -> Iterator[None]:
        while (left_s := until_s - self._clock()) > 0:
            yield None
            self._sleep(min(left_s, TICK_S))

    def _open(self, is_camera: bool) -> Any:
        try:
            import cv2
        except ImportError:
            raise MissingExtra("opencv-python-headless", extra="camera", purpose="reading a camera") from None
        config = self._config
        capture = cv2.VideoCapture(config.device, cv2.CAP_V4L2 if is_camera else cv2.CAP_ANY)
        if not capture.isOpened():
            capture.release()
            raise SourceError(
                f"camera {config.device} cannot be opened",
                hint="`v4l2-ctl --list-devices` shows what is there; the user must be in the group video",
            )
        for key, value in ((cv2.CAP_PROP_FRAME_WIDTH, config.width), (cv2.CAP_PROP_FRAME_HEIGHT, config.height)):
            if value is not None:
                capture.set(key, value)
        return capture


class _Grabber:
    """Reads on a thread of its own: a camera's driver may not come back for seconds."""

    def __init__(self, capture: Any, *, every: bool) -> None:
        """``every``: wait until a picture was taken; else the next one replaces it."""
        self.pictures: queue.Queue[Array | None] = queue.Queue(maxsize=1)
        self._capture = capture
        self._every = every
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="outrider-camera", daemon=True).start()

    def close(self) -> None:
        """End the thread, which frees the camera when its driver comes back."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            there, picture = self._capture.read()
            self._put(picture if there else _END)
            if not there:
                break
        self._capture.release()

    def _put(self, picture: Array | None) -> None:
        while not self._closed.is_set():
            try:
                self.pictures.put(picture, timeout=TICK_S if self._every or picture is _END else 0.0)
                return
            except queue.Full:
                if not self._every and picture is not _END:
                    self._drop()

    def _drop(self) -> None:
        with contextlib.suppress(queue.Empty):
            self.pictures.get_nowait()


def _coloured(picture: Array, colour: str) -> Array:
    """OpenCV's blue, green, red as red, green, blue: uint8 [H, W, 3]; or grey: uint8 [H, W]."""
    import cv2

    coloured: Array = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY if colour == "grey" else cv2.COLOR_BGR2RGB)
    return coloured
