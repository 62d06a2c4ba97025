"""What the device's benchmarks measure with: networks by hand, children, differences."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from benchmarks.children import balanced_orders, interleaved_runs, run_program
from benchmarks.handmade import FORMATS, OUTPUTS, Network, dense, write_file, write_handmade
from benchmarks.raw import open_raw
from benchmarks.stats import difference

from outrider.bundle import open_bundle
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.engines import require_engines

NETWORKS = [Network(name="slice", width=37), dense("one", 12, 1), dense("three", 24, 3)]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
@pytest.mark.parametrize("format_", FORMATS)
def test_a_file_by_hand_gives_what_numpy_gives(network: Network, format_: str, tmp_path: Path) -> None:
    path = write_file(network, tmp_path / f"m.{format_}")
    x = network.input()
    np.testing.assert_allclose(open_raw(path).answer(x), network.reference(x), rtol=1e-4, atol=1e-5)


def test_a_bundle_by_hand_answers_its_golden(tmp_path: Path) -> None:
    network = NETWORKS[2]
    with open_bundle(write_handmade(network, tmp_path)) as bundle:
        manifest = bundle.manifest
        assert [variant.format for variant in manifest.variants] == list(FORMATS)
        for variant in manifest.variants:
            session = require_engines(variant.format)[0].prepare(tmp_path / f"three.{variant.format}", threads=1)
            bound = BoundSession(session, manifest.interface, variant.binding)
            x = network.input(rows=4)
            y = bound.run({"x": x}).outputs["y"]
            assert y.shape == (4, OUTPUTS)
            np.testing.assert_allclose(y, network.reference(x), rtol=1e-3, atol=1e-5)
            bound.close()


def test_a_deep_network_keeps_its_size() -> None:
    network = dense("deep", 256, 8)
    assert 0.1 < network.reference(network.input(16)).std() < 10


def test_a_child_is_timed_and_weighed_and_its_word_taken() -> None:
    ran = run_program("import json, sys; big = b'x' * 50_000_000; print(json.dumps([len(big), sys.argv[1]]))", "word")
    assert ran.said == [50_000_000, "word"]
    assert ran.peak_bytes > 50_000_000
    assert ran.first_line_ms > 0
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_program("1 / 0")


def test_a_child_that_complains_at_length_is_heard_to_its_end() -> None:
    program = "import sys; sys.stderr.write('x' * 1_000_000); print(1); sys.exit(2) if sys.argv[1:] else None"
    assert run_program(program).said == 1
    with pytest.raises(RuntimeError, match=r"^x{1000000}$"):
        run_program(program, "fail")


def test_children_take_turns_and_the_first_round_is_not_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); print(1)"
    runs = interleaved_runs(
        {"a": (program, str(log), "a"), "b": (program, str(log), "b")}, rounds=3, rng=np.random.default_rng(0)
    )
    assert {name: len(kept) for name, kept in runs.items()} == {"a": 3, "b": 3}
    text = log.read_text()
    assert [sorted(text[at : at + 2]) for at in range(0, 8, 2)] == [["a", "b"]] * 4


def test_no_contender_stands_more_often_first_or_last_than_another() -> None:
    names = ["raw", "twin", "ours"]
    orders = balanced_orders(names, 60, np.random.default_rng(3))
    for position in range(3):
        assert Counter(order[position] for order in orders) == dict.fromkeys(names, 20)
    assert {tuple(order) for order in orders} == set(permutations(names))
    assert [sorted(order) for order in balanced_orders(names, 4, np.random.default_rng(0))] == [sorted(names)] * 4


def test_a_difference_and_its_interval_hold_the_truth() -> None:
    rng = np.random.default_rng(1)
    base = 10 + rng.standard_normal((40, 50))
    found = difference(base + 3 + 0.1 * rng.standard_normal((40, 50)), base, rng)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(3.0, abs=0.1)
