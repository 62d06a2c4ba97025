"""docs/endpoint.md says what the code does: reasons, bounds, metrics and paths."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from outrider.endpoint import grpc_reading, heap, inference, intake, protocol, refusals, server
from outrider.endpoint.app import build_app
from outrider.endpoint.faces import LIMITS, MAX_PREPARED_BYTES, MAX_TIME_S
from outrider.endpoint.grpc_server import MAX_MESSAGE_BYTES, MAX_THREADS, SPARE_THREADS
from outrider.endpoint.listening import DRAIN_S
from outrider.endpoint.metrics import CALLER_STATUSES
from outrider.endpoint.models import Models
from outrider_runtimes._oip_files import MAX_FILES
from outrider_runtimes._oip_tensors import MAX_DEPTH
from support.asgi import ask
from support.endpoints import served

TEXT = (Path(__file__).parents[2] / "docs" / "endpoint.md").read_text()
FLAT = " ".join(TEXT.split())


def test_every_reason_is_there_with_its_status():
    rows = re.findall(r"^\| (\d+) \| (\w+) \|", refusals.__doc__ or "", re.M)
    assert len(rows) > 15
    lines = [line.split("|") for line in TEXT.splitlines() if re.match(r"\| \d", line)]
    for status, reason in rows:
        assert any(status in cells[1] and f"`{reason}`" in cells[2] for cells in lines), reason


def test_every_path_is_there():
    shown = FLAT.replace("[/versions/V]", "")
    for route in build_app(Models()).routes:
        path = route.path.replace("/versions/{version}", "").replace("{model}", "M")
        assert path in shown or path.removesuffix("/ready") in shown


def test_every_metric_is_there_and_no_other():
    app = build_app(Models([served(1)]))
    ask(app, "/v2/models/other/infer", b"")
    app.state.endpoint.metrics.turned_away(400)
    names = set(re.findall(r"^# HELP (\w+)", ask(app, "/metrics").body.decode(), re.M))
    assert names == set(re.findall(r"`(outrider_\w+)`", TEXT))


MIB = 1 << 20
BOUNDS = [
    f"as many as preprocessing makes into {MAX_PREPARED_BYTES >> 30} GiB for the network",
    f"At most {MAX_FILES:,} files come in one tensor",
    f"{LIMITS.body_bytes // MIB} MiB, {LIMITS.json_bytes // MIB} MiB of it JSON, JSON {MAX_DEPTH} deep",
    f"all bodies together {intake.BODIES_AT_ONCE * LIMITS.body_bytes // MIB} MiB",
    f"whole within {protocol.BoundedProtocol.body_timeout_s:.0f} s; {protocol.MAX_CHUNKS:,} chunks",
    f"{protocol.MAX_HEAD_BYTES >> 10} KiB, {protocol.MAX_HEADERS} headers, whole within",
    f"within {protocol.BoundedProtocol.head_timeout_s:.0f} s |",
    f"{protocol.MAX_PIPELINE} requests ahead of their replies; idle for {server.KEEP_ALIVE_S} s;",
    f"{protocol.BoundedProtocol.read_timeout_s:.0f} s without reading its replies",
    f"{protocol.MAX_CONNECTIONS} are answered; up to {protocol.MAX_OPEN} are told 503",
    f"at most {MAX_MESSAGE_BYTES // MIB} MiB",
    f"its turn, {grpc_reading.AT_ONCE} at once, and while it comes it counts as {MAX_MESSAGE_BYTES // MIB} MiB",
    f"no turn within {grpc_reading.TURN_S:.0f} s is refused",
    f"not whole {grpc_reading.WITHIN_S:.0f} s after its turn",
    f"and {grpc_reading.AT_ONCE} more, at most {MAX_THREADS - SPARE_THREADS} in all; {SPARE_THREADS} threads are left",
    f"of more than {inference.SOON_SENT_BYTES >> 10} KiB counts among those",
    f"`M_MMAP_THRESHOLD` to {heap.LARGE_BYTES // MIB} MiB",
    f"(`--queue`, {intake.QUEUE})",
    f"for at most {DRAIN_S:.0f} s (`--drain-s`)",
    f"at most {MAX_TIME_S:.0f} s) passed",
    f"wrong ({', '.join(map(str, sorted(CALLER_STATUSES)))}) counts for neither",
]


@pytest.mark.parametrize("bound", BOUNDS)
def test_every_bound_is_there(bound):
    assert bound in FLAT
