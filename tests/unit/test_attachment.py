"""What listens and posts on a reporter's connection."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from outrider.telemetry.attachment import MAX_POSTED, Attachment, Attachments, Outbox
from outrider.telemetry.mqtt import Message

LEVELS = st.sampled_from(["a", "b", "", "$SYS", "a b"])
TOPICS = st.lists(LEVELS, min_size=1, max_size=4).map("/".join)


@given(st.lists(LEVELS | st.just("+"), max_size=4), st.booleans(), TOPICS)
def test_a_filter_matches_as_pahos_does(levels: list[str], rest: bool, topic: str) -> None:
    levels = [*levels, "#"] if rest or not levels else levels
    attached: list[str] = []
    one = Attachment(subscriptions=("/".join(levels),), message=lambda topic, _p, _r: attached.append(topic))
    Attachments([one]).message(topic, b"", False)
    assert attached == ([topic] if topic_matches_sub("/".join(levels), topic) else [])


def test_each_hears_what_it_asked_for_once_and_none_is_harmed_by_another() -> None:
    heard: list[tuple[str, str, bytes, bool]] = []

    def broken(*_: object) -> None:
        raise ValueError("mine")

    def listener(name: str, *subscriptions: str) -> Attachment:
        return Attachment(
            subscriptions=subscriptions,
            up=lambda: heard.append((name, "up", b"", False)),
            message=lambda topic, payload, retained: heard.append((name, topic, payload, retained)),
        )

    bad = Attachment(subscriptions=("a/#",), up=broken, message=broken)
    all_ = Attachments([bad, listener("one", "a/b", "a/+"), listener("two", "b", "a/b")])
    assert all_.subscriptions == ("a/#", "a/b", "a/+", "b")
    all_.up()
    all_.message("a/b", b"x", True)
    all_.message("b", b"y", False)
    assert heard == [
        ("one", "up", b"", False),
        ("two", "up", b"", False),
        ("one", "a/b", b"x", True),
        ("two", "a/b", b"x", True),
        ("two", "b", b"y", False),
    ]


class Wire:
    """A connection that takes so many messages."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.sent: list[Message] = []

    def publish(self, message: Message) -> int | None:
        if len(self.sent) >= self.room:
            return None
        self.sent.append(message)
        return len(self.sent)


def messages(count: int) -> list[Message]:
    return [Message(topic="t", payload=b"%d" % number) for number in range(count)]


def test_posts_go_in_order_and_again_in_the_next_connection_until_they_are_confirmed() -> None:
    outbox, posts = Outbox(), messages(4)
    assert all(map(outbox.offer, posts))
    first = Wire(room=3)
    outbox.send(first.publish)
    assert first.sent == posts[:3]
    outbox.confirmed(2)
    outbox.up()
    second = Wire(room=9)
    outbox.send(second.publish)
    assert second.sent == [posts[0], posts[2], posts[3]]
    for mid in (1, 2, 3):
        outbox.confirmed(mid)
    outbox.up()
    third = Wire(room=9)
    outbox.send(third.publish)
    assert third.sent == []


@pytest.mark.parametrize("sent", [0, 100])
def test_a_full_outbox_says_so(sent: int) -> None:
    outbox = Outbox()
    assert all(map(outbox.offer, messages(MAX_POSTED)))
    outbox.send(Wire(room=sent).publish)
    assert not outbox.offer(messages(1)[0]), "what was sent and not confirmed counts"
    outbox.confirmed(1)
    assert outbox.offer(messages(1)[0]) == (sent > 0)


def test_of_what_a_broker_keeps_the_newest_alone_waits() -> None:
    """A device that is offline for hours tells its newest values when it is back, and not the oldest 256."""
    outbox = Outbox()
    kept = [Message(topic="vitals", payload=b"%d" % number, retain=True) for number in range(2 * MAX_POSTED)]
    first, other, once = Message(topic="a", payload=b""), Message(topic="config", payload=b"", retain=True), kept[0]
    plain = Message(topic="vitals", payload=b"not kept")
    assert all(map(outbox.offer, [first, once, other, plain, *kept[1:]]))
    wire = Wire(room=9)
    outbox.send(wire.publish)
    assert wire.sent == [first, other, plain, kept[-1]]
    outbox.up()
    newest = Message(topic="vitals", payload=b"newest", retain=True)
    assert outbox.offer(newest)
    again = Wire(room=9)
    outbox.send(again.publish)
    assert again.sent == [first, other, plain, newest]


def test_what_has_no_form_in_mqtt_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    outbox, sent = Outbox(), []

    def publish(message: Message) -> int:
        if "+" in message.topic:
            raise ValueError("a wildcard")
        sent.append(message.topic)
        return len(sent)

    assert all(outbox.offer(Message(topic=topic, payload=b"")) for topic in ("a", "b/+", "c"))
    outbox.send(publish)
    assert sent == ["a", "c"]
    assert "'b/+' cannot be sent" in caplog.text
