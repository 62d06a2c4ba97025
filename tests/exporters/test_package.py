from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from outrider.bundle import load_golden, open_bundle, verify_bundle
from outrider_exporters.package import PackageReport, package
from outrider_exporters.sources.files import RANDOM_ROWS
from outrider_runtimes.bound import BoundSession
from outrider_runtimes.engines.litert import LiteRtEngine
from outrider_runtimes.engines.onnxruntime import OnnxRuntimeEngine
from outrider_runtimes.errors import BundleError, ExportError, InputError, ModelLoadError
from support import tinymodels

pytestmark = pytest.mark.slow

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
WEIGHTS = tinymodels.weights()
CONTENT = {"onnx": tinymodels.classifier_onnx(WEIGHTS), "tflite": tinymodels.classifier_tflite(WEIGHTS)}


def save(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def save_onnx(folder: Path, nodes, inputs, outputs, initializers=()) -> Path:
    """A model of `(name, element type, shape)` inputs and outputs."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*item) for item in inputs],
        [helper.make_tensor_value_info(*item) for item in outputs],
        list(initializers),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return save(folder, "model.onnx", model.SerializeToString())


def run_variant(report: PackageReport, inputs: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """The packed variant's answers, from the bundle's bytes."""
    engine = OnnxRuntimeEngine() if report.variant.startswith("onnx") else LiteRtEngine()
    with open_bundle(report.path) as bundle:
        variant = bundle.manifest.variants[0]
        with (folder / "unpacked").open("wb") as file:
            bundle.copy_to(variant.member, file)
        session = engine.prepare(folder / "unpacked", threads=1)
        return BoundSession(session, bundle.manifest.interface, variant.binding).run(inputs).outputs


def test_an_onnx_file_with_a_free_batch(tmp_path):
    path = save(tmp_path, "My Digits v2.onnx", CONTENT["onnx"])
    report = package(path, output=tmp_path / "out.outrider", labels=["0", "1"])
    image, y = report.interface.inputs[0], report.interface.outputs[0]
    assert (image.name, image.dtype, image.shape, image.axes) == ("x", "float32", (None, 1, 8, 8), "NCHW")
    assert (y.name, y.shape, y.axes) == ("y", (None, 10), "NC")
    assert (report.name, report.version, report.variant) == ("my-digits-v2", 1, "onnx-float32")
    assert report.interface.labels == ("0", "1")
    assert report.size_bytes == report.path.stat().st_size
    x = tinymodels.images(5)
    np.testing.assert_allclose(
        run_variant(report, {"x": x}, tmp_path)["y"], tinymodels.reference(WEIGHTS, x), atol=1e-4
    )


def test_a_tflite_file_with_one_fixed_row(tmp_path):
    path = save(tmp_path, "m.tflite", CONTENT["tflite"])
    report = package(path, output=tmp_path / "out.outrider", name="digits", version=7)
    image = report.interface.inputs[0]
    assert (image.name, image.shape, image.axes) == ("x", (1, 8, 8, 1), "")
    assert (report.name, report.version, report.variant) == ("digits", 7, "tflite-float32")
    x = tinymodels.images(1)
    given = run_variant(report, {"x": x.transpose(0, 2, 3, 1).copy()}, tmp_path)["y"]
    np.testing.assert_allclose(given, tinymodels.reference(WEIGHTS, x), atol=1e-4)


def test_axes_make_n_of_one_fixed_row(tmp_path):
    path = save(tmp_path, "m.tflite", CONTENT["tflite"])
    report = package(path, output=tmp_path / "out.outrider", axes={"x": "NHWC", "y": "NC"})
    assert [(s.axes, s.shape) for s in (*report.interface.inputs, *report.interface.outputs)] == [
        ("NHWC", (None, 8, 8, 1)),
        ("NC", (None, 10)),
    ]
    x = tinymodels.images(3)
    given = run_variant(report, {"x": x.transpose(0, 2, 3, 1).copy()}, tmp_path)["y"]
    np.testing.assert_allclose(given, tinymodels.reference(WEIGHTS, x), atol=1e-4)


def test_axes_that_cannot_be(tmp_path):
    path = save(tmp_path, "m.onnx", CONTENT["onnx"])
    with pytest.raises(ExportError, match="a tensor 'z' that the file does not have"):
        package(path, output=tmp_path / "o", axes={"z": "NC"})
    fixed = save_onnx(
        tmp_path, [helper.make_node("Relu", ["a"], ["b"])], [("a", FLOAT, [3, 2])], [("b", FLOAT, [3, 2])]
    )
    with pytest.raises(ExportError, match="cannot be N"):
        package(fixed, output=tmp_path / "o", axes={"a": "NC", "b": "NC"})


@pytest.mark.parametrize("kind", sorted(CONTENT))
def test_the_bundle_is_sound_and_the_file_in_it_is_the_same(tmp_path, kind, capfd):
    path = save(tmp_path, f"m.{kind}", CONTENT[kind])
    report = package(path, output=tmp_path / "out.outrider")
    verify_bundle(report.path)
    with open_bundle(report.path) as bundle:
        assert bundle.manifest.digest == report.digest
        variant = bundle.manifest.variants[0]
        assert (variant.format, variant.precision) == (kind, "float32")
        with (tmp_path / "copy").open("wb") as file:
            bundle.copy_to(variant.member, file)
        source = bundle.manifest.provenance["source"]
        golden = load_golden(bundle.read, bundle.manifest)
    assert (tmp_path / "copy").read_bytes() == CONTENT[kind]
    assert source["file"] == path.name
    assert str(tmp_path).encode() not in report.path.read_bytes()
    np.testing.assert_array_equal(golden.reference["y"], golden.variants[variant.name]["y"])
    assert capfd.readouterr() == ("", "")


def test_equal_files_give_equal_bundles(tmp_path):
    path = save(tmp_path, "m.onnx", CONTENT["onnx"])
    first, second = (package(path, output=tmp_path / name) for name in ("a", "b"))
    assert first.digest == second.digest
    assert first.path.read_bytes() == second.path.read_bytes()


def test_the_example_is_the_golden(tmp_path):
    path, x = save(tmp_path, "m.onnx", CONTENT["onnx"]), tinymodels.images(3)
    report = package(path, output=tmp_path / "a", example={"x": x})
    with open_bundle(report.path) as bundle:
        golden = load_golden(bundle.read, bundle.manifest)
        assert bundle.manifest.provenance["golden_inputs"] == "given"
        assert bundle.manifest.golden.decision.kind == "none"
    np.testing.assert_array_equal(golden.inputs["x"], x)
    np.testing.assert_allclose(golden.reference["y"], tinymodels.reference(WEIGHTS, x), atol=1e-4)


def test_a_task_of_the_cloud_is_marked(tmp_path):
    path = save(tmp_path, "m.onnx", CONTENT["onnx"])
    for marked in (True, False):
        with open_bundle(package(path, output=tmp_path / f"{marked}", cloud_only=marked).path) as bundle:
            assert bundle.manifest.cloud_only is marked
            assert (b"cloud_only" in bundle.manifest.raw) is marked


def test_the_random_golden_says_so(tmp_path):
    report = package(save(tmp_path, "m.onnx", CONTENT["onnx"]), output=tmp_path / "a")
    with open_bundle(report.path) as bundle:
        assert bundle.manifest.golden.rows == RANDOM_ROWS
        assert bundle.manifest.provenance["golden_inputs"] == "random, seed 20"


@pytest.mark.parametrize("example", [{"z": tinymodels.images(1)}, {"x": tinymodels.images(1)[:, :, :4]}, {}])
def test_an_example_that_does_not_fit(tmp_path, example):
    with pytest.raises(InputError):
        package(save(tmp_path, "m.onnx", CONTENT["onnx"]), output=tmp_path / "a", example=example)
    assert not (tmp_path / "a").exists()


def test_indices_and_flags_get_inputs_that_are_allowed(tmp_path):
    path = save_onnx(
        tmp_path,
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"]),
            helper.make_node("Where", ["keep", "rows", "zero"], ["y"]),
        ],
        [("ids", INT64, ["N"]), ("keep", TensorProto.BOOL, ["N", 1])],
        [("y", FLOAT, ["N", 3])],
        [numpy_helper.from_array(np.ones((2, 3), np.float32), "table"), numpy_helper.from_array(np.float32(0), "zero")],
    )
    report = package(path, output=tmp_path / "a")
    assert [(s.dtype, s.axes) for s in report.interface.inputs] == [("int64", "N"), ("bool", "NT")]


def test_images_in_8_bits_get_all_values(tmp_path):
    nodes = [helper.make_node("Cast", ["image"], ["y"], to=FLOAT)]
    path = save_onnx(tmp_path, nodes, [("image", TensorProto.UINT8, ["N", 64])], [("y", FLOAT, ["N", 64])])
    with open_bundle(package(path, output=tmp_path / "a").path) as bundle:
        image = load_golden(bundle.read, bundle.manifest).inputs["image"]
    assert image.dtype == np.uint8
    assert image.max() > 200 > 50 > image.min()


def test_an_open_axis_beyond_the_first_needs_an_example(tmp_path):
    nodes = [helper.make_node("Relu", ["a"], ["b"])]
    path = save_onnx(tmp_path, nodes, [("a", FLOAT, ["N", "T"])], [("b", FLOAT, ["N", "T"])])
    with pytest.raises(ExportError, match="'a' has axes of any size") as caught:
        package(path, output=tmp_path / "o")
    assert "example=" in caught.value.hint
    report = package(path, output=tmp_path / "o", example={"a": np.ones((2, 5), np.float32)})
    assert report.interface.inputs[0].shape == (None, None)


def test_an_output_with_as_many_rows_as_were_found_has_no_n(tmp_path):
    nodes = [helper.make_node("NonZero", ["a"], ["where"]), helper.make_node("Transpose", ["where"], ["found"])]
    path = save_onnx(tmp_path, nodes, [("a", FLOAT, ["N", 4])], [("found", INT64, ["M", 2])])
    report = package(path, output=tmp_path / "o")
    assert (report.interface.outputs[0].axes, report.interface.outputs[0].shape) == ("", (None, 2))
    verify_bundle(report.path)


def test_a_model_without_any_open_axis(tmp_path):
    nodes = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    path = save_onnx(tmp_path, nodes, [("a", FLOAT, [2, 3]), ("b", FLOAT, [3, 4])], [("c", FLOAT, [2, 4])])
    report = package(path, output=tmp_path / "o")
    assert [s.shape for s in (*report.interface.inputs, *report.interface.outputs)] == [(2, 3), (3, 4), (2, 4)]
    with open_bundle(report.path) as bundle:
        assert bundle.manifest.golden.rows == 1


def test_a_model_that_answers_nan_is_refused(tmp_path):
    path = save(tmp_path, "m.onnx", tinymodels.nan_onnx(WEIGHTS))
    with pytest.raises(ExportError, match="gives NaN or infinite values in 'y'"):
        package(path, output=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_model_that_fails_on_random_inputs_asks_for_an_example(tmp_path):
    shape = numpy_helper.from_array(np.array([3, 3], np.int64), "shape")
    nodes = [helper.make_node("Reshape", ["a", "shape"], ["b"])]
    path = save_onnx(tmp_path, nodes, [("a", FLOAT, ["N", 4])], [("b", FLOAT, [3, 3])], [shape])
    with pytest.raises(ExportError, match="cannot run on the golden inputs") as caught:
        package(path, output=tmp_path / "a")
    assert "example=" in caught.value.hint


@pytest.mark.parametrize("name", ["m.pt", "m.PTH", "m.pkl", "m.joblib", "m.bin", "m.ckpt"])
def test_a_pickled_model_is_refused_and_nothing_in_it_runs(tmp_path, name):
    class Canary:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    path = save(tmp_path, name, pickle.dumps(Canary()))
    with pytest.raises(ExportError, match="is a pickled model") as caught:
        package(path, output=tmp_path / "a")
    assert "export" in caught.value.hint
    for kind in CONTENT:
        with pytest.raises(ModelLoadError):
            package(save(tmp_path, f"renamed.{kind}", path.read_bytes()), output=tmp_path / "a")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "a").exists()


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ExportError, match=r"m\.h5 is neither \.onnx nor \.tflite"):
        package(save(tmp_path, "m.h5", b"x"), output=tmp_path / "a")
    with pytest.raises(ExportError, match=r"there is no file none\.onnx"):
        package(tmp_path / "none.onnx", output=tmp_path / "a")
    with pytest.raises(ExportError, match="there is no file"):
        (tmp_path / "folder.onnx").mkdir()
        package(tmp_path / "folder.onnx", output=tmp_path / "a")


@pytest.mark.parametrize("kind", sorted(CONTENT))
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_refused(tmp_path, kind, share):
    content = CONTENT[kind]
    path = save(tmp_path, f"m.{kind}", content[: int(len(content) * share)])
    with pytest.raises(ModelLoadError, match=f"m.{kind}"):
        package(path, output=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_external_data_is_refused(tmp_path):
    model = onnx.load_from_string(CONTENT["onnx"])
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(ModelLoadError, match=r"m\.onnx"):
        package(path, output=tmp_path / "a")


def test_the_model_file_is_not_overwritten(tmp_path):
    path = save(tmp_path, "m.onnx", CONTENT["onnx"])
    with pytest.raises(ExportError, match="is the model file itself"):
        package(path, output=tmp_path / "." / "m.onnx")
    assert path.read_bytes() == CONTENT["onnx"]


def test_a_name_or_place_that_is_not_allowed(tmp_path):
    path = save(tmp_path, "m.onnx", CONTENT["onnx"])
    with pytest.raises(BundleError, match="name"):
        package(path, output=tmp_path / "a", name="No Spaces")
    with pytest.raises(BundleError, match="version"):
        package(path, output=tmp_path / "a", version=0)
    with pytest.raises(BundleError, match="cannot be written"):
        package(path, output=tmp_path / "none" / "a")


@pytest.mark.parametrize(
    ("stem", "name"), [("Ünïcode!!", "n-code"), ("...", "model"), ("a" * 90, "a" * 64), ("v1.2_x", "v1.2_x")]
)
def test_names_are_made_from_file_names(tmp_path, stem, name):
    path = save(tmp_path, f"{stem}.onnx", CONTENT["onnx"])
    assert package(path, output=tmp_path / "o").name == name


def test_packing_imports_no_torch(tmp_path):
    path = save(tmp_path, "m.onnx", CONTENT["onnx"])
    code = (
        "import sys; from outrider_exporters.package import package; package(sys.argv[1], output=sys.argv[2]);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, path, tmp_path / "o"], timeout=250).returncode == 0


@pytest.mark.slow
def test_a_quantized_tflite_file_takes_real_numbers(tmp_path):
    from outrider_exporters.convert import parity, predict_file
    from outrider_exporters.convert.quantize import quantize_file
    from support.converted import convert
    from support.networks import SmallCnn, normal, seeded

    converted = convert(seeded(SmallCnn), {"image": normal(64, 1, 8, 8)}, ["logits"], tmp_path)
    file = quantize_file(
        converted.files["tflite"], [dict(converted.example)], converted.interface, tmp_path / "q.tflite"
    )
    report = package(file.path, output=tmp_path / "o")
    assert report.variant == "tflite-int8"
    image = report.interface.inputs[0]
    assert (image.dtype, image.shape) == ("float32", (1, 8, 8, 1))
    x = normal(1, 1, 8, 8, seed=3)
    mine = predict_file(file, converted.interface)({"image": x})["logits"]
    packed = run_variant(report, {image.name: x.transpose(0, 2, 3, 1).copy()}, tmp_path)
    assert parity({"y": mine}, {"y": packed[report.interface.outputs[0].name]}) < 1e-6
