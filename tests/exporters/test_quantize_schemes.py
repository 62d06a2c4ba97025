"""Every scheme of Quantize on real files of both formats, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from outrider_exporters import Quantize
from outrider_exporters.convert import ModelFile, parity, predict_file
from outrider_exporters.convert.quantize import (
    is_quantized_onnx,
    quantize_file,
    quantized_share_onnx,
    quantized_share_tflite,
)
from outrider_exporters.sources.module import torch_predict
from outrider_runtimes.errors import ConfigError, ExportError
from support.converted import CONVERTERS, Converted, convert
from support.networks import digits, normal, seeded, trained_cnn

pytestmark = pytest.mark.slow

FORMATS = ["onnx", "tflite"]
SHARES = {"onnx": quantized_share_onnx, "tflite": quantized_share_tflite}


class Dense(nn.Module):
    """`tokens: int64 [N, 6] -> float32 [N, 8]`: an embedding and dense layers, mostly the latter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 64)
        self.body = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU())
        self.head = nn.Linear(64, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.table(tokens).mean(1)))


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Converted:
    tokens = np.random.default_rng(0).integers(0, 50, (64, 6))
    return convert(seeded(Dense), {"tokens": tokens}, ["scores"], tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def cnn(tmp_path_factory) -> Converted:
    images, _ = digits()
    return convert(trained_cnn(), {"image": images[:64]}, ["logits"], tmp_path_factory.mktemp("cnn"))


def make(made: Converted, model_format: str, folder, rule: Quantize) -> ModelFile:
    path = folder / f"q.{model_format}"
    return quantize_file(made.files[model_format], [made.example], made.interface, path, rule=rule)


def error(made: Converted, file: ModelFile) -> float:
    exact = torch_predict(made.network, made.interface)(made.example)
    return parity(exact, predict_file(file, made.interface)(made.example))


@pytest.mark.parametrize("model_format", FORMATS)
@pytest.mark.parametrize(
    ("scheme", "precision", "size", "wrong"),
    [
        ("int8", "int8", 0.36, 0.03),
        ("dynamic", "int8", 0.33, 0.03),
        ("weight-only", "int8", 0.33, 0.02),
        ("float16", "float16", 0.55, 1e-3),
        ("int4", "int4", 0.28, 0.12),
    ],
)
def test_a_scheme_is_small_and_right(dense, tmp_path, model_format, scheme, precision, size, wrong):
    file = make(dense, model_format, tmp_path, Quantize(scheme))
    plain = dense.files[model_format]
    assert file.precision == precision
    assert file.path.stat().st_size <= size * plain.path.stat().st_size
    assert SHARES[model_format](file.path) > 0.9 or scheme == "int4"
    assert error(dense, file) < wrong
    if scheme != "int8":
        assert [b.dtype for b in file.binding.outputs] == [b.dtype for b in plain.binding.outputs]
    assert [path.name for path in tmp_path.iterdir()] == [file.path.name]


@pytest.mark.parametrize("model_format", FORMATS)
def test_int4_is_refused_where_dense_layers_are_the_lesser_part(cnn, tmp_path, model_format):
    with pytest.raises(ExportError, match=r"int4 quantized 3\d\.\d% of the weights, at least 50% expected") as caught:
        make(cnn, model_format, tmp_path, Quantize("int4"))
    assert "dense layers" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_dynamic_onnx_file_leaves_convolutions_in_float(cnn, tmp_path):
    import onnx

    model = onnx.load(str(make(cnn, "onnx", tmp_path, Quantize("dynamic")).path))
    assert [n.op_type for n in model.graph.node if "Conv" in n.op_type] == ["Conv", "Conv"]
    assert [n.op_type for n in model.graph.node if "Integer" in n.op_type] == ["MatMulInteger"]


class Convolutions(nn.Module):
    """`image: float32 [N, 1, 8, 8] -> float32 [N, 10]`: of every kind; the first is written as a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, stride=2), nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10),
        )  # fmt: skip

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.body(image)


@pytest.mark.parametrize("scheme", ["int8", "dynamic", "weight-only"])
def test_with_one_scale_a_weight_every_kind_of_convolution_is_right(tmp_path, scheme):
    images = normal(16, 1, 8, 8)
    network = seeded(Convolutions)
    with torch.no_grad():
        network(torch.from_numpy(images))  # the dense layer finds its width
    made = convert(network, {"image": images}, ["logits"], tmp_path)
    for model_format in FORMATS:
        file = make(made, model_format, tmp_path, Quantize(scheme, per_channel=False))
        assert error(made, file) < 0.06, model_format


class Last(nn.Module):
    """`x: float32 [N, T, 8] -> float32 [N, 32]`: the last step of a recurrent layer."""

    def __init__(self, kind: type[nn.RNNBase], layers: int = 1) -> None:
        super().__init__()
        self.cells = kind(8, 32, layers, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cells(x)[0][:, -1]


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent_layers_in_onnx_stay_one_operator_with_int8_weights(kind, tmp_path):
    import onnx

    layers = 2 if kind == "RNN" else 1
    made = convert_onnx(seeded(lambda: Last(getattr(nn, kind), layers)), {"x": normal(16, 12, 8)}, tmp_path / "m")
    file = make(made, "onnx", tmp_path, Quantize("weight-only"))
    nodes = onnx.load(str(file.path)).graph.node
    assert [node.op_type for node in nodes].count(kind) == layers
    assert len(nodes) < 60  # it is not unrolled
    assert quantized_share_onnx(file.path) > 0.9  # all but biases, which have two axes
    assert is_quantized_onnx(file.path)
    assert error(made, file) < 0.02


def convert_onnx(network: nn.Module, example: dict[str, np.ndarray], path) -> Converted:
    from outrider_exporters.sources.module import interface_from_module

    interface = interface_from_module(network, example, ["y"])
    file = CONVERTERS["onnx"](network, interface, example, path)
    return Converted(network=network, interface=interface, example=example, files={"onnx": file})


@pytest.mark.parametrize(
    ("rule", "onnx_scheme", "tflite_scheme"),
    [
        (Quantize(), "qdq-s8s8-per-channel", "static-int8-per-channel"),
        (Quantize(per_channel=False), "qdq-s8s8-per-tensor", "static-int8-per-tensor"),
        (Quantize(activations="uint8", observer="mse"), "qdq-u8s8-per-channel-mse", "static-int8-per-channel-mse"),
        (Quantize(keep_float=("head",)), "qdq-s8s8-per-channel-mixed", "static-int8-per-channel-mixed"),
    ],
)
def test_the_options_of_static_int8(cnn, tmp_path, rule, onnx_scheme, tflite_scheme):
    for model_format, scheme in (("onnx", onnx_scheme), ("tflite", tflite_scheme)):
        file = make(cnn, model_format, tmp_path, rule)
        assert file.scheme == scheme
        assert error(cnn, file) < 0.1


def scales(file: ModelFile) -> dict[str, tuple[float, int]]:
    """By float tensor, the scale and the zero point that the file has for it."""
    if file.format == "onnx":
        import onnx

        stored = {w.name: onnx.numpy_helper.to_array(w) for w in onnx.load(str(file.path)).graph.initializer}
        names = [name.removesuffix("_scale") for name in stored if name.endswith("_scale")]
        pairs = {name: (stored[f"{name}_scale"], stored[f"{name}_zero_point"]) for name in names}
    else:
        from ai_edge_litert.interpreter import Interpreter

        details = Interpreter(str(file.path)).get_tensor_details()
        found = {d["name"]: d["quantization_parameters"] for d in details}
        pairs = {n: (q["scales"], q["zero_points"]) for n, q in found.items() if len(q["scales"]) == 1}
    return {n: (float(np.ravel(s)[0]), int(np.ravel(z)[0])) for n, (s, z) in pairs.items() if np.size(s) == 1}


@pytest.mark.parametrize("observer", ["min-max", "percentile", "mse"])
def test_both_engines_have_the_ranges_of_our_observers(cnn, tmp_path, observer):
    """The input's, and the output's, whose float values are the same in both: to the last step, not more or less."""
    from outrider_exporters.convert.observers import Histogram, find_range

    values = {
        "input": cnn.example["image"],
        "output": torch_predict(cnn.network, cnn.interface)(cnn.example)["logits"],
    }
    files = {model_format: make(cnn, model_format, tmp_path, Quantize(observer=observer)) for model_format in FORMATS}
    for side, array in values.items():
        histogram = Histogram()
        histogram.update(array)
        low, high = find_range(observer, histogram)
        for model_format, file in files.items():
            binding = (cnn.files if model_format == "onnx" else files)[model_format].binding
            name = (binding.inputs if side == "input" else binding.outputs)[0]
            found = scales(file)[name.file_name] if model_format == "onnx" else (name.scale, name.zero_point)
            assert found[0] == pytest.approx((high - low) / 255, rel=2e-3)
            assert abs(found[1] - (round(-128 - low / found[0]))) <= 1


@pytest.mark.parametrize("observer", ["min-max", "mse"])
def test_between_the_layers_the_ranges_are_the_same_in_both_engines(cnn, tmp_path, observer):
    """Tensors have other names in the two formats; their scales are equal where the tensors are."""
    rule = Quantize(observer=observer)
    found = {model_format: scales(make(cnn, model_format, tmp_path, rule)) for model_format in FORMATS}
    onnx_scales = {scale for name, (scale, _) in found["onnx"].items() if not name.startswith("module.")}
    tflite_scales = {scale for scale, _ in found["tflite"].values()}
    shared = [s for s in onnx_scales if any(s == pytest.approx(other, rel=1e-3) for other in tflite_scales)]
    assert len(shared) >= 4  # the input, behind either convolution, the output


@pytest.mark.parametrize("model_format", FORMATS)
def test_what_is_named_stays_float(cnn, tmp_path, model_format):
    whole = SHARES[model_format](make(cnn, model_format, tmp_path, Quantize()).path)
    for names in (("features.0",), ("features",), ("head",), ("head", "features.0")):
        mixed = make(cnn, model_format, tmp_path, Quantize(keep_float=names))
        assert SHARES[model_format](mixed.path) < whole
        kept = {"features.0": 72, "features.4": 1152, "features": 1224, "head": 640}
        floats = 1864 * (1 - SHARES[model_format](mixed.path))
        assert floats == pytest.approx(sum(kept[name] for name in names), abs=70)


@pytest.mark.parametrize("scheme", ["dynamic", "weight-only", "float16", "int4"])
@pytest.mark.parametrize("model_format", FORMATS)
def test_keep_float_is_for_every_scheme(dense, tmp_path, model_format, scheme):
    share = SHARES[model_format]
    whole = share(make(dense, model_format, tmp_path, Quantize(scheme)).path)
    name, weights = ("head", 64 * 8) if scheme == "int4" else ("body.0", 64 * 256)
    mixed = share(make(dense, model_format, tmp_path, Quantize(scheme, keep_float=(name,))).path)
    assert whole - mixed == pytest.approx(weights / (2 * 64 * 256 + 50 * 64 + 64 * 8), rel=0.1)


@pytest.mark.parametrize("model_format", FORMATS)
def test_a_name_that_is_nowhere_is_refused(cnn, tmp_path, model_format):
    with pytest.raises(ConfigError, match="no layer 'feature' is in") as caught:
        make(cnn, model_format, tmp_path, Quantize(keep_float=("feature",)))
    assert "did you mean 'features'?" in caught.value.hint
    with pytest.raises(ExportError, match=r"quantized 0\.0% of the weights") as refused:
        make(cnn, model_format, tmp_path, Quantize(keep_float=("features", "head")))
    assert "name less in keep_float" in refused.value.hint
    assert list(tmp_path.iterdir()) == []
