"""A server that does as it should until a test tells it otherwise, and a remote that asks it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from outrider_runtimes.remote import Remote
from support.servers import Server


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def remote(server: Server) -> Iterator[Remote]:
    with Remote(server.url, model="m") as remote:
        yield remote
