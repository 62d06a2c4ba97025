"""The fleet as text for people and for Prometheus."""

from __future__ import annotations

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from outrider.cli import watch as cli
from outrider.telemetry.vitals import Vitals
from outrider.watch.exposition import expose
from outrider.watch.fleet import Event, Fleet, Row
from outrider.watch.table import SORTS, age, render, repaint, row_to_json, sort_rows, summary
from support.fleet import START_S, a_story

TOLD = Vitals(
    model="digits",
    version=3,
    variant="onnx-int8",
    engine="onnxruntime",
    predictions=100,
    failures=2,
    per_second=1.67,
    p50_ms=2.089,
    p95_ms=14.05,
    offload_share=0.0575,
    degraded_share=0.0,
    temperature_c=51.5,
    throttled=False,
    problems=("failures",),
)
PI = Row(
    device="pi-07", state="online", heard_s=90.0, told=TOLD, event=Event(name="drift", detail="score=1", at_s=40.0)
)
NEW = Row(device="new", state="unknown")
GONE = Row(device="gone", state="offline", reason="lost", heard_s=10.0, told=Vitals(p95_ms=99.0, temperature_c=80.0))


def story() -> list[Row]:
    fleet = Fleet()
    for seen in a_story(until_s=START_S, minutes=3):
        fleet.take(seen.topic, seen.payload, now_s=START_S)
    return fleet.rows()


def test_the_table_says_what_is_known_and_a_dash_where_nothing_is() -> None:
    head, pi, new = render([PI, NEW], now_s=100.0).splitlines()
    assert head.split("  ")[0] == "device" and head.endswith("last event")
    cells = [cell.strip() for cell in pi.split("  ") if cell.strip()]
    assert cells == [
        *("pi-07", "online", "digits 3", "onnx-int8", "1.7", "2.09", "14.05", "5.8%", "0.0%", "52 C", "10 s"),
        *("failures", "drift score=1, 60 s"),
    ]
    assert new.split() == ["new", "unknown", *["-"] * 11]


def test_columns_line_up_and_lines_are_cut_to_the_terminal() -> None:
    lines = render(story(), now_s=START_S).splitlines()
    at = lines[0].index("state")
    assert {line[at:].split()[0] for line in lines[1:]} <= {"online", "offline"}
    assert max(len(line) for line in render(story(), now_s=START_S, width=60).splitlines()) == 60


def test_colour_is_beside_the_word_not_instead_of_it() -> None:
    plain, coloured = (render([PI, GONE], now_s=100.0, colour=colour) for colour in (False, True))
    assert "\x1b[32monline\x1b[0m" in coloured and "\x1b[31moffline\x1b[0m" in coloured
    for code in ("\x1b[1m", "\x1b[0m", "\x1b[31m", "\x1b[32m"):
        coloured = coloured.replace(code, "")
    assert coloured == plain
    assert "\x1b[31m" not in render([GONE], now_s=100.0, width=4, colour=True)


@pytest.mark.parametrize(
    ("by", "order"),
    [
        ("device", ["gone", "new", "pi-07"]),
        ("state", ["gone", "new", "pi-07"]),
        ("latency", ["gone", "pi-07", "new"]),
        ("offload", ["pi-07", "gone", "new"]),
        ("temperature", ["gone", "pi-07", "new"]),
        ("heard", ["pi-07", "gone", "new"]),
    ],
)
def test_what_is_worst_or_newest_comes_first_and_the_unknown_last(by: str, order: list[str]) -> None:
    assert [row.device for row in sort_rows([PI, NEW, GONE], by)] == order


def test_the_command_offers_every_sort() -> None:
    assert tuple(SORTS) == cli.SORT_BY


def test_the_summary_counts() -> None:
    assert summary([PI, NEW, GONE]) == "3 devices: 1 online, 0 stale, 1 offline; 1 with problems; 1.7 answers/s"


def test_a_repaint_leaves_nothing_of_what_was_there() -> None:
    assert repaint("a\nb", height=10) == "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J"
    long = repaint("\n".join("abcdefghij"), height=5)
    assert long.count("\n") == 4 and "... 7 lines more" in long


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s"), (119, "119 s"), (600, "10 min"), (7200, "2 h"), (172800, "2 d")]
)
def test_an_age_is_told_in_its_largest_unit(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_a_row_is_flat_json() -> None:
    fields = json.loads(json.dumps(row_to_json(PI)))
    assert fields["device"] == "pi-07" and fields["p95_ms"] == 14.05 and fields["event"]["name"] == "drift"


def samples(text: str) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels.get("device", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_reads_the_numbers_in_its_units() -> None:
    found = samples(expose([PI, NEW, GONE], connected=True, malformed=4))
    assert found["outrider_watch_connected", ""] == 1.0
    assert found["outrider_watch_malformed_total", ""] == 4.0
    assert found["outrider_latency_p95_seconds", "pi-07"] == pytest.approx(0.01405)
    assert found["outrider_offload_ratio", "pi-07"] == 0.0575
    assert found["outrider_temperature_celsius", "pi-07"] == 51.5
    assert [found["outrider_device_up", name] for name in ("pi-07", "new", "gone")] == [1.0, 0.0, 0.0]
    assert ("outrider_latency_p95_seconds", "new") not in found


def test_each_family_is_written_once_with_its_help_and_type() -> None:
    text = expose(story(), connected=True, malformed=0)
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names)) and all(family.documentation for family in families)
    assert {family.type for family in families} == {"gauge", "counter"}
    assert text.count("# TYPE") == text.count("# HELP") == len(families)
    up = next(family for family in families if family.name == "outrider_device_up")
    assert len(up.samples) == 8


def test_hostile_labels_stay_labels() -> None:
    name = 'a"} 1\n# HELP x\\'
    row = Row(device="pi-07", told=Vitals(model=name, version=1, variant="{}", engine='"'))
    info = next(
        family
        for family in text_string_to_metric_families(expose([row], connected=False, malformed=0))
        if family.name == "outrider_model_info"
    )
    assert info.samples[0].labels == {"device": "pi-07", "model": name, "version": "1", "variant": "{}", "engine": '"'}


def test_an_empty_fleet_is_a_sound_page_of_text() -> None:
    assert set(samples(expose([], connected=False, malformed=0)).values()) == {0.0}
