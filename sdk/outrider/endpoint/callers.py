"""What a caller says of itself, over HTTP and gRPC alike: the token that it brings and the id of its request."""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence

from outrider.endpoint.refusals import Refused

_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


def check_token(given: Sequence[bytes], token: str) -> None:
    """Look at the values of ``authorization``, as often as it was sent, in a time that does not tell the token.

    The scheme's name is taken in capital and small letters (RFC 9110, 11.1), the token as it is.

    Raises:
        Refused: 401, unless there is one value and it is the token as a bearer.
    """
    scheme, _, secret = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    if not hmac.compare_digest(secret, token.encode()) or scheme.lower() != b"bearer":
        raise Refused(401, "no_token", "a bearer token is required")


def id_of(given: Sequence[bytes]) -> str | None:
    """The caller's id, where ``x-request-id`` was sent once and is 1 to 128 letters, digits or ``._:-``."""
    return given[0].decode() if len(given) == 1 and _ID.fullmatch(given[0]) else None
