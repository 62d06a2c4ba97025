"""Nothing that was marked private reaches the cloud: by the call, by the policy, or in the state of a stream."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.hybrid import Hybrid
from outrider.policy import Policy
from outrider.stream import Stream
from outrider_runtimes.errors import InferenceError, OutriderError
from outrider_runtimes.tensors import Interface, StatePair, TensorSpec
from support.effort import effort
from support.runners import CLASSES, INTERFACE, ConnectingRunner
from support.straight import STATE, StraightRunner

SECRET = 1000.0  # in the last column; no sum of what is public comes near it
HELD, GIVEN = (TensorSpec(name=name, dtype="float32", shape=(None, CLASSES), axes="NC") for name in STATE)
RECURRENT = Interface(
    inputs=(*INTERFACE.inputs, HELD),
    outputs=(*INTERFACE.outputs, GIVEN),
    state=(StatePair(input=STATE[0], output=STATE[1]),),
)
NOWHERE = Path("/nowhere")
policies = st.fixed_dictionaries(
    {
        "min_margin": st.sampled_from([0.0, 0.5, 1.0]),
        "hedge_after_ms": st.sampled_from([None, 0.0]),
        "audit_share": st.sampled_from([0.0, 1.0]),
    }
)
calls = st.lists(
    st.fixed_dictionaries(
        {
            "private": st.booleans(),
            "sure": st.booleans(),
            "edge": st.sampled_from(["answers", "fails", "never"]),
            "slow": st.booleans(),
            "reset": st.booleans(),
        }
    ),
    max_size=8,
)


def made(interface, policy, *, cloud_only=False, **more):
    edge, cloud = StraightRunner(interface), StraightRunner(interface)
    edge.cloud_only, cloud.expected_ms = cloud_only, 0.01
    policy = Policy(60_000.0, hot_c=None, audit_allowed=0.5, output="logits", **policy, **more)
    return edge, cloud, Hybrid(edge, cloud, policy, root=NOWHERE)


def asked(face, edge, call):
    """One call; what is private has the secret in it."""
    x = np.array([[9.0 if call["sure"] else 0.0, 0.0, 0.0, SECRET if call["private"] else 0.0]], np.float32)
    edge.error = InferenceError("broke") if call["edge"] == "fails" else None
    edge.never = call["edge"] == "never"
    edge.expected_ms = 1e6 if call["slow"] else 0.01
    with contextlib.suppress(OutriderError):  # a side that never answers is given no time to do so
        face.infer(x, private=call["private"], deadline_ms=3.0 if edge.never else 1000.0)


def leaked(cloud):
    return any((array >= SECRET).any() for seen in cloud.saw for array in seen.values())


@given(policies, st.booleans(), calls)
@settings(max_examples=effort(60), deadline=None)
def test_no_private_input_reaches_the_cloud_whatever_happens(policy, cloud_only, steps):
    edge, cloud, hybrid = made(INTERFACE, policy, cloud_only=cloud_only)
    for call in steps:
        asked(hybrid, edge, call)
    assert not leaked(cloud)


@given(policies, st.booleans(), calls)
@settings(max_examples=effort(60), deadline=None)
def test_neither_does_the_state_that_a_private_call_left_in_a_stream(policy, cloud_only, steps):
    edge, cloud, hybrid = made(RECURRENT, policy, cloud_only=cloud_only)
    stream = hybrid.stream()
    for call in steps:
        if call["reset"]:
            stream.reset()
        asked(stream, edge, call)
    assert not leaked(cloud)


def test_what_follows_a_private_call_of_a_stream_stays_until_it_begins_anew():
    _, cloud, hybrid = made(RECURRENT, {"min_margin": 1.0})
    stream, x = Stream(hybrid), np.zeros((1, CLASSES), np.float32)
    reasons = [stream.infer(x, private=private).reason for private in (False, True, False)]
    assert reasons == ["uncertain", "private", "private"]
    stream.reset()
    assert stream.infer(x).reason == "uncertain"
    assert len(cloud.saw) == 2


@given(policies, st.booleans(), calls)
@settings(max_examples=effort(30), deadline=None)
def test_with_a_private_policy_the_cloud_sees_nothing_at_all(policy, cloud_only, steps):
    edge, cloud, hybrid = made(INTERFACE, policy, cloud_only=cloud_only, private=True)
    for call in steps:
        asked(hybrid, edge, call)
    assert cloud.saw == []


@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_with_a_private_policy_the_cloud_is_not_even_connected_to(margin):
    edge, cloud = StraightRunner(), ConnectingRunner()
    hybrid = Hybrid(edge, cloud, Policy(60_000.0, min_margin=margin, hot_c=None, private=True), root=NOWHERE)
    assert hybrid.infer(np.zeros((1, CLASSES), np.float32)).reason == ("private" if margin else "edge")
    assert (cloud.connects, cloud.submitted) == (0, 0)
    cloud.close()
