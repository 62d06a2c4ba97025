"""One suite for every engine. A session is what ``engines.Session`` says, whichever library is behind it."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest

from outrider_runtimes.engines import FileTensor, engine_named, find_engines
from outrider_runtimes.errors import EngineError, InferenceError, ModelLoadError
from outrider_runtimes.tensors import DTYPES
from support.models import LINEAR_B, LINEAR_W
from support.tflitefiles import tflite_linear

FORMATS = {engine.name: engine.formats[0] for engine in find_engines()}


def prepare(engine, model_file, kind, threads=1):
    return engine.prepare(model_file(f"{FORMATS[engine.name]}-{kind}"), threads=threads)


def linear(x):
    return x @ LINEAR_W + LINEAR_B


def rows(seed, n=1):
    return np.random.default_rng(seed).standard_normal((n, 4)).astype(np.float32)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_goes_in_and_comes_out(engine, model_file, gap, dtype):
    with gap(f"same-{dtype}"):
        session = prepare(engine, model_file, f"same-{dtype}")
        for x in corners(dtype):
            (y,) = session.run([x])
            assert session.inputs[0].dtype == session.outputs[0].dtype == dtype == y.dtype.name
            assert y.tobytes() == x.tobytes()


def corners(dtype):
    """The least, the largest and what lies between; for floats what is no number too: an engine hands on what it is
    given."""
    if dtype == "bool":
        return [np.array([[False, True, False]])]
    limits = np.finfo(dtype) if dtype.startswith("float") else np.iinfo(dtype)
    found = [np.array([[limits.min, 1, limits.max]], dtype)]
    if dtype.startswith("float"):
        found.append(np.array([[np.nan, -np.inf, limits.smallest_subnormal]], dtype))
    return found


@pytest.mark.parametrize("dtype", ["STRING", "COMPLEX64", "BFLOAT16"])
def test_a_dtype_that_no_caller_has_is_refused(engine, model_file, dtype):
    with pytest.raises(ModelLoadError) as caught:
        prepare(engine, model_file, f"same-{dtype}")
    assert f"same-{dtype}" in str(caught.value)


def test_what_the_file_declares(engine, model_file):
    session = prepare(engine, model_file, "linear")
    assert tuple(session.inputs) == (FileTensor(name="x", dtype="float32", shape=(None, 4)),)
    assert tuple(session.outputs) == (FileTensor(name="y", dtype="float32", shape=(None, 3)),)
    assert (list(session.input_names), list(session.output_names)) == (["x"], ["y"])
    fixed = prepare(engine, model_file, "fixed-2")
    assert (fixed.inputs[0].shape, fixed.outputs[0].shape) == ((2, 4), (2, 3))


@pytest.mark.parametrize("n", [1, 2])
def test_several_inputs_and_outputs_keep_their_places(engine, model_file, n):
    session = prepare(engine, model_file, "several")
    assert list(session.input_names) == ["a", "b", "i"]
    assert list(session.output_names) == ["sum", "difference", "echo"]
    a, b = np.array([[1, 2]] * n, np.float32), np.array([[10, 30]] * n, np.float32)
    i = np.arange(7, 7 + n, dtype=np.int64)
    total, difference, echo = session.run([a, b, i])
    assert np.array_equal(total, [[11, 32]] * n)
    assert np.array_equal(difference, [[-9, -28]] * n)
    assert np.array_equal(echo, i)


@pytest.mark.parametrize("n", [0, 1, 2, 17])
def test_a_free_batch_takes_any_number_of_rows(engine, model_file, gap, n):
    with gap(f"rows-{n}"):
        session = prepare(engine, model_file, "linear")
        x = rows(n, n)
        (y,) = session.run([x])
        assert y.shape == (n, 3)
        np.testing.assert_allclose(y, linear(x), atol=1e-5)


def test_free_sizes_change_from_call_to_call_and_back(engine, model_file):
    session = prepare(engine, model_file, "doubled")
    assert session.inputs[0].shape == (None, None, 2)
    for n, t in [(1, 1), (3, 5), (1, 7), (3, 5), (2, 1), (1, 1)]:
        x = np.random.default_rng(n * t).standard_normal((n, t, 2)).astype(np.float32)
        assert np.array_equal(session.run([x])[0], x + x)


def test_a_shape_that_the_file_does_not_allow_leaves_the_session_as_it_was(engine, model_file):
    session = prepare(engine, model_file, "doubled")
    x = np.ones((2, 3, 2), np.float32)
    before = session.run([x])[0]
    for bad in ((2, 3, 4), (2, 3), (2, 3, 2, 1)):
        with pytest.raises(InferenceError):
            session.run([np.ones(bad, np.float32)])
        assert np.array_equal(session.run([x])[0], before)


def test_repeated_calls_give_the_same_bits(engine, model_file):
    session = prepare(engine, model_file, "linear")
    x = rows(3)
    (first,) = session.run([x])
    first = first.copy()
    for seed in range(50):
        session.run([rows(seed)])
    assert np.array_equal(session.run([x])[0], first)


def test_an_output_outlives_the_next_call_the_input_and_the_session(engine, model_file):
    session = prepare(engine, model_file, "linear")
    x = rows(4)
    (kept,) = session.run([x])
    copy = kept.copy()
    x[:] = 99.0
    session.run([x])
    session.close()
    assert np.array_equal(kept, copy)
    kept += 1  # writable, and nobody else's


def test_an_echoed_input_is_a_copy(engine, model_file):
    session = prepare(engine, model_file, "several")
    a = np.zeros((1, 2), np.float32)
    i = np.array([7], np.int64)
    echo = session.run([a, a, i])[2]
    i[:] = 8
    assert echo[0] == 7


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_answer(engine, model_file, threads):
    session = prepare(engine, model_file, "linear", threads=threads)
    x = rows(5)
    np.testing.assert_allclose(session.run([x])[0], linear(x), atol=1e-5)


def test_sessions_of_one_file_run_side_by_side(engine, model_file):
    sessions = [prepare(engine, model_file, "linear") for _ in range(4)]
    x = rows(6)
    wanted = sessions[0].run([x])[0]
    wrong = []

    def work(session):
        wrong.extend(1 for _ in range(200) if not np.array_equal(session.run([x])[0], wanted))

    threads = [threading.Thread(target=work, args=(session,)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(250)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param([], id="no input"),
        pytest.param([np.zeros((1, 4), np.float32)] * 2, id="one too many"),
        pytest.param([np.zeros((1, 5), np.float32)], id="shape"),
        pytest.param([np.zeros((4,), np.float32)], id="rank"),
        pytest.param([np.zeros((1, 4), np.float64)], id="dtype"),
        pytest.param([object()], id="no array"),
    ],
)
def test_a_bad_call_is_an_inference_error_and_the_next_is_as_before(engine, model_file, bad):
    session = prepare(engine, model_file, "linear")
    x = rows(8)
    before = session.run([x])[0]
    with pytest.raises(InferenceError) as caught:
        session.run(bad)
    assert "\n" not in str(caught.value)
    assert np.array_equal(session.run([x])[0], before)


def test_a_closed_session_says_so(engine, model_file):
    session = prepare(engine, model_file, "linear")
    session.close()
    session.close()
    with pytest.raises(InferenceError, match="closed"):
        session.run([rows(0)])


@pytest.mark.parametrize("content", [b"", b"\0", b"not a model", b"\0" * 4096, bytes(range(256)) * 16])
def test_wrong_bytes_are_refused(engine, tmp_path, content):
    path = tmp_path / "wrong.bin"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError) as caught:
        engine.prepare(path, threads=1)
    assert "wrong.bin" in str(caught.value)


def test_a_file_of_the_other_format_is_refused(engine, model_file):
    other = {"onnx": "tflite", "tflite": "onnx"}[FORMATS[engine.name]]
    with pytest.raises(ModelLoadError):
        engine.prepare(model_file(f"{other}-linear"), threads=1)


def test_a_missing_file_and_a_folder_are_refused(engine, tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ModelLoadError, match="cannot be read"):
            engine.prepare(path, threads=1)


# A cut file can crash a native loader: these run in a child, one child for all the cuts of an engine.
TRUNCATED = """
import sys
from pathlib import Path
from outrider_runtimes.engines import engine_named
from outrider_runtimes.errors import ModelLoadError
name, source, target = sys.argv[1:]
data = Path(source).read_bytes()
refused = 0
for step in range(24):
    Path(target).write_bytes(data[: len(data) * step // 24])
    try:
        engine_named(name).prepare(Path(target), threads=1)
    except ModelLoadError:
        refused += 1
Path(target).write_bytes(data)
engine_named(name).prepare(Path(target), threads=1)
print(refused)
"""


def test_truncated_files_are_refused_without_a_crash(engine, model_file, gap, tmp_path):
    source = model_file(f"{FORMATS[engine.name]}-several")
    command = [sys.executable, "-c", TRUNCATED, engine.name, str(source), str(tmp_path / "cut")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    with gap("truncated"):
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == 24


def test_the_version_is_stated(engine):
    assert engine.version()[0].isdigit()


def test_every_error_of_an_engine_is_an_engine_error():
    assert issubclass(ModelLoadError, EngineError)
    assert issubclass(InferenceError, EngineError)


def test_onnxruntime_is_told_what_a_board_needs(model_file):
    engine = engine_or_skip("onnxruntime")
    session = engine.prepare(model_file("onnx-linear"), threads=2)
    options = session._session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert not options.enable_cpu_mem_arena
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert session._session.get_providers() == ["CPUExecutionProvider"]


def engine_or_skip(name):
    engine = engine_named(name)
    if engine.check():
        pytest.skip(str(engine.check()))
    return engine


def test_tflite_quantization_is_told(model_file):
    engine = engine_or_skip("litert")
    session = engine.prepare(model_file("tflite-int8"), threads=1)
    (x,), (y,) = session.inputs, session.outputs
    assert (x.dtype, x.zero_point, y.dtype, y.zero_point) == ("int8", 3, "int8", -2)
    assert (x.scale, y.scale) == (pytest.approx(4 / 127), pytest.approx(16 / 127))
    real = rows(9).clip(-1, 1)
    stored = np.clip(np.rint(real / x.scale) + x.zero_point, -128, 127).astype(np.int8)
    (out,) = session.run([stored])
    assert np.abs((out.astype(np.float32) - y.zero_point) * y.scale - linear(real)).max() < y.scale


def test_a_tflite_without_signatures_is_known_by_its_tensor_names(tmp_path):
    engine = engine_or_skip("litert")
    session = engine.prepare(tflite_linear(tmp_path / "bare.tflite", signature=False), threads=1)
    assert (list(session.input_names), list(session.output_names)) == (["serving_x"], ["serving_y"])
    x = rows(11)
    np.testing.assert_allclose(session.run([x])[0], linear(x), atol=1e-5)
