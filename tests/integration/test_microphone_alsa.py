"""Sound by the real arecord, from devices that ALSA's own plugins make: of a file, of a pipe that the test speaks into,
of a fixed rate."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from outrider.agent.sourceconfig import MicrophoneConfig
from outrider.agent.sources.base import Frame
from outrider.agent.sources.microphone import SILENCE_S, MicrophoneSource
from outrider_exporters import package
from outrider_runtimes.errors import SourceError
from support.agents import AgentProcess, Home
from support.broker import wait_until
from support.sources import QUIET, arrays, dealt_with, taken

pytestmark = pytest.mark.slow

RAMP = np.arange(-800, 800, dtype="<i2")

# The only configuration that ALSA reads here, so that a machine's own devices do not matter.
DEVICES = """
pcm.silence {{ type null }}
pcm.played {{ type file slave.pcm silence file "/dev/null" infile "{folder}/played.raw" format "raw" }}
pcm.spoken {{ type file slave.pcm silence file "/dev/null" infile "{folder}/spoken" format "raw" }}
pcm.studio {{
  type share
  slave {{ pcm silence rate 48000 channels 1 format S16_LE }}
  bindings {{ 0 0 }}
}}
"""


@pytest.fixture
def sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with what is played, and the pipe that is spoken into."""
    RAMP.tofile(tmp_path / "played.raw")
    os.mkfifo(tmp_path / "spoken")
    (tmp_path / "asound.conf").write_text(DEVICES.format(folder=tmp_path))
    monkeypatch.setenv("ALSA_CONFIG_PATH", str(tmp_path / "asound.conf"))
    return tmp_path


def microphone(device: str, **options: Any) -> MicrophoneSource:
    """One whose patience does not end: a machine may take a minute to start arecord."""
    return MicrophoneSource(MicrophoneConfig(**{"device": device, "window": 400, **options}), clock=lambda: 0.0)


@pytest.fixture
def speaker(sounds: Path) -> Iterator[int]:
    """The end of the pipe that is spoken into; opened for reading too, so that it can be opened before arecord does."""
    descriptor = os.open(sounds / "spoken", os.O_RDWR)
    yield descriptor
    os.close(descriptor)


def test_the_samples_are_those_of_the_device(sounds: Path) -> None:
    found = arrays(taken(microphone("played", rate_hz=8000), 4))
    assert [array.dtype for array in found] == [np.float32] * 4
    assert np.array_equal(np.concatenate(found) * 2**15, RAMP)
    stereo = arrays(taken(microphone("played", rate_hz=44_100, channels=2, hop=100), 3))
    mean = RAMP.reshape(-1, 2).mean(axis=1)
    assert [(array * 2**15).tolist() for array in stereo] == [
        mean[first : first + 400].tolist() for first in (0, 100, 200)
    ]


def test_what_is_said_comes_when_it_is_said_and_the_device_is_let_go_of(sounds: Path, speaker: int) -> None:
    with closing(microphone("spoken", rate_hz=8000).frames()) as frames:
        assert next(frames) is None, "nothing was said yet"
        for value in (1, 2, 3):
            os.write(speaker, np.full(8000, value, "<i2").tobytes())
            heard = (array * 2**15 for array in map(only_array, itertools.islice(frames, QUIET)) if array is not None)
            assert any((samples == value).all() for samples in heard)
    assert readers(sounds / "spoken") == 1, "the test's own end alone: arecord is gone"


def only_array(frame: Frame | None) -> np.ndarray | None:
    return None if frame is None else arrays([dealt_with(frame)])[0]


def readers(path: Path) -> int:
    """How many descriptors, of all processes that can be seen, are that file."""
    count = 0
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            count += link.readlink() == path
        except OSError:
            continue
    return count


def test_a_device_that_falls_silent_has_failed_and_is_let_go_of(sounds: Path, speaker: int) -> None:
    times = itertools.count(0.0, SILENCE_S / 3)
    source = MicrophoneSource(MicrophoneConfig(device="spoken", window=400), clock=lambda: next(times))
    with pytest.raises(SourceError, match=f"microphone spoken gave nothing for {SILENCE_S:g} s"):
        list(itertools.islice(source.frames(), QUIET))
    assert readers(sounds / "spoken") == 1


def test_a_rate_that_the_device_does_not_have_is_refused(sounds: Path) -> None:
    with pytest.raises(SourceError, match=r"does not have 16000 samples a second: .*got = 48000Hz") as caught:
        taken(microphone("studio", rate_hz=16_000), 1)
    assert "plughw" in caught.value.hint


def test_a_device_that_is_not_there_is_a_source_error(sounds: Path) -> None:
    with pytest.raises(SourceError, match=r"microphone hw:7 ended: arecord: .*No such file or directory") as caught:
        taken(microphone("hw:7"), 1)
    assert "arecord -L" in caught.value.hint


def doubling(path: Path) -> Path:
    """A bundle that answers 2 x to x, float32 [N, 400]."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 400]) for name in ("sound", "twice")]
    node = helper.make_node("Mul", ["sound", "two"], ["twice"])
    graph = helper.make_graph([node], "doubling", ports[:1], ports[1:], [numpy_helper.from_array(np.float32(2), "two")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path.with_suffix(".onnx"))
    package(path.with_suffix(".onnx"), output=path, name="tiny", axes={"sound": "NT", "twice": "NT"})
    return path


# arecord takes its time to start on a busy machine.
PATIENT = """
import sys
from outrider.agent.sources import microphone
from outrider.cli import main
microphone.SILENCE_S = 300.0
sys.exit(main())
"""


def test_the_agent_answers_what_it_hears_and_ends_on_sigterm_in_silence(sounds: Path, speaker: int) -> None:
    (sounds / "home").mkdir()
    home = Home(sounds / "home", "mqtt://127.0.0.1:1")
    doubling(home.folder / "tiny.outrider")
    home.configure(source='kind = "microphone"\ndevice = "spoken"\nrate_hz = 8000\nwindow = 400')
    home.config.write_text(home.config.read_text().replace("[output]", '[output]\nvalues = "all"'))
    with AgentProcess(home, program=("-c", PATIENT)) as agent:
        agent.wait_for("source_reading")
        os.write(speaker, RAMP.tobytes() * 10)
        wait_until(lambda: len(home.lines) >= 4, what="four answers")
        outcome = agent.stop()
    answered = np.concatenate([line["outputs"]["twice"][0] for line in home.lines[:4]])
    assert np.array_equal(answered * 2**14, RAMP)
    assert (outcome["ended"], outcome["failed"], outcome["refused"]) == ("SIGTERM", {}, {})
    assert readers(sounds / "spoken") == 1
    assert not [event for event in agent.events if event["event"] == "source_failed"], json.dumps(agent.events)
