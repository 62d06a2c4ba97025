"""Sources: real files, a real pty, real child processes; of I2C the decoding alone, for there is no bus here."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from outrider.agent.payload import Named, Signal
from outrider.agent.sourceconfig import (
    CameraConfig,
    FolderConfig,
    I2cConfig,
    MicrophoneConfig,
    SerialConfig,
    StdinConfig,
)
from outrider.agent.sources import folder as folder_module
from outrider.agent.sources import microphone as microphone_module
from outrider.agent.sources.base import Lines, Source
from outrider.agent.sources.camera import CameraSource
from outrider.agent.sources.folder import MOST_DEATHS, FolderSource
from outrider.agent.sources.i2c import I2cSource, read_registers
from outrider.agent.sources.microphone import MicrophoneSource
from outrider.agent.sources.serial import SerialSource, read_row
from outrider.agent.sources.stdin import StdinSource
from outrider_runtimes.errors import InputError, MissingExtra, SourceError
from support.sources import QUIET, arrays, dealt_with, folder, npy, play, pty_pair, put, serial, taken, wav

# a folder


def names(config: FolderConfig, memory: Path, count: int = 1000) -> list[str]:
    return [name for name, _ in taken(FolderSource(config, memory), count)]


def test_files_come_in_the_order_of_their_time_and_once(tmp_path: Path) -> None:
    inbox, config, memory = folder(tmp_path)
    for number, name in enumerate(("c.npy", "a.npz", "b.JSON", "B.jpg")):
        put(inbox / name, b"x", 1000 + number)
    for other in ("d.txt", ".hidden.npy", "e.npy.part"):
        put(inbox / other, b"x", 900)
    (inbox / "folder.npy").mkdir()
    assert names(config, memory) == ["c.npy", "a.npz", "b.JSON", "B.jpg"]
    assert names(config, memory) == []
    put(inbox / "a.npz", b"xy", 2000)
    assert names(config, memory) == ["a.npz"], "it has changed"


def test_what_was_done_is_known_after_a_kill_and_what_was_not_comes_again(tmp_path: Path) -> None:
    inbox, config, memory = folder(tmp_path)
    for number in range(3):
        put(inbox / f"{number}.npy", npy(number), 1000 + number)
    frames = FolderSource(config, memory).frames()
    first = next(frames)
    assert first is not None
    first.done()
    second = next(frames)
    assert second is not None and second.name == "1.npy"
    # killed here: nothing is closed, and a line may be cut
    with memory.open("a") as file:
        file.write('[1001000000000, "1.np')
    assert names(config, memory) == ["1.npy", "2.npy"]
    assert memory.stat().st_mode & 0o777 == 0o600


def test_a_file_at_which_the_agent_dies_again_and_again_is_left_out(tmp_path: Path) -> None:
    inbox, config, memory = folder(tmp_path)
    for number in range(3):
        put(inbox / f"{number}.npy", npy(number), 1000 + number)
    killed = []  # never closed, as a kill leaves them
    for _ in range(MOST_DEATHS):
        frames = FolderSource(config, memory).frames()
        killed.append(frames)
        frame = next(frames)
        assert frame is not None and frame.name == "0.npy"
        assert isinstance(frame.read(), Named)
    (first, why), *others = taken(FolderSource(config, memory), 3)
    assert (first, why) == ("0.npy", "the agent died 2 times while it was under way; it is left out")
    assert [name for name, _ in others] == ["1.npy", "2.npy"]
    assert names(config, memory) == []


def test_a_file_that_was_under_way_at_a_clean_end_is_as_it_was(tmp_path: Path) -> None:
    inbox, config, memory = folder(tmp_path)
    put(inbox / "0.npy", npy(0), 1000)
    for _ in range(MOST_DEATHS + 1):
        with contextlib.closing(FolderSource(config, memory).frames()) as frames:
            frame = next(frames)
            assert frame is not None
            assert frame.read() is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inbox", memory.name]
    memory.with_suffix(".begun").write_text('[1000000000000, "0.n')  # cut by a power cut
    assert names(config, memory) == ["0.npy"]


def test_the_memory_forgets_files_that_are_long_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox, config, memory = folder(tmp_path)
    for number in range(50):
        put(inbox / f"{number}.npy", b"x", 1000 + number)
    names(config, memory)
    for path in list(inbox.iterdir()):
        path.unlink()
    put(inbox / "0.npy", b"x", 1000)
    monkeypatch.setattr(folder_module, "MAX_GONE", 5)
    assert names(config, memory) == []
    assert len(memory.read_text().splitlines()) == 6, "the one that is there, and the newest that were"
    for number in (44, 45):
        put(inbox / f"{number}.npy", b"x", 1000 + number)
    assert names(config, memory) == ["44.npy"], "a disk that is mounted after the agent began has nothing new for it"


def test_a_file_is_left_until_it_has_not_changed_for_a_while(tmp_path: Path) -> None:
    inbox, config, memory = folder(tmp_path, settle_s=5.0, poll_s=1.0)
    now = 100.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now < 104:
            put(inbox / "a.npy", bytes(int(now * 4)), 1000)

    put(inbox / "a.npy", b"", 1000)
    source = FolderSource(config, memory, sleep=sleep, clock=lambda: now)
    frame = next(frame for frame in source.frames() if frame is not None)
    assert frame.name == "a.npy"
    assert now >= 108.0


def test_a_folder_that_is_not_there_is_a_source_error(tmp_path: Path) -> None:
    _, config, memory = folder(tmp_path, path=tmp_path / "none")
    with pytest.raises(SourceError, match="none cannot be read"):
        names(config, memory)


def test_a_sound_in_windows_is_done_with_its_last_one(tmp_path: Path) -> None:
    inbox, config, memory = folder(tmp_path, window=4, hop=2, rate_hz=8000)
    put(inbox / "a.wav", wav(np.arange(9) * 100), 1000)
    put(inbox / "b.wav", b"RIFF", 1001)
    put(inbox / "c.wav", wav(np.arange(3)), 1002)
    found = taken(FolderSource(config, memory), 2)
    assert [(array * 2**15).round().tolist() for array in arrays(found)] == [[0, 100, 200, 300], [200, 300, 400, 500]]
    again = taken(FolderSource(config, memory), 100)
    assert [name for name, _ in again] == ["a.wav"] * 3 + ["b.wav", "c.wav"], "it was not at its end"
    assert "not a WAV file" in str(again[3][1]) and "less than one window" in str(again[4][1])
    assert names(config, memory) == []
    whole = FolderConfig(path=inbox, settle_s=0.0, once=True)
    assert arrays(taken(FolderSource(whole, tmp_path / "other.done"), 1))[0].shape == (9,)


def test_a_file_that_went_away_is_an_input_error(tmp_path: Path) -> None:
    inbox, config, memory = folder(tmp_path)
    put(inbox / "a.npy", npy(1), 1000)
    frame = next(iter(FolderSource(config, memory).frames()))
    assert frame is not None
    (inbox / "a.npy").unlink()
    with pytest.raises(InputError, match=r"a\.npy cannot be read"):
        frame.read()


# standard input


@contextlib.contextmanager
def piped() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    open_ends = [read, write]
    try:
        yield read, write
    finally:
        for end in open_ends:
            with contextlib.suppress(OSError):
                os.close(end)


def test_lines_of_json_come_until_the_end() -> None:
    with piped() as (read, write):
        os.write(write, b'[1, 2]\r\n\n{"x": [3]}\nnonsense\n[4')
        source = StdinSource(StdinConfig(), descriptor=read)
        first = taken(source, 1)
        os.write(write, b"]")
        os.close(write)
        rest = taken(source, 100)
    values = [getattr(payload, "value", payload) for _, payload in first + rest]
    assert values[:2] == [[1, 2], {"x": [3]}]
    assert "not JSON" in str(values[2])
    assert values[3] == [4], "a line without an end is one"
    assert [name for name, _ in first + rest] == ["line 1", "line 3", "line 4", "line 5"]


def test_standard_input_that_says_nothing_ticks() -> None:
    with piped() as (read, _):
        assert list(itertools.islice(StdinSource(StdinConfig(), descriptor=read).frames(), 2)) == [None, None]


def test_lines_are_bounded() -> None:
    lines = Lines(max_bytes=4)
    assert list(lines.add(b"abcdef")) == []
    assert list(lines.add(b"gh\nij\r\nk")) == [b"abcde", b"ij"], "a byte more than four tells that it was too long"
    assert lines.end() == b"k"
    assert lines.end() == b""


# a serial port: a pty pair


def test_readings_come_from_a_serial_port() -> None:
    with pty_pair() as (sensor, port):
        os.write(sensor, b"half of a li")
        frames = serial(port, hop=1).frames()
        assert next(frames) is None
        os.write(sensor, b"ne\n1,2,3\r\n4,5,6\nrubbish\n7,8\n7,8,9\n")
        found = [dealt_with(frame) for frame in itertools.islice(filter(None, frames), 4)]
    windows = [payload.array.tolist() for _, payload in found if isinstance(payload, Signal)]
    assert windows == [[[1, 2, 3], [4, 5, 6]], [[4, 5, 6], [7, 8, 9]]]
    assert "rubbish" in str(found[1][1]) and "2 numbers after lines of 3" in str(found[2][1])


def test_a_serial_port_that_is_not_there_goes_away_or_says_nothing() -> None:
    with pytest.raises(SourceError, match="cannot be opened"):
        taken(serial("/dev/ttyNONE"), 1)
    with pty_pair() as (sensor, port):
        frames = serial(port).frames()
        assert next(frames) is None
        os.close(sensor)
        with pytest.raises(SourceError, match="went away"):
            list(itertools.islice(frames, QUIET))
    now = itertools.count(0.0, 5.0)
    with pty_pair() as (_, port):
        quiet = SerialSource(SerialConfig(port=port, window=1, silence_s=12.0), clock=lambda: next(now))
        with pytest.raises(SourceError, match="no line for 12 s"):
            list(itertools.islice(quiet.frames(), QUIET))


def test_numbers_in_a_line() -> None:
    assert read_row(b" 1.5;2 ; -3e2 ", ";", None).tolist() == [1.5, 2.0, -300.0]
    assert read_row(b"t 20.5  h\t40", " ", (1, 3)).tolist() == [20.5, 40.0]
    for line in (b"", b"1,,2", b"1,x", b"1,nan", b"1,inf", b"\xff\xff"):
        with pytest.raises(InputError):
            read_row(line, ",", None)
    with pytest.raises(InputError):
        read_row(b"1,2", ",", (5,))


# I2C: the decoding, and the loop over a block of registers


def test_registers_are_numbers() -> None:
    raw = struct.pack(">hhh", -32768, 0, 16384)
    assert read_registers(raw, ">hhh").tolist() == [-32768.0, 0.0, 16384.0]
    assert read_registers(b"\x01\x02\x03\x04", "<HBb").tolist() == [513.0, 3.0, 4.0]


def test_readings_at_an_interval_become_windows() -> None:
    now, asked = 0.0, []

    def read_block(address: int, register: int, length: int) -> list[int]:
        asked.append((address, register, length, round(now, 6)))
        return [0, len(asked)]

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    config = I2cConfig(address=0x48, register=7, format=">h", window=2, interval_s=1.0)
    source = I2cSource(config, sleep=sleep, clock=lambda: now)
    frames = list(itertools.islice((frame for frame in source.readings(read_block) if frame is not None), 2))
    assert [frame.read().array.tolist() for frame in frames] == [[[1.0], [2.0]], [[3.0], [4.0]]]  # type: ignore[union-attr]
    assert asked == [(0x48, 7, 2, 0.0), (0x48, 7, 2, 1.0), (0x48, 7, 2, 2.0), (0x48, 7, 2, 3.0)]


def test_a_sensor_that_does_not_answer_and_a_bus_that_is_not_there() -> None:
    def read_block(*_: int) -> list[int]:
        raise OSError(121, "Remote I/O error")

    config = I2cConfig(bus=250, address=0x48, register=7, format=">h", window=1)
    with pytest.raises(SourceError, match="sensor 0x48 on I2C bus 250 does not answer"):
        next(I2cSource(config).readings(read_block))
    with pytest.raises(SourceError, match="bus 250 cannot be opened"):
        taken(I2cSource(config), 1)


# a microphone: a program named arecord, which here plays a ramp in pieces of no whole frame; the real one is in
# tests/integration/test_microphone_alsa.py


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(microphone_module, "SILENCE_S", 240.0)  # a busy machine starts it when it does
    return tmp_path


def test_sound_comes_from_arecord_and_it_is_ended(on_path: Path) -> None:
    play(
        on_path,
        "open(sys.argv[0] + '.args', 'w').write(' '.join(sys.argv[1:]))\n"
        "import os, time\n"
        "assert os.environ['LC_ALL'] == 'C'\n"
        "open(sys.argv[0] + '.pid', 'w').write(str(os.getpid()))\n"
        "out = sys.stdout.buffer\n"
        "data = array('h', [n * 10 for pair in range(8) for n in (pair, pair + 2)]).tobytes()\n"
        "out.write(data[:7]); out.flush(); out.write(data[7:]); out.flush(); time.sleep(600)",
    )
    source = MicrophoneSource(MicrophoneConfig(window=4, hop=2, rate_hz=8000, channels=2, device="hw:1"))
    found = [(array * 2**15).round().tolist() for array in arrays(taken(source, 2))]
    assert found == [[10, 20, 30, 40], [30, 40, 50, 60]]
    assert (on_path / "arecord.args").read_text() == "-t raw -f S16_LE -D hw:1 -r 8000 -c 2"
    with pytest.raises(ProcessLookupError):
        os.kill(int((on_path / "arecord.pid").read_text()), 0)


def test_without_arecord_the_way_to_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError) as caught:
        taken(MicrophoneSource(MicrophoneConfig(window=4)), 1)
    assert caught.value.hint == "apt install alsa-utils"


# a camera: OpenCV reads a video file by the same call


def video(path: Path, count: int) -> list[int]:
    """A file whose pictures are red, darker from one to the next; gives their red."""
    import cv2

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    assert writer.isOpened()
    reds = [250 - 20 * number for number in range(count)]
    for red in reds:
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[..., 2] = red
        writer.write(picture)
    writer.release()
    return reds


def test_every_picture_of_a_video_file_comes_in_red_green_blue(tmp_path: Path) -> None:
    reds = video(tmp_path / "film.avi", 6)
    found = arrays(taken(CameraSource(CameraConfig(device=str(tmp_path / "film.avi"))), 100))
    assert [array.shape for array in found] == [(48, 64, 3)] * 6
    assert all(abs(float(array[..., 0].mean()) - red) < 8 for array, red in zip(found, reds, strict=True))
    assert max(float(array[..., 1:].mean()) for array in found) < 8
    grey = CameraSource(CameraConfig(device=str(tmp_path / "film.avi"), colour="grey"))
    assert arrays(taken(grey, 1))[0].shape == (48, 64)


def test_a_camera_that_is_not_there_is_a_source_error(tmp_path: Path) -> None:
    for device in ("/dev/video250", str(tmp_path / "none.avi")):
        with pytest.raises(SourceError, match="cannot be opened"):
            taken(CameraSource(CameraConfig(device=device)), 1)


@pytest.mark.parametrize(
    ("package", "extra", "source"),
    [
        ("serial", "sensors", SerialSource(SerialConfig(port="/dev/null", window=1))),
        ("smbus2", "sensors", I2cSource(I2cConfig(address=0x48, register=0, format=">h", window=1))),
        ("cv2", "camera", CameraSource(CameraConfig())),
    ],
)
def test_a_missing_package_names_the_pip_command(
    monkeypatch: pytest.MonkeyPatch, package: str, extra: str, source: Source
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra) as caught:
        taken(source, 1)
    assert caught.value.hint == f"pip install 'outrider[{extra}]'"


def test_a_line_of_the_memory_is_json(tmp_path: Path) -> None:
    inbox, config, memory = folder(tmp_path)
    put(inbox / 'a "b".npy', b"x", 1000)
    names(config, memory)
    assert json.loads(memory.read_text()) == [1000 * 10**9, 'a "b".npy', 1]
