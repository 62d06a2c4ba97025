"""`outrider demo`, once, as a user runs it; its figures must hold together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from outrider.bundle import Trust, verify_bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


def test_it_trained_and_says_so(demo_run: dict[str, Any]) -> None:
    assert demo_run["trained"] is True


def test_the_bundle_holds_four_variants_and_is_signed(demo_run: dict[str, Any]) -> None:
    told = demo_run["bundle"]
    path = Path(told["path"])
    found = verify_bundle(path, Trust.load(path.parent / "keys" / "demo.pub"))
    assert found.verified
    assert found.manifest.digest == told["digest"]
    assert path.stat().st_size == told["size_bytes"]
    names = {variant["name"] for variant in told["variants"]}
    assert names == {"onnx-float32", "onnx-int8", "tflite-float32", "tflite-int8"}
    sizes = {variant["name"]: variant["size_bytes"] for variant in told["variants"]}
    assert sizes["onnx-int8"] < sizes["onnx-float32"]
    assert sizes["tflite-int8"] < sizes["tflite-float32"]
    for variant in told["variants"]:
        assert variant["accuracy"] > 0.9
        assert variant["latency_ms_p50"] > 0.0


def test_the_cloud_is_worth_asking(demo_run: dict[str, Any]) -> None:
    accuracy = demo_run["accuracy"]
    low, high = accuracy["hybrid_minus_edge_ci95"]
    assert low <= accuracy["hybrid"] - accuracy["edge"] <= high
    assert high > 0.0
    assert accuracy["edge"] < accuracy["cloud"]
    assert 0.0 < demo_run["offloaded"] < 1.0


def test_no_request_is_lost_or_late(demo_run: dict[str, Any]) -> None:
    requests, outage = demo_run["requests"], demo_run["outage"]
    assert requests["sent"] == requests["answered"] == 5_000
    assert requests["late"] == 0
    assert 0 < outage["requests"] == outage["answered"]
    assert outage["late"] == 0
    assert 0 < outage["degraded"] < outage["requests"]
    assert outage["recovered"] is True


def test_the_account_is_exact_at_both_ends(demo_run: dict[str, Any]) -> None:
    account = demo_run["telemetry"]
    assert account["enqueued"] == account["delivered"] + account["pending"] + account["dropped"]
    assert account["enqueued"] >= demo_run["requests"]["sent"]
    assert account["delivered"] <= account["received"]
    assert account["pending"] == account["dropped"] == 0


def test_the_report_is_one_self_contained_page(demo_run: dict[str, Any]) -> None:
    page = Path(demo_run["report"]).read_text(encoding="utf-8")
    assert page.count("<svg") >= 3
    assert not re.search(r"""(src|href)=["']?https?:""", page)
    assert not re.search(r"<script|<link|@import", page)
    assert demo_run["bundle"]["variants"][0]["name"] in page


def test_a_stream_too_short_to_tell_is_refused(demo_cli: Any, tmp_path: Path) -> None:
    result = demo_cli("--stream", "10", "--output", tmp_path)
    assert result.returncode == 1
    assert "5000" in result.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--broker", "junk"], "junk"),
        (["--rate", "inf"], "--rate"),
        (["--output", "/proc/nothing"], "/proc/nothing"),
        (["--output", "/etc"], "not an earlier demo's"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(demo_cli: Any, args: list[str], said: str, tmp_path: Path) -> None:
    result = demo_cli("--output", tmp_path, *args)
    assert result.returncode == 1
    assert said in result.stderr
    assert "hint: " in result.stderr or "--rate" in args
