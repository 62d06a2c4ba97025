"""`outrider serve --on ray`: two replicas, one of them killed under load; a load that comes and goes. And what of it
needs no Ray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from outrider.endpoint.ray_serve import Replicas
from outrider_runtimes.errors import ConfigError
from support.ray_child import AFTER_S, COUNTED, RATE_PER_S, isolated
from support.realbundles import make_real_bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def seen_by(child: str, folder: Path) -> dict[str, Any]:
    """What a child of ``support`` saw, which runs Ray in namespaces of its own over a bundle in the folder."""
    if sys.platform != "linux":
        pytest.skip("network namespaces are Linux's; Ray would listen on every address of this machine")
    tried = subprocess.run(isolated("true"), capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(
            f"no network namespace without privileges, and Ray listens on every address: {tried.stderr.strip()}"
        )
    make_real_bundle(folder / "b.outrider")
    done = subprocess.run(
        isolated(sys.executable, "-m", f"support.{child}", str(folder / "b.outrider"), str(folder / "state")),
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_one_of_two_replicas_is_killed_and_at_most_one_percent_of_the_next_ten_seconds_fails(tmp_path: Path) -> None:
    told = seen_by("ray_child", tmp_path)
    assert told["replicas_before"] == 2
    assert set(told["before"]) == {200}
    after = told["after"]
    assert len(after) >= AFTER_S * RATE_PER_S - 1 and RATE_PER_S >= 50
    assert sum(status != 200 for status in after) <= 0.01 * len(after), [s for s in after if s != 200]
    assert (told["live"], told["model"]) == (200, 200)
    assert (told["no_token"], told["bad"], told["unknown"]) == (401, 400, 404)
    assert (told["held"], told["new"]) == (200, 503)  # at SIGTERM: what is inside is answered, nothing new is let in
    assert told["code"] == 0 and told["out"].startswith("stopped; in ") and told["replicas_left"] == 0

    # Before the load: what both replicas counted is told by whichever is asked.
    total = told["quality"]["total"]
    assert (told["quality"]["processes"], total["requests"], total["availability"]) == (2, COUNTED, 1.0)
    counts = {
        sample.labels["replica"]: sample.value
        for family in text_string_to_metric_families(told["metrics"])
        for sample in family.samples
        if sample.name == "outrider_requests_total"
    }
    assert len(counts) == 2 and sum(counts.values()) == COUNTED and min(counts.values()) > 0


def test_load_brings_a_second_replica_and_its_end_takes_it_away_without_a_failed_request(tmp_path: Path) -> None:
    told = seen_by("ray_scaling_child", tmp_path)
    assert "BundleError: /nowhere.outrider: there is no such file; the bundles" in told["refused"]
    assert told["at_first"] == [{"RUNNING": 1}, 1]
    assert told["under_load"] == [{"RUNNING": 2}, 2]
    assert told["at_last"] == [{"RUNNING": 1}, 1] and told["processes"] == 1
    assert set(told["busy"]) == set(told["quiet"]) == {200}
    assert told["left"] == 0


def test_replicas_are_a_number_or_a_range() -> None:
    assert Replicas.parsed("2") == Replicas(least=2, most=2)
    assert Replicas.parsed("1-4") == Replicas(least=1, most=4)
    for wrong in ("", "0", "4-1", "-", "1-", "many", "1-2-3", "9" * 12):
        with pytest.raises(ConfigError):
            Replicas.parsed(wrong)


@pytest.mark.parametrize(
    "words", [["--replicas", "2"], ["--on", "ray", "--grpc-port", "0"], ["--on", "ray", "--replicas", "0"]]
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, words: list[str]) -> None:
    make_real_bundle(tmp_path / "b.outrider")
    command = [
        sys.executable,
        "-m",
        "outrider.cli",
        "serve",
        str(tmp_path / "b.outrider"),
        "--state",
        str(tmp_path / "s"),
    ]
    done = subprocess.run([*command, "--port", "0", *words], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "hint: " in done.stderr
