"""From bytes and samples to the model's inputs."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from outrider.agent import payload as payload_module
from outrider.agent.payload import (
    MAX_INPUT_BYTES,
    MAX_PIECES,
    Named,
    Payload,
    Signal,
    Values,
    Windows,
    fit,
    read_json,
    read_payload,
)
from outrider_runtimes.errors import DtypeError, InputError, MissingExtra, ShapeError, UnknownTensor
from outrider_runtimes.tensors import Interface, StatePair, TensorSpec
from support.effort import effort

RNG = np.random.default_rng(5)


def interface(*inputs: TensorSpec, state: tuple[StatePair, ...] = ()) -> Interface:
    outputs = [TensorSpec(name="y", dtype="float32", shape=(None, 3), axes="NC")]
    outputs += [TensorSpec(name=pair.output, dtype="float32", shape=(None, 4), axes="NF") for pair in state]
    return Interface(inputs=inputs, outputs=tuple(outputs), state=state)


def spec(dtype: str, shape: tuple[int | None, ...], axes: str, name: str = "x") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape, axes=axes)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def picture(array: np.ndarray, format_: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format_)
    return file.getvalue()


IMAGE = interface(spec("float32", (None, 3, 4, 5), "NCHW"))


@pytest.mark.parametrize("kind", ["", ".npy"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">i2", "|u1", "?"])
def test_an_array_is_read_as_it_was_saved(kind: str, order: str, dtype: str) -> None:
    array = np.asarray(RNG.integers(0, 2, (3, 4, 5)), dtype=dtype, order=order)  # type: ignore[call-overload]
    payload = read_payload(npy(array), kind)
    assert isinstance(payload, Named)
    np.testing.assert_array_equal(payload.arrays[""], array)
    assert payload.arrays[""].dtype.isnative


def test_arrays_by_name_are_read_and_only_gain_a_batch() -> None:
    both = interface(spec("float32", (None, 2), "NC", "a"), spec("int8", (None, 3), "NC", "b"))
    a, b = np.ones((1, 2), np.float32), np.ones(3, np.int8)
    inputs = fit(both, read_payload(npz(a=a, b=b)))
    assert {name: array.shape for name, array in inputs.items()} == {"a": (1, 2), "b": (1, 3)}
    wrong = fit(both, read_payload(npz(a=a.astype(np.float64), b=b)))
    assert wrong["a"].dtype == np.float64, "an array that has a dtype keeps it: the model refuses it"
    with pytest.raises(UnknownTensor, match="'c'"):
        fit(both, read_payload(npz(c=a)))


def test_an_array_without_a_name_is_for_the_only_input_or_the_one_that_is_named() -> None:
    two = interface(spec("float32", (None, 2), "NC", "a"), spec("float32", (None, 2), "NC", "b"))
    payload = read_payload(npy(np.ones(2, np.float32)))
    with pytest.raises(UnknownTensor) as caught:
        fit(two, payload)
    assert "source.input" in caught.value.hint
    assert set(fit(two, payload, name="b")) == {"b"}
    recurrent = interface(
        spec("float32", (None, 2), "NC", "a"),
        spec("float32", (None, 4), "NF", "h"),
        state=(StatePair(input="h", output="h_next"),),
    )
    assert set(fit(recurrent, payload)) == {"a"}


def test_json_has_no_dtype_and_takes_the_inputs() -> None:
    whole = interface(spec("int8", (None, 3), "NC"))
    assert fit(whole, read_payload(b"[1, 2, 3]"))["x"].dtype == np.int8
    assert fit(whole, read_payload(b' {"x": [[1, 2, 3]]}'))["x"].shape == (1, 3)
    for wrong in (b"[1, 2, 300]", b"[1, 2, 0.5]", b'["1", "2", "3"]', b"[1, null, 3]"):
        with pytest.raises(DtypeError):
            fit(whole, read_payload(wrong))
    with pytest.raises(ShapeError, match="different lengths"):
        fit(whole, read_payload(b"[[1], [2, 3]]"))
    assert fit(interface(spec("float32", (None, 2), "NC")), read_payload(b"[1, 2.5]"))["x"].tolist() == [[1.0, 2.5]]


@pytest.mark.parametrize("format_", ["PNG", "JPEG"])
def test_a_picture_takes_the_order_of_the_input(format_: str) -> None:
    pixels = np.full((4, 5, 3), (250, 10, 10), np.uint8)
    payload = read_payload(picture(pixels, format_), ".jpg")
    inputs = fit(IMAGE, payload, scale=1 / 255)
    assert inputs["x"].shape == (1, 3, 4, 5) and inputs["x"].dtype == np.float32
    assert inputs["x"][0, 0].min() > 0.9 and inputs["x"][0, 1:].max() < 0.1, "red is the first"
    last = fit(interface(spec("uint8", (None, 4, 5, 3), "NHWC")), payload)["x"]
    assert last.dtype == np.uint8 and last.shape == (1, 4, 5, 3)
    grey = read_payload(picture(pixels, format_), ".png", colour="grey")
    assert fit(interface(spec("uint8", (None, 1, 4, 5), "NCHW")), grey)["x"].shape == (1, 1, 4, 5)
    assert fit(interface(spec("uint8", (None, 4, 5), "NHW")), grey)["x"].shape == (1, 4, 5)


def test_readings_lose_and_gain_axes_of_one() -> None:
    one = Signal(array=np.array([[1.0, 2.0, 3.0]]), axes="TC")
    assert fit(interface(spec("float32", (None, 3), "NC")), one)["x"].shape == (1, 3)
    assert fit(interface(spec("float32", (None, 3), "NF")), one)["x"].shape == (1, 3)
    series = Signal(array=np.zeros((8, 3)), axes="TC")
    assert fit(interface(spec("float32", (None, 8, 3), "NTC")), series)["x"].shape == (1, 8, 3)
    assert fit(interface(spec("float32", (None, 3, 8), "NCT")), series)["x"].shape == (1, 3, 8)
    sound = Signal(array=np.zeros(16, np.float32), axes="T")
    assert fit(interface(spec("float32", (None, 16), "NT")), sound)["x"].shape == (1, 16)
    assert fit(interface(spec("float32", (None, 1, 16), "NCT")), sound)["x"].shape == (1, 1, 16)


def test_scale_and_offset_and_what_a_whole_number_cannot_hold() -> None:
    signal = Signal(array=np.array([[0, 255]], np.uint8), axes="TC")
    assert fit(interface(spec("float32", (None, 2), "NC")), signal, scale=2 / 255, offset=-1.0)["x"].tolist() == [
        [-1, 1]
    ]
    with pytest.raises(DtypeError, match="int8"):
        fit(interface(spec("int8", (None, 2), "NC")), signal)
    nan = Signal(array=np.array([[np.nan, 1.0]]), axes="TC")
    with pytest.raises(DtypeError):
        fit(interface(spec("int8", (None, 2), "NC")), nan)


@settings(max_examples=effort(60), deadline=None)
@given(st.lists(st.integers(0, 7), max_size=20), st.integers(1, 6), st.integers(1, 9))
def test_windows_are_those_of_the_whole_whatever_the_pieces(pieces: list[int], size: int, hop: int) -> None:
    rows = np.arange(sum(pieces))
    windows, found, at = Windows(size, hop), [], 0
    for piece in pieces:
        found += [window.tolist() for window in windows.add(rows[at : at + piece])]
        at += piece
    wanted = [rows[start : start + size].tolist() for start in range(0, max(0, len(rows) - size + 1), hop)]
    assert found == wanted


def test_rows_that_come_one_by_one_are_put_together_and_a_long_window_does_not_copy_itself_at_each() -> None:
    size = 3 * MAX_PIECES + 7
    rows = np.arange(2.0 * size)[:, None]
    windows, found, pieces = Windows(size), [], 0
    for row in rows:
        found += list(windows.add(row[None]))
        pieces = max(pieces, len(windows._pieces))
    np.testing.assert_array_equal(found, [rows[:size], rows[size:]])
    assert pieces < MAX_PIECES


HOSTILE: dict[str, Callable[[], tuple[bytes, str]]] = {
    "objects": lambda: (npy(np.array([{}], object)), ""),
    "text": lambda: (npy(np.array(["a"])), ".npy"),
    "a header that lies": lambda: (npy(np.zeros(4)).replace(b"(4,)", b"(9,)"), ""),
    "a header of a terabyte": lambda: (_header((10**12,)) + bytes(32), ""),
    "cut": lambda: (npy(np.zeros(4))[:-1], ""),
    "no zip": lambda: (b"PK\x03\x04....", ""),
    "a zip of something else": lambda: (_zip("a.txt", b"hello"), ".npz"),
    "no picture": lambda: (b"\x89PNG....", ".png"),
    "another picture": lambda: (picture(np.zeros((2, 2, 3), np.uint8), "BMP"), ".png"),
    "deep": lambda: (b"[" * 100 + b"]" * 100, ""),
    "no numbers": lambda: (b"[1, 2", ""),
    "nan": lambda: (b'{"x": NaN}', ""),
    "twice": lambda: (b'{"x": 1, "x": 2}', ""),
    "nothing": lambda: (b"", ""),
}


def _header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue()


def _zip(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)
    return file.getvalue()


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_not_sound_is_an_input_error(what: str) -> None:
    raw, kind = HOSTILE[what]()
    with pytest.raises(InputError):
        fit(interface(spec("float32", (None, 3), "NC")), read_payload(raw, kind))


def test_more_than_a_board_should_hold_is_refused() -> None:
    with pytest.raises(InputError, match="more than 67108864 bytes"):
        read_payload(b" " * (MAX_INPUT_BYTES + 1))
    with pytest.raises(InputError, match="more than 67108864 bytes"):
        read_json(b"[1]" + b" " * MAX_INPUT_BYTES)


def test_what_is_small_until_it_is_unpacked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload_module, "MAX_INPUT_BYTES", 100_000)
    half = np.zeros(50_000, np.uint8)
    bomb = npz(a=half, b=half)
    assert len(bomb) < 1000
    with pytest.raises(InputError, match="unpacked it has more than 100000 bytes"):
        read_payload(bomb)
    assert len(read_payload(npz(a=half)).arrays) == 1  # type: ignore[union-attr]


@settings(max_examples=effort(200), deadline=None)
@given(st.sampled_from([npy(np.ones((2, 3))), npz(a=np.ones(3)), b"[1, 2, 3]"]), st.data())
def test_no_flipped_byte_breaks_it(raw: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(raw) - 1))
    changed = bytearray(raw)
    changed[at] = data.draw(st.integers(0, 255))
    payload: Payload
    try:
        payload = read_payload(bytes(changed))
        fit(interface(spec("float64", (None, 3), "NC", "a")), payload)
    except InputError as error:
        assert str(error)


def test_pictures_need_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = picture(np.zeros((2, 2, 3), np.uint8))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra) as caught:
        read_payload(raw, ".png")
    assert caught.value.hint == "pip install 'outrider[images]'"


def test_values_and_json_lines_agree() -> None:
    assert read_json(b" [1, [2.5]] ") == [1, [2.5]]
    assert read_payload(json.dumps({"x": [1]}).encode()) == Values(value={"x": [1]})
