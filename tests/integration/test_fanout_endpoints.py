"""One batch over two real endpoints, one of which is killed, stopped or away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from outrider.fanout import FannedOut, fan_out, introduce
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import InputError, RunnerError
from outrider_runtimes.remote import Remote
from outrider_runtimes.runner import Answer
from outrider_runtimes.tensors import Interface, Tensors
from support.hybrids import EndpointProcess
from support.ports import free_port
from support.realbundles import expected, images, make_real_bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS = 400
PATIENCE_MS = 200_000.0
X = images(ROWS)


class Accident(Remote):
    """A Remote to whose endpoint something happens when a part is sent to it for the third time."""

    def __init__(self, url: str, *, model: str, happens: Callable[[], None]) -> None:
        super().__init__(url, model=model)
        self._happens = happens
        self._sent = 0

    def submit(self, inputs: Tensors, deadline: Deadline) -> Future[Answer]:
        self._sent += 1
        if self._sent == 3:
            self._happens()
        return super().submit(inputs, deadline)


@pytest.fixture(scope="module")
def endpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[EndpointProcess]]:
    folder = tmp_path_factory.mktemp("fanout")
    make_real_bundle(folder / "large.outrider", name="large", seed=1)
    made = []
    for name in "ab":
        (folder / name).mkdir()
        made.append(EndpointProcess(folder / "large.outrider", model="large", state=folder / name / "state"))
        made[-1].start()
    yield made
    for endpoint in made:
        endpoint.stop()


def shared(first: Remote, second: Remote) -> FannedOut:
    deadline = Deadline.after_ms(PATIENCE_MS)
    interface, away = introduce([first, second], deadline)
    assert isinstance(interface, Interface)
    assert away == {}
    return fan_out([first, second], interface, {"image": X}, deadline)


def check_whole(found: FannedOut) -> None:
    """Every row, in order, and each counted once."""
    np.testing.assert_allclose(found.outputs["logits"], expected(X, seed=1), atol=1e-4)
    assert sum(share.rows for share in found.shares) == ROWS


def test_a_batch_survives_an_endpoint_that_is_killed_and_one_that_hangs(endpoints: list[EndpointProcess]) -> None:
    one, other = endpoints
    with Remote(one.url, model="large") as first, Remote(other.url, model="large") as second:
        both = shared(first, second)
    check_whole(both)
    assert all(share.said == "" for share in both.shares)

    stopped = one.process_id
    with (
        Accident(one.url, model="large", happens=lambda: os.kill(stopped, signal.SIGSTOP)) as first,
        Remote(other.url, model="large") as second,
    ):
        try:
            hung = shared(first, second)
        finally:
            os.kill(stopped, signal.SIGCONT)
    check_whole(hung)
    assert hung.shares[1].rows > hung.shares[0].rows

    with Accident(one.url, model="large", happens=one.kill) as first, Remote(other.url, model="large") as second:
        killed = shared(first, second)
    check_whole(killed)
    assert killed.shares[1].rows > killed.shares[0].rows
    assert (killed.shares[1].failures, killed.shares[1].said) == (0, "")
    one.start()


def infer(*models: str, folder: Path, json: bool = True) -> subprocess.CompletedProcess[str]:
    np.savez(folder / "many.npz", image=X)
    command = [sys.executable, "-m", "outrider.cli", "infer", *(["--json"] if json else []), *models]
    command += ["--input", str(folder / "many.npz"), "--output", str(folder / "out.npz"), "--deadline-ms", "200000"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_command_shares_a_batch_and_says_who_did_what(endpoints: list[EndpointProcess], tmp_path: Path) -> None:
    one, other = (f"{endpoint.url}/large" for endpoint in endpoints)
    away = f"http://127.0.0.1:{free_port()}/large"
    done = infer(one, away, other, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["outputs"]["logits"]["shape"] == [ROWS, 10]
    rows = [each["rows"] for each in told["endpoints"]]
    assert rows[1] == 0 and sum(rows) == ROWS
    assert [each["url"] for each in told["endpoints"]] == [url.rpartition("/")[0] for url in (one, away, other)]
    assert told["endpoints"][1]["said"]
    with np.load(tmp_path / "out.npz") as written:
        np.testing.assert_allclose(written["logits"], expected(X, seed=1), atol=1e-4)

    said = infer(one, away, folder=tmp_path, json=False).stdout
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert f"{ROWS} rows" in lines[one.rpartition("/")[0]]
    assert "0 rows; 0 parts failed, " in lines[away.rpartition("/")[0]]

    mixed = infer(one, "large", folder=tmp_path)
    assert mixed.returncode == 1
    assert "large is not an endpoint's URL/MODEL" in mixed.stderr


def test_where_nobody_is_there_it_fails_with_the_reason(tmp_path: Path) -> None:
    remotes = [Remote(f"http://127.0.0.1:{free_port()}", model="large") for _ in range(2)]
    with pytest.raises(RunnerError):
        introduce(remotes, Deadline.after_ms(PATIENCE_MS))
    for remote in remotes:
        remote.close()
    done = infer(*(f"{remote.url}/large" for remote in remotes), folder=tmp_path)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.npz").exists()


def test_bad_input_is_named_and_nothing_is_written(endpoints: list[EndpointProcess], tmp_path: Path) -> None:
    urls = [f"{endpoint.url}/large" for endpoint in endpoints]
    with Remote(endpoints[0].url, model="large") as remote:
        interface = remote.connect(Deadline.after_ms(PATIENCE_MS))
        with pytest.raises(InputError, match="image"):
            fan_out([remote], interface, {"image": X[:, :, :2]}, Deadline.after_ms(PATIENCE_MS))
    np.savez(tmp_path / "in.npz", picture=X)
    command = [sys.executable, "-m", "outrider.cli", "infer", *urls]
    command += ["--input", str(tmp_path / "in.npz"), "--output", str(tmp_path / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "picture" in done.stderr or "image" in done.stderr
    assert not (tmp_path / "out.npz").exists()
