"""Steps give what torch gives: on the board a network sees what it was trained on with torchvision's transforms.

torchvision's resize of tensors is ``interpolate`` with ``antialias=True``, its normalise the formula below.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from outrider_runtimes.processing import Layout, Normalise, Resize, Softmax, TopK, run_steps

pytestmark = pytest.mark.slow

SIZES = [((40, 50), (20, 20)), ((33, 47), (64, 91)), ((17, 90), (17, 31)), ((200, 120), (24, 24)), ((9, 9), (1, 30))]


def pictures(size):
    """uint8 [2, H, W, 3]: waves and edges."""
    v, u = np.mgrid[0 : size[0], 0 : size[1]] / max(size)
    waves = np.stack([np.sin(7 * u + k) * np.cos(5 * v) + (u > 0.1 * k + v) for k in range(6)])
    return np.clip(70 * waves + 80, 0, 255).astype(np.uint8).reshape(2, 3, *size).transpose(0, 2, 3, 1)


@pytest.mark.parametrize(("before", "after"), SIZES)
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_resize_is_torchs_antialiased_interpolation(method, before, after):
    image = np.ascontiguousarray(pictures(before).transpose(0, 3, 1, 2))
    step = Resize(tensor="image", height=after[0], width=after[1], method=method, axes="NCHW")
    options = {"size": after, "mode": method, "antialias": True, "align_corners": False}
    floats = functional.interpolate(torch.from_numpy(image).float(), **options).numpy()
    np.testing.assert_allclose(step.apply({"image": image.astype(np.float32)}, {})["image"], floats, atol=1e-3)
    whole = functional.interpolate(torch.from_numpy(image), **options).numpy()
    assert np.abs(step.apply({"image": image}, {})["image"].astype(int) - whole).max() <= 1


def test_the_usual_way_from_a_picture_to_a_network():
    image, mean, std = pictures((60, 80)), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    steps = [
        Resize(tensor="image", height=32, width=32),
        Normalise(tensor="image", mean=mean, std=std, divided_by=255.0),
        Layout(tensor="image"),
    ]
    made = run_steps(steps, {"image": image}, {})["image"]
    x = torch.from_numpy(image).permute(0, 3, 1, 2)
    x = functional.interpolate(x, size=(32, 32), mode="bilinear", antialias=True, align_corners=False) / 255.0
    wanted = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    np.testing.assert_allclose(made, wanted.numpy(), atol=1.01 / 255.0 / min(std))  # one level


def test_the_usual_way_from_logits_to_the_best_classes():
    logits = np.random.default_rng(0).standard_normal((5, 100)).astype(np.float32)
    made = run_steps([Softmax(tensor="logits"), TopK(tensor="logits", k=7)], {"logits": logits}, {})
    scores, which = torch.from_numpy(logits).softmax(-1).topk(7)
    np.testing.assert_allclose(made["scores"], scores.numpy(), atol=1e-7)
    np.testing.assert_array_equal(made["classes"], which.numpy())
