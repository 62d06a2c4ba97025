"""One device against the watch of all: its message is counted, its numbers left out, and every other is shown."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from typing import Any

import pytest

from outrider.telemetry.vitals import Vitals
from outrider.watch import Watch
from outrider.watch.fleet import Event, News, Row
from outrider.watch.server import Server, _encode
from support.fleet import Simulated

NOBODY = "mqtt://127.0.0.1:9"
ABOUT = {"connected": True}


def read(text: str) -> Any:
    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("points", [None, {"a": [[1.0]], "evil": [[float("nan")]], "z": []}])
def test_one_bad_device_hides_no_other(bad: float, points: Any) -> None:
    good = Row(device="a", told=Vitals(per_second=2.5), event=Event(name="x", detail="", at_s=1.0))
    evil = replace(good, device="evil", told=Vitals(per_second=bad), state="online")
    said = read(_encode(ABOUT, [good, evil, replace(good, device="z")], points))
    assert said["connected"] is True
    assert [(each["device"], each["per_second"]) for each in said["devices"]] == [
        ("a", 2.5),
        ("evil", None),
        ("z", 2.5),
    ]
    assert said["devices"][1]["state"] == "online"
    assert [each.get("points") for each in said["devices"]] == ([None] * 3 if points is None else [[[1.0]], [], []])


def test_nobody_is_told_as_an_empty_list() -> None:
    assert read(_encode(ABOUT, [])) == {"connected": True, "devices": []}


def test_a_message_that_cannot_be_taken_is_counted_and_the_link_hears_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pi = Simulated("pi-07")
    sound = pi.status()
    seen: list[News] = []
    with Watch(NOBODY, on_news=seen.append) as watch:
        taken = watch._fleet.take

        def take(topic: str, payload: bytes, *, now_s: float) -> Any:
            if payload == b"evil":
                raise OverflowError("integer too large")
            return taken(topic, payload, now_s=now_s)

        monkeypatch.setattr(watch._fleet, "take", take)
        watch._message(sound.topic, b"evil", False)
        watch._message(sound.topic, sound.payload, False)
        assert (watch.malformed, [row.state for row in watch.rows()]) == (1, ["online"])
    assert [news.text for news in seen] == ["online (connected)"]
    assert "could not be taken in" in caplog.text


HEAD = b"HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "request_bytes", [b"GET / " + HEAD, b"GET /nothing " + HEAD, b"GET / HTTP/1.1\r\nHost: evil\r\n\r\n"]
)
def test_who_asks_and_is_gone_writes_nothing_over_the_table(request_bytes: bytes, capfd: Any) -> None:
    with Watch(NOBODY) as watch, Server(watch) as server:
        capfd.readouterr()
        here, there = socket.socketpair()
        there.sendall(request_bytes)
        there.close()
        server._server.process_request_thread(here, ("127.0.0.1", 1))
        assert "Traceback" not in capfd.readouterr().err
