"""Networks with several inputs and outputs, tuples, mappings and token ids, through the whole export to a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import outrider
from outrider_exporters import Data, Quantize, Recipe, export
from outrider_exporters.sources.module import interface_from_module, torch_predict
from outrider_runtimes.errors import DtypeError, ShapeError

pytestmark = pytest.mark.slow

VARIANTS = ["onnx-float32", "onnx-int8", "tflite-float32", "tflite-int8"]


class Captioned(nn.Module):
    """image: float32 [N, 2, 6, 6], tokens: int64 [N, 5] -> a mapping or a nested tuple of four outputs."""

    def __init__(self, *, mapping: bool) -> None:
        super().__init__()
        self.mapping = mapping
        self.table = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.mix = nn.Linear(8 * 36 + 8, 16)
        self.heads = nn.ModuleList([nn.Linear(16, 4), nn.Linear(16, 1)])

    def forward(self, image: torch.Tensor, tokens: torch.Tensor):
        features = torch.relu(self.conv(image))
        hidden = torch.relu(self.mix(torch.cat([features.flatten(1), self.table(tokens).mean(1)], 1)))
        logits, score = self.heads[0](hidden), self.heads[1](hidden)
        best = logits.argmax(-1)
        if self.mapping:
            return {"features": features, "logits": logits, "score": score, "best": best, "hidden": hidden}
        return features, (logits, [score, best])


def rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, 11, (count, 5)),
        "image": rng.standard_normal((count, 2, 6, 6)).astype(np.float32),
    }


@pytest.mark.parametrize(
    ("mapping", "recipe", "variants"),
    [(True, Recipe([Quantize("int8")]), VARIANTS), (False, Recipe(), ["onnx-float32"])],
)
def test_every_variant_takes_and_gives_what_the_network_does(tmp_path, mapping, recipe, variants):
    torch.manual_seed(0)
    network = Captioned(mapping=mapping)
    names = ["features", "logits", "score", "best"]
    report = export(
        network,
        example=rows(1),
        outputs=names[::-1] if mapping else names,
        data=Data(calibration=rows(64, 1), test=rows(32, 2)),
        evaluate=lambda predict, test: {"mean": float(predict(test)["score"].mean())},
        recipe=recipe,
        formats=tuple(dict.fromkeys(variant.partition("-")[0] for variant in variants)),
        ranges={"image": (-3, 3)},
        meanings={"tokens": "word numbers", "score": "how sure"},
        axes={"features": "NCHW"},
        output=tmp_path / "two.outrider",
    )
    assert [v.name for v in report.variants] == variants
    assert all(v.parity < 1e-4 for v in report.variants if v.precision == "float32")
    wanted = torch_predict(network, interface_from_module(network, rows(1), names))(rows(3, 9))
    for variant in [name for name in variants if name.endswith("float32")]:
        with outrider.load(report.bundle, state=tmp_path / "state", variant=variant) as model:
            given = model.predict(rows(3, 9))
            for name in names:
                np.testing.assert_allclose(given[name], wanted[name], atol=1e-4)
                assert given[name].dtype == wanted[name].dtype
            with pytest.raises(DtypeError, match="'tokens'"):
                model.predict({**rows(1), "tokens": rows(1)["tokens"].astype(np.int32)})
            with pytest.raises(ShapeError, match="'tokens'"):
                model.predict({**rows(1), "tokens": rows(1)["tokens"][:, :4]})
            interface = model.interface
    by_name = {s.name: s for s in (*interface.inputs, *interface.outputs)}
    assert [s.name for s in interface.inputs] == ["tokens", "image"]
    assert (by_name["tokens"].dtype, by_name["tokens"].axes, by_name["tokens"].meaning) == (
        "int64",
        "NT",
        "word numbers",
    )
    assert (by_name["image"].range, by_name["features"].axes) == ((-3.0, 3.0), "NCHW")
    assert by_name["score"].meaning == "how sure"


class Gathered(nn.Module):
    """One parameter for two inputs: a dict by name, or a tuple where the annotation says so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.relu(self.first(batch["a"])) + self.second(batch["b"])


class GatheredInOrder(Gathered):
    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return super().forward({"a": batch[0], "b": batch[1]})


@pytest.mark.parametrize("kind", [Gathered, GatheredInOrder])
def test_a_forward_that_takes_all_inputs_as_one(tmp_path, kind):
    torch.manual_seed(0)
    network, rng = kind(), np.random.default_rng(0)
    given = {"a": rng.standard_normal((6, 3)).astype(np.float32), "b": rng.standard_normal((6, 2)).astype(np.float32)}
    report = export(
        network,
        example={name: array[:1] for name, array in given.items()},
        outputs=["y"],
        data=Data(test=given),
        evaluate=lambda predict, test: {"mean": float(predict(test)["y"].mean())},
        output=tmp_path / "gathered.outrider",
    )
    tensors = [torch.from_numpy(array) for array in given.values()]
    wanted = Gathered.forward(network, dict(zip(given, tensors, strict=True))).detach().numpy()
    for variant in ("onnx-float32", "tflite-float32"):
        with outrider.load(report.bundle, state=tmp_path / "state", variant=variant) as model:
            assert np.allclose(model.predict(given)["y"], wanted, atol=1e-5)
