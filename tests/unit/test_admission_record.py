"""What the store kept of an install is a file: whatever stands in it, it is read as it was or refused, typed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider import doctor
from outrider.admit.admission import Admission, Choice, Measured, Skipped, remembered
from outrider.admit.curve import BatchCurve, Point
from outrider.installer import admissions_of, install, rollback
from outrider.model import load
from outrider.store import Store
from outrider_runtimes.errors import StoreError
from support.realbundles import images, make_real_bundle, rewrite_admission

ROW = {"variant": "v", "engine": "e", "threads": 2, "p50_ms": 0.5}
CURVE = BatchCurve(
    variant="v", engine="e", threads=2, points=(Point(rows=1, best_ms=0.5, runs=9), Point(rows=2, best_ms=0.6, runs=9))
)
SOUND = Admission(
    choice=Choice(**ROW, reason="the fastest"),
    measured=(Measured(**ROW, runs=9), Measured(**{**ROW, "threads": 1}, runs=7)),
    skipped=(Skipped(variant="", engine="f", reason="gone"),),
    engines={"e": "1.0"},
    board={"machine": "arm", "memory_bytes": 2**30},
    peak_rss_bytes=2**20,
    bound_ms=3,
    batches=CURVE.to_dict(),
)

Path_ = tuple[Any, ...]
DAMAGE: dict[str, tuple[Path_, Any]] = {
    "no time": (("measured", 0, "p50_ms"), None),
    "a time of NaN": (("measured", 0, "p50_ms"), math.nan),
    "a time of infinity": (("measured", 1, "p50_ms"), math.inf),
    "a time beyond floats": (("measured", 1, "p50_ms"), 10**400),
    "a negative time": (("choice", "p50_ms"), -0.5),
    "a time of yes": (("choice", "p50_ms"), True),
    "text for threads": (("choice", "threads"), "2"),
    "no threads": (("measured", 0, "threads"), 0),
    "too many threads": (("measured", 0, "threads"), 1025),
    "threads in part": (("measured", 0, "threads"), 2.0),
    "a variant without a name": (("measured", 1, "variant"), None),
    "a choice that was not measured": (("choice", "variant"), "nope"),
    "a choice with other threads": (("choice", "threads"), 4),
    "a reason that is none": (("choice", "reason"), []),
    "no runs": (("measured", 0, "runs"), 0),
    "memory as text": (("board", "memory_bytes"), "x"),
    "a peak in part": (("peak_rss_bytes",), 1.5),
    "an engine's version": (("engines", "e"), 1),
    "a bound of nothing": (("bound_ms",), 0),
    "a reason for nothing": (("skipped", 0, "reason"), None),
    "nothing measured": (("measured",), []),
}
DAMAGED_CURVES: dict[str, tuple[Path_, Any]] = {
    "text for rows": (("points", 0, "rows"), "1"),
    "rows that fall": (("points", 1, "rows"), 1),
    "no time": (("points", 0, "best_ms"), 0.0),
    "a time of NaN": (("points", 0, "best_ms"), math.nan),
    "no runs": (("points", 0, "runs"), None),
    "threads": (("threads",), -1),
    "a name": (("engine",), 3),
    "a point": (("points", 0), 7),
}


def changed(data: dict[str, Any], where: Path_, value: Any) -> dict[str, Any]:
    found = copy.deepcopy(data)
    inside: Any = found
    for key in where[:-1]:
        inside = inside[key]
    inside[where[-1]] = value
    return found


def paths(data: Any, where: Path_ = ()) -> Iterator[Path_]:
    if where:
        yield where
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from paths(value, (*where, key))


def as_json(admission: Admission) -> dict[str, Any]:
    return json.loads(json.dumps(admission.to_dict()))


def test_a_sound_one_is_read_as_it_was() -> None:
    assert as_json(Admission.from_dict(as_json(SOUND))) == as_json(SOUND)
    assert BatchCurve.from_dict(as_json(SOUND)["batches"]) == CURVE


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_refused(damage: str) -> None:
    with pytest.raises(StoreError, match="malformed") as caught:
        remembered({"admissions": [changed(as_json(SOUND), *DAMAGE[damage])]})
    assert caught.value.hint == "install again"


@pytest.mark.parametrize("damage", DAMAGED_CURVES)
def test_a_damaged_curve_is_refused(damage: str) -> None:
    with pytest.raises(StoreError, match="malformed"):
        BatchCurve.from_dict(changed(json.loads(json.dumps(CURVE.to_dict())), *DAMAGED_CURVES[damage]))


@given(
    where=st.sampled_from(list(paths(as_json(SOUND)))),
    value=st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([]) | st.just({}),
)
def test_any_one_change_is_refused_or_leaves_what_can_be_used(where: Path_, value: Any) -> None:
    try:
        (found,) = remembered({"admissions": [changed(as_json(SOUND), where, value)]})
    except StoreError:
        return
    assert found.choice.p50_ms > 0
    assert found.choice.threads in {row.threads for row in found.measured}
    assert all(math.isfinite(row.p50_ms * 1.01) for row in found.measured)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda a: a["measured"][0].update(p50_ms=None),
        lambda a: a["choice"].update(variant="nope"),
        lambda a: [row.update(variant="nope") for row in (a["choice"], *a["measured"])],
        lambda a: a["batches"]["points"][0].update(best_ms="x"),
    ],
    ids=["time", "choice", "a variant that the bundle has not", "batches"],
)
def test_doctor_finds_it_and_an_install_heals_it(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    make_real_bundle(tmp_path / "1.outrider", seed=1)
    install(tmp_path / "1.outrider", state=tmp_path)
    store = Store(tmp_path)
    assert doctor._installed(store, "tiny").status == "ok"
    rewrite_admission(tmp_path, change)
    with pytest.raises(StoreError):
        admissions_of(store.installed("tiny"))
    check = doctor._installed(store, "tiny")
    assert (check.status, check.cure) == ("broken", "install again")
    assert install(tmp_path / "1.outrider", state=tmp_path).admitted
    assert doctor._installed(store, "tiny").status == "ok"
    with load("tiny", state=tmp_path) as model:
        assert model.infer(images(1)).variant == "onnx-float32"


@pytest.mark.slow
def test_what_could_not_be_loaded_is_not_gone_back_to(tmp_path: Path) -> None:
    for version in (1, 2):
        make_real_bundle(tmp_path / f"{version}.outrider", version=version, seed=version)
        install(tmp_path / f"{version}.outrider", state=tmp_path)
    rewrite_admission(tmp_path, lambda admission: admission["choice"].update(threads=0), "last_good")
    with pytest.raises(StoreError, match="malformed"):
        rollback("tiny", state=tmp_path)
    assert Store(tmp_path).installed("tiny").manifest.version == 2
