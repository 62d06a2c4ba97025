"""docs/remote.md: its examples run, against servers of the kind that each of them names."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from outrider_runtimes.deadline import Deadline
from outrider_runtimes.tensors import Interface
from support import servers
from support.certificates import issue, serving
from support.grpc_servers import GrpcServer
from support.servers import Server

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[3] / "docs" / "remote.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
X = np.float32([[1.0, 2.0]])
URL = re.compile(r"(http|https|grpc)://[a-z0-9.]+:\d+")


def run(block: str, url: str, **names: object) -> dict[str, object]:
    """The block with the server's URL for its own, and what it leaves behind."""
    text, count = URL.subn(url, block)
    assert count == 1
    space: dict[str, object] = {"outrider": __import__("outrider"), "x": X, **names}
    exec(text, space)
    return space


def asked(space: dict[str, object], name: str = "x") -> np.ndarray:
    with space["remote"] as remote:
        return next(iter(remote.submit({name: X}, Deadline.after_ms(120_000)).result(200).outputs.values()))


def test_every_block_is_run_here():
    assert [URL.search(block)[1] for block in BLOCKS] == ["http", "https", "https", "grpc", "http"]


def test_asking(capsys):
    with Server() as server:
        run(BLOCKS[0], server.url)
    assert capsys.readouterr().out.startswith("[[2. 4.]]")


def test_trust(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    authority = issue(tmp_path, host="authority")
    client = issue(tmp_path, host="pi", by=authority)
    for issued, name in (
        (authority.certificate, "authority"),
        (client.certificate, "pi-07"),
        (client.key, "pi-07-key"),
    ):
        Path(f"{name}.pem").write_bytes(issued.read_bytes())
    for block, clients in ((BLOCKS[1], None), (BLOCKS[2], authority)):
        with Server(tls=serving(issue(tmp_path, by=authority), clients=clients)) as server:
            np.testing.assert_array_equal(asked(run(block, server.url)), X * 2)


def test_grpc():
    with GrpcServer() as server:
        np.testing.assert_array_equal(asked(run(BLOCKS[3], server.url)), X * 2)


def test_an_endpoint_that_is_not_ours():
    """The small model under the page's names on our side, and under its mapping's on the server's."""
    x, y = servers.INTERFACE.inputs[0], servers.INTERFACE.outputs[0]
    ours = Interface(inputs=(replace(x, name="image"),), outputs=(replace(y, name="logits"),))
    block = BLOCKS[4].replace("input_0", "x").replace("output_0", "y")
    with Server(ours={}) as server:
        space = run(block, server.url, edge=SimpleNamespace(interface=ours))
        np.testing.assert_array_equal(asked(space, "image"), X * 2)
