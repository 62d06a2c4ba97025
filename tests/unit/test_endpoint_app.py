"""The application without a server: what it says of its models, of itself and of each request."""

from __future__ import annotations

import asyncio
import json
import logging
import re

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from outrider.endpoint.app import build_app
from outrider.endpoint.calls import access
from outrider.endpoint.faces import LIMITS
from outrider.endpoint.intake import Intake
from outrider.endpoint.models import QUICK_MS, Models, Served
from outrider.endpoint.openapi import OPERATIONS, describe
from outrider_runtimes import oip, runner
from outrider_runtimes.errors import InferenceError, QueueFull, RunnerClosed, RunnerStuck
from outrider_runtimes.oip import Limits
from outrider_runtimes.tensors import Interface, TensorSpec
from support.asgi import ask, asked
from support.endpoints import Named
from support.runners import INTERFACE


def body_of(*data: float) -> bytes:
    """A request for one row that begins with these."""
    row = [*data, *[0.0] * (4 - len(data))]
    return json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": row}]}).encode()


BODY = body_of(1.0, 2.0, 3.0, 4.0)
INFER = "/v2/models/digits/infer"


@pytest.fixture
def digits():
    digits = Named()
    yield digits
    digits.close()


@pytest.fixture
def app(digits):
    return build_app(Models([Served(name="digits", runner=digits)]))


def test_the_reply_names_what_answered_and_after_a_rollback_all_of_it_names_what_is_there_now(app, digits):
    before = ask(app, INFER, BODY).json()
    assert (before["model_version"], before["parameters"]["bundle"]) == ("3", f"{3:064x}")
    digits.become(2, variant="onnx-float32")
    after = ask(app, INFER, BODY).json()
    assert (after["model_version"], after["parameters"]["bundle"]) == ("2", f"{2:064x}")
    model = ask(app, "/v2/models/digits").json()
    ours = model["parameters"]["outrider"]
    assert (model["versions"], ours["bundle"], ours["variant"]) == (["2"], f"{2:064x}", "onnx-float32")
    assert ask(app, "/v2/models/digits/versions/2").status == 200
    assert ask(app, "/v2/models/digits/versions/3").status == 404
    assert f'bundle="{2:064x}"' in ask(app, "/metrics").body.decode()


def test_a_version_that_was_rolled_back_by_this_very_request_is_not_answered_in_its_name(app, digits):
    digits.hold()

    async def both() -> tuple[int, int]:
        named = asyncio.ensure_future(asked(app, "/v2/models/digits/versions/3/infer", BODY))
        while digits.submitted == 0:
            await asyncio.sleep(0)
        digits.become(2)
        digits.let_go()
        return (await named).status, (await asked(app, INFER, BODY)).status

    assert asyncio.run(both()) == (404, 200)


def test_a_quick_model_is_run_in_the_loop_and_any_other_in_its_own_thread(app, digits):
    digits.expected_ms = QUICK_MS
    assert ask(app, INFER, BODY).status == 200
    assert (digits.ran_here, digits.submitted) == (0, 1)  # nobody would see a loop that is stuck
    digits.submitted = 0
    app.state.endpoint.guard()
    for number in range(3):
        reply = ask(app, INFER, body_of(float(number))).json()
        assert reply["outputs"][0]["data"] == [float(number), 0.0, 0.0, 0.0]
    assert (digits.ran_here, digits.submitted) == (3, 0)
    rows = json.dumps({"inputs": [{"name": "x", "shape": [2, 4], "datatype": "FP32", "data": [0.0] * 8}]}).encode()
    assert ask(app, INFER, rows).status == 200  # of two rows nobody says that they take no longer
    digits.expected_ms = QUICK_MS / 2
    assert ask(app, INFER, rows).status == 200
    for slower in (QUICK_MS * 2, None):
        digits.expected_ms = slower
        assert ask(app, INFER, BODY).status == 200
    assert (digits.ran_here, digits.submitted) == (4, 3)


def test_a_model_whose_sizes_are_free_is_not_run_in_the_loop():
    free = Interface(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(None, None), axes="NC"),), outputs=INTERFACE.outputs
    )
    digits = Named(interface=free)
    digits.expected_ms = QUICK_MS / 10
    app = build_app(Models([Served(name="digits", runner=digits)]))
    app.state.endpoint.guard()
    assert ask(app, INFER, BODY).status == 200
    assert (digits.ran_here, digits.submitted) == (0, 1)
    digits.close()


def test_what_is_cut_short_while_it_waits_is_told_so(app, digits):
    digits.hold()

    async def cut() -> int:
        reply = asyncio.ensure_future(asked(app, INFER, BODY))
        while digits.submitted == 0:
            await asyncio.sleep(0)
        app.state.endpoint.inference.cut(RunnerClosed("stop"))
        return (await reply).status

    assert asyncio.run(cut()) == 503
    digits.let_go()


def test_the_bundle_of_a_ladder_step_is_that_of_the_answer_not_of_the_moment(app, digits):
    answered_by = runner.Served(variant="a", engine="b", bundle="f" * 64, verified=True)
    digits.served = answered_by
    assert ask(app, INFER, BODY).json()["parameters"]["bundle"] == "f" * 64
    digits.served = None
    assert ask(app, INFER, BODY).json()["parameters"]["bundle"] == digits.bundle.digest


def test_versions_side_by_side():
    runners = [Named(version, gain=float(version)) for version in (3, 10)]
    app = build_app(Models(Served(name="digits", runner=each) for each in runners))
    for path, version in ((INFER, 10), ("/v2/models/digits/versions/3/infer", 3)):
        reply = ask(app, path, BODY).json()
        assert reply["model_version"] == str(version)
        np.testing.assert_allclose(reply["outputs"][0]["data"], np.float32([1, 2, 3, 4]) * version)
    assert ask(app, "/v2/models/digits").json()["versions"] == ["3", "10"]
    assert ask(app, "/v2/models").json() == {
        "models": [{"name": "digits", "version": version, "ready": True} for version in ("3", "10")]
    }
    counted = {(row["version"], row["requests"]) for row in ask(app, "/v2/quality").json()["models"]}
    assert counted == {("3", 1), ("10", 1)}
    for each in runners:
        each.close()


def test_readiness_is_that_of_each_model_and_of_all(digits):
    cats = Named(1, name="cats")
    app = build_app(Models([Served(name="digits", runner=digits), Served(name="cats", runner=cats)]))
    cats.sick = True
    assert (ask(app, "/v2/models/cats/ready").status, ask(app, "/v2/models/digits/ready").status) == (503, 200)
    assert (ask(app, "/v2/health/ready").status, ask(app, "/v2/health/live").status) == (503, 200)
    cats.sick = False
    assert ask(app, "/v2/health/ready").json() == {"ready": True}
    cats.close()


def test_once_it_is_stopped_nothing_new_is_taken_and_every_reply_ends_its_connection(app):
    app.state.endpoint.intake.stop()
    for path, body, status in (
        ("/v2/health/ready", None, 503),
        ("/v2/models/digits/ready", None, 503),
        (INFER, BODY, 503),
        ("/v2/health/live", None, 200),
        ("/metrics", None, 200),
    ):
        reply = ask(app, path, body)
        assert (reply.status, reply.headers["connection"]) == (status, "close")
    assert ask(app, INFER, BODY).headers["retry-after"] == "1"


def test_what_is_abandoned_at_the_end_is_told_so(app, digits):
    digits.hold()

    async def stopped() -> tuple[int, dict[str, str]]:
        waiting = asyncio.ensure_future(asked(app, INFER, BODY))
        while digits.submitted == 0:
            await asyncio.sleep(0)
        app.state.endpoint.intake.stop()
        app.state.endpoint.abandon()
        reply = await waiting
        return reply.status, reply.json()

    status, said = asyncio.run(stopped())
    digits.let_go()
    assert status == 503 and "stopped before the answer" in said["error"]
    assert app.state.endpoint.intake.inside() == 0


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("abc-1.2:3_Z", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a b", False),
        ("a\tb", False),
        ('a"b', False),
        ("\xe9", False),
        ("../../etc", False),
    ],
)
def test_a_sane_request_id_is_echoed_and_another_one_replaced(app, given, taken):
    for path, body in ((INFER, BODY), ("/v2/nowhere", None)):
        reply = ask(app, path, body, X_Request_ID=given)
        echoed = reply.headers["x-request-id"]
        assert (echoed == given) is taken
        assert taken or re.fullmatch("[0-9a-f]{16}", echoed)
        assert reply.status == 200 or reply.json()["request_id"] == echoed


def test_two_requests_without_an_id_get_two():
    app = build_app(Models())
    assert ask(app, "/v2").headers["x-request-id"] != ask(app, "/v2").headers["x-request-id"]


def test_the_access_log_is_one_line_of_json_for_each_request_and_silent_until_it_is_asked_for(app, caplog):
    ask(app, INFER, BODY)
    assert access.name not in {record.name for record in caplog.records}
    with caplog.at_level(logging.INFO, logger=access.name):
        ask(app, INFER, BODY, X_Request_ID="seven")
        ask(app, "/v2/models/" + "a%0Ab" * 100)
    told = [record.message for record in caplog.records if record.name == access.name]
    lines = [json.loads(message) for message in told]
    assert len(lines) == 2 and all("\n" not in message for message in told)
    first, second = lines
    assert first.pop("ms") > 0 and first.pop("time").endswith("+00:00")
    assert first == {
        "request_id": "seven",
        "client": "192.0.2.7",
        "method": "POST",
        "path": INFER,
        "status": 200,
        "reason": "ok",
        "model": "digits",
        "version": "3",
    }
    assert (second["status"], second["reason"], second["model"]) == (404, "unknown", None)
    assert len(second["path"]) <= 200


def test_the_engines_failures_are_500_and_say_no_path_and_closed_is_503(app, digits):
    digits.error = lambda: InferenceError("ort: cannot read /home/user/model.onnx", hint="look at /var/log/x")
    reply = ask(app, INFER, BODY)
    assert reply.status == 500 and "/home" not in reply.json()["error"] and "(path)" in reply.json()["error"]
    digits.error = lambda: KeyError("secret")
    assert (reply := ask(app, INFER, BODY)).status == 500 and reply.json()["error"] == "internal error"
    digits.error = None
    digits.refusal = lambda: RunnerClosed("the worker was closed")
    assert (reply := ask(app, INFER, BODY)).status == 503 and reply.headers["retry-after"] == "1"
    digits.refusal = None
    assert ask(app, INFER, BODY).status == 200
    reasons = {row["reason"]: row["requests"] for row in ask(app, "/v2/quality").json()["models"][0]["reasons"]}
    assert reasons == {"model_failed": 1, "fault": 1, "stopping": 1, "ok": 1}


def test_mounted_in_another_application_it_answers_alike(app):
    """As Ray mounts it, and as anyone may."""

    async def under(scope: dict, receive: object, send: object) -> None:
        await app(scope | {"root_path": "/deep/er", "path": "/deep/er" + scope["path"]}, receive, send)

    async def mounted(scope: dict, receive: object, send: object) -> None:
        await Starlette(routes=[Mount("/deep", app)])(scope, receive, send)

    for path, status in ((INFER, 200), ("/v2/models/digits/versions/3/infer", 200), ("/v2/models/other/infer", 404)):
        assert ask(under, path, BODY).status == status
        assert ask(mounted, "/deep" + path, BODY).status == status
        assert ask(app, path, BODY, method="GET").status == 405
    assert ask(under, "/v2/health/live").status == 200
    rows = ask(app, "/v2/quality").json()["models"]
    assert {row["model"]: row["requests"] for row in rows} == {"digits": 4, "": 2}


def test_a_stuck_call_is_no_full_queue(app, digits):
    digits.refusal = lambda: QueueFull("9 requests wait or run")
    assert ask(app, INFER, BODY).status == 429
    digits.refusal = lambda: RunnerStuck("a call is stuck in the engine")
    reply = ask(app, INFER, BODY)
    assert (reply.status, reply.headers["retry-after"]) == (503, "1") and "stuck" in reply.json()["error"]


def test_a_full_house_is_refused_before_a_byte_of_the_body_is_read(digits):
    app = build_app(
        Models([Served(name="digits", runner=digits)]), intake=Intake(queue=1, body_bytes=Limits().body_bytes)
    )
    digits.expected_ms = 2500.0
    digits.hold()

    async def unread() -> dict[str, object]:
        raise AssertionError("the body was asked for")

    async def full() -> tuple[int, str]:
        first = asyncio.ensure_future(asked(app, INFER, BODY))
        while digits.submitted == 0:
            await asyncio.sleep(0)
        got: list[dict[str, object]] = []

        async def keep(message: dict[str, object]) -> None:
            got.append(message)

        scope = {"type": "http", "method": "POST", "path": INFER, "headers": [], "query_string": b"", "root_path": ""}
        await app(scope, unread, keep)
        digits.let_go()
        assert (await first).status == 200
        headers = dict(got[0]["headers"])  # type: ignore[call-overload]
        return got[0]["status"], headers[b"retry-after"].decode()  # type: ignore[return-value]

    assert asyncio.run(full()) == (429, "3")


def test_a_body_in_pieces_is_bounded_as_a_whole(digits):
    app = build_app(Models([Served(name="digits", runner=digits)]), limits=Limits(body_bytes=1000, json_bytes=500))
    pieces = [BODY[at : at + 7] for at in range(0, len(BODY), 7)]
    assert ask(app, INFER, pieces).status == 200
    assert (reply := ask(app, INFER, [b" " * 400] * 3)).status == 413 and "1200 bytes or more" in reply.json()["error"]
    assert ask(app, INFER, b" ", Content_Length="1001").status == 413
    assert ask(app, INFER, BODY + b" " * 500).status == 400
    assert app.state.endpoint.intake.held_bytes == 0


def test_callers_without_the_token_learn_nothing_of_the_models(digits):
    app = build_app(Models([Served(name="digits", runner=digits)]), token="right")
    for path in ("/metrics", "/v2/quality", "/v2/models", "/v2", "/v2/models/digits", "/v2/models/other"):
        assert ask(app, path).status == 401
        assert ask(app, path, Authorization="Bearer right").status in (200, 404)
        assert ask(app, path, Authorization="bearer right").status in (200, 404)
    for path in ("/openapi.json", "/docs", "/v2/health/ready", "/v2/health/live"):
        assert (reply := ask(app, path)).status == 200 and b"digits" not in reply.body
    assert ask(app, INFER, BODY).status == 401 and digits.submitted == 0
    nameless = ask(app, "/v2/quality", Authorization="Bearer right").json()["models"][-1]
    assert (nameless["model"], nameless["reasons"][0]["reason"]) == ("", "no_token")


def test_names_that_callers_make_up_are_no_labels(app):
    for at in range(50):
        assert ask(app, f"/v2/models/made-up-{at}/infer", BODY).status == 404
    text = ask(app, "/metrics").body.decode()
    assert "made-up" not in text
    assert 'outrider_requests_total{model="",reason="unknown",status="404",version=""} 50.0' in text


def test_every_route_is_described_and_nothing_else(app):
    routes = app.routes
    document = describe(routes, limits=Limits(body_bytes=12345, json_bytes=678), secured=True, version="1.2.3")
    said = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    assert said == {(route.path, method) for route in routes for method in route.methods - {"HEAD"}}
    assert set(OPERATIONS) == {route.name.removesuffix("_version") for route in routes}
    assert "12345 bytes, 678 of them JSON" in document["info"]["description"]
    infer = document["paths"]["/v2/models/{model}/infer"]["post"]
    assert infer["security"] == [{"token": []}] and "401" in infer["responses"]
    assert document["components"]["schemas"]["Request"]["properties"]["inputs"]["items"]["properties"]["datatype"][
        "enum"
    ] == [*oip.DTYPES, oip.BYTES]


def test_without_a_token_the_description_asks_for_none(app):
    document = ask(app, "/openapi.json").json()
    assert "securitySchemes" not in document["components"] and "401" not in json.dumps(document)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"])


def test_the_page_shows_every_route_and_loads_nothing(app):
    reply = ask(app, "/docs")
    page = reply.body.decode()
    assert reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    for route in app.routes:
        assert route.path in page
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(", page)


def test_json_has_a_shorter_bound_than_a_body_with_binary_tensors(app):
    """While it is decoded nobody else is answered."""
    assert ask(app, INFER, BODY.ljust(LIMITS.json_bytes)).status == 200
    got = ask(app, INFER, BODY.ljust(LIMITS.json_bytes + 1))
    assert got.status == 400 and str(LIMITS.json_bytes) in got.json()["error"]
    assert LIMITS.json_bytes <= 4 << 20
    x = np.zeros((LIMITS.json_bytes // 16 + 1, 4), np.float32)
    message = oip.encode_request({"x": x})
    assert ask(app, INFER, message.body, **message.headers).status == 200
