"""The endpoint against its own description: schemathesis sends what it allows and what it does not, to a real one."""

from __future__ import annotations

import copy
import json
import urllib.request
from importlib import metadata
from typing import Any

import hypothesis
import pytest
import schemathesis
from jsonschema import Draft202012Validator

from outrider.endpoint.app import build_app
from outrider.endpoint.faces import LIMITS
from outrider.endpoint.models import Models
from outrider.endpoint.openapi import describe
from support.endpoint_child import VERSION, Child, write_models

pytestmark = pytest.mark.slow

TOKEN = "right"
# A description cannot say which tensors a model takes: most of what it allows, the model refuses with 400.
EXCLUDED = [schemathesis.checks.positive_data_acceptance]
EXAMPLES = hypothesis.settings(
    max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    child = Child(folder, token=TOKEN, queue=64)
    yield child
    errors = child.stop()
    assert "Traceback" not in errors
    assert child.quality["total"]["requests"] > 100


APP = build_app(Models(), token=TOKEN)
DESCRIPTION = describe(APP.routes, limits=LIMITS, secured=True, version=metadata.version("outrider"))


def acquainted() -> dict[str, Any]:
    """The description as a caller reads it who knows what is there."""
    document = copy.deepcopy(DESCRIPTION)
    known = {"model": ["linear", "log"], "version": [str(VERSION)]}
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path":
                    parameter["schema"] = {"type": "string", "enum": known[parameter["name"]]}
    return document


STRANGER = schemathesis.openapi.from_dict(copy.deepcopy(DESCRIPTION))
ACQUAINTED = schemathesis.openapi.from_dict(acquainted()).include(path_regex="model}")


def check(case: schemathesis.Case, child: Child) -> None:
    case.call_and_validate(
        base_url=child.url, headers={"Authorization": f"Bearer {TOKEN}"}, excluded_checks=EXCLUDED, timeout=200
    )


@STRANGER.parametrize()
@EXAMPLES
def test_a_stranger_gets_what_the_description_says(case, child):
    check(case, child)


@ACQUAINTED.parametrize()
@EXAMPLES
def test_an_acquaintance_gets_what_the_description_says(case, child):
    check(case, child)


def test_the_description_names_no_model_and_needs_no_token_and_fits_the_real_replies(child):
    with urllib.request.urlopen(child.url + "/openapi.json", timeout=200) as reply:
        text = reply.read().decode()
    assert json.loads(text) == DESCRIPTION and "linear" not in text
    schemas = DESCRIPTION["components"]
    for path, name in (("/v2/models/linear", "Model"), ("/v2", "Server"), ("/v2/quality", "Quality")):
        request = urllib.request.Request(child.url + path, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=200) as reply:
            Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": schemas}).validate(
                json.load(reply)
            )
