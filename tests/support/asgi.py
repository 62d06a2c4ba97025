"""One request to an ASGI application in this process, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote


@dataclass(frozen=True, kw_only=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    app: Any, path: str, body: bytes | Sequence[bytes] | None = None, *, method: str | None = None, **headers: str
) -> Reply:
    """The reply; a sequence of bytes is a body in pieces."""
    return asyncio.run(asked(app, path, body, method=method, **headers))


async def asked(
    app: Any, path: str, body: bytes | Sequence[bytes] | None = None, *, method: str | None = None, **headers: str
) -> Reply:
    """The same inside a loop."""
    parts = [body] if isinstance(body, bytes) else list(body or [b""])
    got: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not parts:
            await asyncio.Event().wait()
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        got.append(message)

    fields = [(name.replace("_", "-").lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method or ("GET" if body is None else "POST"),
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": fields,
        "client": ("192.0.2.7", 40000),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    begun = got[0]
    return Reply(
        status=begun["status"],
        headers={name.decode().lower(): value.decode() for name, value in begun["headers"]},
        body=b"".join(message.get("body", b"") for message in got[1:]),
    )
