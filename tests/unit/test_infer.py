"""One call of a loaded model: what it gives, what it refuses, and whose the arrays are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outrider.model import Model, Prediction, load
from outrider_runtimes.errors import (
    DtypeError,
    InputError,
    NotFiniteError,
    ShapeError,
    UnknownTensor,
)
from support.effort import effort
from support.realbundles import close_to, images


@pytest.fixture(params=["onnxruntime", "litert"])
def model(request: pytest.FixtureRequest, tiny_state: Path) -> Iterator[Model]:
    """On each engine, whichever was measured best here."""
    with load("tiny", state=tiny_state, engine=request.param) as model:
        yield model


def test_a_prediction_says_where_it_came_from(model: Model) -> None:
    p = model.infer({"image": images(3)})
    assert isinstance(p, Prediction)
    assert close_to(p.outputs, images(3)) and p.outputs["logits"].dtype == np.float32
    assert (p.source, p.reason, p.variant, p.engine) == ("edge", "local", model.variant, model.engine)
    assert p.bundle == model.bundle.digest
    assert 0 < p.timing_ms.infer <= p.timing_ms.total
    with pytest.raises(AttributeError):
        p.source = "cloud"  # type: ignore[misc]
    assert not hasattr(p, "__dict__")


@pytest.mark.parametrize("deadline_ms", [None, 120_000.0])
def test_mapping_and_bare_array_are_the_same(model: Model, deadline_ms: float | None) -> None:
    x = images()
    by_name = model.infer({"image": x}, deadline_ms=deadline_ms).outputs["logits"]
    bare = model.infer(x, deadline_ms=deadline_ms).outputs["logits"]
    assert np.array_equal(by_name, bare)
    assert np.array_equal(model.predict(x)["logits"], bare)


def bad_inputs() -> dict[str, tuple[Any, type[InputError]]]:
    x = images(2)
    nan = x.copy()
    nan[1, 0, 3, 3] = np.nan
    return {
        "name": ({"picture": x}, UnknownTensor),
        "missing": ({}, UnknownTensor),
        "too many": ({"image": x, "mask": x}, UnknownTensor),
        "dtype": (x.astype(np.float64), DtypeError),
        "list": ([[1.0]], DtypeError),
        "none": (None, DtypeError),
        "shape": (x[:, :, :4], ShapeError),
        "rank": (x[0], ShapeError),
        "nan": (nan, NotFiniteError),
        "infinite": (nan + np.inf, NotFiniteError),
    }


@pytest.mark.parametrize(("bad", "error"), bad_inputs().values(), ids=bad_inputs())
@pytest.mark.parametrize("deadline_ms", [None, 120_000.0])
def test_a_bad_call_is_typed_and_the_next_good_call_bit_identical(
    model: Model, bad: Any, error: type[InputError], deadline_ms: float | None
) -> None:
    before = model.infer(images(), deadline_ms=deadline_ms).outputs["logits"].tobytes()
    with pytest.raises(error):
        model.infer(bad, deadline_ms=deadline_ms)
    assert model.infer(images(), deadline_ms=deadline_ms).outputs["logits"].tobytes() == before


@settings(max_examples=effort(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=5),
    dtype=st.sampled_from(["bool", "int8", "uint16", "int64", "float16", "float32", "float64", ">f4", "U3"]),
    value=st.sampled_from([0, 1, np.nan, np.inf]),
)
def test_any_array_is_answered_or_refused_by_type(model: Model, shape: list[int], dtype: str, value: float) -> None:
    with np.errstate(invalid="ignore"):
        x = np.full(shape, value).astype(dtype)
    try:
        outputs = model.infer(x).outputs
    except InputError:
        return
    assert outputs["logits"].shape == (shape[0], 10)


def test_outputs_are_the_callers_to_keep(model: Model) -> None:
    x = images()
    first = model.predict(x)["logits"]
    kept = first.copy()
    first_input = x.copy()
    x[:] = 0.0
    model.predict(x)
    assert np.array_equal(first, kept)
    first[:] = 7.0
    assert close_to(model.predict(first_input), first_input)


def test_memory_order_and_byte_order_do_not_matter(model: Model) -> None:
    x = images()
    wanted = model.predict(x)["logits"]
    assert np.array_equal(model.predict(np.asfortranarray(x))["logits"], wanted)
    assert np.array_equal(model.predict(x.astype(">f4"))["logits"], wanted)


def test_many_threads_get_their_own_answers(model: Model) -> None:
    failures: list[str] = []

    def ask(seed: int) -> None:
        x = images(4, seed)
        for turn in range(30):
            outputs = model.infer(x, deadline_ms=None if turn % 2 else 120_000.0).outputs
            if not close_to(outputs, x):
                failures.append(f"thread {seed}, turn {turn}")

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
