"""The rules of a caller's token and request id, which HTTP and gRPC share."""

from __future__ import annotations

import pytest

from outrider.endpoint.callers import check_token, id_of
from outrider.endpoint.refusals import Refused


@pytest.mark.parametrize("scheme", [b"Bearer", b"bearer", b"BEARER", b"bEaReR"])
def test_the_scheme_is_taken_in_capital_and_small_letters(scheme: bytes) -> None:
    check_token([scheme + b" s3cret"], "s3cret")
    with pytest.raises(Refused) as caught:
        check_token([scheme + b" S3CRET"], "s3cret")
    assert (caught.value.status, caught.value.reason) == (401, "no_token")
    assert "s3cret" not in str(caught.value).lower()


@pytest.mark.parametrize(
    "given",
    [
        [],
        [b""],
        [b"s3cret"],
        [b"Bearer"],
        [b"Bearer "],
        [b"Bearers3cret"],
        [b"Basic s3cret"],
        [b"Bearer s3cret "],
        [b"Bearer s3cret", b"Bearer s3cret"],
        [b"Bearer r\xffght"],
    ],
)
def test_anything_else_is_refused(given: list[bytes]) -> None:
    with pytest.raises(Refused, match="a bearer token is required"):
        check_token(given, "s3cret")


def test_a_token_beyond_ascii_is_compared_as_utf_8() -> None:
    check_token(["Bearer gr\u00fcn".encode()], "gr\u00fcn")


@pytest.mark.parametrize("given", [[], [b""], [b"a b"], [b"a\n"], [b"\xff"], [b"x" * 129], [b"a", b"a"]])
def test_what_is_no_id_is_none(given: list[bytes]) -> None:
    assert id_of(given) is None
    assert id_of([b"A-z.0_9:" + b"x" * 120]) == "A-z.0_9:" + "x" * 120
