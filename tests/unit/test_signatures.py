"""TFLite files that hold one function at several shapes: the session, the binding, the refusal of other sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from outrider.bundle import Variant, parse_manifest, write_bundle
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.engines import engine_named
from outrider_runtimes.errors import FormatError, InferenceError, ShapeError, UnsupportedBundle
from outrider_runtimes.tensors import Binding, Interface, TensorBinding, TensorSpec
from support import memory
from support.bundles import INTERFACE as PLAIN
from support.bundles import golden, golden_members, manifest_data, model_members
from support.memory import INTERFACE, LENGTHS, SIGNATURES, step


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("signatures") / "memory.tflite"
    file.write_bytes(memory.tflite_bytes())
    return file


def prepare(path):
    return engine_named("litert").prepare(path, threads=1)


def draw(length, rows=1, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((rows, length)).astype(np.float32),
        "h": rng.standard_normal((rows, 1)).astype(np.float32),
    }


def test_a_size_in_which_signatures_differ_is_open(path):
    session = prepare(path)
    assert {tensor.name: tensor.shape for tensor in session.inputs} == {"x": (1, None), "h": (1, 1)}
    assert {tensor.name: tensor.shape for tensor in session.outputs} == {"y": (1, None), "h_next": (1, 1)}


def test_the_signature_is_chosen_by_the_shapes_of_the_call(path):
    session = prepare(path)
    for seed, length in enumerate((*LENGTHS, *LENGTHS[::-1], LENGTHS[0])):
        inputs = draw(length, seed=seed)
        given = dict(zip(session.output_names, session.run([inputs[n] for n in session.input_names]), strict=True))
        y, h = step(inputs["x"], inputs["h"])
        np.testing.assert_allclose(given["y"], y, atol=1e-6)
        np.testing.assert_allclose(given["h_next"], h, atol=1e-6)


def test_an_output_is_the_callers_to_keep(path):
    session = prepare(path)
    first, second = (draw(3, seed=seed) for seed in (1, 2))
    kept = session.run([first[name] for name in session.input_names])
    copies = [array.copy() for array in kept]
    session.run([second[name] for name in session.input_names])
    session.close()
    assert all(np.array_equal(array, copy) for array, copy in zip(kept, copies, strict=True))


def test_shapes_without_a_signature_are_named(path):
    session = prepare(path)
    with pytest.raises(InferenceError, match=r"no signature for inputs of \[1, 1\], \[1, 4\].*\[1, 1\], \[1, 3\]; "):
        session.run([np.zeros((1, 1), np.float32), np.zeros((1, 4), np.float32)])
    assert len(session.run([np.zeros((1, 1), np.float32), np.zeros((1, 3), np.float32)])) == 2


def test_a_closed_session_says_so(path):
    session = prepare(path)
    session.close()
    session.close()
    with pytest.raises(InferenceError, match="closed"):
        session.run([np.zeros((1, 1), np.float32), np.zeros((1, 3), np.float32)])


@pytest.mark.parametrize(
    "options",
    [{"lengths": (3, 3)}, {"names": ("x", "other")}, {"same": "last"}, {"lengths": (4,)}],
    ids=["equal shapes", "other inputs", "other outputs", "one signature"],
)
def test_signatures_of_different_functions_are_left_alone(tmp_path, options):
    """Then the main graph is what runs, as for any file."""
    path = tmp_path / "other.tflite"
    path.write_bytes(memory.tflite_bytes(**options))
    session = prepare(path)
    length = options.get("lengths", LENGTHS)[0]
    assert [tensor.shape for tensor in session.inputs] == [(1, length), (1, 1)]
    inputs = draw(length)
    np.testing.assert_allclose(session.run([inputs["x"], inputs["h"]])[0], step(**inputs)[0], atol=1e-6)


def bound(path):
    return BoundSession(prepare(path), INTERFACE, memory.binding("tflite"))


@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_n_is_free_at_every_size(path, length, rows):
    inputs = draw(length, rows)
    y, h = step(**inputs)
    given = bound(path).run(inputs).outputs
    np.testing.assert_allclose(given["y"], y, atol=1e-6)
    np.testing.assert_allclose(given["h_next"], h, atol=1e-6)


def test_a_size_without_a_signature_is_refused_with_the_sizes_there_are(path):
    session = bound(path)
    with pytest.raises(ShapeError, match=r"'x' \[N, 4\]") as caught:
        session.run(draw(4))
    assert caught.value.tensor == "x"
    assert "'x' [N, 3]; 'x' [N, 5]" in caught.value.hint
    inputs = draw(5)
    np.testing.assert_allclose(session.run(inputs).outputs["y"], step(**inputs)[0], atol=1e-6)


class Echo:
    """A session of one image file that was made for two sizes; it gives back what it is given."""

    def __init__(self):
        self.input_names, self.output_names = ("a",), ("b",)

    def run(self, inputs):
        return list(inputs)

    def close(self):
        pass


def test_sizes_are_compared_in_the_callers_order_of_axes():
    image = TensorSpec(name="image", dtype="float32", shape=(None, 3, None, None), axes="NCHW")
    layout = {"dtype": "float32", "shape": (1, None, None, 3), "permutation": (0, 2, 3, 1)}
    binding = Binding(
        inputs=(TensorBinding(name="image", file_name="a", **layout),),
        outputs=(TensorBinding(name="same", file_name="b", **layout),),
        signatures=({"image": (1, 4, 6, 3)}, {"image": (1, 8, 8, 3)}),
    )
    same = TensorSpec(name="same", dtype="float32", shape=(None, 3, None, None), axes="NCHW")
    session = BoundSession(Echo(), Interface(inputs=(image,), outputs=(same,)), binding)
    for height, width in ((4, 6), (8, 8)):
        x = np.random.default_rng(0).standard_normal((2, 3, height, width)).astype(np.float32)
        assert np.array_equal(session.run({"image": x}).outputs["same"], x)
    with pytest.raises(ShapeError, match=r"'image' \[N, 3, 6, 4\]") as caught:
        session.run({"image": np.zeros((1, 3, 6, 4), np.float32)})
    assert "[N, 3, 4, 6]; 'image' [N, 3, 8, 8]" in caught.value.hint


def test_a_binding_comes_back_as_it_was_stored():
    binding = memory.binding("tflite")
    stored = json.loads(json.dumps(binding.to_dict(), sort_keys=True))
    assert Binding.from_dict(stored, INTERFACE) == binding
    assert "signatures" not in memory.binding("onnx").to_dict()


@pytest.mark.parametrize(
    ("signatures", "words"),
    [
        ([{"x": [1, 3]}], "names"),
        ([{"x": [1, 3], "h": [1, 1], "z": [1]}], "names"),
        ([{"x": [1, 3], "h": [1, 2]}], "'h' has"),
        ([{"x": [1, 3, 1], "h": [1, 1]}], "'x' has"),
        ([{"x": [1, -3], "h": [1, 1]}], "malformed"),
        ([{"x": [1, None], "h": [1, 1]}], "malformed"),
        ([{"x": [1, True], "h": [1, 1]}], "malformed"),
        ([{"x": [1, 2**31], "h": [1, 1]}], "malformed"),
        ([{"x": 3, "h": [1, 1]}], "malformed"),
        ([["x", "h"]], "malformed"),
        (7, "malformed"),
        ([{"x": [1, 3], "h": [1, 1]}] * 2, "twice"),
        ([{"x": [1, length], "h": [1, 1]} for length in range(1, 66)], "at most 64"),
    ],
)
def test_a_binding_with_odd_signatures_is_refused(signatures, words):
    data = {**memory.binding("tflite").to_dict(), "signatures": signatures}
    with pytest.raises(FormatError, match=words):
        Binding.from_dict(data, INTERFACE)


def written(tmp_path):
    """A bundle one of whose variants has signatures."""
    names = ("onnx-float32", "tflite-float32")
    tensors = {"dtype": "float32", "shape": (None, 2, 2)}
    plain = Binding(
        inputs=(TensorBinding(name="image", file_name="x", **tensors),),
        outputs=(TensorBinding(name="logits", file_name="y", dtype="float32", shape=(None, 3)),),
    )
    several = Binding(inputs=plain.inputs, outputs=plain.outputs, signatures=({"image": (1, 2, 2)},))
    members = model_members(names)
    variants = [
        Variant(name=name, format=name.split("-")[0], precision="float32", member=member, binding=binding)
        for name, member, binding in zip(names, members, (plain, several), strict=True)
    ]
    path = tmp_path / "several.outrider"
    write_bundle(
        path,
        name="several",
        version=1,
        interface=PLAIN,
        variants=variants,
        golden=golden(names),
        members={**members, **golden_members(names)},
        provenance={},
    )
    return manifest_data(path)


def test_a_reader_must_know_signatures(tmp_path):
    data = written(tmp_path)
    assert data["requires"] == ["signatures"]
    assert parse_manifest(json.dumps(data).encode()).variants[1].binding.signatures == ({"image": (1, 2, 2)},)
    with pytest.raises(FormatError, match="if and only if 'signatures'"):
        parse_manifest(json.dumps({**data, "requires": []}).encode())
    del data["variants"][1]["binding"]["signatures"]
    with pytest.raises(FormatError, match="if and only if 'signatures'"):
        parse_manifest(json.dumps(data).encode())
    with pytest.raises(UnsupportedBundle, match="'shapes'"):
        parse_manifest(json.dumps({**data, "requires": ["shapes"]}).encode())


def test_the_signatures_of_the_support_file_are_those_of_its_binding():
    assert [item["x"][1] for item in SIGNATURES] == list(LENGTHS)
