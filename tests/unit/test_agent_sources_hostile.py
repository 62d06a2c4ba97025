"""Sources that meet what a board meets: floods, garbage, files that become something else."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from outrider.agent.logs import LOGGER
from outrider.agent.sourceconfig import (
    I2cConfig,
    MicrophoneConfig,
    StdinConfig,
    TopicConfig,
)
from outrider.agent.sources import folder as folder_module
from outrider.agent.sources import microphone as microphone_module
from outrider.agent.sources import topic as topic_module
from outrider.agent.sources.folder import FolderSource
from outrider.agent.sources.i2c import I2cSource
from outrider.agent.sources.microphone import MicrophoneSource
from outrider.agent.sources.serial import MAX_LINE_BYTES, read_row
from outrider.agent.sources.stdin import StdinSource
from outrider.agent.sources.topic import TopicSource
from outrider.telemetry.mqtt import parse_broker
from outrider_runtimes.errors import InputError, SourceError
from support.peaks import peak_bytes
from support.sources import arrays, dealt_with, folder, npy, play, put, taken, wav


def test_a_line_without_an_end_ticks_so_that_a_stop_is_obeyed() -> None:
    with Path("/dev/zero").open("rb", buffering=0) as endless:
        frames = StdinSource(StdinConfig(), descriptor=endless.fileno()).frames()
        assert list(itertools.islice(frames, 20)) == [None] * 20


def test_a_standard_input_that_is_none_is_a_source_error(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(SourceError, match="standard input cannot be read"):
            taken(StdinSource(StdinConfig(), descriptor=descriptor), 1)
    finally:
        os.close(descriptor)


def test_of_a_line_that_was_cut_no_number_is_believed() -> None:
    assert read_row(b"1," * (MAX_LINE_BYTES // 2 - 1) + b"1", ",", (0,)).tolist() == [1.0]
    with pytest.raises(InputError, match=f"more than {MAX_LINE_BYTES} bytes"):
        read_row(b"1," * MAX_LINE_BYTES, ",", (0,))


def test_a_long_sound_is_cut_into_windows_as_they_are_asked_for(tmp_path: Path) -> None:
    inbox, config, memory = folder(tmp_path, window=4000, hop=1, rate_hz=8000)
    put(inbox / "a.wav", wav(np.arange(12_000)), 1000)
    taken(FolderSource(config, memory), 1)  # what the first one imports is not counted
    peak = peak_bytes(lambda: arrays(taken(FolderSource(config, memory), 3)))
    assert peak < 8_000_000, "8001 windows of 16,000 bytes"


def test_a_file_that_is_written_anew_while_others_are_answered_is_left_until_it_is_whole(tmp_path: Path) -> None:
    inbox, config, memory = folder(tmp_path, settle_s=5.0, poll_s=1.0)
    now = 100.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    for number in range(4):
        put(inbox / f"{number}.npy", npy(number), 1000 + number)
    frames = filter(None, FolderSource(config, memory, sleep=sleep, clock=lambda: now).frames())
    first = next(frames)
    first.done()
    put(inbox / "1.npy", b"half", 2000)
    (inbox / "2.npy").unlink()
    third = next(frames)
    third.done()
    assert (first.name, third.name) == ("0.npy", "3.npy")
    begun = now
    assert dealt_with(next(frames))[0] == "1.npy"
    assert now >= begun + 5.0


def test_a_file_that_became_a_pipe_is_an_input_error(tmp_path: Path) -> None:
    inbox, config, memory = folder(tmp_path)
    put(inbox / "a.npy", npy(1), 1000)
    frame = next(iter(FolderSource(config, memory).frames()))
    assert frame is not None
    (inbox / "a.npy").unlink()
    os.mkfifo(inbox / "a.npy")
    with pytest.raises(InputError, match="no file any more"):
        frame.read()


def test_a_link_is_read_as_what_it_leads_to_and_one_to_nowhere_is_left_alone(tmp_path: Path) -> None:
    inbox, config, memory = folder(tmp_path)
    put(tmp_path / "one.npy", npy(3), 1000)
    (inbox / "one.npy").symlink_to(tmp_path / "one.npy")
    (inbox / "none.npy").symlink_to(tmp_path / "none")
    (inbox / "round.npy").symlink_to(inbox / "round.npy")
    assert [name for name, _ in taken(FolderSource(config, memory), 10)] == ["one.npy"]


def test_files_that_come_and_go_for_years_fill_neither_memory_nor_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "MAX_GONE", 10)
    inbox, config, memory = folder(tmp_path, once=False)
    frames = filter(None, FolderSource(config, memory, sleep=lambda _: None, clock=itertools.count().__next__).frames())
    most = 0
    for number in range(60):
        put(inbox / f"{number}.npy", npy(number), 1000 + number)
        frame = next(frames)
        assert frame.name == f"{number}.npy"
        frame.done()
        most = max(most, len(memory.read_text().splitlines()))
        (inbox / f"{number}.npy").unlink()
    assert 10 < most < 30
    put(inbox / "59.npy", npy(59), 1059)
    put(inbox / "next.npy", npy(0), 2000)
    assert next(frames).name == "next.npy", "the folder was not there for a moment; what is back is not new"
    assert memory.stat().st_mode & 0o777 == 0o600


def test_a_bus_that_is_slower_than_the_interval_ticks() -> None:
    now = 0.0

    def read_block(address: int, register: int, length: int) -> list[int]:
        nonlocal now
        now += 0.2
        return [0] * length

    config = I2cConfig(address=0x48, register=7, format=">h", window=1000, interval_s=0.001)
    source = I2cSource(config, sleep=lambda _: pytest.fail("there is no time to rest"), clock=lambda: now)
    assert list(itertools.islice(source.readings(read_block), 10)) == [None] * 10
    assert now <= 2.01


def test_a_sensor_that_gives_half_a_block_does_not_answer() -> None:
    config = I2cConfig(address=0x48, register=7, format=">hh", window=1)
    with pytest.raises(SourceError, match="gave 2 bytes of 4"):
        next(I2cSource(config).readings(lambda address, register, length: [0] * (length // 2)))


def test_an_arecord_that_complains_all_the_time_is_heard_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(microphone_module, "SILENCE_S", 240.0)  # a busy machine starts it when it does
    play(
        tmp_path,
        "import time\n"
        "for each in range(4):\n"
        "    sys.stderr.write('overrun!!! (at least 0.1 ms long)\\n' * 1500); sys.stderr.flush()\n"
        "    sys.stdout.buffer.write(array('h', [each] * 4).tobytes()); sys.stdout.buffer.flush()\n"
        "time.sleep(600)",
    )
    found = arrays(taken(MicrophoneSource(MicrophoneConfig(window=4)), 4))
    assert [(array * 2**15).round().tolist() for array in found] == [[each] * 4 for each in range(4)]


def test_messages_that_wait_are_bounded_by_their_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topic_module, "MAX_INPUT_BYTES", 100)
    source = TopicSource(TopicConfig(topic="#", queue=5), parse_broker("mqtt://127.0.0.1"), device="pi")
    for number in range(8):
        source._message("small", bytes([number]), False)
    source._message("kept", b"old", True)
    assert source.dropped == 3
    source._message("large", bytes(97), False)
    source._message("huge", bytes(1000), False)
    assert [source._take(), source._take()] == [("huge", bytes(1000)), None]
    assert source.dropped == 9
    source._message("next", bytes(100), False)
    assert source._take() == ("next", bytes(100))


def test_the_log_names_the_topic_of_what_was_dropped(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger=LOGGER)
    source = TopicSource(TopicConfig(topic="#", queue=1), parse_broker("mqtt://127.0.0.1"), device="pi")
    source._message("old", b"", False)
    source._message("new", b"", False)
    assert source._take() == ("new", b"")
    assert [record.fields for record in caplog.records] == [{"topic": "old", "dropped": 1}]
