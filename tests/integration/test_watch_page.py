"""The page of `outrider watch --html` in a real Chromium, over a real broker: what people see, and what hostile devices
cannot make them see."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from prometheus_client.parser import text_string_to_metric_families

from outrider.watch import Watch
from outrider.watch import server as module
from outrider.watch.server import Server
from outrider_runtimes.errors import ConfigError
from support.broker import Mosquitto, wait_until
from support.fleet import START_S, Simulated
from support.listener import Listener

pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parents[1]
FAR_MS = 120_000  # no machine is too slow
expect.set_options(timeout=FAR_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        running = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"], timeout=FAR_MS
        )
        yield running
        running.close()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "broker") as running:
        yield running


@pytest.fixture
def watch(broker: Mosquitto) -> Iterator[Watch]:
    # The time of the made-up devices, so that their records are of now.
    with Watch(broker.url, wall_clock=lambda: START_S + 10.0) as running:
        wait_until(lambda: running.connected, what="the watch is connected")
        yield running


@pytest.fixture
def server(watch: Watch) -> Iterator[Server]:
    with Server(watch) as running:
        yield running


@pytest.fixture
def device(broker: Mosquitto) -> Iterator[Listener]:
    with Listener(broker.port, "nothing") as client:
        yield client


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    opened = browser.new_page()
    opened.set_default_timeout(FAR_MS)
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.on("dialog", lambda dialog: problems.append(f"dialog {dialog.message}"))
    opened.goto(server.url)
    yield opened
    opened.close()
    assert problems == []


def tell(device: Listener, *messages: Any) -> None:
    for message in messages:
        device.say(message.topic, message.payload, retain=message.retain)


def line(page: Page, name: str) -> Any:
    return page.locator("#rows tr", has=page.get_by_role("rowheader", name=name, exact=True))


def test_a_device_appears_changes_and_goes(page: Page, device: Listener) -> None:
    expect(page.locator("#empty")).to_be_visible()
    pi = Simulated("pi-07")
    tell(device, pi.status(), pi.info(), pi.metrics([2.0] * 90 + [30.0] * 10, cloud=9))
    row = line(page, "pi-07")
    expect(row).to_contain_text("online")
    expect(row).to_contain_text("digits 3")
    expect(row).to_contain_text("9.0 %")
    expect(page.locator("#empty")).to_be_hidden()
    tell(device, pi.metrics([2.0] * 100, at_s=START_S + 1, temperature_c=71.0), pi.event("rollback", reason="slow"))
    expect(row).to_contain_text("71 °C")
    expect(row).to_contain_text("rollback reason=slow")
    tell(device, pi.status("offline", reason="lost"))
    expect(row).to_contain_text("offline")
    expect(page.get_by_role("status")).to_have_text("pi-07 is offline")
    assert row.locator(".offline").get_attribute("title") == "lost"


def test_a_real_device_that_is_killed_is_shown_offline_by_its_last_will(
    browser: Browser, broker: Mosquitto, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "support.told", broker.url, str(tmp_path / "state"), "pi-real"]
    child = subprocess.Popen(command, cwd=TESTS)
    try:
        with Watch(broker.url) as watch, Server(watch) as server:
            page = browser.new_page()
            page.goto(server.url, timeout=FAR_MS)
            row = line(page, "pi-real")
            expect(row).to_contain_text("online")
            expect(row.locator("td").nth(4)).to_have_text(re.compile("[1-9]"))  # answers a second
            child.send_signal(signal.SIGKILL)
            expect(row).to_contain_text("offline")
            page.close()
    finally:
        child.kill()
        child.wait(120)


HOSTILE = "<img src=x onerror=alert(1)>"


def test_hostile_names_are_text(page: Page, device: Listener, server: Server) -> None:
    evil = Simulated("evil", model=HOSTILE, variant="</script><script>document.title='owned'</script>")
    tell(device, evil.status("online", reason="<b>bold</b>"), evil.info(), evil.metrics([2.0] * 5))
    tell(device, evil.event("<svg onload=alert(2)>", note="\"><a href='javascript:alert(3)'>x</a>"))
    row = line(page, "evil")
    expect(row).to_contain_text(HOSTILE)
    expect(row).to_contain_text("<svg onload=alert(2)>")
    assert page.locator("#rows img, #rows svg, #rows script, #rows a, #rows b").count() == 0
    assert page.title() == "Fleet"
    # Names that no device of ours can have do not come as far as the table.
    device.say("outrider/v1/<img src=x>/status", b'{"v":1}')
    device.say("outrider/v1/evil/status", b"\x00<script>alert(4)</script>")
    tell(device, evil.status("offline", reason="closed"))
    expect(row).to_contain_text("offline")
    assert page.locator("#rows tr").count() == 1


def test_one_hostile_device_takes_nobody_off_the_page(page: Page, device: Listener, watch: Watch) -> None:
    good, evil = Simulated("good"), Simulated("evil")
    tell(device, good.status(), evil.records(("prediction", {"source": "edge", "timing_ms": {"total": 10**400}})))
    tell(device, evil.records(("metrics", {"interval_s": 1e-300, "predictions": 9 * 10**15})))
    expect(line(page, "evil")).to_have_count(1)
    page.reload()
    tell(device, good.metrics([2.0] * 100))
    expect(line(page, "good")).to_contain_text("2.09")
    expect(line(page, "evil")).to_have_count(1)
    assert (watch.connected, watch.last_error, watch.malformed) == (True, "", 1)


def test_the_browser_is_told_to_run_nothing_else(page: Page, server: Server) -> None:
    response = page.request.get(server.url)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    html = response.text()
    # Nothing but this server is named, so nothing else is asked; ids of namespaces are no addresses.
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", html) + re.findall(
        r"https?://[^\s\"'`]+", html
    )
    assert set(addresses) == {"data:,", "/fleet.json", "http://www.w3.org/2000/svg"}
    assert page.evaluate("document.querySelectorAll('script').length") == 1


def test_people_who_do_not_see_it_can_read_it(page: Page, device: Listener) -> None:
    for number, name in enumerate(("pi-01", "pi-02")):
        pi = Simulated(name)
        tell(device, pi.status(), pi.info())
        tell(device, *(pi.metrics([2.0 + number] * 10, at_s=START_S - 60 * (3 - minute)) for minute in range(3)))
    expect(line(page, "pi-02")).to_contain_text("2.95")
    table = page.get_by_role("table", name=re.compile("Each device"))
    assert table.get_by_role("columnheader").count() == 14
    assert page.get_by_role("checkbox", name="Show pi-01 in the charts").is_checked()
    chart = page.get_by_role("img", name=re.compile(r"^Latency p95, ms, now: pi-01 2\.09; pi-02 2.95"))
    expect(chart).to_be_visible()
    page.get_by_text("Values").first.click()
    values = page.get_by_role("table", name="Latency p95")
    expect(values.get_by_role("row", name=re.compile("pi-01"))).to_contain_text("2.09")
    # A line is known by its dashes too, not by its colour alone.
    dashes = (
        page.locator("figure")
        .first.locator("path")
        .evaluate_all("all => all.map(e => e.getAttribute('stroke-dasharray'))")
    )
    assert len(dashes) == len(set(dashes)) == 2


def test_sorting_filtering_and_choosing(page: Page, device: Listener) -> None:
    for number in range(8):
        pi = Simulated(f"pi-{number}", model="sorter" if number == 5 else "digits")
        tell(device, pi.status(), pi.info(), pi.metrics([1.0 + (number * 5) % 8] * 10))
    expect(page.locator("#rows tr")).to_have_count(8)
    heads = page.get_by_role("columnheader", name=re.compile("p95 ms"))
    heads.get_by_role("button").click()
    expect(heads).to_have_attribute("aria-sort", "descending")
    expect(page.locator("#rows tr").first).to_contain_text("pi-3")
    heads.get_by_role("button").press("Enter")
    expect(heads).to_have_attribute("aria-sort", "ascending")
    expect(page.locator("#rows tr").first).to_contain_text("pi-0")
    page.get_by_role("searchbox").fill("SORTER")
    expect(page.locator("#rows tr")).to_have_count(1)
    page.get_by_role("searchbox").fill("")
    expect(page.locator("#legend li")).to_have_count(6)
    page.get_by_role("checkbox", name="Show pi-0 in the charts").uncheck()
    expect(page.locator("#legend li")).to_have_count(5)
    expect(page.locator("#legend")).not_to_contain_text("pi-0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_its_ground(browser: Browser, server: Server, device: Listener, scheme: Any) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(server.url, timeout=FAR_MS)
    ratios = page.evaluate(
        """() => {
          const value = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
          const light = (hex) => {
            const parts = hex.slice(1).match(/../g).map((part) => parseInt(part, 16) / 255)
              .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
          };
          const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          const names = "--text --quiet --good --warn --bad --s0 --s1 --s2 --s3 --s4 --s5".split(" ");
          return Object.fromEntries(names.map((name) => [name, ratio(light(value(name)), light(value("--panel")))]));
        }"""
    )
    page.close()
    # WCAG 2.1: 4.5 for text (1.4.3), 3 for lines (1.4.11).
    low = {name: ratio for name, ratio in ratios.items() if ratio < (3.0 if name.startswith("--s") else 4.5)}
    assert low == {}


def test_a_watch_that_is_gone_is_said_to_be(browser: Browser, watch: Watch) -> None:
    page = browser.new_page()
    with Server(watch) as server:
        page.goto(server.url, timeout=FAR_MS)
        expect(page.locator("#link-text")).to_have_text("live")
    expect(page.locator("#link-text")).to_have_text("the watch does not answer")
    page.close()


def test_a_broker_that_is_gone_is_said_to_be(page: Page, broker: Mosquitto) -> None:
    expect(page.locator("#link-text")).to_have_text("live")
    broker.stop()
    expect(page.locator("#link-text")).to_contain_text("no broker")
    broker.start()
    expect(page.locator("#link-text")).to_have_text("live")


def ask(
    server: Server, path: str, *, method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str], bytes]:
    address = server.url.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(address, timeout=120)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    response = connection.getresponse()
    answer = response.status, dict(response.getheaders()), response.read()
    connection.close()
    return answer


def test_prometheus_and_programs_read_the_same(server: Server, device: Listener, watch: Watch) -> None:
    pi = Simulated("pi-07")
    tell(device, pi.status(), pi.info(), pi.metrics([2.0] * 10, cloud=1))
    wait_until(lambda: any(row.told.predictions for row in watch.rows()), what="told")
    status, headers, body = ask(server, "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }
    assert values["outrider_offload_ratio"] == 0.1 and values["outrider_device_up"] == 1.0
    (found,) = json.loads(ask(server, "/fleet.json?x=1")[2])["devices"]
    assert (found["device"], found["offload_share"]) == ("pi-07", 0.1)


def test_what_it_does_not_answer(server: Server) -> None:
    assert ask(server, "/etc/passwd")[0] == 404
    assert ask(server, "/", method="POST")[0] == 501
    for host in ("evil.example", "evil.example:80", "localhost.evil.example"):
        assert ask(server, "/fleet.json", host=host)[0] == 403
    for host in ("localhost", "localhost:99", "127.0.0.1"):
        assert ask(server, "/fleet.json", host=host)[0] == 200


def test_too_many_open_pages_are_refused_and_those_that_close_make_room(server: Server) -> None:
    address = server.url.removeprefix("http://").rstrip("/")
    open_pages = []
    for _ in range(32):
        connection = http.client.HTTPConnection(address, timeout=120)
        connection.request("GET", "/events")
        response = connection.getresponse()
        assert response.status == 200 and response.readline().startswith(b"data: ")
        open_pages.append((connection, response))
    assert ask(server, "/events")[0] == 503
    for connection, response in open_pages:
        response.close()
        connection.close()

    def has_room() -> bool:
        connection = http.client.HTTPConnection(address, timeout=120)
        connection.request("GET", "/events")
        status = connection.getresponse().status
        connection.close()
        return status == 200

    wait_until(has_room, what="room for one more")


def test_a_large_fleet_is_told_with_its_newest_points(
    server: Server, device: Listener, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_TOLD_POINTS", 40)
    for name in ("a", "b"):
        one = Simulated(name)
        tell(device, *(one.metrics([2.0], at_s=START_S - 60 * (30 - minute)) for minute in range(30)))
    wait_until(lambda: [row.records for row in watch.rows()] == [30, 30], what="all seen")
    connection = http.client.HTTPConnection(server.url.removeprefix("http://").rstrip("/"), timeout=120)
    connection.request("GET", "/events")
    response = connection.getresponse()
    told = json.loads(response.readline().removeprefix(b"data: "))["devices"]
    connection.close()
    assert [len(each["points"]) for each in told] == [20, 20]
    assert told[0]["points"][-1][0] == START_S - 60


def test_a_port_that_is_taken_is_named(server: Server, watch: Watch) -> None:
    port = int(server.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(ConfigError, match=str(port)):
        Server(watch, port=port)
