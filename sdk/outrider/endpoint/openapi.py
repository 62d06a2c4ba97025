"""The endpoint's description of itself: OpenAPI 3.1 made from its routes and limits, and the same as a page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outrider_runtimes import oip

if TYPE_CHECKING:
    from starlette.routing import Route

Schema = dict[str, Any]

_MANY = {"401": "The bearer token is missing or wrong.", "404": "There is no such model or version."}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What is said of the route of one name.

    Attributes:
        schema: the name of what 200 carries; a media type where that is not JSON.
        refusals: the other statuses and when they come.
    """

    summary: str
    schema: str
    refusals: Mapping[str, str]


OPERATIONS: Mapping[str, Operation] = {
    "live": Operation(summary="Whether the process answers.", schema="Live", refusals={}),
    "ready": Operation(
        summary="Whether every model can answer and new requests are taken.",
        schema="Ready",
        refusals={"503": "Not now: the endpoint is being stopped, or a model is stuck."},
    ),
    "openapi": Operation(summary="This description.", schema="Object", refusals={}),
    "docs": Operation(summary="This description as a page.", schema="text/html", refusals={}),
    "server": Operation(summary="Name, version and extensions.", schema="Server", refusals={"401": _MANY["401"]}),
    "index": Operation(summary="The models and versions there are.", schema="Index", refusals={"401": _MANY["401"]}),
    "quality": Operation(
        summary="Service quality since the start: availability, response times, by model and reason.",
        schema="Quality",
        refusals={"401": _MANY["401"]},
    ),
    "exposition": Operation(
        summary="The same for Prometheus, with what goes on now.", schema="text/plain", refusals={"401": _MANY["401"]}
    ),
    "model": Operation(summary="What a model takes and gives, and what answers now.", schema="Model", refusals=_MANY),
    "model_ready": Operation(
        summary="Whether a model can answer.",
        schema="ModelReady",
        refusals={**_MANY, "503": "Not now: a call is stuck, or the endpoint is being stopped."},
    ),
    "infer": Operation(
        summary="Run a model on one batch.",
        schema="Reply",
        refusals={
            **_MANY,
            "400": "The request is not what the protocol or the model's interface says.",
            "413": "The body is too long.",
            "415": "The body is compressed.",
            "429": "As many requests wait as may; come again after Retry-After seconds.",
            "500": "The model failed, or its answer has no JSON form.",
            "503": "No time or no memory for one more, or the endpoint is being stopped; see Retry-After.",
            "504": "The time that the caller gave passed first.",
        },
    ),
}


def describe(routes: Iterable[Route], *, limits: oip.Limits, secured: bool, version: str) -> Schema:
    """The OpenAPI document of ``routes``.

    Args:
        limits: what a request may cost.
        secured: whether a bearer token is asked for, where an operation lists status 401.
        version: Outrider's.
    """
    paths: Schema = {}
    for route in routes:
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(route.path, {})[method.lower()] = _operation(route.name, route.path, limits, secured)
    document: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "Outrider endpoint", "version": version, "description": _description(limits)},
        "paths": paths,
        "components": {"schemas": _schemas()},
    }
    if secured:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return document


def page(document: Schema) -> str:
    """The document as HTML that loads nothing and runs nothing."""
    rows = [
        _section(path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    title = html.escape(document["info"]["title"])
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    paragraphs = "".join(f"<p>{html.escape(line)}</p>" for line in document["info"]["description"].split("\n"))
    return (
        f'<!doctype html><html lang="en"><head>{head}</head>'
        f"<body><h1>{title} {html.escape(document['info']['version'])}</h1>{paragraphs}{''.join(rows)}"
        f"<h2>Schemas</h2>{''.join(_schema_section(*item) for item in document['components']['schemas'].items())}"
        "</body></html>"
    )


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "code{font-family:ui-monospace,monospace}h2 code,h3 code{background:#eef;padding:.1em .3em}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left;vertical-align:top}"
    "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}h2 code,h3 code{background:#224}}"
)


def _description(limits: oip.Limits) -> str:
    return (
        "The Open Inference Protocol v2 with the binary tensor extension.\n"
        f"A body has at most {limits.body_bytes} bytes, {limits.json_bytes} of them JSON, and is not compressed. "
        "A time limit goes into parameters.timeout, in microseconds.\n"
        "Every reply carries X-Request-ID, the caller's own where it sent one. Errors are JSON with the member error."
    )


def _operation(name: str, path: str, limits: oip.Limits, secured: bool) -> Schema:
    about = OPERATIONS[name.removesuffix("_version")]
    out: Schema = {"operationId": name, "summary": about.summary}
    refusals = {status: text for status, text in about.refusals.items() if secured or status != "401"}
    out["responses"] = {"200": _content(about.schema)} | {
        status: _refusal(name, status, text) for status, text in sorted(refusals.items())
    }
    parameters = [
        {"name": each, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for each in re.findall(r"{(\w+)}", path)
    ]
    if about.schema == "Reply":
        parameters.append(_LENGTH)
        out["requestBody"] = _request_body(limits)
    if parameters:
        out["parameters"] = parameters
    if secured and "401" in about.refusals:
        out["security"] = [{"token": []}]
    return out


_LENGTH: Schema = {
    "name": oip.LENGTH_HEADER,
    "in": "header",
    "description": "The bytes of JSON in a body whose tensors follow it in binary.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 10**15 - 1},
}


def _request_body(limits: oip.Limits) -> Schema:
    return {
        "required": True,
        "description": f"At most {limits.body_bytes} bytes.",
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/Request"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }


def _content(schema: str) -> Schema:
    if "/" in schema:
        return {"description": "Text.", "content": {schema: {"schema": {"type": "string"}}}}
    content: Schema = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    if schema == "Reply":
        content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    return {"description": "Done.", "content": content}


def _refusal(name: str, status: str, text: str) -> Schema:
    # Readiness is told in the same form whether it is given or not.
    schemas = ["Error"]
    if status == "503" and not name.startswith("infer"):
        schemas = ["Ready" if name == "ready" else "ModelReady"]
    out: Schema = {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schemas[0]}"}}},
    }
    if status in ("429", "503") and name.startswith("infer"):
        out["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
    return out


def _object(required: Iterable[str] = (), **properties: Schema) -> Schema:
    return {"type": "object", "required": sorted(required), "properties": properties}


def _schemas() -> dict[str, Schema]:
    text, flag, count = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
    name = {"type": "string", "minLength": 1, "maxLength": oip.MAX_NAME}
    sizes = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "maxItems": 16}
    datatype = {"type": "string", "enum": list(oip.DTYPES)}
    sent = {"type": "string", "enum": [*oip.DTYPES, oip.BYTES], "description": "BYTES for inputs that are files."}
    tensor = _object(
        ("name", "datatype", "shape"),
        name=name,
        datatype=datatype,
        shape=sizes,
        data={"type": "array", "description": "The elements in row-major order, flat or nested as the shape says."},
        parameters=_object(binary_data_size=count),
    )
    given = tensor | {"properties": tensor["properties"] | {"datatype": sent}}
    wanted = _object(("name",), name=name, parameters=_object(binary_data=flag))
    timeout = {
        "type": "integer",
        "minimum": 0,
        "maximum": oip.MAX_TIMEOUT_US,
        "description": "Microseconds; 0 is none.",
    }
    described = _object(
        ("name", "datatype", "shape"),
        name=name,
        datatype=datatype,
        shape={"type": "array", "items": {"type": "integer"}},
    )
    return {
        "Object": {"type": "object"},
        "Error": _object(("error",), error=text, request_id=text),
        "Live": _object(("live",), live=flag),
        "Ready": _object(("ready",), ready=flag),
        "ModelReady": _object(("name", "ready"), name=name, ready=flag),
        "Server": _object(("name", "version"), name=text, version=text, extensions=_list(text)),
        "Index": _object(("models",), models=_list(_object(("name", "version"), name=name, version=text, ready=flag))),
        "Quality": _object(
            ("total", "models"),
            seconds={"type": "number"},
            processes={"type": "integer", "minimum": 1},
            total=_quality(),
            models=_list(_quality()),
        ),
        "Model": _object(
            ("name", "versions", "inputs", "outputs"),
            name=name,
            versions=_list(text),
            platform=text,
            inputs=_list(described | {"properties": described["properties"] | {"datatype": sent}}),
            outputs=_list(described),
            parameters={"type": "object"},
        ),
        "Request": _object(
            ("inputs",),
            id={"type": "string", "maxLength": oip.MAX_NAME},
            inputs=_list(given, 1),
            outputs=_list(wanted, 1),
            parameters=_object(timeout=timeout, binary_data_output=flag),
        ),
        "Reply": _object(
            ("model_name", "outputs"),
            model_name=name,
            model_version=text,
            id=text,
            outputs=_list(tensor),
            parameters={"type": "object"},
        ),
    }


def _list(items: Schema, at_least: int = 0) -> Schema:
    return {"type": "array", "items": items} | ({"minItems": at_least} if at_least else {})


def _quality() -> Schema:
    number = {"type": ["number", "null"], "minimum": 0}
    times = dict.fromkeys(("mean_ms", "p50_ms", "p90_ms", "p99_ms", "max_ms"), number)
    count = {"type": "integer", "minimum": 0}
    share = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
    return _object(("requests", "answered"), requests=count, answered=count, availability=share, **times)


def _section(path: str, method: str, operation: Schema) -> str:
    rows = "".join(
        f"<tr><td>{status}</td><td>{html.escape(response['description'])}</td></tr>"
        for status, response in operation["responses"].items()
    )
    return (
        f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(operation['summary'])}</p>"
        f"<table><tr><th>Status</th><th>Meaning</th></tr>{rows}</table>"
    )


def _schema_section(name: str, schema: Schema) -> str:
    rows = "".join(
        f"<tr><td><code>{html.escape(key)}</code></td><td>{html.escape(_kind(value))}</td>"
        f"<td>{'required' if key in schema['required'] else ''}</td></tr>"
        for key, value in schema.get("properties", {}).items()
    )
    return f"<h3><code>{html.escape(name)}</code></h3><table>{rows}</table>" if rows else ""


def _kind(schema: Schema) -> str:
    kind = schema["type"] if isinstance(schema["type"], str) else " or ".join(schema["type"])
    if kind == "array" and "items" in schema:
        inner = schema["items"]
        return f"array of {_kind(inner)}" + (f" ({', '.join(inner['properties'])})" if "properties" in inner else "")
    if "properties" in schema:
        return f"{kind} ({', '.join(schema['properties'])})"
    return kind + (f": {schema['description']}" if "description" in schema else "")
