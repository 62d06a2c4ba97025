"""Keras 3 models on the torch backend. Keras reads its backend once, when it is first imported."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
from keras import layers


def image_classifier(seed: int = 0) -> keras.Model:
    """float32 [N, 12, 12, 3] -> softmax float32 [N, 4]; with what differs between training and use."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(8, 3, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 3, activation="relu"),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(4, activation="softmax"),
        ]
    )
    norm = model.layers[1]
    norm.moving_mean.assign(np.linspace(-0.2, 0.2, 8))
    norm.moving_variance.assign(np.linspace(0.5, 1.5, 8))
    return model


def two_inputs_two_outputs(*, as_dict: bool) -> keras.Model:
    """a: float32 [N, 4], tokens: int32 [N, 5] -> class: float32 [N, 2], score: float32 [N, 1]."""
    keras.utils.set_random_seed(1)
    a = keras.Input((4,), name="a")
    tokens = keras.Input((5,), name="tokens", dtype="int32")
    hidden = layers.Concatenate()([layers.Dense(4)(a), layers.Flatten()(layers.Embedding(7, 2)(tokens))])
    outputs = {"class": layers.Dense(2)(hidden), "score": layers.Dense(1)(hidden)}
    if as_dict:
        return keras.Model({"tokens": tokens, "a": a}, outputs)
    return keras.Model([a, tokens], list(outputs.values()))


class Unregistered(keras.Model):
    """A subclass that Keras cannot rebuild: its config says nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = layers.Dense(width)

    def call(self, x):
        return self.dense(x)


@keras.saving.register_keras_serializable("outrider_tests")
class Subclassed(keras.Model):
    """first: float32 [N, 3], second: float32 [N, 3] -> float32 [N, 3]; the order of its inputs matters."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.dense = layers.Dense(3)

    def build(self, first_shape, second_shape) -> None:
        self.dense.build(first_shape)

    def call(self, first, second):
        return self.dense(first) - second
