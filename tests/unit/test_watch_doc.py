"""docs/watch.md says what the code does."""

from __future__ import annotations

import json
import re
from pathlib import Path

from PIL import Image

from outrider.cli import build_parser
from outrider.cli import watch as cli
from outrider.telemetry.homeassistant import discovery, discovery_topic, encode_vitals, vitals_topic
from outrider.telemetry.sparkplug import TAGS
from outrider.telemetry.vitals import Vitals
from outrider.watch import fleet, server
from outrider.watch.exposition import expose
from outrider.watch.fleet import Row

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "watch.md").read_text()


def test_the_example_of_vitals_is_what_a_device_writes() -> None:
    found = re.search(r"<!-- example: vitals -->\n```json\n(.*?)```", PAGE, re.DOTALL)
    assert found
    said = json.loads(found[1])
    fields = {name: value for name, value in said.items() if name != "v"}
    assert json.loads(encode_vitals(Vitals(**{**fields, "problems": tuple(said["problems"])}))) == said


def test_the_topics_are_those_of_the_code() -> None:
    assert f"`{discovery_topic('pi-07')}`" in PAGE
    assert f"`{vitals_topic('x').replace('/x/', '/<device>/')}`" in PAGE
    assert len(json.loads(discovery("x"))["components"]) == 6 and "with six entities" in PAGE


def test_every_sparkplug_metric_is_in_the_table_with_its_type() -> None:
    rows = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \| (String|Int64|Double|Boolean)", PAGE, re.MULTILINE)
    documented = {name: kind.upper() for names, kind in rows for name in re.findall(r"`([^`]+)`", names)}
    assert documented == {tag.name: tag.datatype.name for tag in TAGS}


def test_every_prometheus_metric_is_in_the_table() -> None:
    told = Vitals(
        model="m",
        version=1,
        per_second=1.0,
        p50_ms=1.0,
        p95_ms=1.0,
        offload_share=0.0,
        degraded_share=0.0,
        availability=1.0,
        temperature_c=1.0,
        throttled=False,
        memory_rss_bytes=1,
        drift=0.0,
    )
    text = expose([Row(device="x", heard_s=1.0, told=told)], connected=True, malformed=0)
    assert set(re.findall(r"`(outrider_\w+)`", PAGE)) == set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))


def test_the_options_and_numbers_are_those_of_the_code() -> None:
    parser = build_parser().parse_args(["watch", "mqtt://127.0.0.1:1883", "--html", "8080"])
    assert (parser.html, parser.stale_after) == (8080, fleet.STALE_AFTER_S)
    options = set(re.findall(r"`(--[a-z-]+)", PAGE))
    certificates = {"--ca", "--cert", "--cert-key"}
    assert options == {"--json", "--seconds", "--once", "--sort", "--user", "--stale-after", "--host"} | certificates
    assert cli.PASSWORD in PAGE and f"({fleet.STALE_AFTER_S:.0f})" in PAGE
    assert all(f"`{by}`" in PAGE for by in cli.SORT_BY)
    assert fleet.WINDOW_S == 600 and "last ten minutes" in PAGE and cli.ONCE_S == 3 and "three seconds" in PAGE
    assert f"{server.MAX_STREAMS} open pages" in (DOCS / "adr" / "0022-the-fleet-view.md").read_text()


def test_the_screenshot_is_small_and_there() -> None:
    (name,) = re.findall(r"!\[.*?\]\((.*?)\)", PAGE)
    path = DOCS / name
    assert path.stat().st_size < 200_000
    with Image.open(path) as image:
        assert image.size == (1360, 1120)
