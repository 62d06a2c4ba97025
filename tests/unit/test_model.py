"""Install, load, infer, go back: real bundles in a real store."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import outrider
from outrider.admission import same_board
from outrider.bundle import Trust, generate_key, save_keypair, thin_bundle
from outrider.installer import InstallReport, install, rollback
from outrider.model import BundleInfo, Model, Prediction, load
from outrider.store import Store
from outrider_runtimes.board import this_board
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.deadline import Deadline
from outrider_runtimes.errors import (
    AdmissionError,
    ConfigError,
    DeadlineExceeded,
    DtypeError,
    InferenceError,
    InputError,
    IntegrityError,
    MissingExtra,
    NoEngine,
    NotFiniteError,
    NotInstalled,
    OutriderError,
    QueueFull,
    RunnerClosed,
    ShapeError,
    StateDirectoryError,
    StoreError,
    TrustError,
    UnknownTensor,
)
from outrider_runtimes.tensors import Array, Binding, Interface, TensorBinding, TensorSpec
from support import tinymodels
from support.realbundles import INTERFACE, ONNX, TFLITE, expected, images, make_real_bundle


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory in which "tiny" with both formats is installed; tests only read it."""
    folder = tmp_path_factory.mktemp("shared")
    make_real_bundle(folder / "tiny.outrider", formats=("onnx", "tflite"))
    install(folder / "tiny.outrider", state=folder / "state")
    return folder / "state"


@pytest.fixture
def model(shared: Path) -> Iterator[Model]:
    with load("tiny", state=shared) as model:
        yield model


def close_to(outputs: dict[str, Array], x: Array, seed: int = 0) -> bool:
    return bool(np.allclose(outputs["logits"], expected(x, seed), atol=1e-4))


# -- install


def test_an_install_reports_what_it_chose_and_why(tmp_path: Path) -> None:
    digest = make_real_bundle(tmp_path / "b.outrider", version=4, formats=("onnx", "tflite"))
    report = install(tmp_path / "b.outrider", state=tmp_path / "state")
    assert (report.name, report.version, report.digest) == ("tiny", 4, digest)
    assert report.admitted and not report.verified
    assert {row.variant for row in report.measured} == {ONNX, TFLITE}
    assert report.choice.p50_ms <= 1.02 * min(row.p50_ms for row in report.measured)
    again = json.loads(json.dumps(report.to_dict()))
    assert again["choice"]["variant"] == report.choice.variant
    assert len(again["measured"]) == len(report.measured)


def test_the_same_bundle_again_is_not_run_again(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider")
    first = install(tmp_path / "b.outrider", state=tmp_path)
    second = install(tmp_path / "b.outrider", state=tmp_path)
    assert first.admitted and not second.admitted
    assert second.measured == first.measured
    with pytest.raises(NotInstalled):
        rollback("tiny", state=tmp_path)


def test_more_members_of_the_same_bundle_are_run(tmp_path: Path) -> None:
    digest = make_real_bundle(tmp_path / "whole.outrider", formats=("onnx", "tflite"))
    assert thin_bundle(tmp_path / "whole.outrider", tmp_path / "thin.outrider", variants=[ONNX]) == digest
    thin = install(tmp_path / "thin.outrider", state=tmp_path)
    assert {row.variant for row in thin.measured} == {ONNX}
    assert (TFLITE, "", "its file is not in this thin bundle") in [
        (row.variant, row.engine, row.reason) for row in thin.skipped
    ]
    whole = install(tmp_path / "whole.outrider", state=tmp_path)
    assert whole.admitted and whole.digest == digest
    assert {row.variant for row in whole.measured} == {ONNX, TFLITE}
    assert not install(tmp_path / "thin.outrider", state=tmp_path).admitted
    with load("tiny", state=tmp_path, variant=TFLITE) as model:
        assert close_to(model.predict(images()), images())


BAD_FILES = {
    "wrong": {"golden_shift": 0.5},
    "nan": {"files": {"onnx": tinymodels.nan_onnx(tinymodels.weights(1))}},
    "garbage": {"files": {"onnx": b"\xff" * 1000}},
}


@pytest.mark.parametrize("made", BAD_FILES.values(), ids=BAD_FILES)
def test_a_refused_bundle_leaves_what_was_active_and_nothing_else(tmp_path: Path, made: dict[str, Any]) -> None:
    state = tmp_path / "state"
    make_real_bundle(tmp_path / "good.outrider", version=1)
    install(tmp_path / "good.outrider", state=state)
    before = snapshot(state)
    make_real_bundle(tmp_path / "bad.outrider", version=2, seed=1, **made)
    with load("tiny", state=state) as model:
        wanted = model.predict(images())["logits"]
        with pytest.raises(AdmissionError):
            install(tmp_path / "bad.outrider", state=state)
        assert np.array_equal(model.predict(images())["logits"], wanted)
    assert snapshot(state) == before
    with load("tiny", state=state) as model:
        assert np.array_equal(model.predict(images())["logits"], wanted)
        assert model.bundle.version == 1


def snapshot(state: Path) -> dict[str, bytes]:
    files = (path for path in state.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(state)): path.read_bytes() for path in files}


def test_nothing_is_written_for_a_first_bundle_that_is_refused(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "bad.outrider", golden_shift=0.5)
    with pytest.raises(AdmissionError):
        install(tmp_path / "bad.outrider", state=tmp_path / "state")
    assert snapshot(tmp_path / "state") == {}


def test_a_flipped_bit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "b.outrider"
    make_real_bundle(path)
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        install(path, state=tmp_path / "state")
    assert snapshot(tmp_path / "state") == {}


def test_rollback_brings_back_bundle_and_choice(tmp_path: Path) -> None:
    for version in (1, 2):
        make_real_bundle(tmp_path / f"{version}.outrider", version=version, seed=version)
    first = install(tmp_path / "1.outrider", state=tmp_path)
    install(tmp_path / "2.outrider", state=tmp_path)
    with load("tiny", state=tmp_path) as model:
        assert close_to(model.predict(images()), images(), seed=2)
    back = rollback("tiny", state=tmp_path)
    assert isinstance(back, InstallReport)
    assert (back.version, back.digest, back.choice, back.admitted) == (1, first.digest, first.choice, False)
    with load("tiny", state=tmp_path) as model:
        assert close_to(model.predict(images()), images(), seed=1)


def test_an_older_version_is_refused(tmp_path: Path) -> None:
    for version in (1, 2):
        make_real_bundle(tmp_path / f"{version}.outrider", version=version, seed=version)
    install(tmp_path / "2.outrider", state=tmp_path)
    with pytest.raises(StoreError):
        install(tmp_path / "1.outrider", state=tmp_path)


def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StateDirectoryError, match="file"):
        install(tmp_path / "b.outrider", state=tmp_path / "file" / "state")


# -- load


def test_load_by_name_starts_no_process_and_hashes_no_member(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib
    import subprocess

    hashed: list[int] = []
    real = hashlib.sha256

    def counting(data: bytes = b"", **kwargs: Any) -> Any:
        hashed.append(len(data))
        return real(data, **kwargs)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(hashlib, "sha256", counting)
    with load("tiny", state=shared) as model:
        assert close_to(model.predict(images()), images())
    assert len(hashed) <= 3  # the manifest, and what names it


def test_what_a_loaded_model_says_of_itself(shared: Path, model: Model) -> None:
    report = json.loads((shared / "names" / "tiny.json").read_text())
    assert model.interface == INTERFACE
    assert isinstance(model.bundle, BundleInfo)
    assert (model.bundle.name, model.bundle.version, model.bundle.verified) == ("tiny", 1, False)
    assert len(model.bundle.digest) == 64 and model.bundle.digest in json.dumps(report)
    assert model.variant in (ONNX, TFLITE)
    assert model.threads >= 1
    assert model.variant in repr(model)


def test_a_path_is_installed_first_and_found_the_second_time(tmp_path: Path) -> None:
    path = tmp_path / "b.outrider"
    make_real_bundle(path)
    for source in (path, str(path)):
        with load(source, state=tmp_path / "state") as model:
            assert close_to(model.predict(images()), images())
    record = (tmp_path / "state/names/tiny.json").stat()
    with load(path, state=tmp_path / "state"):
        pass
    assert (tmp_path / "state/names/tiny.json").stat().st_mtime_ns == record.st_mtime_ns
    make_real_bundle(path, version=2, seed=9)
    with load(path, state=tmp_path / "state") as model:
        assert model.bundle.version == 2
        assert close_to(model.predict(images()), images(), seed=9)


def test_a_damaged_store_is_healed_by_loading_the_path(tmp_path: Path) -> None:
    path, state = tmp_path / "b.outrider", tmp_path / "state"
    make_real_bundle(path)
    load(path, state=state).close()
    for blob in (state / "blobs/sha256").iterdir():
        blob.write_bytes(b"")
    with pytest.raises(StoreError):
        load("tiny", state=state)
    with load(path, state=state) as model:
        assert close_to(model.predict(images()), images())


def test_every_engine_and_variant_can_be_asked_for(shared: Path) -> None:
    for engine, variant in (("onnxruntime", ONNX), ("litert", TFLITE)):
        for asked in ({"engine": engine}, {"variant": variant}, {"engine": engine, "variant": variant, "threads": 1}):
            with load("tiny", state=shared, **asked) as model:  # type: ignore[arg-type]
                assert (model.engine, model.variant) == (engine, variant)
                assert close_to(model.predict(images()), images())
    with load("tiny", state=shared, threads=3) as model:
        assert model.threads == 3


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"variant": "onnx-int8"}, ConfigError, "onnx-int8"),
        ({"engine": "tensorrt-llm"}, NoEngine, "tensorrt-llm"),
        ({"threads": 0}, ConfigError, "threads is 0"),
        ({"finite": "zero"}, ConfigError, "finite is 'zero', expected 'reject' or 'clip' or 'pass'"),
        ({"engine": "onnxruntime", "variant": TFLITE}, NoEngine, f"{TFLITE} on onnxruntime"),
        ({"engine": "tflite_runtime"}, NoEngine, "not installed"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    shared: Path, asked: dict[str, Any], error: type[OutriderError], says: str
) -> None:
    with pytest.raises(error, match=says) as info:
        load("tiny", state=shared, **asked)
    assert info.value.hint or {"threads", "finite"} & set(asked)


def test_the_policy_for_infinities_is_asked_for_at_load(shared: Path) -> None:
    """The interface's range is 0 to 1, so that clip answers as for an image of ones."""
    endless = np.full_like(images(2), np.inf)
    with load("tiny", state=shared) as model, pytest.raises(NotFiniteError):
        model.infer(endless)
    with load("tiny", state=shared, finite="clip") as model:
        clipped = model.predict(endless)
        assert clipped["logits"].tobytes() == model.predict(np.ones_like(endless))["logits"].tobytes()
        assert model.submit({"image": endless}, Deadline.after_ms(60_000)).result(60).outputs.keys() == clipped.keys()
        with pytest.raises(NotFiniteError, match="NaN"):
            model.infer(endless * 0)
    with load("tiny", state=shared, finite="pass") as model:
        assert not np.isfinite(model.predict(endless)["logits"]).any()


def test_an_unknown_name_says_what_is_installed(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotInstalled, match="huge") as info:
        load("huge", state=shared)
    assert "tiny" in info.value.hint
    (tmp_path / "huge").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotInstalled) as info:
        load("huge", state=shared)
    assert "./huge" in info.value.hint


def test_an_engine_that_is_gone_is_replaced_by_the_next_best(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with load("tiny", state=shared) as chosen:
        package = {"litert": "ai_edge_litert", "onnxruntime": "onnxruntime"}[chosen.engine]
        gone = chosen.engine
    uninstall(package, monkeypatch)
    with load("tiny", state=shared) as model, caplog.at_level(logging.WARNING):
        assert model.engine != gone
        assert close_to(model.predict(images()), images())
    with pytest.raises(MissingExtra) as info:
        load("tiny", state=shared, engine=gone)
    assert "pip install" in info.value.hint


def uninstall(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `find_spec(package)` and its import fail, as where it is not installed."""
    import importlib.util
    import sys

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, p=None: None if name == package else real(name, p))
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)


def rewrite(state: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what the store kept of the latest admission of "tiny", as another engine or board would have it."""
    path = state / "names/tiny.json"
    record = json.loads(path.read_text())
    change(record["current"]["choice"]["admissions"][0])
    path.write_text(json.dumps(record))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda admission: admission["engines"].update(onnxruntime="0.0.1"), "onnxruntime's version is another"),
        (lambda admission: admission["board"].update(cpus=99), "the board is another"),
    ],
)
def test_another_engine_version_or_board_is_measured_at_the_next_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    make_real_bundle(tmp_path / "b.outrider")
    first = install(tmp_path / "b.outrider", state=tmp_path)
    rewrite(tmp_path, lambda admission: (change(admission), admission.update(peak_rss_bytes=1)))
    with caplog.at_level(logging.WARNING), load("tiny", state=tmp_path) as model:
        assert close_to(model.predict(images()), images())
    assert says in caplog.text
    kept = json.loads((tmp_path / "names/tiny.json").read_text())["current"]["choice"]["admissions"]
    assert [each["peak_rss_bytes"] > 1 for each in kept] == [True, False]  # the other board's is kept too
    assert (kept[0]["engines"], kept[0]["board"]) == (first.engines, first.board)
    caplog.clear()
    load("tiny", state=tmp_path).close()
    assert "measuring again" not in caplog.text
    assert not install(tmp_path / "b.outrider", state=tmp_path).admitted


@pytest.mark.parametrize(("share", "same"), [(1.0, True), (0.96, True), (1.04, True), (0.9, False), (1.1, False)])
def test_a_little_memory_more_or_less_is_the_same_board_and_nothing_else_is(share: float, same: bool) -> None:
    board = this_board().to_dict()
    other = {**board, "memory_bytes": int(board["memory_bytes"] * share)}
    assert same_board(board, other) is same_board(other, board) is same
    assert not same_board(board, {**other, "cpus": 99})
    assert not same_board(board, {**other, "python": "3.9.0"})


@pytest.mark.slow
def test_a_ladder_on_a_changed_board_measures_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_real_bundle(tmp_path / "b.outrider", formats=("onnx", "tflite"))
    install(tmp_path / "b.outrider", state=tmp_path)
    rewrite(tmp_path, lambda admission: admission["board"].update(cpus=99))
    with caplog.at_level(logging.WARNING):
        load("tiny", state=tmp_path, ladder=[ONNX, TFLITE], latency_ms=1e6).close()
    assert caplog.text.count("measuring again") == 1


@pytest.mark.slow
def test_a_bundle_that_a_new_engine_breaks_says_with_what_it_passed(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider", golden_shift=0.5)
    make_real_bundle(tmp_path / "good.outrider")
    install(tmp_path / "good.outrider", state=tmp_path)
    store = Store(tmp_path)
    with store.add(tmp_path / "b.outrider", Trust()) as staged:  # as if it had passed with another engine
        store.activate(staged, store.installed("tiny").choice)
    rewrite(tmp_path, lambda admission: admission["engines"].update(onnxruntime="0.0.1"))
    with pytest.raises(AdmissionError, match="differs by") as info:
        load("tiny", state=tmp_path)
    assert "onnxruntime 0.0.1" in info.value.hint


# -- trust


def test_trust_is_asked_at_install_and_at_load(tmp_path: Path) -> None:
    key, stranger = generate_key(), generate_key()
    _, public = save_keypair(tmp_path, "ours", key)
    _, other = save_keypair(tmp_path, "other", stranger)
    make_real_bundle(tmp_path / "b.outrider", signing_keys=[key])
    state = tmp_path / "state"
    with pytest.raises(TrustError):
        install(tmp_path / "b.outrider", trust=other, state=state)
    assert install(tmp_path / "b.outrider", trust=public, state=state).verified
    with load("tiny", trust=public, state=state) as model:
        assert model.bundle.verified
        assert model.infer(images()).verified
    with pytest.raises(TrustError):
        load("tiny", trust=other, state=state)
    with pytest.raises(TrustError):
        load(tmp_path / "b.outrider", trust=other, state=state)


def test_a_key_that_is_revoked_after_the_install_stops_the_next_load(tmp_path: Path) -> None:
    state = tmp_path / "state"
    key, second = generate_key(), generate_key()
    _, public = save_keypair(state / "trust", "ours", key)
    save_keypair(state / "trust", "second", second)
    make_real_bundle(tmp_path / "b.outrider", signing_keys=[key])
    assert install(tmp_path / "b.outrider", state=state).verified
    load("tiny", state=state).close()
    (state / "trust" / "revoked").mkdir()
    public.rename(state / "trust" / "revoked" / public.name)
    with pytest.raises(TrustError, match="revoked"):
        load("tiny", state=state)


def test_an_unsigned_bundle_says_so(model: Model) -> None:
    assert model.infer(images()).verified is False


# -- infer


def test_a_prediction_says_where_it_came_from(model: Model) -> None:
    p = model.infer({"image": images(3)})
    assert isinstance(p, Prediction) and p is not None
    assert close_to(p.outputs, images(3)) and p.outputs["logits"].dtype == np.float32
    assert (p.source, p.reason, p.variant, p.engine) == ("edge", "local", model.variant, model.engine)
    assert p.bundle == model.bundle.digest
    assert 0 < p.timing_ms.infer <= p.timing_ms.total
    with pytest.raises(AttributeError):
        p.source = "cloud"  # type: ignore[misc]
    assert not hasattr(p, "__dict__")


@pytest.mark.parametrize("deadline_ms", [None, 10_000.0])
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
@pytest.mark.parametrize("deadline_ms", [None, 10_000.0])
def test_a_bad_call_is_typed_and_the_next_good_call_bit_identical(
    model: Model, bad: Any, error: type[InputError], deadline_ms: float | None
) -> None:
    before = model.infer(images(), deadline_ms=deadline_ms).outputs["logits"].tobytes()
    with pytest.raises(error):
        model.infer(bad, deadline_ms=deadline_ms)
    assert model.infer(images(), deadline_ms=deadline_ms).outputs["logits"].tobytes() == before


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
            outputs = model.infer(x, deadline_ms=None if turn % 2 else 30_000.0).outputs
            if not close_to(outputs, x):
                failures.append(f"thread {seed}, turn {turn}")

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# -- deadlines, on a session that stops where a test tells it to


class Gate:
    """A session that doubles its input, and waits for `go` while `stuck`."""

    def __init__(self) -> None:
        self.inputs = self.outputs = ()
        self.input_names, self.output_names = ("x",), ("y",)
        self.go, self.entered = threading.Event(), threading.Event()
        self.stuck = False
        self.closed = False

    def run(self, inputs: Any) -> list[Array]:
        self.entered.set()
        if self.stuck:
            self.go.wait(60.0)
        if self.closed:
            raise InferenceError("the session was closed")
        return [inputs[0] * 2]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.go.set()


def gated(gate: Gate, expected_ms: float | None = None, **options: Any) -> Model:
    x, y = (TensorSpec(name=name, dtype="float32", shape=(None,), axes="N") for name in "xy")
    bind = [TensorBinding(name=name, file_name=name, dtype="float32", shape=(None,)) for name in "xy"]
    interface = Interface(inputs=(x,), outputs=(y,))
    session = BoundSession(gate, interface, Binding(inputs=(bind[0],), outputs=(bind[1],)))
    info = BundleInfo(name="gate", version=1, digest="0" * 64, verified=False)
    return Model(session, bundle=info, variant="v", engine="gate", threads=1, expected_ms=expected_ms, **options)


ONE = np.ones(1, np.float32)


def test_a_stuck_engine_does_not_hold_a_caller_beyond_its_deadline(gate: Gate) -> None:
    model = gated(gate)
    gate.stuck = True
    for _ in range(2):
        begun = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            model.infer(ONE, deadline_ms=50.0)
        assert time.monotonic() - begun < 5.0
    gate.stuck = False
    gate.go.set()
    assert model.infer(ONE, deadline_ms=10_000.0).outputs["y"][0] == 2.0
    model.close()


def test_a_deadline_must_be_positive(gate: Gate) -> None:
    with gated(gate) as model:
        for bad in (0.0, -1.0, float("nan")):
            with pytest.raises(ConfigError):
                model.infer(ONE, deadline_ms=bad)


def test_the_estimate_is_the_installs_until_calls_were_measured(gate: Gate) -> None:
    with gated(gate) as unknown:
        assert unknown.estimate_ms() is None
    model = gated(gate, expected_ms=5.0)
    gate.closed = False
    assert model.estimate_ms() == 5.0
    gate.stuck = True
    first = model.submit({"x": ONE}, Deadline.after_ms(None))
    gate.entered.wait(10.0)
    assert model.estimate_ms() == 10.0
    gate.go.set()
    first.result(10.0)
    assert model.estimate_ms() != 10.0
    model.close()


def test_submit_is_a_runners(gate: Gate) -> None:
    with gated(gate) as model:
        answer = model.submit({"x": ONE}, Deadline.after_ms(10_000.0)).result(10.0)
        assert answer.outputs["y"][0] == 2.0
        with pytest.raises(DtypeError):
            model.submit({"x": ONE.astype(np.float64)}, Deadline.after_ms(None))


@pytest.mark.parametrize("used", [None, 10_000.0])
def test_after_close_every_call_says_so(gate: Gate, used: float | None) -> None:
    model = gated(gate)
    model.infer(ONE, deadline_ms=used)
    model.close()
    model.close()
    assert gate.closed
    with pytest.raises(RunnerClosed):
        model.infer(ONE)
    with pytest.raises(RunnerClosed):
        model.infer(ONE, deadline_ms=1000.0)
    with pytest.raises(RunnerClosed):
        model.submit({"x": ONE}, Deadline.after_ms(None))


def test_a_model_that_was_never_used_with_a_deadline_starts_no_thread(gate: Gate) -> None:
    before = threading.active_count()
    with gated(gate) as model:
        model.infer(ONE)
        assert threading.active_count() == before
    with gated(gate) as closed:
        closed.close()
        with pytest.raises(RunnerClosed):
            closed.infer(ONE, deadline_ms=1000.0)
        assert threading.active_count() == before


def test_close_waits_for_the_call_that_runs(gate: Gate) -> None:
    model = gated(gate)
    gate.stuck = True
    answers: list[Prediction] = []
    caller = threading.Thread(target=lambda: answers.append(model.infer(ONE)))
    caller.start()
    assert gate.entered.wait(10.0)
    closer = threading.Thread(target=model.close)
    closer.start()
    gate.go.set()
    caller.join(10.0)
    closer.join(10.0)
    assert answers[0].outputs["y"][0] == 2.0
    assert gate.closed


def test_a_call_that_loses_the_race_with_close_is_told_so(gate: Gate) -> None:
    model = gated(gate)
    late = model._run  # what a caller holds who looked it up just before
    model.close()
    model._run = late
    with pytest.raises(RunnerClosed):
        model.infer(ONE)


# -- a process of its own


@pytest.mark.slow
def test_a_process_of_its_own_gives_the_same_bits_and_survives_a_stuck_call(tmp_path: Path) -> None:
    make_real_bundle(tmp_path / "b.outrider", files={"onnx": tinymodels.endless_onnx(tinymodels.weights(0), above=1.5)})
    with load(tmp_path / "b.outrider", state=tmp_path) as model:
        here = model.predict(images())["logits"]
    with load("tiny", state=tmp_path, isolation="process") as model:
        assert model.predict(images())["logits"].tobytes() == here.tobytes()
        with pytest.raises(DeadlineExceeded):
            model.infer(images() + 2.0, deadline_ms=50.0)
        assert model.infer(images(), deadline_ms=60_000.0).outputs["logits"].tobytes() == here.tobytes()
        assert not model.sick


@pytest.mark.parametrize("asked", [{"isolation": "thraed"}, {"drop": "all"}])
def test_a_word_that_an_option_does_not_have_is_refused_before_anything_is_opened(
    shared: Path, asked: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="expected '"):
        load("tiny", state=shared, **asked)


@pytest.mark.parametrize("drop", ["newest", "oldest"])
def test_drop_says_which_request_goes(gate: Gate, drop: Any) -> None:
    model = gated(gate, drop=drop)
    gate.stuck = True
    first = model.submit({"x": ONE}, Deadline.after_ms(None))
    gate.entered.wait(10.0)
    waiting = [model.submit({"x": ONE}, Deadline.after_ms(None)) for _ in range(8)]
    if drop == "newest":
        with pytest.raises(QueueFull):
            model.submit({"x": ONE}, Deadline.after_ms(None))
    else:
        waiting.append(model.submit({"x": ONE}, Deadline.after_ms(None)))
        with pytest.raises(QueueFull):
            waiting.pop(0).result(0)
    gate.go.set()
    assert all(future.result(10.0).outputs["y"][0] == 2.0 for future in [first, *waiting])
    model.close()


# -- callbacks


def test_each_prediction_goes_to_every_callback_until_it_is_taken_off(gate: Gate) -> None:
    model = gated(gate)
    seen: dict[str, list[Prediction]] = {"a": [], "b": []}
    take_off = model.on_prediction(seen["a"].append)
    model.on_prediction(seen["b"].append)
    first = model.infer(ONE)
    second = model.infer(ONE, deadline_ms=10_000.0)
    take_off()
    take_off()
    third = model.infer(ONE)
    assert seen["a"] == [first, second]
    assert seen["b"] == [first, second, third]
    model.close()


def test_the_same_callback_twice_is_two(gate: Gate) -> None:
    model = gated(gate)
    seen: list[Prediction] = []
    model.on_prediction(seen.append)
    take_off = model.on_prediction(seen.append)
    model.infer(ONE)
    take_off()
    model.infer(ONE)
    assert len(seen) == 3


def test_a_callback_that_fails_loses_no_answer_and_is_logged_once(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    model = gated(gate)
    seen: list[Prediction] = []

    def fail(_: Prediction) -> None:
        raise RuntimeError("the disk is full")

    model.on_prediction(fail)
    model.on_prediction(seen.append)
    for _ in range(3):
        assert model.infer(ONE).outputs["y"][0] == 2.0
    assert len(seen) == 3
    assert [record.exc_info[1].args for record in caplog.records if record.exc_info] == [("the disk is full",)]


def test_an_unsubscribe_inside_a_callback_is_safe(gate: Gate) -> None:
    model = gated(gate)
    calls: list[int] = []
    take_off = model.on_prediction(lambda _: (calls.append(1), take_off())[0])
    model.infer(ONE)
    model.infer(ONE)
    assert calls == [1]


def test_several_inputs_want_names() -> None:
    session = Gate()
    session.input_names = ("a", "b")  # type: ignore[assignment]
    specs = tuple(TensorSpec(name=name, dtype="float32", shape=(None,), axes="N") for name in "aby")
    bind = tuple(TensorBinding(name=name, file_name=name, dtype="float32", shape=(None,)) for name in "aby")
    bound = BoundSession(
        session, Interface(inputs=specs[:2], outputs=specs[2:]), Binding(inputs=bind[:2], outputs=bind[2:])
    )
    info = BundleInfo(name="two", version=1, digest="0" * 64, verified=False)
    with Model(bound, bundle=info, variant="v", engine="gate", threads=1) as model:
        with pytest.raises(UnknownTensor) as raised:
            model.infer(ONE)
        assert "['a', 'b']" in raised.value.hint
        assert model.infer({"b": ONE, "a": ONE}).outputs["y"][0] == 2.0


def test_the_public_names_are_these_objects() -> None:
    assert outrider.load is load
    assert outrider.install is install
    assert outrider.Model is Model


@pytest.mark.parametrize("threads", [0, -1, 1025, 2**70, "2", 1.5])
def test_a_number_of_threads_that_no_board_has_is_refused(shared: Path, threads: Any) -> None:
    with pytest.raises(ConfigError, match="from 1 to 1024"):
        load("tiny", state=shared, threads=threads)


def test_a_name_that_is_too_long_for_a_file_is_not_installed(shared: Path) -> None:
    with pytest.raises(NotInstalled):
        load("x" * 5000, state=shared)


def test_a_state_directory_with_a_null_byte_is_a_typed_error() -> None:
    with pytest.raises(StateDirectoryError, match="null byte"):
        load("tiny", state="a\0b")
