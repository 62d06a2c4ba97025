"""Items 6 to 9: networks in Keras 3 on the torch backend."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from networks.case import (
    ACCURACY,
    JUDGED,
    R2,
    RMSE,
    Case,
    Predict,
    Trained,
    classifier,
    held_out_rows,
    in_chunks,
    majority_accuracy,
)
from networks.images import SHAPES, digits, shapes
from outrider_exporters import Data
from outrider_runtimes.processing import Rename, Step, TokenLookup, encode_text, run_steps

STATIC = {"onnx": "int8", "tflite": "int8"}


def build(*layers: Any) -> Any:
    import keras

    return keras.Sequential(list(layers))


def library() -> Any:
    """Keras with its layers; it reads its backend once, when it is first imported."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.utils.set_random_seed(0)
    return keras.layers


def keras_fit(model: Any, x: np.ndarray, y: np.ndarray, *, loss: str, epochs: int, rate: float, rows: int = 64) -> Any:
    """Keras's own loop, Adam; the model itself."""
    import keras

    model.compile(optimizer=keras.optimizers.Adam(rate), loss=loss)
    model.fit(x, y, batch_size=rows, epochs=epochs, verbose=0)
    return model.eval()


def drawn(train: int, test: int, held_out: int) -> list[tuple[int, np.random.Generator]]:
    """How many rows to train, to calibrate and to judge, and the generator of each."""
    rng = np.random.default_rng(0)
    return [(train, rng), (200, rng), (test, held_out_rows(held_out))]


def channel_last(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


# --- 6


def train_cnn(held_out: int = JUDGED) -> Trained:
    """image: float32 [N, 28, 28, 1] -> scores: float32 [N, 10], a softmax."""
    layers = library()
    model = build(
        *(layers.Input((28, 28, 1)), layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D()),
        *(layers.Conv2D(64, 3, activation="relu"), layers.MaxPooling2D(), layers.Conv2D(64, 3, activation="relu")),
        *(layers.Flatten(), layers.Dense(64, activation="relu"), layers.Dense(10, activation="softmax")),
    )
    split = digits(train=4000, test=2000, noise=0.25, held_out=held_out)
    train, test = ((channel_last(images), labels) for images, labels in (split.train, split.test))
    keras_fit(model, *train, loss="sparse_categorical_crossentropy", epochs=2, rate=3e-3)
    return classifier(model, train, channel_last(split.calibration), test, name="image")


# --- 7


def line(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    x = rng.uniform(-2.0, 2.0, (count, 1)).astype(np.float32)
    return x, (3.0 * x + 0.5 * rng.standard_normal(x.shape)).astype(np.float32)


def friedman(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's make_friedman1 about its middle: five of ten inputs matter, most not in a straight line."""
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(count, noise=1.0, random_state=int(rng.integers(2**31)))
    return (2.0 * x - 1.0).astype(np.float32), ((y[:, np.newaxis] - 14.4) / 5.0).astype(np.float32)


def rmse(predict: Predict, test: Any) -> dict[str, float]:
    inputs, wanted = test
    return {"rmse": float(np.sqrt(np.mean((in_chunks(predict, inputs)["y"] - wanted) ** 2)))}


def r2(predict: Predict, test: Any) -> dict[str, float]:
    inputs, wanted = test
    return {"r2": explained(in_chunks(predict, inputs)["y"], wanted)}


def explained(answers: np.ndarray, wanted: np.ndarray) -> float:
    return 1.0 - float(((answers - wanted) ** 2).sum() / ((wanted - wanted.mean()) ** 2).sum())


def train_line(held_out: int = JUDGED) -> Trained:
    layers = library()
    learned, calibration, test = (line(n, g) for n, g in drawn(500, 2000, held_out))
    model = keras_fit(build(layers.Input((1,)), layers.Dense(1)), *learned, loss="mse", epochs=10, rate=0.1, rows=25)
    return _regression(model, calibration[0], test, rmse, float(test[1].std()))


def train_perceptron(held_out: int = JUDGED) -> Trained:
    """x: float32 [N, 10] -> y: float32 [N, 1]."""
    layers = library()
    learned, calibration, test = (friedman(n, g) for n, g in drawn(3000, 2000, held_out))
    hidden = [layers.Dense(width, activation="relu") for width in (64, 32)]
    model = build(layers.Input((10,)), *hidden, layers.Dense(1))
    keras_fit(model, *learned, loss="mse", epochs=20, rate=5e-3, rows=60)
    weights, *_ = np.linalg.lstsq(_with_one(learned[0]), learned[1], rcond=None)
    return _regression(model, calibration[0], test, r2, explained(_with_one(test[0]) @ weights, test[1]))


def _with_one(x: np.ndarray) -> np.ndarray:
    return np.c_[x, np.ones(len(x))]


def _regression(model: Any, calibration: np.ndarray, test: Any, evaluate: Any, baseline: float) -> Trained:
    return Trained(
        module=model,
        example={"x": test[0][:2]},
        outputs=("y",),
        data=Data(calibration={"x": calibration}, test=({"x": test[0]}, test[1])),
        evaluate=evaluate,
        baseline=baseline,
    )


# --- 8

WORDS, TEXT_LENGTH, TEXT_BYTES = 400, 24, 192
_SYLLABLES = ("ba", "ko", "li", "mu", "ne", "po", "ra", "si", "tu", "ve")


def word(number: int) -> str:
    return "".join(_SYLLABLES[int(digit)] for digit in f"{number:03d}")


TOKENIZER: tuple[Step, ...] = (
    TokenLookup(tensor="text", vocabulary=[word(number) for number in range(WORDS)], length=TEXT_LENGTH),
    Rename(tensor="text", to="tokens"),
)


def as_bytes(texts: Sequence[str]) -> np.ndarray:
    """What a caller passes: uint8 [N, 192]."""
    return encode_text(texts, TEXT_BYTES)


def tokenize(texts: Sequence[str]) -> np.ndarray:
    """What the network takes, by the bundle's own steps: int32 [N, 24]."""
    return run_steps(TOKENIZER, {"text": as_bytes(texts)}, {})["tokens"]


def reviews(count: int, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """Made-up sentences. Every word leans to praise or blame, the frequent ones little; the sum and chance decide."""
    leaning = np.random.default_rng(5).standard_normal(WORDS)
    frequency = 1.0 / np.arange(2, WORDS + 2) ** 0.7
    leaning -= np.average(leaning, weights=frequency)
    texts, labels = [], []
    for _ in range(count):
        chosen = rng.choice(WORDS, rng.integers(8, TEXT_LENGTH + 1), p=frequency / frequency.sum())
        texts.append(" ".join(word(number) for number in chosen))
        labels.append(leaning[chosen].sum() + 1.0 * rng.standard_normal() > 0.0)
    return texts, np.array(labels, np.int64)


def sided(predict: Predict, test: Any) -> dict[str, float]:
    inputs, labels = test
    return {"accuracy": float(((in_chunks(predict, inputs)["praise"][:, 0] > 0.5) == labels).mean())}


def build_text() -> Any:
    """tokens: int32 [N, 24] -> praise: float32 [N, 1] in 0..1."""
    layers = library()
    return build(
        *(
            layers.Input((TEXT_LENGTH,), dtype="int32"),
            layers.Embedding(WORDS + 2, 16),
            layers.GlobalAveragePooling1D(),
        ),
        *(layers.Dense(16, activation="relu"), layers.Dense(1, activation="sigmoid")),
    )


def train_text(held_out: int = JUDGED) -> Trained:
    """tokens: int32 [N, 24] -> praise: float32 [N, 1] in 0..1; a caller passes text."""
    learned, calibration, test = (reviews(n, g) for n, g in drawn(3000, 4000, held_out))
    model = build_text()
    keras_fit(model, tokenize(learned[0]), learned[1], loss="binary_crossentropy", epochs=10, rate=1e-2)
    texts = as_bytes(test[0])
    return Trained(
        module=model,
        example={"text": texts[:2]},
        outputs=("praise",),
        data=Data(calibration={"text": as_bytes(calibration[0])}, test=({"text": texts}, test[1])),
        evaluate=sided,
        baseline=majority_accuracy(test[1]),
        decide=lambda outputs, _: outputs["praise"] > 0.5,
        preprocessing=TOKENIZER,
    )


# --- 9


def train_shapes(held_out: int = JUDGED) -> Trained:
    """image: float32 [N, 64, 64, 3] -> scores: float32 [N, 5], a softmax."""
    layers = library()
    stages = [
        layer
        for width in (16, 32, 64)
        for layer in (layers.Conv2D(width, 3, padding="same", activation="relu"), layers.MaxPooling2D())
    ]
    model = build(
        *(layers.Input((64, 64, 3)), *stages, layers.Flatten()),
        *(layers.Dense(512, activation="relu"), layers.Dense(5, activation="softmax")),
    )
    split = shapes(
        size=64, train=1000, test=2000, noise=0.05, classes=SHAPES[:5], radius=(0.3, 0.45), held_out=held_out
    )
    train, test = ((channel_last(images), labels) for images, labels in (split.train, split.test))
    keras_fit(model, *train, loss="sparse_categorical_crossentropy", epochs=4, rate=2e-3, rows=32)
    return classifier(model, train, channel_last(split.calibration), test, name="image")


CASES = (
    Case(
        name="keras-cnn",
        item=6,
        network="Keras: conv 32, pool, conv 64, pool, conv 64, dense 64, softmax 10 on 28x28x1",
        data="as lenet",
        parameters=93_322,
        metric=ACCURACY,
        rule="nearest class mean",
        baseline=0.67,
        floor=0.75,
        ceiling=0.99,
        forms=STATIC,
        train=train_cnn,
    ),
    Case(
        name="keras-line",
        item=7,
        network="Keras: dense 1 of one input",
        data="y = 3x + noise, sigma 0.5",
        parameters=2,
        metric=RMSE,
        rule="the mean",
        baseline=3.4,
        floor=0.55,
        ceiling=0.45,
        forms=STATIC,
        train=train_line,
        shrinks=False,
    ),
    Case(
        name="keras-perceptron",
        item=7,
        network="Keras: dense 64, 32, 1 of ten inputs",
        data="scikit-learn's make_friedman1, noise 1.0",
        parameters=2817,
        metric=R2,
        rule="least squares",
        baseline=0.71,
        floor=0.90,
        ceiling=0.97,
        forms=STATIC,
        train=train_perceptron,
    ),
    Case(
        name="keras-text",
        item=8,
        network="Keras: embedding 402x16, mean, dense 16, sigmoid, on 24 tokens",
        data="made-up sentences of 400 words, each leaning to praise or blame, and chance; the tokenizer is a step",
        parameters=6721,
        metric=ACCURACY,
        rule="the more frequent answer",
        baseline=0.51,
        floor=0.80,
        ceiling=0.97,
        forms={"onnx": "weight-only", "tflite": "dynamic"},
        train=train_text,
    ),
    Case(
        name="keras-shapes",
        item=9,
        network="Keras: three conv/pool stages 16, 32, 64, dense 512, softmax 5 on 64x64x3",
        data="five shapes of any colour on slanting backgrounds, turned, noise 0.05",
        parameters=2_123_813,
        metric=ACCURACY,
        rule="nearest class mean",
        baseline=0.19,
        floor=0.70,
        ceiling=0.99,
        forms=STATIC,
        train=train_shapes,
    ),
)
