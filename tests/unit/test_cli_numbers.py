"""Numbers on the command line: what is out of its range is wrong usage, told by argparse, and nothing has begun."""

from __future__ import annotations

import argparse
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.cli import build_parser
from outrider.cli.infer import REMOTE_DEADLINE_MS
from outrider.cli.options import number, whole_number
from outrider.endpoint.intake import QUEUE
from outrider.endpoint.listening import DRAIN_S

INFER = ("infer", "tiny", "--input", "a.npz", "--output", "b.npz")
INSTALL = ("install", "b.outrider")
REHEARSE = ("rehearse", "b.outrider", "--target", "pi4")
SERVE = ("serve", "b.outrider")
NO_TIMES = ("nan", "inf", "-inf", "-1", "0", "1e300", "soon", "")
WRONG = {
    (*INSTALL, "--latency-ms"): NO_TIMES,
    (*INFER, "--deadline-ms"): NO_TIMES,
    (*INFER, "--threads"): ("0", "-1", "1025", "1.5", "nan", "9" * 5000, "1_0"),
    (*REHEARSE, "--timeout"): (*NO_TIMES, "1e-9"),
    (*SERVE, "--drain-s"): ("nan", "inf", "-1"),
    (*SERVE, "--port"): ("-1", "65536", "http"),
    (*SERVE, "--grpc-port"): ("-1", "65536"),
    (*SERVE, "--queue"): ("-1", "0", "1e3"),
    ("watch", "mqtt://h", "--seconds"): NO_TIMES,
    ("watch", "mqtt://h", "--stale-after"): NO_TIMES,
    ("watch", "mqtt://h", "--html"): ("65536",),
}


@pytest.mark.parametrize(("words", "texts"), WRONG.items(), ids=[" ".join((w[0], w[-1])) for w in WRONG])
def test_out_of_range_is_wrong_usage(
    words: tuple[str, ...], texts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = build_parser()
    for text in texts:
        with pytest.raises(SystemExit) as left:
            parser.parse_args([*words[:-1], f"{words[-1]}={text}"])
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert f"argument {words[-1]}: " in said
        assert " number from " in said


def test_what_is_in_range_is_taken() -> None:
    parse = build_parser().parse_args
    assert parse([*INSTALL, "--latency-ms", "2.5"]).latency_ms == 2.5
    assert parse([*INFER, "--deadline-ms", "1e3", "--threads", "1024"]).threads == 1024
    assert parse([*REHEARSE, "--timeout", "30"]).timeout == 30.0
    assert parse([*SERVE, "--port", "0", "--queue", "1"]).port == 0


def test_the_help_names_the_defaults_that_stand_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for command in ("serve", "infer"):
        with pytest.raises(SystemExit):
            build_parser().parse_args([command, "--help"])
        said[command] = " ".join(capsys.readouterr().out.split())
    assert f"before callers get 429 (default: {QUEUE})" in said["serve"]
    assert f"when it is stopped (default: {DRAIN_S:g})" in said["serve"]
    assert f"(default: an endpoint after {REMOTE_DEADLINE_MS / 1e3:g} s)" in said["infer"]


@given(st.floats(allow_nan=True, allow_infinity=True), st.integers())
def test_a_range_holds_its_ends_and_nothing_beyond(value: float, whole: int) -> None:
    for parse, text, inside in (
        (number(-1.0, 2.0), repr(value), -1.0 <= value <= 2.0),
        (whole_number(-1, 2), str(whole), -1 <= whole <= 2),
    ):
        if inside:
            assert parse(text) in (value, whole)
        else:
            with pytest.raises(argparse.ArgumentTypeError):
                parse(text)
    assert number(-1.0, 2.0)("-1") == -1.0
    assert not math.isnan(number(0.0, math.inf)("inf"))
