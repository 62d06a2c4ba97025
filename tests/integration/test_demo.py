"""`outrider demo`, once, as a user runs it but for the deadline, which is far away; its figures must hold together."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest

from outrider.bundle import Trust, open_bundle, verify_bundle
from outrider_exporters.demo.run import CERTIFICATION_SAMPLES, RISK

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


def test_service_quality_counts_each_request_once(demo_run: dict[str, Any]) -> None:
    total, *kinds = demo_run["service"]
    assert total["availability"] == 1.0
    assert total["requests"] == sum(kind["requests"] for kind in kinds) == demo_run["requests"]["sent"]
    assert {"edge", "cloud", "edge_degraded"} <= {kind["source"] for kind in kinds}
    for row in demo_run["service"]:
        assert 0.0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
    page = Path(demo_run["report"]).read_text(encoding="utf-8")
    assert "Service quality" in page
    assert all(kind["reason"] in page for kind in kinds)


def test_the_threshold_is_certified_and_the_stream_keeps_to_it(demo_run: dict[str, Any]) -> None:
    rule, threshold = demo_run["offload"], demo_run["threshold"]
    variants = {variant["name"] for variant in demo_run["bundle"]["variants"]}
    assert threshold["min_margin"] is None and demo_run["served"] in variants
    with open_bundle(Path(demo_run["bundle"]["path"]), None) as bundle:
        assert bundle.manifest.offload is not None
        assert bundle.manifest.offload.thresholds == rule["thresholds"]
    assert set(rule["thresholds"]) == variants
    assert rule["rows"] == CERTIFICATION_SAMPLES
    kept = next(kind["requests"] for kind in demo_run["service"] if kind["source"] == "edge")
    noise = 4.0 * (RISK * (1.0 - RISK) / kept) ** 0.5
    assert threshold["kept_wrong"] <= RISK + noise
    chosen = rule["measured"][demo_run["served"]]["chosen"]
    assert chosen["accuracy_kept"] > 1.0 - RISK and 0.0 < chosen["offloaded"] < 1.0
    page = html.unescape(Path(demo_run["report"]).read_text(encoding="utf-8"))
    assert threshold["text"] in page and "certified by Learn-then-Test" in threshold["text"]
    assert f"{demo_run['served']}: dotted is the certified threshold" in page


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
