"""What Home Assistant is told, against the fields that its documentation lists, its templates rendered by Jinja."""

from __future__ import annotations

import json
import re
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.telemetry.homeassistant import HomeAssistant, discovery, discovery_topic, encode_vitals, vitals_topic
from outrider.telemetry.mqtt import Message
from outrider.telemetry.record import encode_status, topics
from outrider.telemetry.vitals import Vitals
from outrider_runtimes.errors import ConfigError
from support.telemetry import BOOT, STREAM

# https://www.home-assistant.io/integrations/mqtt/#device-discovery-payload and the pages of sensor.mqtt and
# binary_sensor.mqtt: what an object may hold, and what it must.
DEVICE = {"identifiers", "connections", "name", "manufacturer", "model", "model_id", "sw_version", "hw_version"}
DEVICE |= {"serial_number", "suggested_area", "via_device", "configuration_url"}
ORIGIN = {"name", "sw_version", "support_url"}
ROOT = {"device", "origin", "components", "availability", "availability_mode", "state_topic", "command_topic"}
ROOT |= {"qos", "encoding"}
ENTITY = {"platform", "unique_id", "name", "icon", "entity_category", "value_template", "device_class", "state_topic"}
ENTITY |= {"json_attributes_topic", "json_attributes_template", "expire_after", "force_update", "enabled_by_default"}
FIELDS = {
    "sensor": ENTITY | {"unit_of_measurement", "state_class", "suggested_display_precision", "options"},
    "binary_sensor": ENTITY | {"payload_on", "payload_off", "off_delay"},
}
UNITS = {"duration": {"ms", "s", "min", "h", "d"}, "temperature": {"°C", "°F", "K"}}
# The pattern by which Home Assistant finds configurations below its prefix.
TOPIC = re.compile(r"homeassistant/device/[a-zA-Z0-9_-]+/config")

devices = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
told = Vitals(
    model="digits",
    version=3,
    predictions=10,
    failures=1,
    p95_ms=14.05,
    offload_share=0.0575,
    temperature_c=51.5,
    problems=("failures",),
)


def config() -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(discovery("pi-07"))
    return fields


def render(template: str, payload: bytes) -> str:
    return (
        jinja2.Environment(undefined=jinja2.StrictUndefined)
        .from_string(template)
        .render(value=payload.decode(), value_json=json.loads(payload))
    )


def states(vitals: Vitals) -> dict[str, str]:
    payload = encode_vitals(vitals)
    return {name: render(each["value_template"], payload) for name, each in config()["components"].items()}


def test_every_field_is_one_that_home_assistant_documents() -> None:
    fields = config()
    assert set(fields) <= ROOT and {"device", "origin", "components"} <= set(fields)
    assert set(fields["device"]) <= DEVICE and fields["device"]["identifiers"]
    assert set(fields["origin"]) <= ORIGIN and fields["origin"]["name"]
    for component in fields["components"].values():
        assert set(component) <= FIELDS[component["platform"]]
        assert component["unique_id"] and component["name"]
        if "state_class" in component:
            assert component["state_class"] == "measurement" and component["unit_of_measurement"]
        if component.get("device_class") in UNITS:
            assert component["unit_of_measurement"] in UNITS[component["device_class"]]


def test_it_has_what_was_promised() -> None:
    assert list(config()["components"]) == [
        "model",
        "version",
        "p95_latency",
        "temperature",
        "offload_share",
        "problem",
    ]


def test_availability_is_our_own_status_topic() -> None:
    (availability,) = config()["availability"]
    assert availability["topic"] == topics("pi-07").status
    for state in ("online", "offline"):  # what Home Assistant takes for available and not, where it is told no other
        will = encode_status(state, device="pi-07", stream=STREAM, boot_id=BOOT, reason="lost", wall_s=None)
        assert render(availability["value_template"], will) == state


def test_the_templates_read_the_vitals() -> None:
    assert states(told) == {
        "model": "digits",
        "version": "3",
        "p95_latency": "14.05",
        "temperature": "51.5",
        "offload_share": "5.75",
        "problem": "ON",
    }
    attributes = config()["components"]["problem"]["json_attributes_template"]
    assert json.loads(render(attributes, encode_vitals(told))) == {"problems": ["failures"], "failures": 1}


def test_what_is_not_known_is_what_home_assistant_takes_for_unknown() -> None:
    assert states(Vitals()) == {
        "model": "None",
        "version": "None",
        "p95_latency": "None",
        "temperature": "None",
        "offload_share": "None",
        "problem": "OFF",
    }


@given(devices, devices)
def test_the_topic_is_one_that_it_finds_and_no_two_devices_share_it(one: str, other: str) -> None:
    assert TOPIC.fullmatch(discovery_topic(one))
    assert (discovery_topic(one) == discovery_topic(other)) == (one == other)
    ids = [each["unique_id"] for each in json.loads(discovery(one))["components"].values()]
    assert len(set(ids)) == len(ids)


def test_it_tells_all_when_it_comes_up_and_when_home_assistant_does() -> None:
    posted: list[Message] = []

    def post(message: Message) -> bool:
        posted.append(message)
        return True

    home = HomeAssistant(device="pi-07", post=post)
    assert home.attachment.subscriptions == ("homeassistant/status",)
    home.attachment.up()
    both = [discovery_topic("pi-07"), vitals_topic("pi-07")]
    assert [message.topic for message in posted] == both
    assert all(message.retain for message in posted)
    home.tell(told)
    assert json.loads(posted[-1].payload)["model"] == "digits"
    posted.clear()
    for payload, retained in ((b"offline", False), (b"online", True), (b"\xff", False)):
        home.attachment.message("homeassistant/status", payload, retained)
    assert posted == []
    home.attachment.message("homeassistant/status", b"online", False)
    assert [message.topic for message in posted] == both
    assert json.loads(posted[-1].payload)["model"] == "digits"


@pytest.mark.parametrize("prefix", ["", "a+b", "#", "a\nb", 3])
def test_a_prefix_that_a_topic_cannot_hold(prefix: str) -> None:
    with pytest.raises(ConfigError, match="prefix"):
        HomeAssistant(device="pi-07", post=lambda message: True, prefix=prefix)
